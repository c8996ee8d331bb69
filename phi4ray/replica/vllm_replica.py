"""The replica itself: `phi4ray.protocol.OnlineReplica` on a real vLLM engine.

Requests go to vLLM's serving objects, and whatever those refuse goes through vLLM's ASGI
application, which words the error as its server does.
"""

import asyncio
import contextlib
import logging
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable, Iterator
from multiprocessing.context import BaseContext
from typing import Any

import httpx
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.stats import SchedulerStats

from phi4ray import engine_log
from phi4ray.config import Endpoint, EngineConfig
from phi4ray.errors import EngineDeadError, EngineStartError
from phi4ray.pauses import in_turns, rare_collections
from phi4ray.preemption import going_on
from phi4ray.protocol import Answer, Json, KVState, refusal
from phi4ray.replica.arguments import server_args
from phi4ray.replica.openai_app import Handler, openai_app
from phi4ray.replica.statistics import stat_logger, tell_aborted

STOP_S = 2.0
"""For the engine's process to end by itself. It gives back what it holds in one second, and then
takes Python's time to exit, for which there is no need to wait."""

logger = logging.getLogger(__name__)


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
        self.on_begun: Callable[[str], None] | None = None
        """Told of each sequence that the engine is given."""
        self.on_finished: Callable[[str, int, int], None] | None = None
        """Told of each sequence that finished; not with `disable_log_stats`."""
        self.on_aborted: Callable[[str, int, int], None] | None = None
        """Told of each sequence that was aborted; not with `disable_log_stats`."""
        self.on_step: Callable[[int, float | None, int], None] | None = None
        """Told of each step; not with `disable_log_stats`."""
        self.stats = SchedulerStats()
        """The newest of the engine's scheduler."""
        self._engine: AsyncLLM | None = None
        self._vllm_config: VllmConfig | None = None
        self._handlers: dict[str, Handler] = {}
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
                stat_loggers=[stat_logger(self, metrics=not self.config.disable_log_stats)],
                disable_log_stats=args.disable_log_stats,
            )
        client: Any = engine.engine_core
        client.get_output_async = in_turns(client.get_output_async)
        states = engine.output_processor.request_states
        client.add_request_async = self._told(going_on(states, client.add_request_async))
        tell_aborted(engine.output_processor, self)
        self.app, self._handlers = await openai_app(engine, args)
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app, raise_app_exceptions=False),
            base_url="http://replica",
            timeout=None,
        )
        await self._warm_up()
        self._guard.enter_context(rare_collections())
        enable_envs_cache()

    def _told(self, add: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
        async def added(request: Any) -> None:
            if self.on_begun is not None:
                self.on_begun(request.external_req_id)
            await add(request)

        return added

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

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        """Answer one request; see `phi4ray.protocol.Replica.complete`.

        The serving objects are called directly, which spares the HTTP layer's share of a request
        (see benchmarks/RESULTS.md). What they refuse by an exception is sent through the
        application once more: it fails the same way, before any work, and is worded there.
        """
        if endpoint in self._handlers:
            handler = self._handlers[endpoint]
            # vLLM ignores parameters it does not know; a batch of answers that silently lack
            # what was asked for is worse than an error row.
            if unknown := body.keys() - handler.parameters:
                return refusal("unknown_parameter", f"unknown parameter {min(unknown)!r}")
            try:
                response = await handler.answer(handler.request_type.model_validate(body))
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

    async def abort(self, ids: Iterable[str]) -> None:
        """See `phi4ray.protocol.OnlineReplica.abort`."""
        if self._engine is not None:
            await self._engine.abort(ids)

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
        config, stats = self._vllm_config, self.stats
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
