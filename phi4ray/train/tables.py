"""An evaluation's report as Markdown: lm-eval's table, for two models, and the verdict. Pure."""

from collections.abc import Iterable, Sequence

from phi4ray.train.scores import Report, Score


def render(report: Report) -> str:
    """The report as Markdown: scores side by side, comparisons, verdict, settings."""
    parts = [score_table(report)]
    if report.against is not None:
        parts.append(f"Base: {report.base.model}\nAgainst: {report.against.model}")
        parts += [comparison_table(report), verdict_line(report)]
    parts.append("\n".join(f"* {name}: {text}" for name, text in report.settings.items()))
    return "\n\n".join(parts) + "\n"


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
