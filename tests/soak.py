"""How long the long tests are: `make soak` has them at full length, CI each thing that can happen."""

import os
from typing import TypeVar

T = TypeVar("T")


def at_length(short: T, long: T) -> T:
    """`long` with PHI4RAY_SOAK in the environment."""
    return long if "PHI4RAY_SOAK" in os.environ else short
