"""Requests that make way and come again: they go on where they were, as vLLM's own preemption does.

A request that is cancelled is forgotten by vLLM, with all that it has generated; one with a long
answer that has to make way again and again would never end. But its prompt and its answer so far
are a prompt for the rest, most of which the engine's prefix cache still holds. So the engine is
handed that, while vLLM's front end goes on with what it had made of the answer: its text, half a
character included, its log probabilities and what it looks for to stop. Whoever asked sees one
answer, and its usage, as if it had never been interrupted.
"""

import contextlib
import copy
import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

_CARRIED = frozenset({
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "max_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids",
    "include_stop_str_in_output", "logprobs", "flat_logprobs", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "output_kind", "output_text_buffer_length", "skip_clone",
})  # fmt: skip
"""Parameters that mean the same for the rest of an answer as for all of it. Others look back at
where it began, as `presence_penalty` and grammars do, and `seed` unless all is greedy, or are not
known here."""

_FINAL_ONLY = "FINAL_ONLY"
"""vLLM's kind of output for what is not streamed: nobody has seen a part of it yet."""

_asked: ContextVar["Preemptible | None"] = ContextVar("asked", default=None)


class Preemptible:
    """One request that may be cancelled and asked again. It starts over where it cannot go on:
    with several choices, or with parameters that depend on the beginning of an answer."""

    def __init__(self) -> None:
        self._state: Any = None
        """vLLM's `RequestState` of when it was asked last: the part of it that is answered."""
        self._sequences = 0

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Requests to a replica in this block are this one, now or once more."""
        self._sequences = 0
        token = _asked.set(self)
        try:
            yield
        finally:
            _asked.reset(token)

    def _go_on(self, request: Any, state: Any) -> Any:
        """What the engine is to be asked: of the same answer, what is not there yet."""
        before, self._state = self._state, None
        self._sequences += 1
        if self._sequences > 1 or not _can_go_on(request):
            return request
        self._state = state
        if before is None or not _was_aborted(before):
            return request
        if before.prompt_token_ids != request.prompt_token_ids:
            return request
        answered: list[int] = before.detokenizer.output_token_ids
        params = copy.copy(request.sampling_params)
        params.max_tokens -= len(answered)
        if not answered or params.max_tokens < 1:
            return request
        params.min_tokens = max(0, params.min_tokens - len(answered))
        state.detokenizer = before.detokenizer
        state.logprobs_processor = before.logprobs_processor
        rest = copy.copy(request)
        rest.prompt_token_ids = [*request.prompt_token_ids, *answered]
        rest.sampling_params = params
        return rest


def going_on(
    states: Mapping[str, Any], add: Callable[[Any], Awaitable[None]]
) -> Callable[[Any], Awaitable[None]]:
    """Have `Preemptible` requests go on, between vLLM's front end and its engine.

    `states` are those of vLLM's `OutputProcessor`, which knows a request before `add`, the
    engine's, does.
    """

    async def added(request: Any) -> None:
        asked = _asked.get()
        if asked is not None:
            request = asked._go_on(request, states[request.request_id])
        await add(request)

    return added


def _was_aborted(state: Any) -> bool:
    """Whether the engine had it when it was cancelled: vLLM leaves an output that says so.

    One that had ended in the same step, before its task could know, has no rest.
    """
    outputs = getattr(state.queue.output, "outputs", ())
    return any(output.finish_reason == "abort" for output in outputs)


def _can_go_on(request: Any) -> bool:
    params = request.sampling_params
    if params is None or request.prompt_token_ids is None or request.prompt_embeds is not None:
        return False
    if request.mm_features or params.output_kind.name != _FINAL_ONLY or params.max_tokens is None:
        return False
    kind: Callable[[], Any] = type(params)
    usual = _usual(kind)
    carried = _CARRIED | ({"seed"} if params.temperature == 0 else set())
    others = (name for name in params.__struct_fields__ if name not in carried and name[0] != "_")
    return all(
        getattr(params, name) is False or getattr(params, name) == getattr(usual, name)
        for name in others
    )


@functools.cache
def _usual(kind: Callable[[], Any]) -> Any:
    """Parameters of which none is set; vLLM takes its time to make some."""
    return kind()
