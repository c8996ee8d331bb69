"""What every replica must do, run against the fake and against a real vLLM engine on the CPU."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from starlette.types import Message, Receive, Scope, Send

from phi4ray import fork_server
from phi4ray.batch.answers import within
from phi4ray.batch.parts import error_of
from phi4ray.config import Endpoint, EngineConfig
from phi4ray.demand import sequences_of
from phi4ray.engines import make_replica
from phi4ray.errors import ConfigError, EngineDeadError, EngineStartError
from phi4ray.orphans import MARK, kill_orphans
from phi4ray.preemption import Preemptible
from phi4ray.protocol import Answer, Json, OnlineReplica
from phi4ray.serve.app import OnlineApp
from phi4ray.serve.config import serve_config
from phi4ray.serve.state import State
from phi4ray.train.tiny import make_tiny_model
from tests.processes import lives
from tests.tiny_engines import tiny_engine
from tests.waiting import until

T = TypeVar("T")
CHAT: Endpoint = "/v1/chat/completions"
COMPLETIONS: Endpoint = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


class Running:
    """A started replica and the event loop that it lives on."""

    def __init__(self, config: EngineConfig) -> None:
        self.loop = asyncio.new_event_loop()
        self.replica: OnlineReplica = make_replica(config)
        self.model = config.model_name
        self.kind = config.kind
        self.run(self.replica.start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def ask(self, endpoint: Endpoint, **body: Any) -> tuple[int, Json]:
        answer = self.run(self.replica.complete(endpoint, {"model": self.model, **body}))
        return answer.status, answer.body


def tiny(folder: Path, **changes: Any) -> EngineConfig:
    return tiny_engine(make_tiny_model(folder), **changes)


@pytest.fixture(scope="module", params=["fake", pytest.param("vllm", marks=pytest.mark.engine)])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    sleeps = {"enable_sleep_mode": True}
    if request.param == "fake":
        config = EngineConfig(
            kind="fake", model="phi-4", max_model_len=1024, max_num_seqs=64, engine_args=sleeps
        )
    else:
        model = tmp_path_factory.mktemp("model") / "tiny"
        config = tiny(model)
        config = config.model_copy(update={"engine_args": {**config.engine_args, **sleeps}})
    found = Running(config)
    yield found
    found.run(found.replica.stop())


def test_a_chat_is_answered_as_openai_does(running: Running) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    status, body = running.ask(CHAT, messages=messages, max_tokens=5)
    assert status == 200
    assert body["object"] == "chat.completion"
    assert isinstance(body["choices"][0]["message"]["content"], str)
    assert body["choices"][0]["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 1


def test_an_engine_that_can_sleep_answers_when_it_woke_and_another_stays_awake(
    running: Running,
) -> None:
    assert running.replica.can_sleep == (running.kind == "fake")  # vLLM cannot on CPUs
    if running.replica.can_sleep:
        running.run(running.replica.sleep())
        running.run(running.replica.wake())
    assert running.ask(COMPLETIONS, prompt="Once upon a time", max_tokens=5)[0] == 200


def test_the_processes_other_logs_are_as_before(running: Running) -> None:
    assert logging.root.level == logging.WARNING


def test_a_completion_is_answered_as_openai_does(running: Running) -> None:
    status, body = running.ask(COMPLETIONS, prompt="Once upon a time", max_tokens=5)
    assert status == 200
    assert body["object"] == "text_completion"
    assert isinstance(body["choices"][0]["text"], str)


def test_the_same_request_has_the_same_answer(running: Running) -> None:
    body: Json = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0.0}
    first, second = (running.ask(COMPLETIONS, **body)[1]["choices"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("endpoint", "body", "code"),
    [
        (COMPLETIONS, {"prompt": "word " * 5000, "max_tokens": 5}, "context_length_exceeded"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 5000}], "max_tokens": 5},
         "context_length_exceeded"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": -1}, None),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": "many"}, None),
        (CHAT, {"messages": None}, None),
    ],
)  # fmt: skip
def test_a_bad_request_is_an_answer_and_no_exception(
    running: Running, endpoint: Endpoint, body: Json, code: str | None
) -> None:
    answer = running.run(running.replica.complete(endpoint, {"model": running.model, **body}))
    assert 400 <= answer.status < 500
    assert isinstance(answer.body["error"]["message"], str)
    if code:
        assert error_of(answer).code == code


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"messages": []}, "invalid_request"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_parameter"),
        ({"messages": HI, "temprature": 1}, "unknown_parameter"),
        ({"messages": HI, "temperature": "x"}, "invalid_parameter"),
        ({"messages": HI, "temperature": -1}, "invalid_parameter"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_utf8"),
        # What vLLM finds only when it sends it to the engine's process.
        ({"messages": HI, "top_k": 1 << 70}, "invalid_request"),
        ({"messages": HI, "bad_words": ["\ud800"]}, "invalid_utf8"),
    ],
)  # fmt: skip
def test_what_a_real_engine_refuses_has_a_stable_code(
    running: Running, body: Json, code: str
) -> None:
    if running.kind == "fake":
        pytest.skip("the fake takes what a model would")
    answer = running.run(running.replica.complete(CHAT, {"model": running.model, **body}))
    assert answer.status == 400
    assert error_of(answer).code == code


@pytest.mark.parametrize(
    ("path", "body", "sequences"),
    [
        (CHAT, {"messages": HI, "max_tokens": 5, "n": 3}, 3),
        (COMPLETIONS, {"prompt": ["Once", "upon a time"], "max_tokens": 5, "n": 2}, 4),
        (COMPLETIONS, {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 5}, 2),
        ("/v1/chat/completions/batch", {"messages": [HI, HI], "max_tokens": 5}, 2),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 5}, 1),
    ],
)
def test_a_requests_usage_is_metered_as_the_engine_tells_it(
    running: Running, path: str, body: Json, sequences: int
) -> None:
    if running.kind == "fake":
        pytest.skip("it has one answer to each request")
    online = OnlineApp(running.replica, serve_config({"engine": {"kind": "fake", "model": "m"}}))
    states: list[State] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await online(scope, receive, send)
        finally:
            states.append(State.of(scope))

    async def answer() -> Json:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://phi4") as client:
            reply = await client.post(path, json={"model": running.model, **body}, timeout=60)
            assert reply.status_code == 200, reply.text
            found: Json = reply.json()
            return found

    usage = running.run(answer())["usage"]
    (metered,) = [state.usage for state in states]
    assert metered is not None
    assert metered.prompt_tokens == usage.get("prompt_tokens", usage.get("input_tokens"))
    assert metered.completion_tokens == usage.get("completion_tokens", usage.get("output_tokens"))
    assert sequences_of(body) == sequences


@pytest.mark.parametrize("in_a_hurry", [True, False])
@pytest.mark.parametrize("choices", [1, 2])
def test_who_hangs_up_pays_what_was_generated_until_then(
    running: Running, choices: int, in_a_hurry: bool
) -> None:
    """Those who read slowly hang up while a chunk is being sent, and vLLM goes on for nobody."""
    if running.kind == "fake" and (choices > 1 or not in_a_hurry):
        pytest.skip("it has one answer to each request, which ends with its stream")
    online = OnlineApp(running.replica, serve_config({"engine": {"kind": "fake", "model": "m"}}))
    body: Json = {"messages": HI, "max_tokens": 900, "ignore_eos": True, "stream": True}
    raw = json.dumps({"model": running.model, "n": choices, **body}).encode()
    messages = [{"type": "http.request", "body": raw, "more_body": False}]
    scope: Scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"",
                    "headers": [(b"content-type", b"application/json")]}  # fmt: skip
    aborted: list[tuple[int, int]] = []
    tell = running.replica.on_aborted
    assert tell is not None

    def told(engine_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        aborted.append((prompt_tokens, completion_tokens))
        tell(engine_id, prompt_tokens, completion_tokens)

    async def hang_up() -> None:
        enough, chunks = asyncio.Event(), 0

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await enough.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal chunks
            chunks += bool(message.get("body"))
            if chunks >= 10:
                enough.set()
                if not in_a_hurry:
                    await asyncio.sleep(0.05)

        await online(scope, receive, send)

    running.replica.on_aborted = told
    running.run(hang_up())
    usage = State.of(scope).usage
    assert usage is not None
    assert usage.aborted
    assert len(aborted) == choices
    assert usage.prompt_tokens == aborted[0][0] > 0
    assert 0 < usage.completion_tokens == sum(tokens for _, tokens in aborted) < 900


def test_many_requests_run_at_once(running: Running) -> None:
    async def both() -> list[int]:
        asked = [
            running.replica.complete(
                COMPLETIONS, {"model": running.model, "prompt": f"number {n}", "max_tokens": 4}
            )
            for n in range(100)
        ]
        return [answer.status for answer in await asyncio.gather(*asked)]

    assert running.run(both()) == [200] * 100


def test_kv_state_is_in_tokens_and_empty_when_idle(running: Running) -> None:
    kv = running.replica.kv()
    assert kv.capacity_tokens > kv.max_model_len == 1024
    assert kv.max_num_seqs == 64
    deadline = time.monotonic() + 30
    while running.replica.kv().used_tokens or running.replica.kv().running:
        running.ask(COMPLETIONS, prompt="hi", max_tokens=1)  # the last step's figures
        running.run(asyncio.sleep(0.2))
        assert time.monotonic() < deadline


def test_a_step_lasts_until_its_tokens_are_here(running: Running) -> None:
    steps: list[tuple[float | None, int]] = []

    def told(_running: int, length_s: float | None, begun: int) -> None:
        steps.append((length_s, begun))
        if len(steps) == 2:
            time.sleep(0.5)  # clients wait for a process that has no time, whatever the engine does

    running.replica.on_step = told
    try:
        body: Json = {"prompt": "Once upon a time", "max_tokens": 6, "ignore_eos": True}
        assert running.ask(COMPLETIONS, **body)[0] == 200
    finally:
        running.replica.on_step = None
    assert sum(begun for _, begun in steps) == 1
    assert steps[0][0] is None
    if running.kind == "vllm":  # the fake's answers come in one step
        lengths = [length_s for length_s, _ in steps[1:] if length_s is not None]
        assert len(lengths) == 5
        assert lengths[1] >= 0.5


def test_others_have_their_turn_beside_an_engine_that_is_faster(running: Running) -> None:
    turns = 0
    at_step: list[int] = []

    def told(_running: int, _length_s: float | None, _begun: int) -> None:
        at_step.append(turns)
        time.sleep(0.05)  # far longer than a step takes: the next ones are waiting by then

    async def ask() -> Answer:
        nonlocal turns
        body = {"model": running.model, "prompt": "go on", "max_tokens": 20, "ignore_eos": True}
        task = asyncio.create_task(running.replica.complete(COMPLETIONS, body))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        return await task

    running.replica.on_step = told
    try:
        assert running.run(ask()).status == 200
    finally:
        running.replica.on_step = None
    if running.kind == "vllm":  # the fake's answers come in one step
        assert len(at_step) == 20
        assert all(before < after for before, after in itertools.pairwise(at_step))


def test_an_abandoned_request_frees_its_tokens(running: Running) -> None:
    async def abandon() -> None:
        body = {"model": running.model, "prompt": "go on", "max_tokens": 900, "ignore_eos": True}
        task = asyncio.create_task(running.replica.complete(COMPLETIONS, body))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # The fake one had answered by then.
        assert task.cancelled() or running.kind == "fake"
        await asyncio.sleep(0.5)

    running.run(abandon())
    running.ask(COMPLETIONS, prompt="hi", max_tokens=1)
    assert running.replica.kv().running <= 1


class Interruptions:
    """Asks one request, cancels it after some tokens, and asks it again; counts the tokens."""

    def __init__(self, running: Running, **body: Any) -> None:
        self.generated = 0
        self.interrupted = 0
        self._replica = running.replica
        self._body = {"model": running.model, **body}
        self._wanted = 0
        self._task: asyncio.Task[Answer] | None = None

    async def answer(self, *after_tokens: int) -> Json:
        """Its answer, with an interruption after so many more tokens each time."""
        request = Preemptible()
        self._replica.on_step = self._step
        try:
            for tokens in after_tokens:
                self._wanted = self.generated + tokens
                self._task = task = asyncio.create_task(self._ask(request))
                await asyncio.gather(task, return_exceptions=True)
                self.interrupted += task.cancelled()
            self._task = None
            answer = await self._ask(request)
        finally:
            self._replica.on_step = None
        assert answer.status == 200, answer.body
        return answer.body

    async def _ask(self, request: Preemptible) -> Answer:
        with request.asked():
            return await self._replica.complete(COMPLETIONS, self._body)

    def _step(self, _running: int, _length_s: float | None, _begun: int) -> None:
        self.generated += 1
        if self._task is not None and self.generated >= self._wanted:
            self._task.cancel()  # as rows are: before a task can know what this step has brought


@pytest.mark.parametrize(
    ("after_tokens", "most"),
    # A token may have been on its way to this process at each interruption. What had ended when it
    # was cancelled has no rest, and starts over.
    [((7, 1, 20), 43), ((7, 33), 81)],
)
def test_a_request_that_made_way_has_the_answer_that_it_would_have_had(
    running: Running, after_tokens: tuple[int, ...], most: int
) -> None:
    body: Json = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0.0}
    body |= {"ignore_eos": True, "min_tokens": 30, "logprobs": 1, "seed": 1}
    _, whole = running.ask(COMPLETIONS, **body)
    request = Interruptions(running, **body)
    answer = running.run(request.answer(*after_tokens))
    assert answer["usage"] == whole["usage"]
    assert answer["choices"][0]["text"] == whole["choices"][0]["text"]
    assert answer["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    if running.kind == "vllm":  # the fake's answers come in one step
        assert request.interrupted == len(after_tokens)
        assert 40 <= request.generated <= most
        tokens, wholes = (one["choices"][0]["logprobs"]["tokens"] for one in (answer, whole))
        assert tokens == wholes


@pytest.mark.engine
@pytest.mark.parametrize("when_it_ended", [(), (1,)])
def test_an_answer_ends_where_it_is_to_stop_though_half_of_that_came_before(
    running: Running, when_it_ended: tuple[int, ...]
) -> None:
    body: Json = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0.0}
    if running.kind == "fake":
        pytest.skip("its answers come in one step")
    _, whole = running.ask(COMPLETIONS, ignore_eos=True, logprobs=1, **body)
    tokens = whole["choices"][0]["logprobs"]["tokens"]
    begins = next(n for n in range(3, 39) if "".join(tokens[n : n + 2]).isascii()
                  and "".join(tokens[n : n + 2]) not in "".join(tokens[: n + 1]))  # fmt: skip
    stop = "".join(tokens[begins : begins + 2])
    request = Interruptions(running, ignore_eos=True, stop=[stop], **body)
    answer = running.run(request.answer(begins + 1, *when_it_ended))
    assert request.interrupted == 1 + len(when_it_ended)
    assert answer["choices"][0]["text"] == "".join(tokens[:begins])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == begins + 2


@pytest.mark.parametrize("look_back", [{"n": 2}, {"seed": 7}, {"presence_penalty": 0.5}])
def test_a_request_that_made_way_starts_over_where_a_rest_is_not_the_same(
    running: Running, look_back: Json
) -> None:
    body: Json = {"prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": True}
    request = Interruptions(running, **body, **look_back)
    answer = running.run(request.answer(10))
    if running.kind == "vllm":
        assert request.interrupted == 1
        assert request.generated >= 30
        assert answer["usage"]["completion_tokens"] == 20 * look_back.get("n", 1)
        assert [choice["index"] for choice in answer["choices"]] == [*range(look_back.get("n", 1))]


def test_another_request_does_not_go_on_where_one_was(running: Running) -> None:
    async def ask() -> Json:
        request = Preemptible()
        body: Json = {"model": running.model, "temperature": 0.0, "max_tokens": 30}
        with request.asked():
            await asyncio.wait_for(
                running.replica.complete(COMPLETIONS, body | {"prompt": "One"}), 60
            )
            answer = await running.replica.complete(COMPLETIONS, body | {"prompt": "Two"})
        return answer.body["choices"][0]

    _, whole = running.ask(COMPLETIONS, prompt="Two", max_tokens=30, temperature=0.0)
    assert running.run(ask()) == whole["choices"][0]


def test_a_request_that_takes_too_long_is_no_answer_but_a_timeout(running: Running) -> None:
    async def hurry() -> Answer:
        body = {"model": running.model, "prompt": "go on", "max_tokens": 900, "ignore_eos": True}
        return await within(0.2, running.replica.complete(COMPLETIONS, body))

    if running.kind == "vllm":  # the fake one is in time
        assert error_of(running.run(hurry())).code == "timeout"


@pytest.fixture
def no_fork_server() -> Iterator[None]:
    """A process has one fork server, which other tests use with other imports than an engine's."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    preloaded = server._preload_modules
    server._stop()
    yield
    server._stop()
    server.set_forkserver_preload(preloaded)


