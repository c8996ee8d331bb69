"""vLLM's own OpenAI application, and the serving objects inside it.

Nothing of the OpenAI protocol is written here.
"""

import logging
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError

try:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
except ModuleNotFoundError:  # vLLM 0.25
    from vllm.entrypoints.openai.api_server import build_app, init_app_state


@dataclass(frozen=True, slots=True)
class Handler:
    """One endpoint's serving object, to be called without HTTP."""

    request_type: type[Any]
    parameters: frozenset[str]
    answer: Callable[..., Any]


async def openai_app(engine: AsyncLLM, args: Namespace) -> tuple[Any, dict[str, Handler]]:
    """The application of a started engine, and its handlers by endpoint.

    A handler refuses by an exception or by a response with an `error`, as the application does.
    """
    tasks = await engine.get_supported_tasks()
    # A library below it sets the root logger to this, and to errors only if there is none.
    os.environ.setdefault("SAGEMAKER_CONTAINER_LOG_LEVEL", str(logging.root.level))
    app = build_app(args, tasks, engine.model_config)
    app.add_exception_handler(EngineGenerateError, _as_its_cause)
    app.middleware_stack = None  # built already, and so with the handlers of before
    await init_app_state(engine, app.state, args, tasks)
    # vLLM's handlers tell the server to exit with a dead engine; here its watcher does.
    app.state.server = SimpleNamespace(should_exit=False)
    handlers = {}
    for endpoint, request_type, serving, method in (
        ("/v1/chat/completions", ChatCompletionRequest, "openai_serving_chat",
         "create_chat_completion"),
        ("/v1/completions", CompletionRequest, "openai_serving_completion", "create_completion"),
    ):  # fmt: skip
        if found := getattr(app.state, serving, None):
            fields = request_type.model_fields
            names = frozenset(fields) | {f.alias for f in fields.values() if f.alias}
            handlers[endpoint] = Handler(request_type, names, getattr(found, method))
    return app, handlers


async def _as_its_cause(request: Request, error: EngineGenerateError) -> Response:
    """Answer as vLLM does to the error below this one, which tells whose fault it is.

    What cannot be sent to the engine, as an integer of 70 bits, is the client's and not a 500.
    """
    cause = error.__cause__ or error
    handlers = request.app.exception_handlers
    kinds = (kind for kind in type(cause).__mro__ if kind is not EngineGenerateError)
    handler = next(handlers[kind] for kind in kinds if kind in handlers)
    answer: Response = await handler(request, cause)
    return answer
