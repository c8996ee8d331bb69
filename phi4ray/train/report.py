"""The report of a finished fine-tune: one HTML file with its loss curve."""

import math
from collections.abc import Iterable, Sequence

from phi4ray.batch.charts import line_chart
from phi4ray.batch.page import page, shown, table, tiles, versions
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.curve import Point
from phi4ray.train.plan import FinetunePlan

REPORT_NAME = "_report.html"
SMOOTHING = 0.9
"""Weight of what was before in the smoothed loss, an exponential moving mean."""


def render_report(config: FinetuneConfig, plan: FinetunePlan, points: Sequence[Point]) -> str:
    """Render the report. The curve is the whole run's, however often it was interrupted."""
    last = points[-1]
    figures = tiles(
        [
            ("steps", f"{last.steps_total:,}"),
            ("chats", f"{plan.chats:,}"),
            ("refused rows", f"{plan.refused:,}"),
            ("tokens of all chats", f"{plan.tokens:,}"),
            ("of them learned", f"{plan.answer_tokens:,}"),
            ("tokens trained on", f"{last.tokens:,}"),
            ("first loss", f"{points[0].loss:.4f}"),
            ("last loss", f"{last.loss:.4f}"),
        ]
    )
    steps = [float(point.step) for point in points]
    losses = [point.loss for point in points]
    rates = {"rate": [point.learning_rate for point in points]}
    finite = [point for point in points if math.isfinite(point.grad_norm)]
    norms = {"norm": [point.grad_norm for point in finite]}
    both = {"loss": losses, "smoothed": list(smoothed(losses))}
    curves = [
        line_chart("Loss", "nats", steps, both, across="step"),
        line_chart("Learning rate", "", steps, rates, across="step"),
        line_chart("Norm of the gradient", "", [p.step for p in finite], norms, across="step"),
    ]
    settings = config.model_dump(exclude={"lora"} if config.method == "full" else set())
    lines = [
        ("plan", plan.plan_id),
        *((name, shown(name, value)) for name, value in settings.items()),
        ("versions", ", ".join(versions())),
    ]
    return page(
        title=f"phi4ray {plan.plan_id}",
        heading=f"Fine-tune of {config.model}: {plan.chats:,} chats",
        line=config.output,
        body=(
            f'{figures}<h2>Training</h2><div class="charts">{"".join(curves)}</div>'
            f"<h2>Configuration</h2>{table(lines)}"
        ),
    )


def smoothed(values: Iterable[float]) -> Iterable[float]:
    """An exponential moving mean, corrected for its beginning as Adam's moments are.

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980, section 3.
    """
    mean, weight = 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        yield mean / weight
