"""A simulated fleet of replicas: a discrete-event simulation with measured speeds.

A replica is modelled by measured figures of one H200 with Phi-4 in FP8 (benchmarks/RESULTS.md):

* Work. 512 x 256 tokens ran at 34.8 requests/s and 128 x 16 at 238: solved for the two unknowns, a
  prompt token costs 25 us and an answer token 62 us of a saturated replica.
* Alone, a request gets 196 tokens/s: 14.7 GB of weights, read at 60% of 4.8 TB/s, a token. Many
  share the replica: each then goes at 1 / (1 + sum(work / time alone)) of that, so that all
  together approach one second of work a second, as a step of n sequences takes t0 + n * t.
* Start: 100 s from the decision to the first token (weights from disk, compile cache cold).

A request is admitted while the demand of all fits the KV cache (1,139,056 tokens) and 1,024
sequences; it waits up to 30 s, then it is turned away. It goes to the emptiest replica.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from phi4ray.serve.autoscaling import ReplicaLoad
from phi4ray.serve.rate import Rate


@dataclass(frozen=True, slots=True)
class Speed:
    """One replica, in measured figures."""

    prompt_s: float = 25.0e-6
    answer_s: float = 62.3e-6
    solo_tokens_per_s: float = 196.0
    capacity_tokens: int = 1_139_056
    max_num_seqs: int = 1024
    start_s: float = 100.0
    queue_timeout_s: float = 30.0


H200 = Speed()
SMALL = Speed(
    prompt_s=500e-6,
    answer_s=1250e-6,
    solo_tokens_per_s=50.0,
    capacity_tokens=200_000,
    max_num_seqs=256,
)
"""A card with a twentieth of that speed: assumed, not measured. Sixteen answers at once, which hold
46,000 tokens in the end, make each other twice as slow."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must get to count as served well."""

    ttft_s: float = 2.0
    tpot_s: float = 0.05


class Arrival(NamedTuple):
    """A request: its second, and tokens of its prompt and answer."""

    at_s: float
    prompt: int
    answer: int


class Request:
    """`cohort` alike requests at once, which keeps a simulation short."""

    __slots__ = ("admitted", "alone_s", "answer", "arrived", "first_s", "load", "tokens")

    def __init__(self, arrival: Arrival, speed: Speed, cohort: int) -> None:
        self.arrived, prompt, self.answer = arrival
        self.first_s = prompt * speed.prompt_s + 1 / speed.solo_tokens_per_s
        self.alone_s = prompt * speed.prompt_s + self.answer / speed.solo_tokens_per_s
        work_s = prompt * speed.prompt_s + self.answer * speed.answer_s
        self.load = cohort * work_s / self.alone_s
        self.tokens = cohort * float(prompt + self.answer)
        self.admitted = 0.0


