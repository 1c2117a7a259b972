"""Whether the disk can hold what a run writes, asked when it is queued; the runner asks again before it claims."""

from __future__ import annotations

import shutil

from db.lab import Lab
from db.weights import SPARE_BYTES, as_size
from moe.accounting import disk_bytes
from moe.config import Config


def disk_problem(lab: Lab, config: Config) -> str | None:
    """Why a run of `config` could never be written, whatever is deleted; None when it could."""
    need, cap = disk_bytes(config), lab.settings.runner.max_disk_gib
    if cap is not None and need > cap * 2**30:
        return f"a run writes up to {as_size(need)} to disk, over max_disk_gib = {cap:g} (under [runner])"

    total = shutil.disk_usage(lab.runs_folder).total
    return f"a run writes up to {as_size(need)}, and the whole disk has {as_size(total)}" if need > total else None


def disk_note(lab: Lab, config: Config) -> str | None:
    """What is worth saying when there is too little room now; the run then waits for it."""
    need, free = disk_bytes(config) + SPARE_BYTES, shutil.disk_usage(lab.runs_folder).free
    if need <= free:
        return None

    return (
        f"disk: {as_size(free)} free of the {as_size(need)} that a run needs; until there is more, nothing is claimed "
        "(blueberry clean shows what may go)"
    )