@pytest.mark.engine
@pytest.mark.usefixtures("no_fork_server")
@pytest.mark.parametrize("forked", [False, True])
def test_an_engine_whose_process_dies_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: bool
) -> None:
    if forked:  # as with an NVIDIA card
        monkeypatch.setattr(fork_server, "NVIDIA", None)  # which is this process
    others = marked_children()
    running = Running(tiny(tmp_path / "tiny", num_gpus=float(forked)))
    (engine,) = [
        child for child in marked_children() if "EngineCore" in child.name() and child not in others
    ]
    assert (engine.ppid() != os.getpid()) == forked
    engine.kill()

    async def ask_until_it_is_noticed() -> None:
        for _ in range(100):
            body = {"model": running.model, "prompt": "hi", "max_tokens": 1}
            await running.replica.complete(COMPLETIONS, body)
            await asyncio.sleep(0.2)

    with pytest.raises(EngineDeadError):
        running.run(ask_until_it_is_noticed())
    running.run(running.replica.stop())


@pytest.mark.engine
def test_a_killed_owner_leaves_no_engine_behind(tmp_path: Path) -> None:
    # vLLM's own way: a process for the model below that of the engine.
    config = tiny(tmp_path / "tiny", engine_args={}, env={}).model_dump_json()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, config], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert any(line.startswith("started") for line in owner.stdout)
    processes = psutil.Process(owner.pid).children(recursive=True)
    names = " ".join(process.name() for process in processes)
    assert "EngineCore" in names
    assert "Worker" in names
    owner.kill()
    owner.wait()
    until(lambda: not any(map(lives, processes)), 60)


