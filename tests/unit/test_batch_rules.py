"""The Batch API's rules, which need no server: states, ids, lines, forms, windows."""

import io
import json
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batches import states
from phi4ray.batches.config import BatchesConfig, window_s
from phi4ray.batches.job import next_step
from phi4ray.batches.records import (
    BATCH_ID,
    ENDED,
    FILE_ID,
    BatchRequest,
    BatchState,
    LineError,
    age_s,
    is_result,
    new_batch_id,
    new_file_id,
    result_file_id,
    shown_batch,
)
from phi4ray.batches.store import Key, owner_of
from phi4ray.batches.turns import turns
from phi4ray.batches.upload import FormError, UploadForm
from phi4ray.batches.validation import MAX_ERRORS, check, lines_of
from phi4ray.errors import ConfigError
from phi4ray.serve.config import serve_config
from tests.batch_service import CHAT, jsonl, line

REQUEST = BatchRequest(
    id=new_batch_id(1000.0), endpoint=CHAT, input_file_id=new_file_id(1000.0),
    completion_window="24h", created_at=1000, expires_at=2000,
)  # fmt: skip

# States


@st.composite
def lives(draw: st.DrawFn) -> list[BatchState]:
    """Every state of a batch's life, whatever its client and the clock do, with many restarts."""
    now_s, cancel_at = 1000.0, None
    life = [BatchState()]
    bad_file = draw(st.booleans())
    while not life[-1].ended:
        now_s += draw(st.sampled_from([0.5, 10.0, 700.0]))
        if cancel_at is None and draw(st.integers(0, 5)) == 5:
            cancel_at = int(now_s)
        state = states.looked_at(life[-1], REQUEST, cancel_at, now_s)
        match next_step(state):
            case "validate" if bad_file:
                state = states.cancelled(state, cancel_at)
                state = states.failed(state, [LineError(code="c", message="m")], now_s)
            case "validate":
                state = states.validated(state, 10, now_s)
            case "answer" | "stop" if draw(st.booleans()):
                done = draw(st.integers(0, 10))
                state = states.counted(state, done, 10 - done)
            case "answer" | "stop":
                state = states.finalizing(state, now_s)
                if not draw(st.booleans()):
                    state = states.ended(states.cancelled(state, cancel_at), "o", None, now_s)
        life.append(state)
    if cancel_at is not None:
        assert life[-1].stop is not None  # and never completed
    return life


@given(lives())
def test_a_batch_goes_only_forward_and_says_when(life: list[BatchState]) -> None:
    order = ["validating", "in_progress", "cancelling", "finalizing", *ENDED]
    seen = [order.index(state.status) for state in life]
    assert all(a <= b or {order[a], order[b]} <= ENDED for a, b in pairwise(seen))
    last = life[-1]
    assert last.status in ENDED
    ends = [at for at in ENDED if getattr(last, f"{at}_at") is not None]
    assert ends == [last.status]
    if last.status != "failed":
        assert last.total == (10 if last.validated else 0)
        assert {None: "completed", "batch_cancelled": "cancelled", "batch_expired": "expired"}[
            last.stop
        ] == last.status
    stops = [state.stop for state in life if state.stop is not None]
    assert len(set(stops)) <= 1
    for before, now in pairwise(life):  # no time is ever taken back
        for name in BatchState.model_fields:
            if name.endswith("_at") and getattr(before, name) is not None:
                assert getattr(now, name) == getattr(before, name)


def test_what_is_finalizing_is_neither_cancelled_nor_expired() -> None:
    state = states.finalizing(states.validated(BatchState(), 1, 1001), 1002)
    assert states.looked_at(state, REQUEST, 1003, 9999) == state


def test_a_batch_that_is_to_be_cancelled_shows_so_before_its_runner_knows() -> None:
    shown = shown_batch(REQUEST, BatchState(), 1234, "m")
    assert (shown["status"], shown["cancelling_at"]) == ("cancelling", 1234)
    finalizing = BatchState(status="finalizing")
    assert shown_batch(REQUEST, finalizing, 1234, "m")["status"] == "finalizing"


