"""What ends a run that has gone wrong: numbers that are not finite, exploding gradients, dead routers.

A single spike is clipped and survived; what stays bad for PATIENCE steps in a row is not going to recover, and the GPU
has better things to do.

L layers with experts, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from torch import Tensor

from moe.config import Config

PATIENCE = 50  # steps in a row
EXPLODED = 1000.0  # times the median norm of the last PATIENCE healthy steps


class TrainingError(ArithmeticError):
    """Training went wrong at `step`; `code` is what error.json calls it."""

    code = "training"

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} at step {step}")
        self.step = step


class NonFiniteError(TrainingError):
    """A loss, gradient or weight is not a number."""

    code = "non_finite"


class ExplodingGradientError(TrainingError):
    """The gradient's norm has stayed far above what it was."""

    code = "exploding_gradient"


class DeadRouterError(TrainingError):
    """A layer has sent every token to the same experts."""

    code = "dead_router"


class Watch:
    """Looks at each step. Its state is part of a checkpoint, so that a resumed run ends where an unbroken one would."""

    def __init__(self, config: Config) -> None:
        self.top_k = config.top_k
        self.routes = config.routing == "token_choice" and config.num_experts > config.top_k
        self.norms: deque[float] = deque(maxlen=PATIENCE)
        self.exploded = 0
        self.dead = 0

    def look(self, step: int, norm: float, load_LE: Tensor) -> None:
        """Take in one step: the gradient's norm before clipping and the load of its whole batch.

        Raises:
            ExplodingGradientError, DeadRouterError: for PATIENCE steps in a row.
        """
        typical = median(self.norms) if len(self.norms) == PATIENCE else norm
        self.exploded = self.exploded + 1 if norm > EXPLODED * typical else 0
        if self.exploded == 0:
            self.norms.append(norm)

        if self.exploded >= PATIENCE:
            raise ExplodingGradientError(
                f"gradient norm {norm:.2g}, over {EXPLODED:.0f} times the usual {typical:.2g} for {PATIENCE} steps,",
                step,
            )

        used_L = (load_LE > 0).sum(dim=1)
        self.dead = self.dead + 1 if self.routes and int(used_L.min()) <= self.top_k else 0
        if self.dead >= PATIENCE:
            raise DeadRouterError(
                f"layer {int(used_L.argmin())} of those with experts sent all tokens to {int(used_L.min())} experts "
                f"for {PATIENCE} steps,",
                step,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "exploded": self.exploded, "dead": self.dead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norms = deque(state["norms"], maxlen=PATIENCE)
        self.exploded, self.dead = state["exploded"], state["dead"]
