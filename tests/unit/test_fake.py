"""The fake engine: deterministic answers, and faults as planned."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.config import Endpoint, EngineConfig
from phi4ray.errors import EngineDeadError, EngineStartError
from phi4ray.fake import FakeReplica, fake_text
from phi4ray.protocol import Answer

CHAT: Endpoint = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def replica(max_model_len: int | None = None, **knobs: Any) -> FakeReplica:
    return FakeReplica(
        EngineConfig(kind="fake", model="tiny", max_model_len=max_model_len, engine_args=knobs)
    )


def ask(engine: FakeReplica, body: dict[str, Any], endpoint: Endpoint = CHAT) -> Answer:
    return asyncio.run(engine.complete(endpoint, body))


def test_the_same_prompt_has_the_same_answer_and_another_one_another() -> None:
    one, same = ask(replica(), HELLO), ask(replica(latency_s=0.001), HELLO)
    assert one == same
    assert one.body["choices"][0]["message"]["content"] == fake_text("hello")
    assert fake_text("hello") != fake_text("hello ")


def test_every_endpoint_has_openais_shape() -> None:
    chat = ask(replica(), HELLO).body
    text = ask(replica(), {"prompt": "hello"}, "/v1/completions").body
    vector = ask(replica(), {"input": ["hello"]}, "/v1/embeddings").body
    assert [chat["object"], text["object"], vector["object"]] == [
        "chat.completion",
        "text_completion",
        "list",
    ]
    assert text["choices"][0]["text"] == fake_text("hello")
    assert vector["data"][0]["embedding"]
    for body in (chat, text, vector):
        assert body["model"] == "tiny"
        assert body["usage"]["total_tokens"] == (
            body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
        )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_type"),
        ({"messages": "hello"}, "invalid_type"),
        ({"messages": ["hello"]}, "invalid_type"),
        (HELLO | {"max_tokens": 0}, "invalid_type"),
        (HELLO | {"max_tokens": "5"}, "invalid_type"),
        (HELLO | {"max_tokens": 2000}, "context_length_exceeded"),
        ({"messages": [{"content": "x" * 8000}]}, "context_length_exceeded"),
    ],
)
def test_a_bad_request_is_refused_as_openai_refuses(body: dict[str, Any], code: str) -> None:
    answer = ask(replica(max_model_len=1000), body)
    assert (answer.status, answer.body["error"]["code"]) == (400, code)


def test_a_limit_of_null_is_none() -> None:
    assert ask(replica(), HELLO | {"max_tokens": None}).status == 200


bodies = st.dictionaries(
    st.sampled_from(["messages", "prompt", "input", "max_tokens", "max_completion_tokens"]),
    st.recursive(
        st.none() | st.integers() | st.text() | st.just("\ud800"),
        lambda inner: st.lists(inner) | st.dictionaries(st.just("content"), inner),
        max_leaves=4,
    ),
)


@given(bodies, st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]))
def test_no_request_makes_it_raise(body: dict[str, Any], endpoint: Endpoint) -> None:
    answer = ask(replica(), body, endpoint)
    assert answer.status in (200, 400)
    json.dumps(answer.body)


def test_it_fails_each_request_as_often_as_planned() -> None:
    engine = replica(fail_times=2)
    other = {"messages": [{"role": "user", "content": "other"}]}
    assert [ask(engine, HELLO).status for _ in range(4)] == [500, 500, 200, 200]
    assert [ask(engine, other).status for _ in range(3)] == [500, 500, 200]


def test_it_dies_after_as_many_requests_as_planned_and_stays_dead() -> None:
    engine = replica(die_after=3)
    assert [ask(engine, HELLO).status for _ in range(2)] == [200, 200]
    for _ in range(2):
        with pytest.raises(EngineDeadError):
            ask(engine, HELLO)


def test_it_cannot_start_as_planned() -> None:
    with pytest.raises(EngineStartError, match="no such model"):
        asyncio.run(replica(start_error="no such model").start())


def test_an_unknown_knob_is_an_engine_that_cannot_start() -> None:
    with pytest.raises(EngineStartError, match="latency_ms"):
        replica(latency_ms=5)


def test_what_it_works_on_is_in_its_cache_until_it_is_answered_or_cancelled() -> None:
    async def scenario() -> None:
        engine = replica(latency_s=30, kv_cache_size_tokens=100)
        asked = [asyncio.create_task(engine.complete(CHAT, HELLO)) for _ in range(3)]
        await asyncio.sleep(0)
        busy = engine.kv()
        assert (busy.running, busy.used_tokens, busy.capacity_tokens) == (3, 3 * 17, 100)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert (engine.kv().running, engine.kv().used_tokens) == (0, 0)

    asyncio.run(scenario())


def test_a_stopped_engine_answers_nothing_and_may_be_stopped_again() -> None:
    engine = replica()
    asyncio.run(engine.stop())
    asyncio.run(engine.stop())
    with pytest.raises(EngineDeadError):
        ask(engine, HELLO)