# Turns


def key(name: str) -> Key:
    """Of the owner that its letter says; its number says when it was made."""
    return Key(name[0], name)


@pytest.mark.parametrize(
    ("waiting", "working", "room", "leaving", "begin", "leave"),
    [
        ("a1 a2 a3 a4 b5", "", 4, 0, "a1 b5 a2 a3", ""),
        ("a3 a4 b5", "a1 a2", 1, 0, "b5", ""),
        ("a3 b5 b6", "a1 a2", 0, 0, "", "a2"),
        ("a3 b5 b6", "a1", 0, 1, "", ""),
        ("b5 c6 d7", "a1 a2 a3", 0, 0, "", "a3 a2"),
        ("c5", "a1 b2 b3 a4", 0, 0, "", "a4"),
        ("c5", "a1 b2", 0, 0, "", ""),
        ("a5 a6", "a1 a2", 0, 0, "", ""),
        ("c5 d6", "", 0, 1, "", ""),
        ("a5", "b1", -1, 0, "", ""),
    ],
)
def test_owners_take_turns(
    waiting: str, working: str, room: int, leaving: int, begin: str, leave: str
) -> None:
    found = turns([*map(key, waiting.split())], [*map(key, working.split())], room, leaving)
    assert [" ".join(one.id for one in keys) for keys in found] == [begin, leave]


# Ids

RANDOM = "0" * 20  # at the end of each


@given(st.lists(st.floats(0, 4e9), min_size=1, max_size=20))
def test_ids_sort_by_time_and_tell_their_age(times: list[float]) -> None:
    times.sort()
    for make, form in ((new_file_id, FILE_ID), (new_batch_id, BATCH_ID)):
        ids = [make(at) for at in times]
        stamps = [one[: -len(RANDOM)] for one in ids]
        assert stamps == sorted(stamps)
        assert all(form.fullmatch(one) for one in ids)
        assert age_s(ids[0], times[0] + 5) == pytest.approx(5, abs=0.002)


def test_a_batchs_files_have_the_same_ids_however_often_they_are_made() -> None:
    made = {result_file_id("batch_1", "output", 5.0) for _ in range(3)}
    assert len(made) == 1
    assert not made & {result_file_id("batch_1", "error", 5.0)}
    file_id = made.pop()
    assert FILE_ID.fullmatch(file_id)
    assert is_result(file_id, "batch_1")
    assert not is_result(file_id, "batch_2")


@given(st.text(min_size=1), st.text(min_size=1))
def test_tenants_have_folders_of_their_own(one: str, other: str) -> None:
    folder = owner_of(one)
    assert "/" not in folder
    assert folder not in (".", "..", owner_of(None))
    assert (folder == owner_of(other)) == (one == other)


# Lines


def checked(data: bytes, max_rows: int = 1000, max_bytes: int = 10_000) -> list[Any]:
    found = check(lines_of(io.BytesIO(data), max_bytes), CHAT, "m", max_rows, max_bytes)
    return [(error.code, error.line) for error in found.errors]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_each_repeated_custom_id_is_named_by_its_line(numbers: list[int]) -> None:
    repeated = [at for at, number in enumerate(numbers, 1) if number in numbers[: at - 1]]
    assert checked(jsonl(*map(line, numbers))) == [("duplicate_custom_id", at) for at in repeated]


def test_blank_lines_count_as_lines_and_not_as_rows() -> None:
    data = b"\xef\xbb\xbf" + jsonl(line(0), b"", b"  ", line(1), {})
    assert checked(data, max_rows=3) == [("missing_required_parameter", 5)]


def test_no_more_errors_are_told_than_anybody_reads() -> None:
    assert len(checked(b"{\n" * 500)) == MAX_ERRORS
    assert len(checked(jsonl(*[line(0)] * 500))) == MAX_ERRORS


