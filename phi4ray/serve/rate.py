"""How much a second, of late."""

import math

HALF_LIFE_S = 10.0

AGE_S = HALF_LIFE_S / math.log(2)
"""How old, in the mean, what is told of a second is."""

VARIANCE_PER_S = math.log(2) / (2 * HALF_LIFE_S)
"""Amounts that come independently of each other make a rate that varies with this times the sum of
their squares that comes in a second (Campbell's theorem)."""


class Rate:
    """An exponentially weighted rate: each addition counts half after the half-life."""

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        self._half_life_s = half_life_s
        self._sum = 0.0
        self._at: float | None = None

    def _decay(self, now: float) -> None:
        if self._at is not None:
            self._sum *= 0.5 ** (max(0.0, now - self._at) / self._half_life_s)
        self._at = now

    def add(self, amount: float, now: float) -> None:
        """Count an amount at a moment in seconds."""
        self._decay(now)
        self._sum += amount

    def per_s(self, now: float) -> float:
        """What comes in a second."""
        self._decay(now)
        # The integral of the weights over all the past.
        return self._sum * math.log(2) / self._half_life_s
