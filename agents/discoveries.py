"""Which hypotheses of a campaign may be claimed, so that of all claims at most a share `alpha` is false on average.

Online e-BH (Fischer, Xu and Ramdas 2024, arXiv:2407.20683): the t-th registered hypothesis may be claimed when its
e-value reaches 1 / level, where level = alpha * share(t) * (number of claims, with this one). It holds whatever the
dependence between experiments, at any moment one stops. A claim never falls: later hypotheses take nothing from it,
and later claims only lower what the others need, those given up included. e-LOND (Xu and Ramdas 2024) is the same
without this second chance.

Each word has a family of its own: of everything called improved at most `alpha` is false on average, and likewise of
everything called worse, and of everything called equivalent. An experiment of which evidence was given once keeps its
position, whatever becomes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ALPHA = 0.05
"""The share of false ones among the claims of a campaign, on average over campaigns."""

_OFFSET, _POWER = 3.0, 1.6
_TOTAL = math.fsum((t + _OFFSET) ** -_POWER for t in range(1, 10_000)) + (
    (10_000 - 0.5 + _OFFSET) ** (1.0 - _POWER) / (_POWER - 1.0)
)


def share(position: int) -> float:
    """The part of alpha that goes to the hypothesis registered as number `position`, from 1; sums to 1 over all.

    Of ten sequences the one that costs a campaign of 1 to 100 hypotheses the fewest pairs in the worst case
    (docs/evidence.md): a steeper one starves the later hypotheses, a flatter one makes a single one dear.
    """
    if position < 1:
        raise ValueError(f"positions count from 1, not {position}")

    return float((position + _OFFSET) ** -_POWER / _TOTAL)


def level(position: int, claims_before: float, alpha: float = ALPHA) -> float:
    """What the hypothesis at `position` is tested at, after `claims_before` other claims: it needs 1 / level.

    Plans may expect a broken number of claims.
    """
    return alpha * share(position) * (claims_before + 1)


def discoveries(e_values: Sequence[float], alpha: float = ALPHA) -> list[bool]:
    """Which of the hypotheses, in the order of their registration, are claimed given their e-values so far.

    A hypothesis that is claimed keeps the e-value it was claimed with.
    """
    needed = sorted((1.0 / (e * share(t)) if e > 0.0 else math.inf) for t, e in enumerate(e_values, start=1))
    most = max((k for k, needs in enumerate(needed, start=1) if needs <= alpha * k), default=0)
    return [most > 0 and e >= 1.0 / level(t, most - 1, alpha) for t, e in enumerate(e_values, start=1)]
