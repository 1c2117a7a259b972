"""Numbers for people: no more digits than the noise allows."""

from __future__ import annotations

import pytest

from db.formats import difference, places, span


@pytest.mark.parametrize(
    ("deviation", "value", "decimals"),
    [
        (0.02, -0.1222, 3),
        (0.0019, 0.4, 4),
        (31.0, 52.7, 0),
        (3.1, 52.7, 1),
        (0.02, 412.7, 0),
        (0.0, -0.25, 5),
        (None, -0.1222, 2),
    ],
)
def test_places_are_two_digits_of_the_noise(deviation: float | None, value: float, decimals: int) -> None:
    assert places(deviation, value) == decimals


def test_an_effect_is_written_with_its_interval() -> None:
    assert span(-0.12219, -0.18918, None, 0.02) == "−0.122 [−0.189, +∞]"
    assert span(None, None, None, 0.02) == "–"
    assert difference(52.71, 31.0) == "+53"
