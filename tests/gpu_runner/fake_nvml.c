/* A libnvidia-ml.so.1 for tests: up to four cards whose state is read, at each call, from the file that FAKE_NVML names.

   Lines of `name value`, or `name@1 value` for the second card alone: count, kind (1: an L4), init and error (codes), hang (1: never
   return), used, temperature, utilization, milliwatts, millijoules, reasons, ecc (-1: not supported), pid1, pid2 (of
   processes on the card), mig (slices). Compiled with -DOLD it lacks what old drivers do not have. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7
#define MIG 16 /* handles are 1 to 4; of the slices of the first card 17 and 18 */

static const char *UUIDS[] = {"GPU-aaaa", "GPU-bbbb", "GPU-cccc", "GPU-dddd"};

static long long state(const char *wanted, void *handle, long long otherwise) {
    char name[64], particular[64];
    long long value;
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    if (!file) return otherwise;
    snprintf(particular, sizeof particular, "%s@%ld", wanted, (long)handle - 1);
    while (fscanf(file, "%63s %lld", name, &value) == 2)
        if (!strcmp(name, wanted) || (handle && !strcmp(name, particular))) otherwise = value;
    fclose(file);
    return otherwise;
}

static int check(void *handle) {
    while (state("hang", handle, 0)) sleep(1);
    return (int)state("error", handle, 0);
}

static int measure(const char *name, void *handle, long long *value) {
    *value = state(name, handle, 0);
    return *value < 0 ? NOT_SUPPORTED : check(handle);
}

int nvmlInitWithFlags(unsigned flags) { return (int)state("init", 0, 0); }
int nvmlShutdown(void) { return 0; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = (unsigned)state("count", 0, 1);
    return check(0);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(long)(index + 1);
    return check(*handle);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    int slice;
    for (int index = 0; index < 4; index++)
        if (!strcmp(uuid, UUIDS[index])) {
            *handle = (void *)(long)(index + 1);
            return check(*handle);
        }
    if (sscanf(uuid, "MIG-%d", &slice) != 1) return NOT_FOUND;
    *handle = (void *)(long)(MIG + slice);
    return check(*handle);
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length) {
    if ((long)handle > MIG) snprintf(uuid, length, "MIG-%ld", (long)handle - MIG);
    else snprintf(uuid, length, "%s", UUIDS[(long)handle - 1]);
    return check(handle);
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length) {
    const char *whole = state("kind", handle, 0) ? "NVIDIA L4" : "Tesla T4";
    snprintf(name, length, "%s", (long)handle > MIG ? "NVIDIA A100 MIG 1g.5gb" : whole);
    return check(handle);
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    memory[0] = (long)handle > MIG ? 5ull << 30 : 16ull << 30; /* total, free, used */
    memory[2] = (unsigned long long)state("used", handle, 0);
    memory[1] = memory[0] - memory[2];
    return check(handle);
}

int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    if ((long)handle > MIG) return NOT_SUPPORTED;
    rates[0] = (unsigned)state("utilization", handle, 0);
    rates[1] = 0;
    return check(handle);
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    *celsius = (unsigned)state("temperature", handle, 0);
    return check(handle);
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    long long value;
    int code = measure("milliwatts", handle, &value);
    *milliwatts = (unsigned)value;
    return code;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
    return measure("reasons", handle, (long long *)reasons);
}

#ifndef OLD
int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *reasons) {
    return measure("reasons", handle, (long long *)reasons);
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    return measure("millijoules", handle, (long long *)millijoules);
}

int nvmlDeviceGetTotalEccErrors(void *handle, int type, int counter, unsigned long long *errors) {
    return measure("ecc", handle, (long long *)errors);
}

struct process {
    unsigned pid;
    unsigned long long memory;
    unsigned instance, compute_instance;
};

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *processes) {
    unsigned pids[2], found = 0;
    if ((pids[found] = (unsigned)state("pid1", handle, 0))) found++;
    if ((pids[found] = (unsigned)state("pid2", handle, 0))) found++;
    if (*count < found) {
        *count = found;
        return INSUFFICIENT_SIZE;
    }
    *count = found;
    for (unsigned i = 0; i < found; i++) processes[i] = (struct process){.pid = pids[i], .memory = 1ull << 30};
    return check(handle);
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    *current = *pending = state("mig", handle, 0) > 0;
    return check(handle);
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    *count = 7;
    return check(handle);
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **slice) {
    *slice = (void *)(long)(MIG + 1 + index);
    return index < state("mig", handle, 0) ? check(handle) : NOT_FOUND;
}
#endif
