"""One batch in the runner's hands: validated, answered as a batch job, its files made known.

Every step may be cut off at any point and run again from what the store holds.
"""

import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Literal

from rich.console import Console

from phi4ray.batch.executor import Executor
from phi4ray.batch.manifest import read_receipts
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import PLAN_NAME, Plan, read_plan
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.run import answer, finish, pending_shards
from phi4ray.batch.tally import Tally
from phi4ray.batches import states
from phi4ray.batches.config import BatchesConfig
from phi4ray.batches.executors import Executors, Look, Stats, WatchedExecutor, stopped_executor
from phi4ray.batches.records import (
    STOPS,
    BatchRequest,
    BatchState,
    FileRecord,
    LineError,
    result_file_id,
)
from phi4ray.batches.store import Key, Store
from phi4ray.batches.validation import check, lines_of
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import InputError, ObjectNotFoundError
from phi4ray.protocol import RowError
from phi4ray.storage import join

Step = Literal["validate", "answer", "stop", "tidy"]

logger = logging.getLogger(__name__)


class InterruptedJob(Exception):
    """The runner goes, or another one is further with this batch: nothing more is to be written."""


def next_step(state: BatchState) -> Step:
    """What is to be done for a batch. A stopped one needs no engine."""
    if state.ended:
        return "tidy"
    if not state.validated:
        return "validate"
    return "answer" if state.stop is None else "stop"


