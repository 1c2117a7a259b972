"""A lab: one folder that holds all of a user's research.

lab.db  blueberry.toml  .env  domains/  runs/  data/  logs/  locks/  backups/
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from db.errors import LabUnusableError
from db.settings import OpenRouter, Settings, load_openrouter, load_settings
from db.store import Store


class Lab:
    """One lab's folder, configuration and database. Threads may share a Lab: each gets a connection of its own."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Opens the lab, making the folder when it is new.

        Args:
            read_only: the database is only read, and may be a newer Blueberry's: columns are added, and never change.

        Raises:
            LabUnusableError: the folder cannot be made or written.
            SettingsError: the configuration cannot be used.
        """
        self.folder = folder.expanduser().absolute()
        self.read_only = read_only
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("runs", "data", "logs", "locks", "domains"):
                (self.folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise LabUnusableError(
                f"the lab {self.folder} cannot be used: {error.strerror}; "
                "make the folder writable, or name another with --lab or BLUEBERRY_LAB"
            ) from None

        self.settings: Settings = load_settings(self.folder)
        self._local = threading.local()

    def reload(self) -> list[str]:
        """Reads the configuration anew; returns what has changed, such as "runner.max_failures 2 -> 3".

        Raises:
            SettingsError: it cannot be used; the former one stays.
        """
        settings = load_settings(self.folder)
        before, after = _flat(self.settings.model_dump()), _flat(settings.model_dump())
        self.settings = settings
        names = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
        return [f"{name} {before.get(name)} -> {after.get(name)}" for name in names]

    @property
    def store(self) -> Store:
        """This thread's connection to the database."""
        store: Store | None = getattr(self._local, "store", None)
        if store is None:
            store = self._local.store = Store(self.folder / "lab.db", read_only=self.read_only)

        return store

    def close(self) -> None:
        """Closes this thread's connection."""
        store: Store | None = getattr(self._local, "store", None)
        if store is not None:
            store.close()
            self._local.store = None

    @cached_property
    def openrouter(self) -> OpenRouter:
        """Access to OpenRouter, read once."""
        return load_openrouter(self.folder)

    @property
    def runs_folder(self) -> Path:
        """One folder an attempt."""
        return self.folder / "runs"

    @property
    def data_folder(self) -> Path:
        """Tokenized corpora."""
        return self.folder / "data"

    @property
    def domains_folder(self) -> Path:
        """The user's own research domains."""
        return self.folder / "domains"

    def log(self, name: str) -> Path:
        """The log file of one of our processes."""
        return self.folder / "logs" / f"{name}.log"

    def lock(self, name: str) -> Path:
        """The lock file of that name."""
        return lock_file(self.folder, name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}

    return flat


def lock_file(folder: Path, name: str) -> Path:
    """The lock file of that name in the lab in `folder`."""
    return folder / "locks" / f"{name}.lock"


def lab_folder(named: str | None) -> Path:
    """The folder that `--lab` names, otherwise BLUEBERRY_LAB, otherwise ~/.blueberry."""
    return Path(named or os.environ.get("BLUEBERRY_LAB") or "~/.blueberry").expanduser().absolute()
