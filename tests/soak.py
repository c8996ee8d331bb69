"""How long the long tests are: at full length in `make soak`, in CI with one of each event."""

import os
from typing import TypeVar

T = TypeVar("T")


def at_length(short: T, long: T) -> T:
    """`long` with PHI4RAY_SOAK in the environment."""
    return long if "PHI4RAY_SOAK" in os.environ else short
