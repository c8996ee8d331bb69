"""A replica without a model: deterministic answers, planned delays and faults.

For fault injection and for measuring our own machinery at scale; shipped so that users can try
a job's plumbing (buckets, credentials, formats) before they rent a GPU.
"""

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterable
from typing import Any

from phi4ray.config import Endpoint, EngineConfig
from phi4ray.errors import EngineDeadError, EngineStartError
from phi4ray.fake_app import fake_app
from phi4ray.protocol import Answer, Json, KVState, refusal


class FakeReplica:
    """A `phi4ray.protocol.Replica` that answers with a digest of the request.

    `config.engine_args` may set: `latency_s` (of each request), `start_s`, `start_error`
    (message of an `EngineStartError`), `kv_cache_size_tokens`, `die_after` (requests until the
    engine is dead), `fail_times` (how often each request gets a 500 before its answer),
    `chunk_s` (between the characters of a streamed answer), `sleep_s` (to fall asleep or to wake).
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        knobs = dict(config.engine_args)
        self._latency_s = float(knobs.pop("latency_s", 0.0))
        self._start_s = float(knobs.pop("start_s", 0.0))
        self._start_error = knobs.pop("start_error", None)
        self._capacity_tokens = int(knobs.pop("kv_cache_size_tokens", 1_000_000))
        self._die_after = knobs.pop("die_after", None)
        self._fail_times = int(knobs.pop("fail_times", 0))
        chunk_s = float(knobs.pop("chunk_s", 0.0))
        self._sleep_s = float(knobs.pop("sleep_s", 0.0))
        self.can_sleep = bool(knobs.pop("enable_sleep_mode", False))
        self._asleep = False
        if knobs:
            raise EngineStartError(f"the fake engine has no argument {sorted(knobs)[0]!r}")
        self._used_tokens = self._running = self._served = 0
        self._failures: dict[str, int] = {}
        self._dead = False
        self.on_begun: Callable[[str], None] | None = None
        self.on_finished: Callable[[str, int, int], None] | None = None
        self.on_step: Callable[[int, float | None, int], None] | None = None
        self.on_aborted: Callable[[str, int, int], None] | None = None
        self.app: Any = fake_app(
            self, config.model_name, chunk_s, self._begun, self._finished, self._aborted
        )

    def _begun(self, engine_id: str) -> None:
        if self.on_begun is not None:
            self.on_begun(engine_id)

    def _finished(self, engine_id: str, usage: Json) -> None:
        if self.on_finished is not None:
            self.on_finished(engine_id, usage["prompt_tokens"], usage["completion_tokens"])

    def _aborted(self, engine_id: str, usage: Json) -> None:
        if self.on_aborted is not None:
            self.on_aborted(engine_id, usage["prompt_tokens"], usage["completion_tokens"])

    def alive(self) -> bool:
        """See `phi4ray.protocol.OnlineReplica.alive`."""
        return not self._dead

    async def abort(self, ids: Iterable[str]) -> None:
        """See `phi4ray.protocol.OnlineReplica.abort`: its answers end with whoever asks."""

    async def sleep(self) -> None:
        """See `phi4ray.protocol.OnlineReplica.sleep`."""
        self._check_alive()
        assert self.can_sleep, "enable_sleep_mode comes first"
        assert not self._running, "vLLM would abort what runs"
        self._asleep = True
        await asyncio.sleep(self._sleep_s)

    async def wake(self) -> None:
        """See `phi4ray.protocol.OnlineReplica.wake`."""
        await asyncio.sleep(self._sleep_s)
        self._check_alive()
        self._asleep = False

    async def start(self) -> None:
        """See `phi4ray.protocol.Replica.start`."""
        os.environ.update(self.config.env)
        await asyncio.sleep(self._start_s)
        if self._start_error:
            raise EngineStartError(f"the fake engine cannot start: {self._start_error}")

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        """See `phi4ray.protocol.Replica.complete`."""
        self._check_alive()
        assert not self._asleep, "an engine that sleeps cannot answer"
        text = prompt_text(endpoint, body)
        if text is None:
            return refusal("invalid_type", "the request has no prompt")
        prompt_tokens = max(1, len(text) // 4)
        limits = body.get("max_completion_tokens"), body.get("max_tokens"), 16
        max_tokens = next(limit for limit in limits if limit is not None)
        if not isinstance(max_tokens, int) or max_tokens < 1:
            return refusal("invalid_type", f"max_tokens must be a positive integer: {max_tokens!r}")
        if prompt_tokens + max_tokens > self.kv().max_model_len:
            return refusal("context_length_exceeded", f"{prompt_tokens} tokens do not fit")
        if self._fail_times:
            failures = self._failures.get(text, 0)
            if failures < self._fail_times:
                self._failures[text] = failures + 1
                return refusal("engine_error", "planned failure", status=500)
        self._running += 1
        self._used_tokens += prompt_tokens + max_tokens
        self._step(begun=1)
        try:
            if self._latency_s:
                await asyncio.sleep(self._latency_s)
        finally:
            self._running -= 1
            self._used_tokens -= prompt_tokens + max_tokens
        self._step(begun=0)
        self._served += 1
        if self._die_after is not None and self._served >= self._die_after:
            self._dead = True
        self._check_alive()
        return Answer(200, _response(endpoint, self.config.model_name, text, prompt_tokens))

    def _step(self, *, begun: int) -> None:
        if self.on_step is not None:
            self.on_step(self._running, None, begun)

    def _check_alive(self) -> None:
        if self._dead:
            raise EngineDeadError("the fake engine died as planned")

    def kv(self) -> KVState:
        """See `phi4ray.protocol.Replica.kv`."""
        return KVState(
            capacity_tokens=self._capacity_tokens,
            used_tokens=min(self._used_tokens, self._capacity_tokens),
            running=self._running,
            waiting=0,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len or 16384,
        )

    async def stop(self) -> None:
        """See `phi4ray.protocol.Replica.stop`."""
        self._dead = True


def prompt_text(endpoint: Endpoint, body: Json) -> str | None:
    """The text of a request's prompt; None where it has none."""
    if endpoint == "/v1/chat/completions":
        messages = body.get("messages")
        if not isinstance(messages, list):
            return None
        if not all(isinstance(message, dict) for message in messages):
            return None
        return "\n".join(str(message.get("content") or "") for message in messages)
    value = body.get("prompt" if endpoint == "/v1/completions" else "input")
    return value if isinstance(value, str) else None if value is None else str(value)


def fake_text(prompt: str) -> str:
    """The answer that the fake engine gives to a prompt: tests recompute it."""
    return (
        "fake:"
        + hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    )


def _response(endpoint: Endpoint, model: str, prompt: str, prompt_tokens: int) -> Json:
    text = fake_text(prompt)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 4,
        "total_tokens": prompt_tokens + 4,
    }
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if endpoint == "/v1/embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [0.0, 1.0]}]
        return {"object": "list", "model": model, "data": data, "usage": usage}
    if endpoint == "/v1/chat/completions":
        kind = "chat.completion"
        choice["message"] = {"role": "assistant", "content": text}
    else:
        kind, choice["text"] = "text_completion", text
    return {"id": text, "object": kind, "model": model, "choices": [choice], "usage": usage}