@pytest.mark.engine
def test_an_engine_that_cannot_start_names_the_cause(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tmp_path / "no-such-model"))
    with pytest.raises(EngineStartError, match="no-such-model"):
        Running(config)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ({"api_key": ["secret"]}, "api_key: give keys by gate.keys_file"),
        ({"root_path": "/api"}, "root_path: give the application a route_prefix"),
        ({"served_model_name": ["other"]}, "served_model_name: set engine.served_model_name"),
        ({"no_such": 1}, "no engine argument 'no_such'"),
    ],
)
def test_arguments_that_would_hold_for_a_part_of_the_service_are_refused(
    argument: Json, advice: str
) -> None:
    from phi4ray.replica.arguments import server_args

    with pytest.raises(ConfigError, match=advice):
        server_args(EngineConfig(model="m", engine_args=argument))


@pytest.mark.engine
def test_nor_is_vllms_own_key_for_all_taken_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from phi4ray.replica.arguments import server_args

    with pytest.raises(ConfigError, match=r"unset VLLM_API_KEY: give keys by gate\.keys_file"):
        server_args(EngineConfig(model="m", env={"VLLM_API_KEY": "secret"}))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.raises(ConfigError, match="unset VLLM_API_KEY"):
        server_args(EngineConfig(model="m"))


