"""Tokens of KV cache that a request will hold: what it states, and what finished ones taught."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.demand import MOST_TOKENS, Lengths, Size, max_tokens_of, prompt_of, sequences_of


def test_demand_is_the_prompt_and_the_most_it_may_produce() -> None:
    lengths = Lengths()
    assert lengths.demand(400, 10) == 100 + 10
    assert lengths.demand(0, 10) == 10


def test_demand_of_rows_without_a_limit_is_learnt_from_finished_ones() -> None:
    lengths = Lengths()
    for _ in range(10_000):
        lengths.observe(prompt_chars=300, prompt_tokens=100, completion_tokens=50)
    assert lengths.demand(300, None) == pytest.approx(150, rel=0.02)


def test_a_limit_that_answers_never_reach_does_not_empty_the_engine() -> None:
    lengths = Lengths()
    for _ in range(10_000):
        lengths.observe(prompt_chars=300, prompt_tokens=100, completion_tokens=50)
    assert lengths.demand(0, 100_000) == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "n": 3}, 15),
        ({"max_tokens": 5, "n": "3"}, 15),
        ({"max_tokens": 5, "n": 2, "prompt": ["a", "b", "c"]}, 30),
        ({"max_tokens": 5, "n": 10**400}, None),
        ({"max_tokens": 10**400}, MOST_TOKENS),
        ({"max_tokens": 10**400, "n": 2}, 2 * MOST_TOKENS),
        ({"max_tokens": None, "n": None}, None),
        ({"max_tokens": 0}, None),
        ({"max_tokens": -5}, None),
        ({"max_tokens": 5, "n": -1}, None),
        ({"max_tokens": "5"}, None),
        ({"max_tokens": 5.5}, None),
        ({"max_tokens": [5], "n": {}}, None),
        ({"token_ids": [1], "sampling_params": {"max_tokens": 5, "n": 2}}, 10),
        ({"prompt": "a", "sampling_params": {"max_tokens": 5}}, None),
        ({"query": "a", "documents": ["b", "c"]}, 0),
        ({"prompt": "", "documents": ["b"], "max_tokens": 5}, 5),
    ],
)
def test_a_requests_limit_counts_all_its_choices_and_bad_ones_count_nothing(
    body: dict[str, Any], limit: int | None
) -> None:
    assert max_tokens_of(body) == limit


@given(st.integers(0, 10**9), st.none() | st.integers(1, 10**30))
def test_demand_is_never_negative_and_always_finite(chars: int, limit: int | None) -> None:
    assert 0 <= Lengths().demand(chars, limit) < 1e12


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"messages": [{"content": "a"}, {"content": "b"}]}, "a\nb"),
        ({"messages": [{"content": None}, 5]}, "None\n"),
        ({"prompt": "a"}, "a"),
        ({"prompt": [1, 2]}, "[1, 2]"),
        ({"messages": [[{"content": "a"}, {"content": "b"}], [{"content": "c"}], 5]}, "a\nb\nc"),
        ({"input": "a"}, "a"),
        ({}, ""),
    ],
)
def test_a_requests_prompt_is_one_text(body: dict[str, Any], prompt: str) -> None:
    assert prompt_of(body) == prompt


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "a"}, 0),
        ({"prompt": [1, 2, 3]}, 3),
        ({"prompt": [[1, 2], [3]]}, 3),
        ({"prompt": ["a", "b"]}, 0),
        ({"input": [7, 8]}, 2),
        ({"token_ids": [7, 8]}, 2),
        ({"query": [7, 8], "items": [[1], [2, 3]]}, 5),
        ({"prompt": []}, 0),
        ({}, 0),
    ],
)
def test_token_ids_are_counted_and_not_guessed(body: dict[str, Any], tokens: int) -> None:
    assert Size.of(body).ids == tokens


TEXT, CHAT = "x" * 1000, {"messages": [{"role": "user", "content": "x" * 1000}]}


@pytest.mark.parametrize(
    ("body", "chars"),
    [
        (CHAT, 1000),
        (CHAT | {"tools": [{"type": "function", "function": {"description": TEXT}}]}, 2000),
        (CHAT | {"system": TEXT}, 2000),
        (CHAT | {"system": [{"type": "text", "text": TEXT}]}, 2000),
        ({"messages": [{"content": None, "tool_calls": [{"function": {"name": TEXT}}]}]}, 1000),
        ({"messages": [[{"content": TEXT}], [{"content": TEXT, "reasoning": TEXT}]]}, 3000),
        ({"input": TEXT, "instructions": TEXT}, 2000),
        ({"input": [{"type": "function_call_output", "output": TEXT}]}, 1000),
        ({"query": TEXT, "documents": [TEXT, {"text": TEXT}]}, 3000),
        ({"queries": TEXT, "items": [TEXT]}, 2000),
        ({"text_1": TEXT, "text_2": [TEXT, TEXT]}, 3000),
        ({"data_1": [TEXT], "data_2": [TEXT]}, 2000),
        ({"texts": [TEXT, TEXT]}, 2000),
        ({"inputs": [{"content": [{"type": "text", "text": TEXT}]}]}, 1000),
        ({"prompt": [[1, 2], TEXT]}, 1000),
    ],
)
def test_all_that_the_engine_reads_counts(body: dict[str, Any], chars: int) -> None:
    assert chars <= Size.of(body).chars < chars + 100  # and the words of its JSON


@pytest.mark.parametrize(
    ("body", "sequences"),
    [
        ({}, 1),
        ({"prompt": "abc"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": [[1, 2], [3], [4]]}, 3),
        ({"prompt": ["a", "b"], "n": 4}, 8),
        ({"input": ["a", "b"]}, 2),
        ({"input": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, 1),
        ({"messages": [{"content": "a"}, {"content": "b"}], "n": 3}, 3),
        ({"messages": [[{"content": "a"}], [{"content": "b"}]]}, 2),
        ({"query": "a", "documents": ["b", {"text": "c"}]}, 2),
        ({"token_ids": [1, 2, 3], "sampling_params": {"n": 4}}, 4),
        ({"n": 3.0}, 3),
        ({"n": 0}, 1),
        ({"n": 10**400}, 1),
        ({"n": {}, "prompt": []}, 1),
    ],
)
def test_a_request_holds_a_sequence_for_each_choice_of_each_prompt(
    body: dict[str, Any], sequences: int
) -> None:
    assert sequences_of(body) == sequences


ONE, MANY = [{"content": "a"}], ["a", "b", "c"]


@pytest.mark.parametrize(
    ("path", "body", "sequences", "limit"),
    [
        ("/v1/completions", {"prompt": MANY, "messages": "x", "max_tokens": 5}, 3, 15),
        ("/v1/completions", {"prompt": MANY, "max_completion_tokens": 1}, 3, None),
        ("/v1/completions", {"prompt": MANY, "max_completion_tokens": 1, "max_tokens": 5}, 3, 15),
        ("/v1/completions", {"prompt_embeds": "x", "documents": MANY}, 1, None),
        ("/v1/chat/completions", {"messages": ONE, "documents": MANY, "max_tokens": 5}, 1, 5),
        ("/v1/chat/completions", {"messages": ONE, "max_output_tokens": 1, "n": 2}, 2, None),
        ("/v1/responses", {"input": "a", "max_tokens": 1}, 1, None),
        ("/v1/responses", {"input": "a", "max_output_tokens": 5}, 1, 5),
        ("/v1/messages", {"messages": ONE, "prompt": MANY, "max_tokens": 5}, 1, 5),
        (
            "/inference/v1/generate",
            {"token_ids": [1], "prompt": "x", "sampling_params": {"n": 2, "max_tokens": 5}},
            2,
            10,
        ),
        ("/invocations", {"prompt": MANY, "messages": ONE, "max_tokens": 5}, 3, 15),
        ("/invocations", {"prompt": MANY, "max_output_tokens": 1, "max_tokens": 5}, 3, 15),
        ("/rerank", {"messages": ONE, "documents": MANY}, 3, None),
    ],
)
def test_what_a_path_passes_over_tells_nothing(
    path: str, body: dict[str, Any], sequences: int, limit: int | None
) -> None:
    assert sequences_of(body, path) == sequences
    assert max_tokens_of(body, path) == limit


def test_demand_is_of_all_sequences_and_what_is_learnt_of_one() -> None:
    lengths = Lengths()
    for _ in range(10_000):
        lengths.observe(300, prompt_tokens=100, completion_tokens=200, sequences=4)
    assert lengths.demand(300, None, sequences=8) == pytest.approx(100 + 8 * 50, rel=0.02)
    assert lengths.demand(300, 8 * 10, sequences=8) == pytest.approx(100 + 8 * 10, rel=0.02)
    assert lengths.demand(300, 8 * 999, sequences=8) == pytest.approx(100 + 8 * 100, rel=0.02)


def test_a_change_of_traffic_is_noticed_after_some_thousand_requests() -> None:
    lengths = Lengths()
    for _ in range(100_000):
        lengths.observe(prompt_chars=400, prompt_tokens=100, completion_tokens=10)
    for _ in range(20_000):
        lengths.observe(prompt_chars=400, prompt_tokens=100, completion_tokens=500)
    assert lengths.demand(0, None) > 400


@pytest.mark.parametrize(("chars", "tokens"), [(5, 8_000), (30_000_000, 1)])
def test_one_clients_requests_change_what_is_expected_of_others_by_no_more_than_text_can(
    chars: int, tokens: int
) -> None:
    lengths = Lengths()
    for _ in range(400):
        lengths.observe(chars, tokens, 300)
    assert 8_000 / 16 <= lengths.demand(8_000, 0) <= 1.5 * 8_000
