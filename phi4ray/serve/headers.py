"""What headers say of a request, and what ours say of limits. Pure."""

import contextlib
import math
from collections.abc import Mapping

from starlette.types import Scope

from phi4ray.serve.limits import Remaining

FORM = b"application/x-www-form-urlencoded"
PRIORITY = b"x-vllm-priority"
"""For vLLM it is before the body's `priority`."""


def key_of(headers: Mapping[bytes, bytes]) -> str | None:
    """The key that a client presents, as OpenAI's clients do, or as Anthropic's."""
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip() or None


def is_preflight(scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser asks what a page may ask: it sends no key with that (Fetch standard)."""
    return (
        scope["method"] == "OPTIONS"
        and b"origin" in headers
        and b"access-control-request-method" in headers
    )


def is_form(scope: Scope) -> bool:
    """Whether the application may read fields from a body in another way than as JSON.

    Every header counts: which of several is the content type, each layer has its own opinion.
    """
    kinds = (
        value.partition(b";")[0].strip().lower()
        for name, value in scope["headers"]
        if name == b"content-type"
    )
    return any(kind.startswith(b"multipart/") or kind == FORM for kind in kinds)


def priorities_of(scope: Scope) -> list[int]:
    """What a request's headers say of its priority; vLLM passes over what is no integer.

    Every header counts, as in `is_form`.
    """
    found = []
    for name, value in scope["headers"]:
        if name == PRIORITY:
            with contextlib.suppress(ValueError):
                found.append(int(value.decode("latin-1")))
    return found


def rate_limits(remaining: Remaining) -> dict[str, str]:
    """OpenAI's `x-ratelimit-` headers; resets are seconds until the limit is whole again."""
    found = {}
    for name, pair in (("requests", remaining.requests), ("tokens", remaining.tokens)):
        if pair is not None:
            limit, left = pair
            found[f"x-ratelimit-limit-{name}"] = f"{limit:.0f}"
            found[f"x-ratelimit-remaining-{name}"] = str(math.floor(left))
            found[f"x-ratelimit-reset-{name}"] = f"{(limit - left) * 60 / limit:.1f}s"
    return found
