"""A replica: one vLLM engine behind vLLM's own OpenAI application. The only importer of vLLM.

Works with vLLM 0.25.1 (old module names) and 0.32 (`vllm.entrypoints.launchers`). Nothing of the
OpenAI protocol is written here: requests go to vLLM's serving objects, and whatever those refuse
goes through vLLM's ASGI application, which words the error as its server does.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.context import BaseContext
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from phi4ray import amx, engine_log
from phi4ray.config import Endpoint, EngineConfig
from phi4ray.errors import ConfigError, EngineDeadError, EngineStartError
from phi4ray.pauses import in_turns, rare_collections
from phi4ray.preemption import going_on
from phi4ray.protocol import Answer, Json, KVState, refusal

try:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ModuleNotFoundError:  # vLLM 0.25
    from vllm.entrypoints.openai.api_server import build_app, init_app_state
    from vllm.entrypoints.openai.cli_args import make_arg_parser

STOP_S = 2.0
"""For the engine's process to end by itself. It gives back what it holds in one second, and then
takes Python's time to exit, for which there is no need to wait."""

logger = logging.getLogger(__name__)

_NOT_ENGINE_ARGS = {"kind", "num_gpus", "num_cpus", "engine_args", "env"}


class VllmReplica:
    """A `phi4ray.protocol.Replica` on a real vLLM engine in a child process.

    `guard` is closed when it stops; `processes` starts the engine's process, if not vLLM's way.
    """

    def __init__(
        self,
        config: EngineConfig,
        guard: contextlib.ExitStack,
        processes: BaseContext | None = None,
    ) -> None:
        self.config = config
        self.app: Any = None
        """vLLM's ASGI application, once started."""
        self.on_finished: Callable[[str, int, int], None] | None = None
        """Told of each sequence that finished; not with `disable_log_stats`."""
        self.on_step: Callable[[int, float | None, int], None] | None = None
        """Told of each step; not with `disable_log_stats`."""
        self._engine: AsyncLLM | None = None
        self._vllm_config: VllmConfig | None = None
        self._stats = SchedulerStats()
        self._handlers: dict[str, tuple[type[Any], frozenset[str], Callable[..., Any]]] = {}
        self._http: httpx.AsyncClient | None = None
        self._guard = guard
        self._processes = processes

    async def start(self) -> None:
        """Load the model; see `phi4ray.protocol.Replica.start`."""
        # Forks of this process would not carry the mark that lets orphans be found.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        logged = engine_log.watch()
        try:
            await self._start(server_args(self.config))
        except (Exception, SystemExit) as error:
            await self.stop()
            cause = logged()
            raise EngineStartError(
                f"vLLM cannot start {self.config.model!r}: {type(error).__name__}: {error}"
                + (f"\nThe engine's log says: {cause}" if cause else "")
            ) from error

    async def _start(self, args: Namespace) -> None:
        if args.enable_sleep_mode and not current_platform.is_sleep_mode_available():
            logger.warning("vLLM has no sleep mode on this platform: the engine stays awake")
            args.enable_sleep_mode = False
        self._vllm_config = config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
            UsageContext.OPENAI_API_SERVER
        )
        with _started_by(self._processes):
            self._engine = engine = AsyncLLM.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=[self._stat_logger()],
                disable_log_stats=args.disable_log_stats,
            )
        client: Any = engine.engine_core
        client.get_output_async = in_turns(client.get_output_async)
        states = engine.output_processor.request_states
        client.add_request_async = going_on(states, client.add_request_async)
        tasks = await engine.get_supported_tasks()
        # A library below it sets the root logger to this, and to errors only if there is none.
        os.environ.setdefault("SAGEMAKER_CONTAINER_LOG_LEVEL", str(logging.root.level))
        self.app = build_app(args, tasks, config.model_config)
        self.app.add_exception_handler(EngineGenerateError, _as_its_cause)
        self.app.middleware_stack = None  # built already, and so with the handlers of before
        state = self.app.state
        await init_app_state(engine, state, args, tasks)
        # vLLM's handlers tell the server to exit with a dead engine; here its watcher does.
        state.server = SimpleNamespace(should_exit=False)
        for endpoint, request_type, serving, method in (
            ("/v1/chat/completions", ChatCompletionRequest, "openai_serving_chat",
             "create_chat_completion"),
            ("/v1/completions", CompletionRequest, "openai_serving_completion",
             "create_completion"),
        ):  # fmt: skip
            if handler := getattr(state, serving, None):
                fields = request_type.model_fields
                names = frozenset(fields) | {f.alias for f in fields.values() if f.alias}
                self._handlers[endpoint] = request_type, names, getattr(handler, method)
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app, raise_app_exceptions=False),
            base_url="http://replica",
            timeout=None,
        )
        await self._warm_up()
        self._guard.enter_context(rare_collections())
        enable_envs_cache()

    async def _warm_up(self) -> None:
        """Have one request answered on each way: the first costs what the others never do again."""
        one = {"model": self.config.model_name, "max_tokens": 1}
        prompts: dict[Endpoint, Json] = {
            "/v1/completions": {"prompt": "Hello"},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
        }
        for endpoint, prompt in prompts.items():
            if endpoint in self._handlers:
                # A refusal is no failure: base models have no chat template.
                await self.complete(endpoint, one | prompt)

    def _stat_logger(self) -> type[PrometheusStatLogger]:
        """What keeps the newest scheduler statistics where `kv` reads them.

        vLLM adds its Prometheus metrics unless a logger is one: they cost a batch 4% of this
        process, and nobody asks for them there.
        """
        replica = self
        base = _NoMetrics if self.config.disable_log_stats else PrometheusStatLogger

        class LatestStats(base):  # type: ignore[misc, valid-type]
            at_s = 0.0

            def record(
                self,
                scheduler_stats: SchedulerStats | None,
                iteration_stats: IterationStats | None,
                *args: Any,
                **kw: Any,
            ) -> None:
                super().record(scheduler_stats, iteration_stats, *args, **kw)
                if scheduler_stats is not None:
                    replica._stats = scheduler_stats
                if iteration_stats is None:
                    return
                if replica.on_finished is not None:
                    for one in iteration_stats.finished_requests:
                        replica.on_finished(
                            one.request_id or "", one.num_prompt_tokens, one.num_generation_tokens
                        )
                # By this process's clock and not by the engine's: clients get their tokens from
                # here, and where it cannot keep up with the engine they wait for it.
                before, self.at_s = self.at_s, time.monotonic()
                if replica.on_step is not None:
                    waited = iteration_stats.inter_token_latencies_iter
                    begun = len(iteration_stats.time_to_first_tokens_iter)
                    replica.on_step(
                        replica._stats.num_running_reqs,
                        self.at_s - before if waited else None,
                        begun,
                    )

        return LatestStats

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        """Answer one request; see `phi4ray.protocol.Replica.complete`.

        The serving objects are called directly, which spares the HTTP layer's share of a request
        (see benchmarks/RESULTS.md). What they refuse by an exception is sent through the
        application once more: it fails the same way, before any work, and is worded there.
        """
        if endpoint in self._handlers:
            request_type, names, handler = self._handlers[endpoint]
            # vLLM ignores parameters it does not know; a batch of answers that silently lack
            # what was asked for is worse than an error row.
            if unknown := body.keys() - names:
                return refusal("unknown_parameter", f"unknown parameter {min(unknown)!r}")
            try:
                response = await handler(request_type.model_validate(body))
            except Exception as error:
                self._check_alive(error)
            else:
                # vLLM answers "Client disconnected" to a request that is cancelled, and so keeps
                # from whoever cancelled it that it ended for that.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError
                content: Json = response.model_dump()
                if "error" not in content:
                    return Answer(200, content)
                self._check_alive()
                return Answer(int(content["error"]["code"]), content)
        assert self._http is not None, "start() comes first"
        try:
            reply = await self._http.post(endpoint, json=body)
        except UnicodeEncodeError as error:
            return refusal("invalid_utf8", f"the request holds text that is not UTF-8: {error}")
        self._check_alive()
        try:
            return Answer(reply.status_code, reply.json())
        except ValueError:
            return refusal("engine_error", reply.text or "empty answer", status=500)

    def _check_alive(self, cause: Exception | None = None) -> None:
        if not self.alive():
            raise EngineDeadError("the vLLM engine died; its log above says why") from cause

    def alive(self) -> bool:
        """See `phi4ray.protocol.OnlineReplica.alive`."""
        return self._engine is not None and not self._engine.errored

    @property
    def can_sleep(self) -> bool:
        """See `phi4ray.protocol.OnlineReplica.can_sleep`."""
        config = self._vllm_config
        return config is not None and bool(config.model_config.enable_sleep_mode)

    async def sleep(self) -> None:
        """See `phi4ray.protocol.OnlineReplica.sleep`: weights to the host, KV cache dropped."""
        assert self._engine is not None, "start() comes first"
        await self._moved(self._engine.sleep(level=1))

    async def wake(self) -> None:
        """See `phi4ray.protocol.OnlineReplica.wake`."""
        assert self._engine is not None, "start() comes first"
        await self._moved(self._engine.wake_up())

    async def _moved(self, done: Awaitable[Any]) -> None:
        try:
            await done
        except Exception as error:
            self._check_alive(error)
            raise

    def kv(self) -> KVState:
        """See `phi4ray.protocol.Replica.kv`."""
        assert self._vllm_config is not None, "start() comes first"
        config, stats = self._vllm_config, self._stats
        cache = config.cache_config
        capacity = cache.kv_cache_size_tokens or (cache.num_gpu_blocks or 0) * cache.block_size
        return KVState(
            capacity_tokens=capacity,
            used_tokens=round(stats.kv_cache_usage * capacity),
            running=stats.num_running_reqs,
            waiting=stats.num_waiting_reqs,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_model_len=config.model_config.max_model_len,
        )

    async def stop(self) -> None:
        """See `phi4ray.protocol.Replica.stop`."""
        engine, self._engine = self._engine, None
        disable_envs_cache()
        if self._http is not None:
            await self._http.aclose()
        if engine is not None:
            await asyncio.to_thread(engine.shutdown, STOP_S)
        self._guard.close()


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