def test_a_line_without_end_is_not_read_to_its_end() -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.taken += len(buffer)
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    endless = Endless()
    stream: Any = io.BufferedReader(endless, 100)
    found = check(lines_of(stream, 10_000), CHAT, "m", 10, 10_000)
    assert [error.code for error in found.errors] == ["line_too_long"]
    assert endless.taken < 20_000


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"custom_id": ""}, "missing_required_parameter"),
        ({"custom_id": None}, "missing_required_parameter"),
        ({"body": [1]}, "invalid_type"),
        ({"body": "{}"}, "invalid_type"),
        ({"url": 5}, "invalid_url"),
        ({"prompt": "me instead"}, "unknown_parameter"),
        ({"messages": []}, "unknown_parameter"),
    ],
)
def test_a_line_that_is_no_request_is_refused(change: dict[str, Any], code: str) -> None:
    assert checked(jsonl(line(0) | change)) == [(code, 1)]


@pytest.mark.parametrize("change", [{"method": "G" * 9999}, {"url": "/" * 9999}])
def test_what_is_told_of_a_line_does_not_grow_with_it(change: dict[str, Any]) -> None:
    data = jsonl(line(0) | change, line(1, body={"model": ["m" * 9999] * 99}))
    found = check(lines_of(io.BytesIO(data), 1 << 20), CHAT, "m", 10, 1 << 20)
    assert [len(error.message) < 1000 for error in found.errors] == [True, True]


def test_a_line_that_names_no_model_or_more_than_is_known_is_a_request() -> None:
    assert checked(jsonl(line(0, body={"messages": []}, note="kept"))) == []


# Forms


def form_of(fields: dict[str, str], content: bytes | None) -> bytes:
    parts = [
        f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    if content is not None:
        head = '--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
        parts.append(f"{head}Content-Type: text/plain\r\n\r\n".encode() + content + b"\r\n")
    random.Random(len(content or b"")).shuffle(parts)
    return b"".join(parts) + b"--B--\r\n"


@given(st.binary(max_size=300), st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_a_form_is_read_however_it_is_cut(content: bytes, cuts: list[int]) -> None:
    body = form_of({"purpose": "batch", "expires_after[seconds]": "3600"}, content)
    form, taken, at = UploadForm("multipart/form-data; boundary=B"), b"", 0
    while at < len(body):
        step = cuts[at % len(cuts)]
        taken += form.feed(body[at : at + step])
        at += step
    assert taken == content
    assert form.whole
    assert (form.filename, form.field("purpose")) == ("a.jsonl", "batch")
    assert form.field("expires_after[seconds]") == "3600"
    assert form.field("expires_after[anchor]") is None


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary"]
)
def test_another_body_is_no_form(content_type: str) -> None:
    with pytest.raises(FormError):
        UploadForm(content_type)


def test_what_only_claims_to_be_a_form_is_an_error() -> None:
    form = UploadForm("multipart/form-data; boundary=B")
    with pytest.raises(FormError, match="cannot be read"):
        form.feed(json.dumps({"a": 1}).encode())
    twice = UploadForm("multipart/form-data; boundary=B")
    with pytest.raises(FormError, match="one file"):
        twice.feed(form_of({}, b"1").removesuffix(b"--B--\r\n") + form_of({}, b"2"))


# Configuration


@pytest.mark.parametrize(
    ("window", "seconds"), [("24h", 86400), ("90m", 5400), ("7d", 604800), ("30s", 30)]
)
def test_windows(window: str, seconds: float) -> None:
    assert BatchesConfig(store="s", completion_windows=(window,))
    assert window_s(window) == seconds


@pytest.mark.parametrize("window", ["", "24", "h", "0h", "-1h", "1w", "24H", "24h "])
def test_what_is_no_window_is_a_configuration_error(window: str) -> None:
    engine = {"kind": "fake", "model": "m"}
    batches = {"store": "s", "completion_windows": [window]}
    with pytest.raises(ConfigError, match=r"batches\.completion_windows"):
        serve_config({"engine": engine, "batches": batches})
