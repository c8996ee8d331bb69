"""Which replica works on which shards of which job, where replicas serve online traffic besides.

    driver:  submit → poll, poll, … → forget       replica: exchange, exchange, …

Replicas come and go, and have time for batch or not, so they ask for shards when they want some,
and hold them as leases. A replica that is silent has lost its leases. When no shard is left to
hand out, one that has come along least is given to a second replica that is free (backup tasks of
Dean and Ghemawat, "MapReduce", OSDI 2004, section 3.6): both write the same part, and the last one
wins. A shard that went down with a replica may be what killed it: it goes after all others, after
some such deaths one at a time to a replica, and is given up at last. Everything here may be
forgotten and told again: truth is in the parts. Pure: times are given.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from phi4ray.batch.parts import Receipt
from phi4ray.batch.worker import WorkerStats
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import Phi4rayError
from phi4ray.protocol import RowError

SILENT_S = 5.0
"""A replica that has not been heard of for so long is gone."""

DRIVER_SILENT_S = 60.0
"""And so is the driver of a job."""

BACKUP_AFTER_S = 15.0
"""A shard that was handed out so long ago may be given to a second replica."""

GRACE_S = 10.0
"""A table that has just started may not have been told of a job yet that replicas know."""

MAX_DIED = 3
"""A shard with which so many engines died is given up, and with one less it is a suspect."""

MAX_LOST = 8
"""The same of replicas that were lost without a word, with an engine's death or without one."""