@dataclass(slots=True, eq=False)
class Replica:
    """Requests share it: its own clock runs slower, the more there are."""

    ready_at: float
    now: float = 0.0
    clock: float = 0.0
    load: float = 0.0
    used: float = 0.0
    queued: float = 0.0
    ends_at: float = math.inf
    running: list[tuple[float, int, Request]] = field(default_factory=list)
    queue: deque[Request] = field(default_factory=deque)
    arrived: Rate = field(default_factory=Rate)
    released: Rate = field(default_factory=Rate)
    squares: Rate = field(default_factory=Rate)
    leaving: bool = False

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do."""
        return not self.running and not self.queue

    def told(self, now: float, speed: Speed) -> ReplicaLoad:
        """What the replica would tell of itself."""
        return ReplicaLoad(
            speed.capacity_tokens,
            self.used,
            self.queued,
            self.arrived.per_s(now),
            self.released.per_s(now),
            arrived_squares_per_s=self.squares.per_s(now),
        )

    def advance(self, now: float) -> None:
        """Let time pass."""
        self.clock += (now - self.now) / (1.0 + self.load)
        self.now = now

    def plan_end(self) -> None:
        """Say when the next request ends if no other comes."""
        self.ends_at = math.inf
        if self.running:
            left = max(0.0, self.running[0][0] - self.clock)
            self.ends_at = self.now + left * (1.0 + self.load)


class Fleet:
    """The event loop: arrivals, ends, and a look of the policy every second."""

    def __init__(
        self,
        policy: Callable[["Fleet"], int],
        replicas: int,
        *,
        speed: Speed,
        objective: Objective,
        cohort: int,
    ) -> None:
        self.policy, self.speed, self.objective, self.cohort = policy, speed, objective, cohort
        self.now = 0.0
        self.replicas = [Replica(0.0) for _ in range(replicas)]
        self.target = self.most = replicas
        self.changes = 0
        self.replica_s = 0.0
        self.good = self.late = self.turned_away = 0
        self._serial = 0

    @property
    def ready(self) -> list[Replica]:
        """Replicas that take requests."""
        return [r for r in self.replicas if r.ready_at <= self.now and not r.leaving]

    @property
    def loads(self) -> list[ReplicaLoad]:
        """What they tell."""
        return [replica.told(self.now, self.speed) for replica in self.ready]

    @property
    def missed(self) -> int:
        """Requests that were not served well."""
        return self.late + self.turned_away

    @property
    def within(self) -> float:
        """Share of the requests that were."""
        return self.good / max(1, self.good + self.missed)

    def run(self, arrivals: Iterable[Arrival], end_s: float, most_missed: float = math.inf) -> None:
        """Until the end, or until so many requests missed the objective."""
        coming = iter(arrivals)
        arrival = next(coming, None)
        look, ready = 0.0, self.ready
        while self.missed <= most_missed:
            first = min(self.replicas, key=lambda r: r.ends_at, default=None)
            ends = first.ends_at if first else math.inf
            arrives = arrival.at_s if arrival else math.inf
            moment = min(arrives, ends, look, end_s)
            self.replica_s += len(self.replicas) * (moment - self.now)
            self.now = moment
            if moment == end_s:
                return
            if first and moment == ends:
                self._end(first)
            elif arrival and moment == arrives:
                self._arrive(Request(arrival, self.speed, self.cohort), ready)
                arrival = next(coming, None)
            else:
                self._scale(self.policy(self))
                ready = self.ready
                look += 1.0

    def _arrive(self, request: Request, ready: list[Replica]) -> None:
        if not ready:
            self.turned_away += 1
            return
        replica = min(ready, key=lambda r: r.used + r.queued)
        replica.arrived.add(request.tokens, self.now)
        replica.squares.add(request.tokens**2, self.now)
        replica.queue.append(request)
        replica.queued += request.tokens
        replica.advance(self.now)
        self._admit(replica)

    def _admit(self, replica: Replica) -> None:
        while replica.queue:
            request = replica.queue[0]
            late = self.now - request.arrived > self.speed.queue_timeout_s
            full = (len(replica.running) + 1) * self.cohort > self.speed.max_num_seqs
            if not late and (full or replica.used + request.tokens > self.speed.capacity_tokens):
                break
            replica.queue.popleft()
            replica.queued = replica.queued - request.tokens if replica.queue else 0.0
            if late:
                self.turned_away += 1
                continue
            request.admitted = self.now
            replica.used += request.tokens
            replica.load += request.load
            self._serial += 1
            entry = (replica.clock + request.alone_s, self._serial, request)
            heapq.heappush(replica.running, entry)
        replica.plan_end()

    def _end(self, replica: Replica) -> None:
        replica.advance(self.now)
        _, _, request = heapq.heappop(replica.running)
        replica.released.add(request.tokens, self.now)
        replica.used = replica.used - request.tokens if replica.running else 0.0
        replica.load = replica.load - request.load if replica.running else 0.0
        took = self.now - request.admitted
        ttft = request.admitted - request.arrived + took * request.first_s / request.alone_s
        if ttft <= self.objective.ttft_s and took / request.answer <= self.objective.tpot_s:
            self.good += 1
        else:
            self.late += 1
        self._admit(replica)
        if replica.leaving and replica.idle:
            self.replicas.remove(replica)

    def _scale(self, target: int) -> None:
        self.changes += target != self.target
        self.target = target
        staying = [r for r in self.replicas if not r.leaving]
        for _ in range(target - len(staying)):
            ready_at = self.now + self.speed.start_s
            self.replicas.append(Replica(ready_at, now=ready_at))
        # The youngest go first, and those that are still starting before those that work.
        for replica in sorted(staying, key=lambda r: -r.ready_at)[: max(0, len(staying) - target)]:
            replica.leaving = True
            if replica.idle:
                self.replicas.remove(replica)
        self.most = max(self.most, len(self.replicas))
