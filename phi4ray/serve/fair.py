"""Which batch job's row goes next: by priority, and by weight among jobs of the same priority.

Start-time fair queueing (Goyal, Vin, Cheng: "Start-time Fair Queueing", SIGCOMM 1996): each job
has a virtual time that advances by what it was given divided by its weight, and the least advanced
one goes next. A job that comes, or comes back, starts at the present of its priority: it gets its
share from now on, however much the others had before, and another priority meanwhile.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Lane(Generic[T]):
    weight: float
    priority: int
    virtual: float = 0.0
    waiting: list[tuple[int, T]] = field(default_factory=list)


class FairQueue(Generic[T]):
    """Items of several jobs; those of one job go in the order of their numbers."""

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane[T]] = {}
        self._present: defaultdict[int, float] = defaultdict(float)  # by priority

    def join(self, job: str, weight: float = 1.0, priority: int = 0) -> None:
        """Add a job, or change its weight. Lower `priority` goes first, as in vLLM."""
        lane = self._lanes.setdefault(job, _Lane(weight, priority))
        if lane.priority != priority:
            lane.virtual = self._present[priority]
        lane.weight, lane.priority = weight, priority

    def leave(self, job: str) -> None:
        """Forget a job and what waits of it."""
        self._lanes.pop(job, None)

    def push(self, job: str, number: int, item: T) -> None:
        """Have an item wait; numbers are unique in a job, and a lower one goes first."""
        lane = self._lanes[job]
        if not lane.waiting:
            lane.virtual = max(lane.virtual, self._present[lane.priority])
        heapq.heappush(lane.waiting, (number, item))

    def head(self) -> T | None:
        """The item that goes next; None when none waits."""
        lane = self._next()
        return lane.waiting[0][1] if lane else None

    def pop(self, cost: float = 0.0) -> T:
        """Take the head off, and have its job pay for it. 0 for one that is not wanted any more."""
        lane = self._next()
        assert lane is not None, "nothing waits"
        if cost:
            self._present[lane.priority] = lane.virtual
            lane.virtual += cost / lane.weight
        return heapq.heappop(lane.waiting)[1]

    def refund(self, job: str, cost: float) -> None:
        """Give a job back what it paid for an item that was taken from it again."""
        if lane := self._lanes.get(job):
            lane.virtual -= cost / lane.weight

    def waiting(self, job: str) -> int:
        """How many items of a job wait."""
        lane = self._lanes.get(job)
        return len(lane.waiting) if lane else 0

    def _next(self) -> _Lane[T] | None:
        lanes = (lane for lane in self._lanes.values() if lane.waiting)
        return min(lanes, key=lambda lane: (lane.priority, lane.virtual), default=None)
