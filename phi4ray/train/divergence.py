"""A training that has diverged: its loss or its weights are no numbers, and none comes of it."""

import math
from pathlib import Path

from safetensors import safe_open

from phi4ray.errors import DivergedError
from phi4ray.train.curve import Point

ADVICE = (
    "the training has diverged, and would again: give a lower learning_rate, and another output"
)


def check_point(point: Point) -> None:
    """Refuse a point of the curve after which no weight is a number.

    An infinite norm alone is none: the gradient is cut to 0, and the next loss or the weights tell
    if it had infinite elements, of which that makes NaN.

    Raises:
        DivergedError: the loss is no number, or the norm of the gradient is NaN.
    """
    if not math.isfinite(point.loss) or math.isnan(point.grad_norm):
        raise DivergedError(
            f"step {point.step:,} has loss {point.loss} and gradient norm {point.grad_norm}: "
            f"{ADVICE}"
        )


def has_numbers(folder: Path) -> bool:
    """Whether all weights in a folder are finite; so they are where there are none."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            # One at a time: all of them may be more than fits beside the model.
            if not all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys()):  # noqa: SIM118
                return False
    return True


def broken_weights(step: int) -> DivergedError:
    """What to raise where weights of a step are not numbers."""
    return DivergedError(f"weights after step {step:,} are infinite or NaN: {ADVICE}")