ENGINE_DIED = RowError(
    "engine_died",
    "Engine after engine died at work on this row and others of its part, of which one may be what "
    "kills them: ask for them again in small numbers to find it, or later if replicas were lost "
    "for another reason.",
)
"""What the rows of a shard get that is given up."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as its replicas need to know it. `lanes` is the shards a replica works on at once.

    Room is shared by `weight` among jobs of the same `priority`; a lower one goes first. With
    `same_engine` a replica whose engine is another than that of its plan fails it.
    """

    name: str
    config: BatchConfig
    plan_id: str
    lanes: int
    weight: float = 1.0
    priority: int = 0
    same_engine: bool = True


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica tells: all by name of job.

    `holding` has the shards that it works on, `wanted` how many more it would take. One that is
    `draining` has dropped its shards, and takes no other; one whose `engine_died` is about to end.
    """

    replica: str
    engine: EngineConfig
    stats: Mapping[str, WorkerStats] = field(default_factory=dict)
    holding: Mapping[str, frozenset[int]] = field(default_factory=dict)
    wanted: Mapping[str, int] = field(default_factory=dict)
    finished: Sequence[tuple[str, Receipt]] = ()
    failed: Sequence[tuple[str, Phi4rayError]] = ()
    draining: bool = False
    engine_died: bool = False


@dataclass(frozen=True, slots=True)
class Orders:
    """What a replica is told: jobs that are new to it, what to begin, and what is worth nothing.

    Of a job that is not in `live` everything is to be dropped; of one in `stop` every row that is
    not answered yet gets that error, see `phi4ray.batch.worker.ShardWorker.stop`.
    """

    live: frozenset[str]
    new: tuple[Job, ...] = ()
    begin: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    drop: Mapping[str, frozenset[int]] = field(default_factory=dict)
    stop: Mapping[str, RowError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class News:
    """What a driver is told: the receipts that it has not seen, and what replicas do now.

    `leased` counts the shards that replicas work on, `replicas` those that were heard of lately.
    `given_up` has all shards that nobody will answer: their rows are to have `ENGINE_DIED`.
    `batch_replicas` is how many batch may start or keep, None where their number is fixed.
    """

    receipts: tuple[Receipt, ...]
    leased: int
    stats: Mapping[str, WorkerStats]
    failure: Phi4rayError | None
    replicas: int = 0
    batch_replicas: int | None = None
    given_up: tuple[int, ...] = ()


def waits_for(application: str, news: News) -> str:
    """Say what a job waits for while no replica runs; empty while one does."""
    if news.replicas:
        return ""
    nobody = f"no replica of {application!r} runs: rows wait "
    match news.batch_replicas:
        case None:
            return nobody + "until Serve has started one"
        case 0:
            return (
                nobody + "for an online request to start one. With autoscaling.batch_replicas of 1 "
                "or more in the application's settings batch jobs do so themselves"
            )
        case _:
            return nobody + "for the one that is being started for them"


@dataclass(slots=True)
class _Entry:
    job: Job
    pending: deque[int]
    heard_s: float
    leases: dict[int, dict[str, float]] = field(default_factory=dict)
    lost: dict[int, dict[str, bool]] = field(default_factory=dict)
    """The replicas that a shard went down with, and of which the engine is known to have died."""
    done: set[int] = field(default_factory=set)
    given_up: list[int] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    seen: int = 0
    stats: dict[str, WorkerStats] = field(default_factory=dict)
    failure: Phi4rayError | None = None
    stop: RowError | None = None


class JobTable:
    """The jobs of one application. Safe to call again when an answer was lost on its way."""

    def __init__(self, now_s: float) -> None:
        self.engine: EngineConfig | None = None
        """What the application's replicas run, once one was heard of."""
        self._started_s = now_s
        self._jobs: dict[str, _Entry] = {}
        self._replicas: dict[str, float] = {}
        self._batch_replicas: int | None = None

    def submit(self, job: Job, pending: Sequence[int], now_s: float) -> None:
        """Have these shards answered, in this order."""
        if job.name not in self._jobs:
            self._jobs[job.name] = _Entry(job, deque(pending), now_s)

    def poll(self, name: str, seen: int, now_s: float) -> News | None:
        """What is new of a job of which `seen` receipts were received; None if it is not known."""
        # Where no replica is left, none comes along that would have the others forgotten.
        self._forget_silent_replicas(now_s)
        entry = self._jobs.get(name)
        if entry is None:
            return None
        entry.heard_s = now_s
        # What was received need not be kept.
        del entry.receipts[: seen - entry.seen]
        entry.seen = seen
        return News(
            tuple(entry.receipts),
            len(entry.leases),
            dict(entry.stats),
            entry.failure,
            len(self._replicas),
            self._batch_replicas,
            tuple(entry.given_up),
        )

    def open_shards(self, engine: EngineConfig, batch_replicas: int, now_s: float) -> int:
        """Tell autoscaling how many shards of all jobs are not answered yet.

        It tells what the application's replicas run, of which there may be none, and how many of
        them batch may start or keep.
        """
        self.engine, self._batch_replicas = engine, batch_replicas
        return sum(
            len(entry.pending) + len(entry.leases)
            for entry in self._jobs.values()
            if entry.failure is None
            and entry.stop is None
            and now_s - entry.heard_s <= DRIVER_SILENT_S
        )

    def stop(self, name: str, error: RowError) -> None:
        """Have the shards in hand ended with this error for what is left; begin no other."""
        if entry := self._jobs.get(name):
            entry.stop = error

    def forget(self, name: str) -> None:
        """Drop a job; replicas stop working on it at their next exchange."""
        self._jobs.pop(name, None)

    def exchange(self, report: Report, now_s: float) -> Orders:
        """Take a replica's report, and tell it what to do."""
        self.engine = report.engine
        if report.replica not in self._replicas and not report.engine_died:
            for each in self._jobs.values():  # it was only out of reach
                for replicas in each.lost.values():
                    replicas.pop(report.replica, None)
        self._replicas[report.replica] = now_s
        self._forget_silent_drivers(now_s)
        self._forget_silent_replicas(now_s)
        for name, receipt in report.finished:
            if entry := self._jobs.get(name):
                _finish(entry, receipt)
        for name, error in report.failed:
            if (entry := self._jobs.get(name)) and entry.failure is None:
                entry.failure = error
        if report.draining or report.engine_died:
            del self._replicas[report.replica]
            for entry in self._jobs.values():
                if report.engine_died:
                    _lose(entry, report.replica, died=True)
                else:
                    _leave(entry, report.replica)
            return Orders(live=frozenset())
        begin: dict[str, tuple[int, ...]] = {}
        drop: dict[str, frozenset[int]] = {}
        for name, entry in self._jobs.items():
            entry.stats.pop(report.replica, None)
            if name in report.stats:
                entry.stats[report.replica] = report.stats[name]
            held = report.holding.get(name, frozenset())
            _renew(entry, report.replica, held, now_s)
            if useless := held & entry.done:
                drop[name] = useless
            # Of a job that is new to it a replica wants one shard to begin with.
            wanted = report.wanted.get(name, 0 if name in report.stats else 1)
            if entry.failure is None and entry.stop is None and wanted:
                alone = any(_has_suspect(other, report.replica) for other in self._jobs.values())
                begin[name] = tuple(_take(entry, report.replica, wanted, now_s, suspects=not alone))
        fresh = now_s - self._started_s < GRACE_S
        return Orders(
            live=frozenset(self._jobs) | (frozenset(report.stats) if fresh else frozenset()),
            new=tuple(e.job for name, e in self._jobs.items() if name not in report.stats),
            begin=begin,
            drop=drop,
            stop={name: e.stop for name, e in self._jobs.items() if e.stop is not None},
        )

    def _forget_silent_drivers(self, now_s: float) -> None:
        for name in [n for n, e in self._jobs.items() if now_s - e.heard_s > DRIVER_SILENT_S]:
            del self._jobs[name]

    def _forget_silent_replicas(self, now_s: float) -> None:
        for replica in [r for r, at in self._replicas.items() if now_s - at > SILENT_S]:
            del self._replicas[replica]
            for entry in self._jobs.values():
                _lose(entry, replica, died=False)


