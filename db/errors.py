"""The one error base whose text a user or a chat model sees; everything else is a bug and stays a traceback."""

from __future__ import annotations


class LabError(Exception):
    """Something the user can act on. The message says what is wrong and what to do next."""


class NotFoundError(LabError):
    """A row that was asked for by id is not in the lab."""

    def __init__(self, what: str, key: object, known: str = "") -> None:
        super().__init__(f"there is no {what} {key}" + (f"; {known}" if known else ""))


class RefusedError(LabError):
    """A request that contradicts the state of the lab or its limits; nothing was changed."""


class SettingsError(LabError):
    """A configuration that cannot be used: names the key, the file or variable, and the bound."""


class LabUnusableError(LabError):
    """The lab's folder or database cannot be read or written: missing rights, full disk, damaged or newer file."""


class NewerLabError(LabUnusableError):
    """The database was written by a newer Blueberry than this one. Raised by db.store."""


class FencedError(Exception):
    """A write by a runner that no longer holds the attempt. Raised by db.queue; the runner lets go of the attempt."""