def test_a_fake_fails_to_start_as_planned() -> None:
    config = EngineConfig(kind="fake", model="m", engine_args={"start_error": "no memory"})
    with pytest.raises(EngineStartError, match="no memory"):
        Running(config)


@pytest.mark.slow
@pytest.mark.usefixtures("no_fork_server")
def test_forks_have_the_environment_that_their_owner_has_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fork_server, "IMPORTS", ("json", "no_such_module"))
    monkeypatch.setenv("OLD", "old")
    with kill_orphans():
        context = fork_server.start()
        monkeypatch.delenv("OLD")
        monkeypatch.setenv("NEW", "new")
        told = context.SimpleQueue()
        process = context.Process(target=tell, args=(told,))
        process.start()
        assert told.get() == (None, "new")
        process.join()


def tell(told: Any) -> None:
    told.put((os.environ.get("OLD"), os.environ["NEW"]))


def marked_children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # another test's, which has ended
            if child.environ().get(MARK):
                found.append(child)
    return found


OWNER = """
import asyncio, sys
from phi4ray.config import EngineConfig
from phi4ray.engines import make_replica

async def main():
    replica = make_replica(EngineConfig.model_validate_json(sys.argv[1]))
    await replica.start()
    print("started", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""

ORPHANS = """
import subprocess, time
from phi4ray.orphans import kill_orphans
with kill_orphans():
    subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"])
    time.sleep(600)
"""


@pytest.mark.parametrize("children_first", [False, True], ids=["alone", "after its children"])
def test_what_a_killed_process_started_dies_with_it(children_first: bool) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert owner.stdout is not None
    below = psutil.Process(int(owner.stdout.readline()))
    if children_first:  # as Ray does where a worker ends: those of the children live on
        for child in psutil.Process(owner.pid).children():
            child.kill()
        assert lives(below)
    owner.kill()
    owner.wait()
    until(lambda: not lives(below), 30)
