"""Calibration rows: chosen alike each time, each as likely, and understood or refused by place."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.errors import InputError
from phi4ray.protocol import Json
from phi4ray.train.calibration import choose, read_samples, to_sample

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@given(st.integers(0, 200), st.integers(1, 50), st.integers())
def test_a_choice_has_the_count_keeps_the_order_and_repeats(
    rows: int, count: int, seed: int
) -> None:
    chosen = choose(range(rows), count, seed)
    assert len(chosen) == min(rows, count)
    assert chosen == sorted(set(chosen))
    assert chosen == choose(range(rows), count, seed)


def test_every_row_is_about_as_likely_to_be_chosen() -> None:
    seen = Counter(row for seed in range(2000) for row in choose(range(20), 5, seed))
    # 500 expected of each, with a standard deviation of 19.
    assert all(400 < seen[row] < 600 for row in range(20))


@pytest.mark.parametrize(
    ("record", "sample"),
    [
        ({"messages": CHAT, "language": "en"}, {"messages": CHAT}),
        ({"messages": json.dumps(CHAT)}, {"messages": CHAT}),
        ({"prompt": "hi", "completion": "hello"}, {"messages": CHAT}),
        ({"prompt": "hi"}, {"messages": CHAT[:1]}),
        ({"text": "Once upon a time"}, {"text": "Once upon a time"}),
    ],
)
def test_a_row_is_a_chat_or_a_text(record: Json, sample: Json) -> None:
    assert to_sample(record, "row 0") == sample


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"text": ""},
        {"text": 5},
        {"messages": []},
        {"messages": "not json"},
        {"messages": [{"role": "user"}]},
        {"prompt": ["a", "b"]},
    ],
)
def test_a_row_without_text_is_refused_by_its_place(record: Json) -> None:
    with pytest.raises(InputError, match=r"part\.jsonl row 7"):
        to_sample(record, "part.jsonl row 7")


def test_rows_are_read_from_every_format_and_store(prefix: str, tmp_path: Path) -> None:
    from phi4ray.storage import storage_for

    table = pa.table({"prompt": ["from parquet"], "other": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    storage = storage_for(prefix)
    storage.write(f"{prefix}a.parquet", (tmp_path / "a.parquet").read_bytes())
    storage.write(f"{prefix}b.jsonl", b'{"text": "from jsonl"}\n\n{"text": "again"}\n')
    found = read_samples([f"{prefix}*"], 10, 0)
    assert found == [
        {"messages": [{"role": "user", "content": "from parquet"}]},
        {"text": "from jsonl"},
        {"text": "again"},
    ]
    assert len(read_samples([prefix], 2, 0)) == 2


def test_a_broken_line_and_no_rows_are_errors(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"broken\.jsonl row 1"):
        read_samples([str(tmp_path / "broken.jsonl")], 10, 0)
    with pytest.raises(InputError, match="no rows to calibrate on"):
        read_samples([str(tmp_path / "empty.jsonl")], 10, 0)
