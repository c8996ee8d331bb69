"""One batch in the runner's hands: validated, answered as a batch job, its files made known.

Every step may be cut off at any point and run again from what the store holds.
"""

import contextlib
import io
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from rich.console import Console

from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batch.export import export_part
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import PLAN_NAME, Plan
from phi4ray.batch.planning import obtain_plan, stored_plan
from phi4ray.batch.run import answer, finish
from phi4ray.batch.tally import Tally
from phi4ray.batches import states
from phi4ray.batches.config import BatchesConfig
from phi4ray.batches.executors import Executors, Look, Stats, WatchedExecutor, stopped_executor
from phi4ray.batches.records import BatchRequest, BatchState, LineError
from phi4ray.batches.recovery import recover
from phi4ray.batches.results import result_file
from phi4ray.batches.store import Key, Store
from phi4ray.batches.validation import Checked, check, lines_of
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import (
    ConfigError,
    IncompleteOutputError,
    InputError,
    ObjectNotFoundError,
    Phi4rayError,
    StorageError,
)
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
    return "answer" if states.stopping(state) is None else "stop"


def counts_of(receipts: Iterable[Receipt]) -> tuple[int, int]:
    """How many rows of some parts are answered, and how many failed."""
    counts = [(receipt.rows, receipt.error_rows) for receipt in receipts]
    errors = sum(failed for _, failed in counts)
    return sum(rows for rows, _ in counts) - errors, errors


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
        self.key, self.request, self.step = key, request, step
        self.state = self._saved = BatchState()
        self.cancelled = self.interrupted = False
        self._store, self._config = store, config
        self._engine, self._executors, self._clock = engine, executors, clock
        self._stopped: RowError | None = None
        self._saved_s = -math.inf
        self._planned: Plan | None = None

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
        stopped = states.stopping(self.state) is not None
        try:
            match next_step(self.state):
                case "validate":
                    self._validate()
                case "answer" | "stop":
                    self._answer()
                case "tidy":
                    pass
        except (InterruptedJob, StorageError):
            raise
        except Exception as error:
            # Trying again cannot mend a file; and what is stopped, and was tried without an engine,
            # ends come what may.
            if not (isinstance(error, InputError) or stopped):
                raise
            logger.error(
                "%s ends with the answers that it has: %s", self.key.id, error,
                exc_info=not isinstance(error, Phi4rayError),
            )  # fmt: skip
            self._conclude(error)
        if self.state.ended:
            self._tidy()

    def _looked(self) -> BatchState:
        cancel_at = self._store.cancel_at(self.key) if self.cancelled else None
        return states.looked_at(self.state, self.request, cancel_at, self._clock())

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

    def _validate(self) -> None:
        checked = self._checked()
        if checked.errors:
            state = self._cancelled(self.state)
            self._end(states.failed(state, checked.errors, self._clock()))
        else:
            self._save(states.validated(self.state, checked.rows, self._clock()))

    def _checked(self) -> Checked:
        limit = int(self._config.max_row_mib * (1 << 20))
        try:
            with self._store.storage.open(self._content()) as stream:
                return check(
                    lines_of(stream, limit),
                    self.request.endpoint,
                    self._engine.model_name,
                    self._config.max_file_rows,
                    limit,
                )
        except ObjectNotFoundError as error:
            raise InputError(f"the file {self.request.input_file_id} is gone") from error

    def _answer(self) -> None:
        config = self._job()
        plan = self._planned = self._plan(config)
        done = recover(config.output, plan)
        pending = dict.fromkeys(one.index for one in plan.shards if one.index not in done)
        was, now = plan.identity["engine.model_name"], self._engine.model_name
        if pending and was != now:
            message = f"The batch began with the model {was!r}; the service now has {now!r}."
            self._refuse([LineError(code="model_not_found", message=message)])
        self._stopped = states.stopping(self.state)
        inner = stopped_executor(self._stopped) if self._stopped else self._executors(self._stop)
        executor = WatchedExecutor(inner, self._looks(plan, done.values()))
        facts = answer(config, plan, pending, executor, Console(file=io.StringIO(), quiet=True))
        self._finalize(self.state)
        finish(config, plan, facts, executor)
        self._end_with_files(plan)

    def _refuse(self, errors: Sequence[LineError]) -> None:
        if errors and states.stopping(self.state) is None:
            self._save(states.refused(self.state, errors))

    def _conclude(self, error: Exception) -> None:
        """End with what is answered; the other rows are in no file."""
        plan, output = self._planned, self._store.answers(self.key)
        told = LineError(code="invalid_file", message=self._shown(error))
        state = states.refused(self.state, [told])
        if plan is None:
            self._end(states.ended(self._cancelled(state), None, None, self._clock()))
            return
        done = recover(output, plan)
        self._finalize(states.counted(state, *counts_of(done.values())))
        for shard in done:
            with contextlib.suppress(IncompleteOutputError):  # it cannot be kept
                export_part(output, plan.part_name(shard))
        self._end_with_files(plan)

    def _shown(self, error: Exception) -> str:
        """An error without what is the operator's: where the store is, and how it is laid out."""
        message = str(error).replace(self._content(), self.request.input_file_id)
        return message.replace(self._store.root, "")

    def _content(self) -> str:
        name = self._store.content_name(self.key.owner, self.request.input_file_id)
        return self._store.uri(name)

    def _end_with_files(self, plan: Plan) -> None:
        made = self.state.finalizing_at
        assert made is not None
        life_s = self.request.output_expires_after_s or self._config.output_expiry_s
        output, error = (
            result_file(self._store, self.key, plan, kind, made, life_s)
            for kind in ("output", "error")
        )
        # From `finalizing` on the door takes no wish to cancel; those that it took are here.
        state = self._cancelled(self.state)
        self._end(states.ended(state, output, error, self._clock()))

    def _finalize(self, state: BatchState) -> None:
        self._save(states.finalizing(self._cancelled(state), self._clock()))

    def _cancelled(self, state: BatchState) -> BatchState:
        return states.cancelled(state, self._store.cancel_at(self.key))

    def _job(self) -> BatchConfig:
        return BatchConfig(
            input=(self._content(),),
            output=self._store.answers(self.key),
            engine=self._engine,
            endpoint=self.request.endpoint,
            output_format="openai-jsonl",
            shard_rows=self._config.shard_rows,
            max_row_mib=self._config.max_row_mib,
        )

    def _plan(self, config: BatchConfig) -> Plan:
        """The plan that there is, whatever engine settings have changed since; or a new one.

        A row that asks for a model which the service had when it was validated is not answered by
        another one.
        """
        uri = join(config.output, PLAN_NAME)
        try:
            return stored_plan(config.output)
        except ObjectNotFoundError:
            pass
        except ConfigError as error:
            logger.warning("%s is planned again: %s", self.key.id, error)
            self._store.storage.delete(uri)
        if states.stopping(self.state) is None and self.state.finalizing_at is None:
            wrong = [one for one in self._checked().errors if one.code == "model_not_found"]
            self._refuse(wrong)
        return obtain_plan(config, InProcessExecutor())

    def _looks(self, plan: Plan, done: Iterable[Receipt]) -> Look:
        """What is done at every tick: counts, and whether to stop."""
        answered, errors = counts_of(done)
        tally = Tally(plan.rows, answered + errors)
        self.state = states.counted(self.state, answered, errors)

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
            self._stopped = states.stopping(looked)

        return look

    def _stop(self) -> RowError | None:
        return self._stopped

    def _tidy(self) -> None:
        """Remove what the job needed and nobody can ask for, and last of all the open mark."""
        ids = (self.state.output_file_id, self.state.error_file_id)
        records = [self._store.file(self.key.owner, name) for name in ids if name]
        self._store.keep_only(
            self.key, {piece.name for record in records if record for piece in record.pieces}
        )
        self._store.close_batch(self.key)
