"""What fuzz tests share: broken text, JSON that is nearly right, and how long to look."""

import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = 12
"""With HYPOTHESIS_PROFILE=long, so many times the examples."""


def budget(examples: int) -> settings:
    many = os.environ.get("HYPOTHESIS_PROFILE") == "long"
    return settings(
        max_examples=examples * (LONG if many else 1),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0]),
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["\x00", "\ufeff", "\ud800", "a\udfffb", "\u2028", "ß" * 2000, "[]", '{"a":1}']
    ),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


def near(valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects like a valid one, with members changed, left out or added."""
    changed = st.dictionaries(st.sampled_from(sorted(valid)) | texts, values, max_size=3)
    dropped = st.sets(st.sampled_from(sorted(valid)), max_size=2)
    return st.builds(
        lambda more, less: {k: v for k, v in {**valid, **more}.items() if k not in less},
        changed,
        dropped,
    )


def dumped(value: Any, *, ascii_only: bool = True) -> bytes:
    """JSON as careless writers make it: NaN and Infinity, and surrogates alone."""
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


deep = st.builds(
    lambda levels, kind: {
        "list": b"[" * levels + b"]" * levels,
        "object": b'{"a":' * levels + b"1" + b"}" * levels,
        "open": b"[" * levels,
    }[kind],
    st.sampled_from([100, 199, 200, 201, 1000, 100_000]),
    st.sampled_from(["list", "object", "open"]),
)

broken_texts = st.one_of(
    st.binary(max_size=40),
    deep,
    st.builds(lambda digits: b'{"prompt": "x", "n": ' + b"9" * digits + b"}", st.integers(1, 6000)),
    st.sampled_from(
        [
            b'{"prompt": "x", "prompt": null}',
            b'{"prompt": "a\x00b"}',
            b'{"prompt": "\\ud800"}',
            b'{"prompt": "\xed\xa0\x80"}',
            b'{"prompt": "x", "m": NaN}',
            b'{"prompt": "x", "m": -Infinity}',
            b'{"prompt": "x", "m": 1e999}',
            b'{"": 1, "prompt": "x"}',
            b'\xef\xbb\xbf{"prompt": "x"}',
            b'\xff\xfe{\x00"\x00',
            b'{"prompt": "x"}{"prompt": "y"}',
            b'{"prompt": "x",}',
            b"{'prompt': 'x'}",
            b"null",
            b'"x"',
        ]
    ),
)
"""What stands in files that are said to hold JSON."""


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """A file that was cut off, or has some of its bytes changed."""
    places = st.integers(0, max(0, len(data) - 1))
    changes = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)

    def change(spots: list[tuple[int, int]]) -> bytes:
        copy = bytearray(data)
        for at, byte in spots:
            copy[at] = byte
        return bytes(copy)

    return changes.map(change) | places.map(lambda end: data[:end])
