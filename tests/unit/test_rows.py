"""What becomes of an input record: the request that it states, or the reason why it has none."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch.rows import (
    BrokenRow,
    Defaults,
    Request,
    as_text,
    decode_line,
    record_id,
    request_members,
    to_request,
)
from phi4ray.protocol import RowError

CHAT = "/v1/chat/completions"
DEFAULTS = Defaults("tiny", sampling={"temperature": 0.5, "max_tokens": 8})
HELLO = [{"role": "user", "content": "hello"}]

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def body_of(record: dict[str, Any], defaults: Defaults = DEFAULTS) -> dict[str, Any]:
    request = to_request(record, defaults)
    assert isinstance(request, Request), request
    return request.body


def code_of(record: dict[str, Any] | RowError, defaults: Defaults = DEFAULTS) -> str:
    error = record if isinstance(record, RowError) else to_request(record, defaults)
    assert isinstance(error, RowError), error
    assert error.message
    return error.code


# Forms


def test_a_prompt_becomes_one_user_message() -> None:
    assert body_of({"prompt": "hello"}) == {
        "model": "tiny",
        "temperature": 0.5,
        "max_tokens": 8,
        "messages": HELLO,
    }


def test_the_jobs_system_prompt_comes_before_a_prompt() -> None:
    body = body_of({"prompt": "hello"}, Defaults("tiny", system_prompt="be brief"))
    assert body["messages"] == [{"role": "system", "content": "be brief"}, *HELLO]


def test_messages_are_sent_as_they_are() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "看"}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
    ]
    defaults = Defaults("tiny", system_prompt="not for rows with messages")
    assert body_of({"messages": messages}, defaults)["messages"] == messages


def test_messages_may_be_a_string_of_json() -> None:
    assert body_of({"messages": json.dumps(HELLO)})["messages"] == HELLO


def test_messages_go_before_a_prompt() -> None:
    assert body_of({"messages": HELLO, "prompt": "other"})["messages"] == HELLO


@pytest.mark.parametrize(
    ("endpoint", "member"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")]
)
@pytest.mark.parametrize("prompt", ["hello", [1, 2, 3], ["a", "b"]])
def test_a_prompt_goes_to_the_jobs_endpoint(endpoint: Any, member: str, prompt: Any) -> None:
    request = to_request({"prompt": prompt}, Defaults("tiny", endpoint=endpoint))
    assert request == Request(endpoint, {"model": "tiny", member: prompt})


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, {"messages": HELLO}),
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/embeddings", {"input": ["hello"]}),
    ],
)
def test_a_batch_line_says_its_endpoint_and_body(url: str, body: dict[str, Any]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": url, "body": body | {"seed": 3}}
    request = to_request(line, Defaults("tiny", sampling={"seed": 1, "top_p": 0.5}))
    assert request == Request(url, {**body, "seed": 3, "top_p": 0.5, "model": "tiny"})  # type: ignore[arg-type]


def test_a_batch_line_may_leave_its_method_out_and_state_its_body_as_json() -> None:
    line = {"custom_id": "a", "url": CHAT, "body": json.dumps({"messages": HELLO})}
    assert body_of(line)["messages"] == HELLO


def test_the_model_is_the_jobs_whatever_the_row_says() -> None:
    line = {"url": CHAT, "body": {"model": "gpt-4o", "messages": HELLO}}
    assert body_of(line)["model"] == "tiny"


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0, "seed": 7}, '{"temperature": 0, "seed": 7}']
)
def test_a_rows_sampling_wins_over_the_jobs(sampling: Any) -> None:
    body = body_of({"prompt": "hello", "sampling": sampling})
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0, 7, 8)


@pytest.mark.parametrize("own", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("jobs", ["max_tokens", "max_completion_tokens"])
def test_a_rows_limit_wins_over_the_jobs_by_whichever_name(own: str, jobs: str) -> None:
    defaults = Defaults("tiny", sampling={"seed": 1, jobs: 512})
    line = {"url": CHAT, "body": {"messages": HELLO, own: 16}}
    for record in (line, {"prompt": "hello", "sampling": {own: 16}}):
        body = {"model": "tiny", "messages": HELLO, "seed": 1, own: 16}
        assert body_of(record, defaults) == body


def test_a_page_with_url_and_body_beside_its_prompt_is_no_batch_line() -> None:
    page = {"prompt": "hello", "url": "https://example.org", "method": "GET", "body": "<html>"}
    assert body_of(page)["messages"] == HELLO
    assert request_members(page).isdisjoint({"url", "method", "body"})


def test_a_batch_line_with_an_id_of_its_own_beside_carries_it() -> None:
    line = {"custom_id": "a", "url": CHAT, "body": {"messages": HELLO}, "id": 5}
    assert record_id(line) == "a"
    assert "id" not in request_members(line)


def test_so_does_a_prompt_with_both_ids() -> None:
    assert "id" not in request_members({"custom_id": "a", "id": 17, "prompt": "hello"})
    assert "id" in request_members({"custom_id": "", "id": 17, "prompt": "hello"})


def test_a_record_without_a_request_carries_nothing_that_may_make_one() -> None:
    assert {"url", "body", "id", "prompt"} <= request_members({"url": "x", "prompt": None})


def test_a_request_is_no_view_of_its_record() -> None:
    record = {"url": CHAT, "body": {"messages": HELLO, "stream_options": {}}}
    before = json.dumps(record)
    assert "stream_options" not in body_of(record)
    assert json.dumps(record) == before


# Ids


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (7, "7"),
        (2**70, str(2**70)),
        (1.5, "1.5"),
        (True, "true"),
        ([1, "é"], '[1,"é"]'),
        ({"a": None}, '{"a":null}'),
        (Decimal("1.50"), "1.50"),
        (b"\xff\x00", "/wA="),
    ],
)
def test_an_id_of_any_type_is_text(value: Any, text: str) -> None:
    assert record_id({"id": value}) == text
    assert record_id({"custom_id": value, "id": "other"}) == text


@pytest.mark.parametrize("value", [None, "", float("nan")])
def test_an_empty_id_is_none(value: Any) -> None:
    assert record_id({"id": value}) is None
    assert record_id({"custom_id": value, "id": "second"}) == "second"


@given(json_values)
def test_any_value_has_a_text_that_can_be_written(value: Any) -> None:
    text = as_text(value)
    assert (text or "").encode().decode() == (text or "")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"id": "a", "prompt": "\xff"}', "a"),
        (b'{"id": "a", "prompt": "x', "a"),
        (b'{"id": 7, "prompt": "x" 5}', "7"),
        (b'{"id": "a", "' + b"n" * 2000 + b'": 1}', "a"),
        (b'{"id": "a\xff", "prompt": "x"}', None),
        (b'{"id": 12', None),
        (b'{"id": "a', None),
        (b'["id"]', None),
        (b"id", None),
    ],
)
def test_a_line_that_is_no_record_keeps_an_id_that_can_be_read(
    line: bytes, text: str | None
) -> None:
    error = decode_line(line)
    assert isinstance(error, BrokenRow)
    assert error.id == text


# Lines


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"prompt": "\xff"}', "invalid_utf8"),
        ("é".encode("latin-1"), "invalid_utf8"),
        ('{"prompt": "x"}'.encode("utf-16"), "invalid_utf8"),
        (b"\x80", "invalid_utf8"),
        (b"not json", "invalid_json"),
        (b'{"prompt": "x"', "invalid_json"),
        (b'{"prompt": "x"} {}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b'{"\\udc00": "x"}', "invalid_json"),
        (b'{"prompt": "a\x00b"}', "invalid_json"),
        (b'{"id": ' + b"1" * 5000 + b"}", "invalid_json"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "invalid_json"),
        (b"[1]", "invalid_type"),
        (b'"text"', "invalid_type"),
        (b"null", "invalid_type"),
        (b"12", "invalid_type"),
        (b"true", "invalid_type"),
    ],
)
def test_a_line_that_is_no_object_of_json_is_an_error(line: bytes, code: str) -> None:
    assert code_of(decode_line(line)) == code  # type: ignore[arg-type]


def test_of_a_key_that_comes_twice_the_last_counts() -> None:
    assert decode_line(b'{"prompt": "a", "prompt": "b"}') == {"prompt": "b"}


def test_a_line_of_ten_megabytes_is_read_and_asked() -> None:
    text = "é\\n" * (10 << 20 >> 2)
    record = decode_line(b'{"prompt": "' + text.encode() + b'"}')
    assert isinstance(record, dict)
    assert body_of(record)["messages"][0]["content"] == text.replace("\\n", "\n")


def test_a_row_may_be_nested_as_deep_as_the_decoder_goes() -> None:
    deep = b'{"prompt": "x", "carried": ' + b"[" * 150 + b"]" * 150 + b"}"
    record = decode_line(deep)
    assert isinstance(record, dict)
    assert as_text(record["carried"]) == "[" * 150 + "]" * 150


@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_record_or_an_error(line: bytes) -> None:
    assert isinstance(decode_line(line), dict | RowError)


# Requests that cannot be


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({}, "missing_prompt"),
        ({"id": 1, "prompt": None, "messages": None}, "missing_prompt"),
        ({"custom_id": "a", "method": "POST", "url": CHAT}, "missing_prompt"),
        ({"url": CHAT, "body": {}}, "missing_prompt"),
        ({"url": CHAT, "body": {"messages": None}}, "missing_prompt"),
        ({"prompt": 5}, "invalid_type"),
        ({"prompt": True}, "invalid_type"),
        ({"prompt": ["a"]}, "invalid_type"),
        ({"prompt": {"a": 1}}, "invalid_type"),
        ({"prompt": b"\xff"}, "invalid_type"),
        ({"messages": {}}, "invalid_type"),
        ({"messages": 1}, "invalid_type"),
        ({"messages": ["hi"]}, "invalid_type"),
        ({"messages": [None]}, "invalid_type"),
        ({"messages": '{"role": "user"}'}, "invalid_type"),
        ({"messages": []}, "empty_messages"),
        ({"messages": "[]"}, "empty_messages"),
        ({"messages": ""}, "invalid_json"),
        ({"messages": "hello"}, "invalid_json"),
        ({"url": CHAT, "body": {"messages": []}}, "empty_messages"),
        ({"url": CHAT, "body": [1]}, "invalid_type"),
        ({"url": CHAT, "body": "{"}, "invalid_json"),
        ({"method": "GET", "url": CHAT, "body": {"messages": HELLO}}, "unsupported_method"),
        ({"method": 1, "url": CHAT, "body": {"messages": HELLO}}, "unsupported_method"),
        ({"url": "/v1/images", "body": {"prompt": "x"}}, "unsupported_url"),
        ({"url": [CHAT], "body": {"prompt": "x"}}, "unsupported_url"),
        ({"body": {"messages": HELLO}}, "unsupported_url"),
        ({"prompt": "x", "sampling": [1]}, "invalid_type"),
        ({"prompt": "x", "sampling": 1}, "invalid_type"),
        ({"prompt": "x", "sampling": "warm"}, "invalid_json"),
        ({"prompt": "x", "sampling": {"stream": True}}, "unsupported_parameter"),
        ({"url": CHAT, "body": {"messages": HELLO, "stream": True}}, "unsupported_parameter"),
        ({"prompt": "x", "sampling": {"top_p": float("nan")}}, "invalid_value"),
        ({"prompt": "x", "sampling": {"top_p": float("-inf")}}, "invalid_value"),
        ({"messages": [{"role": "user", "content": b"\xff"}]}, "invalid_value"),
    ],
)
def test_a_record_without_a_request_has_a_stable_code(record: dict[str, Any], code: str) -> None:
    assert code_of(record) == code


def test_a_list_is_a_prompt_only_where_the_endpoint_takes_one() -> None:
    assert code_of({"prompt": {"a": 1}}, Defaults("tiny", endpoint="/v1/completions")) == (
        "invalid_type"
    )


def test_what_is_wrong_is_named() -> None:
    error = to_request({"method": "PUT", "url": CHAT, "body": {}}, DEFAULTS)
    assert error == RowError("unsupported_method", "'method' is 'PUT'; only 'POST' is answered")


def test_stream_false_is_let_pass() -> None:
    assert body_of({"prompt": "x", "sampling": {"stream": False}})["stream"] is False


members = st.sampled_from(
    ["custom_id", "id", "prompt", "messages", "sampling", "method", "url", "body", "stream", "n"]
)
likely = st.sampled_from(["POST", CHAT, "/v1/completions", "[]", "{}", HELLO, {"messages": HELLO}])


@pytest.mark.slow
@given(
    st.dictionaries(members, json_values | likely, max_size=6),
    st.sampled_from([CHAT, "/v1/completions", "/v1/embeddings"]),
)
def test_any_record_is_a_request_that_can_be_sent_or_an_error(
    record: dict[str, Any], endpoint: Any
) -> None:
    request = to_request(record, Defaults("tiny", endpoint=endpoint))
    record_id(record)
    if isinstance(request, Request):
        assert request.body["model"] == "tiny"
        assert json.loads(json.dumps(request.body, allow_nan=False)) == request.body
