"""Adding up what a run has done so far, from the receipts of its parts and its workers' stats."""

from collections.abc import Mapping
from dataclasses import dataclass

from phi4ray.batch.answers import Done
from phi4ray.batch.parts import Receipt
from phi4ray.batch.worker import WorkerStats
from phi4ray.errors import TooManyErrorsError

MIN_ROWS_FOR_FRACTION = 100
"""`max_error_fraction` is judged from so many finished rows on, or at the end of the run."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment. Rows count those of earlier runs too, errors and tokens only this one's.

    `errors` counts rows by code; `kv_used_fraction` is the replicas' mean; `elapsed_s` counts from
    the start of this run.
    """

    rows_total: int
    rows_resumed: int
    rows_done: int
    errors: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    rows_in_flight: int
    kv_used_fraction: float
    running: int
    waiting: int
    replicas: int
    elapsed_s: float

    @property
    def error_rows(self) -> int:
        """Rows without an answer."""
        return sum(self.errors.values())

    @property
    def starting(self) -> bool:
        """Whether no replica has been ready yet."""
        return not self.replicas and self.rows_done == self.rows_resumed


class Tally:
    """The running totals of one run. Pure: times are given.

    `rewritten` has the earlier receipts of parts whose failed rows this run reruns: only what it
    adds to them is counted as its own. `before` is what earlier runs answered and this one leaves
    as it is: a job has too many errors by all its rows.
    """

    def __init__(
        self,
        rows_total: int,
        rows_resumed: int,
        rewritten: Mapping[int, Receipt] | None = None,
        before: Done | None = None,
    ) -> None:
        self._before = before or Done()
        self._rows_total = rows_total
        self._rows_resumed = rows_resumed
        self._rewritten = rewritten or {}
        self._written: set[int] = set()
        self._done = Done()
        self._open: Mapping[str, Mapping[int, Done]] = {}
        self.first_part_s: float | None = None
        """When the first part of this run was durable."""
        self.last_part_s: float | None = None
        self.engine_began_s: float | None = None
        """When a replica took this run's first shard."""
        self.replica_s = 0.0
        """How long replicas were held, added up: each counts while it tells of itself, from one
        snapshot to the next, and for its start as long as the first took from the run's start.
        """
        self._replicas, self._looked_at_s = 0, 0.0
        self._known: set[str] = set()
        self._start_s: float | None = None

    def add(self, receipt: Receipt, elapsed_s: float) -> None:
        """Count a part that is written. One that is told twice, by a retried task, counts once."""
        if receipt.shard in self._written:
            return
        self._written.add(receipt.shard)
        before = self._rewritten.get(receipt.shard)
        self._done += Done(
            before.error_rows if before else receipt.rows,
            receipt.errors,
            receipt.prompt_tokens - (before.prompt_tokens if before else 0),
            receipt.completion_tokens - (before.completion_tokens if before else 0),
        )
        # By this run's clock: the worker's may show another time. What it found was written before.
        began_s = max(0.0, elapsed_s - receipt.took_s)
        if self.engine_began_s is None or began_s < self.engine_began_s:
            self.engine_began_s = began_s
        if self.first_part_s is None:
            self.first_part_s = elapsed_s
        self.last_part_s = elapsed_s

    def snapshot(self, stats: Mapping[str, WorkerStats], elapsed_s: float) -> Snapshot:
        """The totals now, of written parts and of what is finished of others."""
        self._hold(stats, elapsed_s)
        # A shard that its worker does not tell of any more is written, and its receipt on the way;
        # what a worker had open that is gone is lost.
        self._open = {
            name: {
                shard: done
                for shard, done in {**self._open.get(name, {}), **worker.open_shards}.items()
                if shard not in self._written
            }
            for name, worker in stats.items()
        }
        # A shard that moved to another worker may still be told by its first one.
        unfinished: dict[int, Done] = {}
        for shards in self._open.values():
            for shard, done in shards.items():
                if done.rows >= unfinished.get(shard, done).rows:
                    unfinished[shard] = done
        total = sum(unfinished.values(), start=self._done)
        replicas = max(1, len(stats))
        return Snapshot(
            rows_total=self._rows_total,
            rows_resumed=self._rows_resumed,
            rows_done=self._rows_resumed + total.rows,
            errors=total.errors,
            prompt_tokens=total.prompt_tokens,
            completion_tokens=total.completion_tokens,
            rows_in_flight=sum(worker.rows_in_flight for worker in stats.values()),
            kv_used_fraction=sum(worker.kv_used_fraction for worker in stats.values()) / replicas,
            running=sum(worker.running for worker in stats.values()),
            waiting=sum(worker.waiting for worker in stats.values()),
            replicas=len(stats),
            elapsed_s=elapsed_s,
        )

    def _hold(self, stats: Mapping[str, WorkerStats], elapsed_s: float) -> None:
        if stats and self._start_s is None:
            self._start_s = elapsed_s
        new = stats.keys() - self._known
        held_s = self._replicas * (elapsed_s - self._looked_at_s)
        self.replica_s += held_s + len(new) * (self._start_s or 0.0)
        self._known |= new
        self._replicas, self._looked_at_s = len(stats), elapsed_s

    def check_errors(
        self, snapshot: Snapshot, max_error_fraction: float | None, *, final: bool = False
    ) -> None:
        """Stop a job that is plainly misconfigured; parts that are written stay.

        Raises:
            TooManyErrorsError: more than this share of the finished rows failed.
        """
        own = Done(snapshot.rows_done - snapshot.rows_resumed, snapshot.errors)
        done = self._before + own
        rows, failed = done.rows, sum(done.errors.values())
        if max_error_fraction is None or rows < (1 if final else MIN_ROWS_FOR_FRACTION):
            return
        if failed > max_error_fraction * rows:
            codes = sorted(done.errors.items(), key=lambda item: -item[1])[:5]
            named = ", ".join(f"{code} ({count:,})" for code, count in codes)
            raise TooManyErrorsError(
                f"{failed:,} of {rows:,} rows failed, more than max_error_fraction="
                f"{max_error_fraction:g} allows: {named}. Correct the input or the settings and "
                "use a new output; or run the same command with a higher fraction to go on"
            )
