"""The autoscaling policy on a simulated fleet, against static peak and Serve's own policy.

    python benchmarks/autoscale_sim.py

A discrete-event simulation driven by the function that runs in Serve's controller, over two
traces: a day with its swing, and bursts. A replica is modelled by three measured figures of one
H200 with Phi-4 in FP8 (benchmarks/RESULTS.md):

* Work. 512 x 256 tokens ran at 34.8 requests/s and 128 x 16 at 238: solved for the two unknowns, a
  prompt token costs 25 us and an answer token 62 us of a saturated replica.
* Alone, a request gets `SOLO` tokens/s: 14.7 GB of weights, read at 60% of 4.8 TB/s, a token.
  Many share the replica: each then goes at 1 / (1 + sum(work / time alone)) of that, so that all
  together approach one second of work a second, as a step of n sequences takes t0 + n * t.
* Start: 100 s from the decision to the first token (weights from disk, compile cache cold).

A request is admitted while the demand of all fits the KV cache (1,139,056 tokens) and 1,024
sequences; it waits up to 30 s, then it is turned away. It goes to the emptiest replica. Every
policy may use 1.3 times the replicas of the static peak, which are the fewest that keep 99% of the
requests in the objective. To keep the run short, one simulated request stands for `COHORT` real
ones of the same kind.
"""

import argparse
import heapq
import json
import math
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from phi4ray.serve.autoscaling import AutoscalingPolicyConfig, ReplicaLoad, decide

PROMPT_S, ANSWER_S = 25.0e-6, 62.3e-6
SOLO = 196.0
CAPACITY = 1_139_056
MAX_SEQS = 1024
QUEUE_TIMEOUT_S = 30.0
START_S = 100.0
COHORT = 4
CONTROL_S = 1.0
EPOCH = 1_800_000_000.0
TTFT_S, TPOT_S = 2.0, 0.05


@dataclass(slots=True)
class Request:
    arrived: float
    prompt: int
    answer: int
    admitted: float = 0.0
    began: float = 0.0  # on the replica's own clock

    @property
    def alone_s(self) -> float:
        return self.prompt * PROMPT_S + self.answer / SOLO

    @property
    def load(self) -> float:
        """Share of a replica that it takes when it goes at full speed."""
        return COHORT * (self.prompt * PROMPT_S + self.answer * ANSWER_S) / self.alone_s

    @property
    def tokens(self) -> float:
        return COHORT * float(self.prompt + self.answer)


@dataclass(slots=True)
class Replica:
    """Requests share it: its own clock runs slower, the more there are."""

    ready_at: float
    now: float = 0.0
    clock: float = 0.0
    load: float = 0.0
    used: float = 0.0
    running: list[tuple[float, int, Request]] = field(default_factory=list)
    queue: deque[Request] = field(default_factory=deque)
    leaving: bool = False

    @property
    def queued(self) -> float:
        return sum(request.tokens for request in self.queue)

    def advance(self, now: float) -> None:
        self.clock += (now - self.now) / (1.0 + self.load)
        self.now = now

    def next_end(self) -> float:
        if not self.running:
            return math.inf
        return self.now + max(0.0, self.running[0][0] - self.clock) * max(1.0, self.load)


