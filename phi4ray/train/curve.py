"""The loss curve: its points, while they come and as they are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter

HISTORY_NAME = "_history.json"


@dataclass(frozen=True, slots=True)
class Point:
    """Means over the steps since the point before; `loss` is nats a learned token.

    `tokens` are all that were taken in since the first step, without padding.
    """

    step: int
    steps_total: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int

    @classmethod
    def of_log(cls, log: Mapping[str, Any], steps_total: int) -> "Point":
        """Take it from an entry of transformers' `TrainerState.log_history`."""
        return cls(
            step=int(log["step"]),
            steps_total=steps_total,
            loss=float(log["loss"]),
            learning_rate=float(log.get("learning_rate", 0.0)),
            grad_norm=float(log.get("grad_norm") or 0.0),
            tokens=int(log.get("num_input_tokens_seen", 0)),
        )


# A norm may be infinite, which is `Infinity` then, as Python's json has it, and not null.
_HISTORY = TypeAdapter(list[Point], config=ConfigDict(ser_json_inf_nan="constants"))


def encode_history(points: Sequence[Point]) -> bytes:
    """Write a curve as JSON."""
    return _HISTORY.dump_json(list(points), indent=1)


def decode_history(data: bytes) -> list[Point]:
    """Read what `encode_history` wrote."""
    return _HISTORY.validate_json(data)
