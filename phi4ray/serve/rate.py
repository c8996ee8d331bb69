"""How much a second, of late."""

import math

HALF_LIFE_S = 10.0


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