@contextlib.contextmanager
def _started_by(processes: BaseContext | None) -> Iterator[None]:
    """Have vLLM start its processes so. Its settings know "spawn" and "fork" alone."""
    vllms = engine_utils.get_mp_context
    if processes is not None:
        engine_utils.get_mp_context = lambda: processes
    try:
        yield
    finally:
        engine_utils.get_mp_context = vllms


class _NoMetrics(PrometheusStatLogger):
    """Stands in for vLLM's Prometheus metrics, and counts nothing."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        self.engine_indexes = engine_indexes or [0]

    def record(self, *args: Any, **kw: Any) -> None:
        """Ignore it."""

    def log_engine_initialized(self) -> None:
        """Say nothing."""

    def record_admission_rejection(self, reason: str) -> None:
        """Ignore it."""

    def record_sleep_state(self, *args: Any, **kw: Any) -> None:
        """Ignore it."""


def server_args(config: EngineConfig) -> Namespace:
    """Turn an engine's configuration into the arguments of vLLM's own API server.

    Raises:
        ConfigError: vLLM has no such argument.
    """
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    # Some fields of the engine have no flag, as `model_weights`.
    known = vars(args).keys() | {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    given = config.model_dump(exclude=_NOT_ENGINE_ARGS, exclude_none=True)
    given["served_model_name"] = [config.model_name]
    for name, value in {**given, **config.engine_args}.items():
        if name not in known:
            raise ConfigError(f"this vLLM has no engine argument {name!r}: see `vllm serve --help`")
        setattr(args, name, value)
    if current_platform.is_cpu() and args.worker_extension_cls == "":
        args.worker_extension_cls = amx.WORKER_EXTENSION
    return args
