"""Which micro-batches a card has held and which it has not, by hardware class and model.

What ran out of memory is remembered for a while only: it may have been another program's doing, and to ask again costs
one attempt. A later success at the same size proves it wrong at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from db.clock import utc_now
from db.events import add_event
from db.records import Attempt
from db.store import Store

REMEMBERED_DAYS = 14


@dataclass(frozen=True, kw_only=True)
class KnownFit:
    """The largest micro-batch that a run was completed with, and the smallest that ran out of memory since."""

    fits: int | None = None
    fails: int | None = None

    @property
    def most(self) -> int | None:
        """The largest worth trying: half of what failed, or what is known to fit; None: nothing has failed."""
        if self.fails is None:
            return None

        return max(self.fails // 2, self.fits or 0)

    @property
    def note(self) -> str:
        """What failed, to be appended to a sentence."""
        return f"; {self.fails} ran out of memory on this card" if self.fails is not None else ""


def known_fit(store: Store, hardware_class: str, model: str) -> KnownFit:
    """What is known of a model (moe.accounting.memory_class) on a hardware class."""
    since = (datetime.now(UTC) - timedelta(days=REMEMBERED_DAYS)).isoformat()
    row = store.row(
        """
        SELECT fits, CASE WHEN updated_at >= ? THEN fails END AS fails FROM micro_batches
        WHERE hardware_class = ? AND model = ?
        """,
        (since, hardware_class, model),
    )
    return KnownFit(fits=row["fits"], fails=row["fails"]) if row else KnownFit()


def note_fit(store: Store, hardware_class: str, model: str, size: int) -> None:
    """A run was completed with this micro-batch."""
    known = known_fit(store, hardware_class, model)
    fails = None if known.fails is not None and known.fails <= size else known.fails
    if (known.fits or 0) < size or fails != known.fails:
        _put(store, hardware_class, model, KnownFit(fits=max(known.fits or 0, size), fails=fails))


def note_out_of_memory(store: Store, hardware_class: str, model: str, size: int) -> KnownFit:
    """A run with this micro-batch ran out of memory; returns what is known now."""
    known = known_fit(store, hardware_class, model)
    fits = None if known.fits is not None and known.fits >= size else known.fits
    known = KnownFit(fits=fits, fails=min(known.fails or size, size))
    _put(store, hardware_class, model, known)
    return known


def note_attempt(store: Store, attempt: Attempt, size: int, asked: int) -> None:
    """Writes down the micro-batch that an attempt trains with, where its config asked for `asked`."""
    with store.transaction():
        store.execute("UPDATE attempts SET micro_batch_size = ? WHERE id = ?", (size, attempt.id))
        if size != asked:
            message = (
                f"run {attempt.run_id} is refitted to the card: micro-batches of {size} sequences instead of {asked}, "
                "the gradients are the same"
            )
            add_event(store, "refitted", message, run_id=attempt.run_id)


def _put(store: Store, hardware_class: str, model: str, known: KnownFit) -> None:
    store.execute(
        """
        INSERT INTO micro_batches VALUES (?, ?, ?, ?, ?)
        ON CONFLICT (hardware_class, model) DO UPDATE SET
            fits = excluded.fits, fails = excluded.fails, updated_at = excluded.updated_at
        """,
        (hardware_class, model, known.fits, known.fails, utc_now()),
    )
