"""What an evaluation measured, and how two models' samples compare. Pure."""

from collections.abc import Mapping
from dataclasses import asdict

from phi4ray.config import Config
from phi4ray.errors import InputError
from phi4ray.train.paired import Verdict, compare, verdict

POINTS = 100.0
"""A share of 1 in points."""

Samples = Mapping[str, Mapping[str, float]]
"""Score of each sample by its id, for each `task,metric,filter` that is compared."""


class Score(Config):
    """One line of lm-eval's table. `task` is indented below its group by `depth`."""

    task: str
    version: str
    filter: str
    n_shot: str
    metric: str
    higher_is_better: bool | None
    value: float | None
    stderr: float | None
    depth: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """What the line of another model must have to be the same line."""
        return self.task, self.filter, self.metric


class Measured(Config):
    """One model's scores. `samples` says how many documents each task had."""

    model: str
    scores: tuple[Score, ...]
    samples: Mapping[str, int]
    seconds: float


class Comparison(Config):
    """A task's paired comparison; all but `p_value` and the counts in points (of 100).

    `difference` is against - base in the direction that is better, with its confidence limits.
    """

    task: str
    filter: str
    metric: str
    samples: int
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    gained: int
    lost: int
    verdict: Verdict


class Report(Config):
    """An evaluation: what was asked of whom, what came out, and whether the loss is in bounds."""

    base: Measured
    against: Measured | None = None
    comparisons: tuple[Comparison, ...] = ()
    bound_points: float
    confidence: float
    settings: Mapping[str, str]
    """What decides the figures, as text: tasks, chat template, temperature, versions."""

    @property
    def verdict(self) -> Verdict | None:
        """The worst of the comparisons; None without any."""
        found = {comparison.verdict for comparison in self.comparisons}
        return next((one for one in ("fail", "undecided", "pass") if one in found), None)


def compare_samples(
    base: Samples,
    against: Samples,
    higher_is_better: Mapping[str, bool],
    *,
    bound_points: float,
    confidence: float,
    seed: int = 0,
) -> tuple[Comparison, ...]:
    """Compare two models on every `task,metric,filter` that both were scored on.

    Raises:
        InputError: they did not answer the same samples.
    """
    found = []
    for key in sorted(base):
        task, metric, name = key.rsplit(",", 2)
        ours, theirs = base[key], against.get(key, {})
        if ours.keys() != theirs.keys():
            raise InputError(
                f"{key}: the models answered {len(ours)} and {len(theirs)} samples, not the same "
                "ones: evaluate both with the same data and limit"
            )
        paired = compare(
            list(ours.values()),
            [theirs[sample] for sample in ours],
            confidence=confidence,
            seed=seed,
        ).scaled(POINTS if higher_is_better.get(key, True) else -POINTS)
        found.append(
            Comparison(
                task=task,
                metric=metric,
                filter=name,
                verdict=verdict(paired.low, paired.high, bound_points),
                **asdict(paired),
            )
        )
    return tuple(found)
