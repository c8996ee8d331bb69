"""What the engine tells of its steps, taken from vLLM's statistics."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from vllm.config import VllmConfig
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, SchedulerStats


class Told(Protocol):
    """Who is told; see `phi4ray.protocol.OnlineReplica` for those that are called."""

    stats: SchedulerStats
    """The newest of the scheduler."""
    on_finished: Callable[[str, int, int], None] | None
    on_aborted: Callable[[str, int, int], None] | None
    on_step: Callable[[int, float | None, int], None] | None


def stat_logger(told: Told, *, metrics: bool) -> type[PrometheusStatLogger]:
    """What vLLM is given to log its statistics with, once for each engine.

    Without `metrics` it has none for Prometheus: vLLM adds them unless a logger is one, they cost a
    batch 4% of this process, and nobody asks for them there.
    """
    base = PrometheusStatLogger if metrics else _NoMetrics

    class Telling(base):  # type: ignore[misc, valid-type]
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
                told.stats = scheduler_stats
            if iteration_stats is None:
                return
            if told.on_finished is not None:
                for one in iteration_stats.finished_requests:
                    told.on_finished(
                        one.request_id or "", one.num_prompt_tokens, one.num_generation_tokens
                    )
            # By this process's clock and not by the engine's: clients get their tokens from
            # here, and where it cannot keep up with the engine they wait for it.
            before, self.at_s = self.at_s, time.monotonic()
            if told.on_step is not None:
                waited = iteration_stats.inter_token_latencies_iter
                begun = len(iteration_stats.time_to_first_tokens_iter)
                told.on_step(
                    told.stats.num_running_reqs, self.at_s - before if waited else None, begun
                )

    return Telling


def tell_aborted(processor: OutputProcessor, told: Told) -> None:
    """Have it told as well what was generated for whoever did not wait for the end.

    vLLM drops the state of such a sequence, and has no statistics of it.
    """
    abort = processor.abort_requests

    def aborting(request_ids: Iterable[str], internal: bool) -> list[str]:
        ids = list(request_ids)
        if told.on_aborted is not None:
            known = processor.external_req_ids
            inner = ids if internal else [one for outer in ids for one in known.get(outer, ())]
            # Choices of one prompt, which their parent's id stands for, vLLM aborts by this again.
            for one in inner:
                state = processor.request_states.get(one)
                if state is not None and state.stats is not None:
                    told.on_aborted(
                        state.external_req_id, state.prompt_len, state.stats.num_generation_tokens
                    )
        return abort(ids, internal)

    processor.abort_requests = aborting


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