class Fleet:
    """The event loop: arrivals, ends, and a look of the policy every second."""

    def __init__(self, policy: Callable[["Fleet"], int], replicas: int) -> None:
        self.policy = policy
        self.now = 0.0
        self.replicas = [Replica(0.0) for _ in range(replicas)]
        self.target = replicas
        self.replica_s = 0.0
        self.good = self.late = self.turned_away = 0
        self.most = replicas
        self._serial = 0

    def ready(self) -> list[Replica]:
        return [r for r in self.replicas if r.ready_at <= self.now and not r.leaving]

    def run(self, arrivals: Iterator[Request], end_s: float) -> None:
        coming = next(arrivals, None)
        look = 0.0
        while True:
            ends = min(self.replicas, key=Replica.next_end, default=None)
            moments = (
                coming.arrived if coming else math.inf,
                ends.next_end() if ends else math.inf,
                look,
            )
            moment = min(moments)
            if moment >= end_s:
                return
            self.replica_s += len(self.replicas) * (moment - self.now)
            self.now = moment
            if moment == moments[1] and ends is not None:
                self._end(ends)
            elif moment == moments[0] and coming is not None:
                self._arrive(coming)
                coming = next(arrivals, None)
            else:
                self._scale(self.policy(self))
                look += CONTROL_S

    def _arrive(self, request: Request) -> None:
        ready = self.ready()
        if not ready:
            self.turned_away += 1
            return
        replica = min(ready, key=lambda r: r.used + r.queued)
        replica.queue.append(request)
        self._admit(replica)

    def _admit(self, replica: Replica) -> None:
        replica.advance(self.now)
        while replica.queue:
            request = replica.queue[0]
            if self.now - request.arrived > QUEUE_TIMEOUT_S:
                replica.queue.popleft()
                self.turned_away += 1
                continue
            full = (len(replica.running) + 1) * COHORT > MAX_SEQS
            if full or replica.used + request.tokens > CAPACITY:
                return
            replica.queue.popleft()
            request.admitted, request.began = self.now, replica.clock
            replica.used += request.tokens
            replica.load += request.load
            self._serial += 1
            entry = (replica.clock + request.alone_s, self._serial, request)
            heapq.heappush(replica.running, entry)

    def _end(self, replica: Replica) -> None:
        replica.advance(self.now)
        _, _, request = heapq.heappop(replica.running)
        replica.used -= request.tokens
        replica.load = max(0.0, replica.load - request.load)
        took = self.now - request.admitted
        slow = took / request.alone_s
        ttft = request.admitted - request.arrived + (request.prompt * PROMPT_S + 1 / SOLO) * slow
        if ttft <= TTFT_S and took / request.answer <= TPOT_S:
            self.good += 1
        else:
            self.late += 1
        self._admit(replica)
        if replica.leaving and not replica.running and not replica.queue:
            self.replicas.remove(replica)

    def _scale(self, target: int) -> None:
        self.target = target
        staying = [r for r in self.replicas if not r.leaving]
        for _ in range(target - len(staying)):
            self.replicas.append(Replica(self.now + START_S, now=self.now + START_S))
        # The youngest go first, and those that are still starting before those that work.
        for replica in sorted(staying, key=lambda r: -r.ready_at)[: max(0, len(staying) - target)]:
            replica.leaving = True
            if not replica.running and not replica.queue:
                self.replicas.remove(replica)
        self.most = max(self.most, len(self.replicas))


def static(fleet: Fleet) -> int:
    return fleet.target


def ours(config: AutoscalingPolicyConfig) -> Callable[[Fleet], int]:
    state: dict[str, Any] = {}

    def policy(fleet: Fleet) -> int:
        nonlocal state
        loads = [ReplicaLoad(CAPACITY, r.used, r.queued) for r in fleet.ready()]
        found = decide(
            config, loads, target=fleet.target, held_requests=0, now_s=EPOCH + fleet.now,
            state=state,
        )  # fmt: skip
        state = found.state
        return found.replicas

    return policy


def serves_own(target_ongoing_requests: int, most: int) -> Callable[[Fleet], int]:
    """Ray Serve's default policy itself, with its delays, on the simulation's clock."""
    from ray.serve import autoscaling_policy
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    clock = types.SimpleNamespace(time=lambda: 0.0, monotonic=lambda: 0.0)
    autoscaling_policy.time = clock
    apply = autoscaling_policy._apply_autoscaling_config(
        autoscaling_policy.default_autoscaling_policy
    )
    config = AutoscalingConfig(
        min_replicas=1, max_replicas=most, target_ongoing_requests=target_ongoing_requests
    )
    state: dict[str, Any] = {}
    window: deque[tuple[float, float]] = deque()

    def policy(fleet: Fleet) -> int:
        nonlocal state
        clock.time = lambda: EPOCH + fleet.now
        ready = fleet.ready()
        ongoing = COHORT * sum(len(r.running) + len(r.queue) for r in ready)
        window.append((fleet.now, ongoing))
        while window[0][0] < fleet.now - config.look_back_period_s:
            window.popleft()
        context = AutoscalingContext(
            deployment_id=None, deployment_name="", app_name="",
            current_num_replicas=len(ready), target_num_replicas=fleet.target,
            running_replicas=[], total_num_requests=sum(o for _, o in window) / len(window),
            total_queued_requests=0.0, aggregated_metrics=None, raw_metrics=None,
            capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=most,
            policy_state=state, last_scale_up_time=None, last_scale_down_time=None,
            current_time=clock.time(), config=config,
        )  # fmt: skip
        desired, state = apply(context)
        return max(1, min(most, math.ceil(desired)))

    return policy


