"""The tree of champions: a path from a root to each, and the best of those that grew from one root."""

from __future__ import annotations

from collections.abc import Sequence

from db.records import Champion
from moe.config import Config, ConfigError, scientific


def path_of(champions: Sequence[Champion], champion: Champion) -> list[Champion]:
    """From the root to a champion, both included."""
    by_id = {item.id: item for item in champions}
    path = [champion]
    while path[0].parent_id is not None:
        path.insert(0, by_id[path[0].parent_id])

    return path


def best_from(champions: Sequence[Champion], root: Config) -> Champion | None:
    """The champion with the largest expected gain along its path from this config; None while nothing was confirmed."""
    grown = [
        item for item in champions if item.experiment_id is not None and is_config(path_of(champions, item)[0], root)
    ]
    return max(grown, key=lambda item: (item.gain, -item.id), default=None)


def is_config(champion: Champion, config: Config) -> bool:
    """Whether a champion's config trains to the same as this one; False where it is of other knobs than today's."""
    try:
        return scientific(Config.model_validate(champion.config)) == scientific(config)
    except (ConfigError, ValueError):
        return False
