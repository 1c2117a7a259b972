/* A libnvidia-ml.so.1 for tests: two cards whose state is read, at each call, from the file that FAKE_NVML names.

   Lines of `name value`: count, init (error code), utilization, used, temperature, milliwatts (-1: not supported),
   lost (1: the card has fallen off the bus), hang (1: never return). */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define GPU_IS_LOST 15

static const char *UUIDS[] = {"GPU-aaaa", "GPU-bbbb"};

static long long state(const char *wanted, long long otherwise) {
    char name[64];
    long long value;
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    if (!file) return otherwise;
    while (fscanf(file, "%63s %lld", name, &value) == 2)
        if (!strcmp(name, wanted)) otherwise = value;
    fclose(file);
    return otherwise;
}

static int check(void) {
    while (state("hang", 0)) sleep(1);
    return state("lost", 0) ? GPU_IS_LOST : 0;
}

int nvmlInitWithFlags(unsigned flags) { return (int)state("init", 0); }
int nvmlInit_v2(void) { return (int)state("init", 0); }
int nvmlShutdown(void) { return 0; }

const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "some error"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = (unsigned)state("count", 1);
    return check();
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(long)(index + 1);
    return check();
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    for (int index = 0; index < 2; index++)
        if (!strcmp(uuid, UUIDS[index])) {
            *handle = (void *)(long)(index + 1);
            return check();
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length) {
    snprintf(uuid, length, "%s", UUIDS[(long)handle - 1]);
    return check();
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length) {
    snprintf(name, length, "Tesla T4");
    return check();
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    memory[0] = 16ull << 30; /* total, free, used */
    memory[2] = (unsigned long long)state("used", 0);
    memory[1] = memory[0] - memory[2];
    return check();
}

int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    rates[0] = (unsigned)state("utilization", 0);
    rates[1] = 0;
    return check();
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    *celsius = (unsigned)state("temperature", 0);
    return check();
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    long long value = state("milliwatts", 0);
    *milliwatts = (unsigned)value;
    return value < 0 ? NOT_SUPPORTED : check();
}