def day(hours: float, peak: float) -> Callable[[float], float]:
    """Requests a second: from a fifth of the peak at night to the peak at noon, with noise."""
    noise = random.Random(1)
    minutes = [noise.lognormvariate(0, 0.08) for _ in range(int(hours * 60) + 2)]

    def rate(at: float) -> float:
        swing = 0.5 - 0.5 * math.cos(2 * math.pi * at / (hours * 3600))
        return peak * (0.2 + 0.75 * swing**1.5) * minutes[int(at // 60)]

    return rate


def bursts(hours: float, peak: float) -> Callable[[float], float]:
    """A quarter of the peak, and now and then a rise to it within two minutes, for some while."""
    chance = random.Random(2)
    spans: list[tuple[float, float]] = []
    at = 900.0
    while at < hours * 3600:
        spans.append((at, at + chance.uniform(600, 1800)))
        at = spans[-1][1] + chance.expovariate(1 / 4500)

    def rate(at: float) -> float:
        for begin, end in spans:
            if begin <= at < end:
                return peak * (0.25 + 0.75 * min(1.0, (at - begin) / 120, (end - at) / 120))
        return peak * 0.25

    return rate


def arrivals(rate: Callable[[float], float], most: float, end_s: float) -> Iterator[Request]:
    """A Poisson process thinned to the rate; prompts and answers of log-normal lengths."""
    chance = random.Random(3)
    at = 0.0
    while True:
        at += chance.expovariate(most / COHORT)
        if at >= end_s:
            return
        if chance.random() * most < rate(at):
            prompt = min(8000, int(chance.lognormvariate(6.0, 0.7)) + 16)
            answer = min(2000, int(chance.lognormvariate(5.3, 0.6)) + 8)
            yield Request(at, prompt, answer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=6.0)
    parser.add_argument("--peak", type=float, default=180.0, help="requests a second [180]")
    parser.add_argument("--target", type=float, default=0.08, help="our target_occupancy [0.08]")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    end_s = arguments.hours * 3600
    results = []
    for trace, shape in (("day", day), ("bursts", bursts)):
        rate = shape(arguments.hours, arguments.peak)
        most = max(rate(float(at)) for at in range(0, int(end_s), 30)) * 1.05
        # Static peak: the fewest replicas that keep the objective over the whole trace.
        least = max(1, int(most / 45))
        for replicas in range(least, 200):
            fleet = Fleet(static, replicas)
            fleet.run(arrivals(rate, most, end_s), end_s)
            if fleet.good >= 0.99 * (fleet.good + fleet.late + fleet.turned_away):
                break
        peak_replicas, most_replicas = replicas, math.ceil(1.3 * replicas)
        config = AutoscalingPolicyConfig(
            min_replicas=1, max_replicas=most_replicas, target_occupancy=arguments.target
        )
        policies: dict[str, Callable[[], Callable[[Fleet], int]]] = {
            "static peak": lambda: static,
            "Serve, 100 ongoing": partial(serves_own, 100, most_replicas),
            "Serve, 200 ongoing": partial(serves_own, 200, most_replicas),
            "by KV tokens": partial(ours, config),
        }
        base = 0.0
        for name, policy in policies.items():
            fleet = Fleet(policy(), peak_replicas if name == "static peak" else 2)
            fleet.run(arrivals(rate, most, end_s), end_s)
            total = fleet.good + fleet.late + fleet.turned_away
            base = base or fleet.replica_s
            results.append(
                {
                    "trace": trace, "policy": name, "requests": total * COHORT,
                    "slo": round(fleet.good / total, 4),
                    "turned_away": round(fleet.turned_away / total, 4),
                    "replica_hours": round(fleet.replica_s / 3600, 1),
                    "of_peak": round(fleet.replica_s / base, 3), "most": fleet.most,
                }
            )  # fmt: skip
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    table = Table(
        "trace", "policy", "within SLO", "turned away", "replica-hours", "of peak", "most"
    )
    for r in results:
        table.add_row(
            r["trace"], r["policy"], f"{r['slo']:.2%}", f"{r['turned_away']:.2%}",
            f"{r['replica_hours']:,.0f}", f"{r['of_peak']:.1%}", str(r["most"]),
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
