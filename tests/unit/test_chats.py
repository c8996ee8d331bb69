"""Chats are read from three formats, and what is wrong with a row is said with its place."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch.plan import Input
from phi4ray.errors import InputError
from phi4ray.storage import storage_for
from phi4ray.train import chats
from phi4ray.train.chats import Chat, Place, Refused, read_chats, to_chat
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.plan import list_chats
from tests.small_jobs import write_lines, write_parquet

ASKED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
HERE = Place("chats.jsonl", 7)


def read(path: Path) -> list[Chat | Refused]:
    found = storage_for(str(path)).head(str(path))
    return list(read_chats([Input(uri=found.uri, size=found.size, etag=found.etag)]))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    path.write_text("\ufeff" + text.getvalue(), encoding="utf-8", newline="")
    return path


def test_all_formats_hold_the_same_chats(tmp_path: Path) -> None:
    rows = [
        {"prompt": 'a, "b"\nc', "completion": "naïve 🙂", "n": 1},
        {"prompt": "2+2?", "completion": "4", "n": 2},
    ]
    jsonl = read(write_lines(tmp_path / "a.jsonl", rows))
    parquet = read(write_parquet(tmp_path / "a.parquet", pa.Table.from_pylist(rows)))
    table = read(write_csv(tmp_path / "a.csv", rows))
    for found in (jsonl, parquet, table):
        assert [getattr(chat, "messages", chat) for chat in found] == [
            [
                {"role": "user", "content": 'a, "b"\nc'},
                {"role": "assistant", "content": "naïve 🙂"},
            ],
            ASKED,
        ]
    assert [chat.place.row for chat in table] == [0, 1]


def test_tables_in_capitals_are_read_and_files_that_are_no_chats_are_told(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "completion": "4"}
    chats = write_csv(tmp_path / "A.CSV", [row])
    (tmp_path / "b.xlsx").write_bytes(b"")
    told: list[str] = []
    config = FinetuneConfig(input=(str(tmp_path),), output="out", model="tiny")
    inputs = list_chats(config, told.append)
    assert [item.uri for item in inputs] == [str(chats)]
    assert [chat.messages for chat in read_chats(inputs) if isinstance(chat, Chat)] == [ASKED]
    assert f"1 (first: {tmp_path}/b.xlsx)" in told[0]


def test_messages_are_a_list_or_its_json_text(tmp_path: Path) -> None:
    whole = {"messages": ASKED}
    as_text = {"messages": json.dumps(ASKED)}
    found = read(write_lines(tmp_path / "a.jsonl", [whole, as_text]))
    found += read(write_csv(tmp_path / "b.csv", [as_text]))
    found += read(write_parquet(tmp_path / "c.parquet", pa.Table.from_pylist([whole])))
    assert [getattr(chat, "messages", chat) for chat in found] == [ASKED] * 4


def test_a_system_text_comes_first() -> None:
    chat = to_chat(HERE, {"system": "Be brief.", "prompt": "2+2?", "completion": "4"})
    assert chat == Chat(HERE, [{"role": "system", "content": "Be brief."}, *ASKED])
    assert to_chat(HERE, {"system": "", "prompt": "2+2?", "completion": "4"}) == Chat(HERE, ASKED)


@pytest.mark.parametrize(
    ("record", "field", "code"),
    [
        ({"prompt": "a"}, "completion", "missing_field"),
        ({"completion": "a"}, "prompt", "missing_field"),
        ({"prompt": "a", "completion": " \n"}, "completion", "empty_answer"),
        ({"prompt": 5, "completion": "a"}, "prompt", "invalid_type"),
        ({"messages": "{no json"}, "messages", "invalid_json"),
        ({"messages": []}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "unknown_role"),
        ({"messages": ASKED[:1]}, "messages", "no_answer"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0}]}, "messages", "no_answer"),
        (
            {"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]},
            "messages[1].weight",
            "unknown_weight",
        ),
        (
            {"messages": [*ASKED, ASKED[0], {"role": "assistant", "content": ""}]},
            "messages[3].content",
            "empty_answer",
        ),
        (
            {"messages": [ASKED[0], {"role": "assistant", "content": None}]},
            "messages[1].content",
            "invalid_type",
        ),
    ],
)
def test_a_row_that_cannot_be_learned_from_names_its_field(
    record: dict[str, Any], field: str, code: str
) -> None:
    refused = to_chat(HERE, record)
    assert isinstance(refused, Refused)
    assert (refused.place, refused.field, refused.code) == (HERE, field, code)
    assert str(refused).startswith(f"chats.jsonl row 7, {field}: ")


def test_broken_rows_keep_their_numbers(tmp_path: Path) -> None:
    good = {"prompt": "2+2?", "completion": "4"}
    found = read(write_lines(tmp_path / "a.jsonl", [good, b"{broken", b"\xff", good]))
    assert [type(row) for row in found] == [Chat, Refused, Refused, Chat]
    assert [row.place.row for row in found] == [0, 1, 2, 3]
    path = tmp_path / "b.csv"
    path.write_text("prompt,completion\na,b\nonly one\na,b,c\n")
    assert [getattr(row, "code", "chat") for row in read(path)] == [
        "chat",
        "ragged_row",
        "ragged_row",
    ]


def test_a_cell_may_be_as_long_as_a_row(tmp_path: Path) -> None:
    long = "x" * 140_000
    path = write_csv(tmp_path / "a.csv", [{"prompt": long, "completion": "b"}])
    [chat] = read(path)
    assert isinstance(chat, Chat)
    assert chat.messages[0]["content"] == long


@pytest.mark.parametrize(
    "long",
    [
        "x" * 5000,
        "a,b\n" * 1000,
        'she said "x"\n' * 500,
        "x" * 990 + '\n"yyyyyyyyyyyy',
        "ab\n" * 200_000,
    ],
)
def test_a_longer_row_is_refused_with_its_place_and_those_after_it_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: str
) -> None:
    monkeypatch.setattr(chats, "MAX_ROW_BYTES", 1000)
    good = {"prompt": "2+2?", "completion": "4"}
    rows = [good, {"prompt": long, "completion": "b"}, good, {"prompt": "a", "completion": long}]
    found = read(write_csv(tmp_path / "a.csv", [*rows, good]))
    assert [getattr(row, "code", "chat") for row in found] == [
        "chat",
        "row_too_long",
        "chat",
        "row_too_long",
        "chat",
    ]
    assert str(found[1]) == f"{tmp_path}/a.csv row 1, row: the row has more than 1,000 characters"


def test_an_answer_of_weight_0_is_not_to_be_learned() -> None:
    wrong = {"role": "assistant", "content": "5", "weight": 0}
    found = to_chat(HERE, {"messages": [ASKED[0], wrong, ASKED[0], {**ASKED[1], "weight": 1}]})
    plain = {"role": "assistant", "content": "5"}
    assert found == Chat(HERE, [ASKED[0], plain, *ASKED], unlearned=frozenset({1}))
    by_default = to_chat(HERE, {"messages": [ASKED[0], {**ASKED[1], "weight": None}]})
    assert by_default == Chat(HERE, ASKED)


def test_a_table_that_begins_with_its_row_numbers_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",prompt,completion\n0,a,b\n1,c,d\n")  # as pandas writes it
    assert [type(row) for row in read(path)] == [Chat, Chat]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_file_without_the_columns_is_refused_as_a_whole(tmp_path: Path, name: str) -> None:
    rows = [{"question": "2+2?", "answer": "4"}]
    path = tmp_path / name
    if name.endswith("csv"):
        write_csv(path, rows)
    else:
        write_parquet(path, pa.Table.from_pylist(rows))
    with pytest.raises(InputError, match="'prompt' and 'completion'; it has question, answer"):
        read(path)


def test_a_csv_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\na,\xff\n")
    with pytest.raises(InputError, match="not a readable CSV"):
        read(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.sampled_from(["messages", "prompt", "completion", "system"]),
)
def test_no_row_is_an_exception(value: Any, name: str) -> None:
    record = {"prompt": "a", "completion": "b", name: value}
    assert isinstance(to_chat(HERE, record), Chat | Refused)