def _finish(entry: _Entry, receipt: Receipt) -> None:
    if receipt.shard not in entry.done:
        entry.done.add(receipt.shard)
        entry.receipts.append(receipt)
    entry.leases.pop(receipt.shard, None)


def _renew(entry: _Entry, replica: str, held: frozenset[int], now_s: float) -> None:
    for shard in held - entry.done:
        entry.leases.setdefault(shard, {}).setdefault(replica, now_s)
    # What was handed out a moment ago may not be held yet.
    for shard, leases in list(entry.leases.items()):
        if shard not in held and now_s - leases.get(replica, now_s) > SILENT_S:
            _release(entry, shard, replica)


def _leave(entry: _Entry, replica: str) -> None:
    """Take back all shards of a replica: another one begins with them."""
    entry.stats.pop(replica, None)
    for shard in _held(entry, replica):
        _release(entry, shard, replica)


def _lose(entry: _Entry, replica: str, *, died: bool) -> None:
    """Take back all shards of a replica that is gone: they go last, or are given up."""
    entry.stats.pop(replica, None)
    for shard in _held(entry, replica):
        entry.lost.setdefault(shard, {})[replica] = died
        if _more_to_lose(entry, shard):
            _release(entry, shard, replica, last=True)
        else:
            del entry.leases[shard]
            entry.done.add(shard)
            entry.given_up.append(shard)


def _held(entry: _Entry, replica: str) -> list[int]:
    return [shard for shard, leases in entry.leases.items() if replica in leases]


def _release(entry: _Entry, shard: int, replica: str, *, last: bool = False) -> None:
    leases = entry.leases[shard]
    del leases[replica]
    if not leases:
        del entry.leases[shard]
        if last:
            entry.pending.append(shard)
        else:
            entry.pending.appendleft(shard)


def _more_to_lose(entry: _Entry, shard: int) -> int:
    """How many more replicas a shard may go down with until it is given up; 0 at the last one."""
    lost = entry.lost.get(shard, {})
    return max(0, min(MAX_LOST - len(lost), MAX_DIED - sum(lost.values())))


def _suspect(entry: _Entry, shard: int) -> bool:
    return _more_to_lose(entry, shard) == 1


def _has_suspect(entry: _Entry, replica: str) -> bool:
    return any(
        _suspect(entry, shard) and replica in entry.leases.get(shard, ()) for shard in entry.lost
    )


def _take(entry: _Entry, replica: str, wanted: int, now_s: float, *, suspects: bool) -> list[int]:
    """The next shards, of them one suspect at most; with `suspects` false none."""
    taken: list[int] = []
    left: list[int] = []
    while entry.pending and len(taken) < wanted:
        shard = entry.pending.popleft()
        if shard in entry.done or shard in entry.leases:
            continue
        suspect = _suspect(entry, shard)
        if suspect and not suspects:
            left.append(shard)
            continue
        suspects = suspects and not suspect
        taken.append(shard)
    entry.pending.extend(left)
    if not taken and (slow := _backup(entry, replica, now_s)) is not None:
        taken.append(slow)
    for shard in taken:
        entry.leases.setdefault(shard, {})[replica] = now_s
    return taken


def _backup(entry: _Entry, replica: str, now_s: float) -> int | None:
    """The shard that has come along least among those that one other replica has for long."""

    def rows(shard: int) -> int:
        (holder,) = entry.leases[shard]
        stats = entry.stats.get(holder)
        done = stats.open_shards.get(shard) if stats else None
        return done.rows if done else 0

    slow = [
        shard
        for shard, leases in entry.leases.items()
        if len(leases) == 1
        and replica not in leases
        and not _suspect(entry, shard)
        and now_s - next(iter(leases.values())) > BACKUP_AFTER_S
    ]
    return min(slow, key=rows, default=None)
