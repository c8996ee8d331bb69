"""What may be in a body before any layer decodes it. Pure."""

import json
from typing import Any

from phi4ray.protocol import Json

DEEPEST_JSON = 128
"""Levels of arrays and objects in a body: more than any request has, and so few that no layer
behind this one, which may recurse on it, meets Python's limit of 1,000 frames."""


class BodyError(Exception):
    """A body that no layer behind this one should see."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)


def json_object(body: bytes) -> Json | None:
    """The JSON object that a body is; None: it is none.

    Raises:
        BodyError: it is nested too deeply.
    """
    too_deep = BodyError(400, "invalid_json", f"a body may be nested {DEEPEST_JSON} levels deep")
    try:
        value = json.loads(body)
    except ValueError:
        return None  # vLLM words that refusal
    except RecursionError:
        raise too_deep from None
    # Counting costs next to nothing, and spares nearly every request the walk.
    if body.count(b"[") + body.count(b"{") > DEEPEST_JSON and _deeper(value, DEEPEST_JSON):
        raise too_deep
    return value if isinstance(value, dict) else None


def _deeper(value: Any, levels: int) -> bool:
    """Whether arrays and objects lie in each other more than so many deep."""
    inside = [value]
    for _ in range(levels + 1):
        inside = [one for one in inside if isinstance(one, dict | list)]
        if not inside:
            return False
        inside = [
            child for one in inside for child in (one.values() if isinstance(one, dict) else one)
        ]
    return True
