"""Whose batch is next: owners take turns, however long their queues and their batches are. Pure."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from phi4ray.batches.store import Key


class Turns(NamedTuple):
    """The batches that begin, and those at work that are to be left for a while."""

    begin: list[Key]
    leave: list[Key]


def turns(waiting: Sequence[Key], working: Sequence[Key], room: int, leaving: int = 0) -> Turns:
    """Give the room for batches to those whose owners have least at work, and to the oldest.

    An owner who has none at work does not wait for the end of one who has several: of these, the
    last to begin makes room. `working` is in the order in which they began, without those that
    are leaving already. Everybody's first batch stays, so that each owner gets on.
    """
    queue, at_work = list(waiting), list(working)
    begin: list[Key] = []
    leave: list[Key] = []
    busy = Counter(key.owner for key in working)
    while queue and len(begin) < room:
        first = min(queue, key=lambda key: (busy[key.owner], key.id))
        queue.remove(first)
        begin.append(first)
        busy[first.owner] += 1
    without = dict.fromkeys(key.owner for key in queue if not busy[key.owner])
    for _ in list(without)[leaving:]:
        owner, most = max(busy.items(), key=lambda item: item[1], default=("", 0))
        if most < 2:
            break
        last = max(at for at, key in enumerate(at_work) if key.owner == owner)
        leave.append(at_work.pop(last))
        busy[owner] -= 1
    return Turns(begin, leave)
