"""What a runner has to say beside its card: each part by a name, together the message of its row."""

from __future__ import annotations

import logging

from db.runners import beat_runner
from db.store import Store

_LOG = logging.getLogger(__name__)


class Notices:
    """The runner's message: how its card was chosen, then what stands in its way at the moment."""

    def __init__(self, store: Store, runner_id: int, about_card: str) -> None:
        self._store = store
        self._runner_id = runner_id
        self._about_card = about_card
        self._texts: dict[str, str] = {}

    def put(self, name: str, text: str | None) -> None:
        """Says `text` under this name from now on, or nothing; a change is written down and logged once."""
        if text == self._texts.get(name):
            return

        texts = {key: value for key, value in self._texts.items() if key != name}
        if text is not None:
            texts[name] = text

        beat_runner(self._store, self._runner_id, message="; ".join([self._about_card, *texts.values()]))
        self._texts = texts
        if text is None:
            _LOG.info("no more: %s", name)
        else:
            _LOG.warning("%s", text)
