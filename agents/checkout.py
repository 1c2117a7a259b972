"""Which commit of this repository holds the moe/ that made a run. Runs are known by a hash of that folder alone.

Other folders may differ: what they do cannot change a score (moe/fingerprint.py).
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path, PurePosixPath

import moe

_FOLDER = Path(moe.__file__).parent


def commit_with(code: str) -> str | None:
    """The newest commit, of any branch, whose moe/ has this hash; None where there is none, or no repository."""
    listed = (_git("log", "--all", "--format=%H") or b"").decode().split()
    trees = _git("cat-file", "--batch-check=%(objectname)", given="".join(f"{commit}:./\n" for commit in listed))
    seen: set[str] = set()
    for commit, tree in zip(listed, (trees or b"").decode().splitlines(), strict=False):
        if tree not in seen and code_at(commit) == code:
            return commit

        seen.add(tree)

    return None


def code_at(commit: str) -> str | None:
    """moe.fingerprint.code_hash() of a commit."""
    archive = _git("archive", "--format=tar", commit, ".")
    if archive is None:
        return None

    digest = hashlib.sha256()
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        paths = {PurePosixPath(name): name for name in files.getnames() if name.endswith(".py")}
        for path in sorted(paths):
            file = files.extractfile(paths[path])
            digest.update(path.as_posix().encode() + b"\0" + (file.read() if file else b"") + b"\0")

    return digest.hexdigest()


def _git(*arguments: str, given: str = "") -> bytes | None:
    # In moe/: paths are those below it. An installed package lies in no repository, or in one that does not track it.
    command = ["git", *arguments]
    try:
        return subprocess.run(command, cwd=_FOLDER, capture_output=True, check=True, input=given.encode()).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