class Job:
    """One step of one batch. `cancelled` and `interrupted` are set from outside."""

    def __init__(
        self,
        store: Store,
        key: Key,
        request: BatchRequest,
        step: Step,
        config: BatchesConfig,
        engine: EngineConfig,
        executors: Executors,
        clock: Callable[[], float],
    ) -> None:
        self.key, self.step = key, step
        self.state = self._saved = BatchState()
        self.cancelled = self.interrupted = False
        self._store, self._request, self._config = store, request, config
        self._engine, self._executors, self._clock = engine, executors, clock
        self._stopped: RowError | None = None
        self._saved_s = -math.inf

    def run(self) -> None:
        """Take the next step of the batch; blocks until it is done.

        Raises:
            InterruptedJob: the step is left to another runner, or is done.
            EngineError, StorageError, ClusterError: a later try may do it.
        """
        self.state = self._saved = self._store.state(self.key)  # another runner may have gone on
        looked = self._looked()
        if next_step(looked) == "answer" != self.step:
            raise InterruptedJob(self.key.id)  # what waits for no engine has no room for it
        if looked != self.state:
            self._save(looked)
        try:
            match next_step(self.state):
                case "validate":
                    self._validate()
                case "answer" | "stop":
                    self._answer()
                case "tidy":
                    pass
        except InputError as error:  # which trying again cannot mend
            logger.error("%s failed: %s", self.key.id, error)
            self._fail([LineError(code="invalid_file", message=str(error))])
        if self.state.ended:
            self._tidy()

    def _looked(self) -> BatchState:
        cancel_at = self._store.cancel_at(self.key) if self.cancelled else None
        return states.looked_at(self.state, self._request, cancel_at, self._clock())

    def _save(self, state: BatchState) -> None:
        # Two runners may overlap while one is being replaced. Who comes later goes on from what the
        # other one wrote: `finalizing_at` is in the names of the files.
        other = self._store.state(self.key)
        if other.ended or (other.finalizing_at and not self.state.finalizing_at):
            raise InterruptedJob(self.key.id)
        self._store.write_state(self.key, state)
        self._is_now(state)

    def _end(self, state: BatchState) -> None:
        self._is_now(self._store.end_batch(self.key, state))

    def _is_now(self, state: BatchState) -> None:
        if state.status != self._saved.status:
            logger.info(
                "%s is %s: %d requests, %d answered, %d failed",
                self.key.id, state.status, state.total, state.completed, state.failed,
            )  # fmt: skip
        self.state = self._saved = state
        self._saved_s = time.monotonic()

    def _fail(self, errors: Sequence[LineError]) -> None:
        self._end(states.failed(self.state, errors, self._clock()))

    def _validate(self) -> None:
        content = self._store.uri(
            self._store.content_name(self.key.owner, self._request.input_file_id)
        )
        limit = int(self._config.max_row_mib * (1 << 20))
        try:
            with self._store.storage.open(content) as stream:
                checked = check(
                    lines_of(stream, limit),
                    self._request.endpoint,
                    self._engine.model_name,
                    self._config.max_file_rows,
                    limit,
                )
        except ObjectNotFoundError as error:
            raise InputError(f"the file {self._request.input_file_id} is gone") from error
        if checked.errors:
            self._fail(checked.errors)
        else:
            self._save(states.validated(self.state, checked.rows, self._clock()))

    def _answer(self) -> None:
        config = self._job()
        self._stopped = STOPS[self.state.stop] if self.state.stop else None
        inner = stopped_executor(self._stopped) if self._stopped else self._executors(self._stop)
        plan = self._plan(config, inner)
        was, now = plan.identity["engine.model_name"], self._engine.model_name
        if was != now:
            message = f"The batch began with the model {was!r}; the service now has {now!r}."
            self._fail([LineError(code="model_not_found", message=message)])
            return
        pending = pending_shards(config, plan)
        done = [shard.index for shard in plan.shards if shard.index not in pending]
        executor = WatchedExecutor(
            inner, self._looks(plan, read_receipts(config.output, plan, done))
        )
        facts = answer(config, plan, pending, executor, Console(file=io.StringIO(), quiet=True))
        self._save(states.finalizing(self.state, self._clock()))
        finish(config, plan, facts, executor)
        output, error = self._results()
        self._end(states.ended(self.state, output, error, self._clock()))

    def _job(self) -> BatchConfig:
        content = self._store.content_name(self.key.owner, self._request.input_file_id)
        return BatchConfig(
            input=(self._store.uri(content),),
            output=self._store.answers(self.key),
            engine=self._engine,
            endpoint=self._request.endpoint,
            output_format="openai-jsonl",
            shard_rows=self._config.shard_rows,
            max_row_mib=self._config.max_row_mib,
        )

    def _plan(self, config: BatchConfig, executor: Executor) -> Plan:
        """The plan that there is, though the engine's settings may have changed since."""
        uri = join(config.output, PLAN_NAME)
        try:
            return read_plan(self._store.storage.read(uri), uri)
        except ObjectNotFoundError:
            return obtain_plan(config, executor)

    def _looks(self, plan: Plan, done: Sequence[Receipt]) -> Look:
        """What is done at every tick: counts, and whether to stop."""
        rows, errors = sum(r.rows for r in done), sum(r.error_rows for r in done)
        tally = Tally(plan.rows, rows)
        self.state = states.counted(self.state, rows - errors, errors)

        def look(receipt: Receipt | None, stats: Stats) -> None:
            if self.interrupted:
                raise InterruptedJob(self.key.id)
            if receipt is not None:
                tally.add(receipt, 0.0)
            snapshot = tally.snapshot(stats, 0.0)
            failed = errors + snapshot.error_rows
            self.state = states.counted(self.state, snapshot.rows_done - failed, failed)
            looked = self._looked()
            due = time.monotonic() - self._saved_s >= self._config.poll_interval_s
            if looked.stop != self.state.stop or (due and looked != self._saved):
                self._save(looked)
            if looked.stop is not None:
                self._stopped = STOPS[looked.stop]

        return look

    def _stop(self) -> RowError | None:
        return self._stopped

    def _results(self) -> tuple[str | None, str | None]:
        """Make the files of answers and of errors known; None for one that would be empty."""
        made = self.state.finalizing_at
        assert made is not None
        life_s = self._request.output_expires_after_s or self._config.output_expiry_s
        found: list[str | None] = []
        kinds: tuple[tuple[Literal["output", "error"], str], ...] = (
            ("output", ".output.jsonl"), ("error", ".errors.jsonl"),
        )  # fmt: skip
        for kind, ending in kinds:
            pieces = self._store.pieces(self.key, ending)
            record = FileRecord(
                id=result_file_id(self.key.id, kind, made),
                filename=f"{self.key.id}_{kind}.jsonl",
                purpose="batch_output",
                created_at=made,
                expires_at=None if life_s is None else int(made + life_s),
                pieces=pieces,
            )
            if pieces:
                self._store.write_file(self.key.owner, record)
            found.append(record.id if pieces else None)
        return found[0], found[1]

    def _tidy(self) -> None:
        """Remove what the job needed and nobody can ask for, and last of all the open mark."""
        ids = (self.state.output_file_id, self.state.error_file_id)
        records = [self._store.file(self.key.owner, name) for name in ids if name]
        self._store.keep_only(
            self.key, {piece.name for record in records if record for piece in record.pieces}
        )
        self._store.close_batch(self.key)
