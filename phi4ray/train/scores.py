"""What an evaluation measured, and its tables. Pure."""

from collections.abc import Iterable, Mapping, Sequence
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
    for key in base:
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


def score_table(report: Report) -> str:
    """The models' scores in lm-eval's table, side by side, as Markdown."""
    values = ["Value", "", "Stderr"]
    heads = ["Tasks", "Version", "Filter", "n-shot", "Metric", ""]
    if report.against is None:
        return markdown_table(
            heads + values, [_line(score) + _value(score) for score in report.base.scores]
        )
    others = {score.key: score for score in report.against.scores}
    heads += ["Base", "", "Stderr", "Against", "", "Stderr"]
    rows = [_line(one) + _value(one) + _value(others.get(one.key)) for one in report.base.scores]
    return markdown_table(heads, rows)


def comparison_table(report: Report) -> str:
    """The paired comparisons as Markdown; differences in points."""
    heads = ["Tasks", "Filter", "Metric", "Samples", "Gained", "Lost", "Difference"]
    heads += [f"{report.confidence:.0%} interval", "p", "Test", "Verdict"]
    rows = [
        [
            one.task,
            one.filter,
            one.metric,
            f"{one.samples:,}",
            f"{one.gained:,}",
            f"{one.lost:,}",
            f"{one.difference:+.2f}",
            f"{one.low:+.2f} to {one.high:+.2f}",
            f"{one.p_value:.3g}",
            one.test,
            one.verdict,
        ]
        for one in report.comparisons
    ]
    return markdown_table(heads, rows)


def verdict_line(report: Report) -> str:
    """What the comparisons come to, in one sentence."""
    bound = f"{report.bound_points:g} points"
    match report.verdict:
        case "pass":
            return f"pass: the loss is below {bound} on every task"
        case "fail":
            return f"fail: the loss is above {bound} on at least one task"
        case "undecided":
            return f"undecided: these samples cannot tell whether the loss is below {bound}"
        case _:
            return "nothing was compared"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up; figures are to the right."""
    lines = [list(row) for row in rows]
    columns = list(zip(heads, *lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(_is_figure(cell) for cell in column[1:] if cell) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return f"|{'|'.join(padded)}|"

    rule = [
        "-" * (width - 1) + ":" if to_right else "-" * width
        for width, to_right in zip(widths, right, strict=True)
    ]
    return "\n".join([line(heads), line(rule), *map(line, lines)])


def _line(score: Score) -> list[str]:
    arrow = {True: "↑", False: "↓", None: ""}[score.higher_is_better]
    task = f"{' ' * score.depth}- {score.task}" if score.depth else score.task
    return [task, score.version, score.filter, score.n_shot, score.metric, arrow]


def _value(score: Score | None) -> list[str]:
    if score is None or score.value is None:
        return ["", "", ""]
    if score.stderr is None:
        return [f"{score.value:.4f}", "", ""]
    return [f"{score.value:.4f}", "±", f"{score.stderr:.4f}"]


def _is_figure(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").lstrip("+-").isdigit()
