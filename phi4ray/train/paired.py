"""Two models' scores of the same samples, compared: difference, interval, test, verdict. Pure.

Differences are `against - base`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import NormalDist
from typing import Literal

import numpy as np

Verdict = Literal["pass", "fail", "undecided"]

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Paired:
    """A mean difference, the limits of its confidence interval, and a two-sided p-value.

    In the unit of the scores. `gained` and `lost` count the samples that got better and worse.
    """

    samples: int
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    gained: int
    lost: int

    def scaled(self, factor: float) -> "Paired":
        """In another unit; with a negative factor, of a metric that is better when lower."""
        turned = factor < 0
        limits = sorted((factor * self.low, factor * self.high))
        return replace(
            self,
            difference=factor * self.difference,
            low=limits[0],
            high=limits[1],
            gained=self.lost if turned else self.gained,
            lost=self.gained if turned else self.lost,
        )


def compare(
    base: Sequence[float], against: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Paired:
    """Compare scores sample by sample: McNemar's test where all are 0 or 1, else resampling.

    Raises:
        ValueError: the sequences are empty or of different lengths.
    """
    if not base or len(base) != len(against):
        raise ValueError(f"{len(base)} and {len(against)} scores cannot be paired")
    if set(base) | set(against) <= {0.0, 1.0}:
        return _of_proportions(base, against, confidence)
    return _of_means(np.asarray(base, float), np.asarray(against, float), confidence, seed)


def verdict(low: float, high: float, bound: float) -> Verdict:
    """Whether the loss is below a bound, as far as the difference's interval tells.

    `pass` if even the largest loss in the interval is below it (non-inferiority), `fail` if even
    the smallest is above; anything between needs more samples.
    """
    if -low < bound:
        return "pass"
    return "fail" if -high > bound else "undecided"


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact p-value: changes are as likely to gain as to lose, Binomial(n, 1/2).

    Source: McNemar (1947), Psychometrika 12, 153-157, in its exact form: twice the smaller tail.
    """
    changed = gained + lost
    tail = term = 1
    for k in range(min(gained, lost)):
        term = term * (changed - k) // (k + 1)
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**changed)))


def proportion_interval(
    gained: int, lost: int, samples: int, confidence: float
) -> tuple[float, float]:
    """Interval of the difference of two paired proportions: Wald's after half a sample a cell.

    It has width even if nothing changed, as it must: a few samples prove little.
    Source: Agresti and Min (2005), Statistics in Medicine 24, 729-740.
    """
    up, down, n = gained + 0.5, lost + 0.5, samples + 2
    centre = (up - down) / n
    spread = math.sqrt(max(0.0, up + down - (up - down) ** 2 / n)) / n
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * spread
    return max(-1.0, centre - reach), min(1.0, centre + reach)


def _of_proportions(base: Sequence[float], against: Sequence[float], confidence: float) -> Paired:
    gained = sum(b < a for b, a in zip(base, against, strict=True))
    lost = sum(b > a for b, a in zip(base, against, strict=True))
    n = len(base)
    low, high = proportion_interval(gained, lost, n, confidence)
    return Paired(
        samples=n,
        difference=(gained - lost) / n,
        low=low,
        high=high,
        p_value=mcnemar_p(gained, lost),
        test="McNemar exact",
        gained=gained,
        lost=lost,
    )


def _of_means(base: np.ndarray, against: np.ndarray, confidence: float, seed: int) -> Paired:
    """Percentile bootstrap of the mean difference, and a test that flips signs at random.

    Sources: Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapters 13 and 15;
    the counted p-value as Phipson and Smyth (2010), doi:10.2202/1544-6115.1585.
    """
    differences = against - base
    n, observed = len(differences), float(differences.mean())
    random = np.random.default_rng(seed)
    means, flipped = np.empty(RESAMPLES), np.empty(RESAMPLES)
    for i in range(RESAMPLES):  # one at a time: all at once would take n * RESAMPLES numbers
        means[i] = differences[random.integers(0, n, n)].mean()
        flipped[i] = (differences * random.choice((-1.0, 1.0), n)).mean()
    tail = (1 - confidence) / 2
    low, high = (float(limit) for limit in np.quantile(means, (tail, 1 - tail)))
    # As extreme, or the same but for rounding.
    extreme = int((np.abs(flipped) >= abs(observed) * (1 - 1e-12)).sum())
    p_value = (extreme + 1) / (RESAMPLES + 1)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return Paired(n, observed, low, high, p_value, "paired bootstrap", gained, lost)
