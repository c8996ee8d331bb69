"""What the replicas' limiters tell each other: the protocol of `phi4ray.serve.limits`. Pure.

Whoever holds the exchange knows no limits. It hands on what was spent, and keeps what the buckets
lacked at the replica that was heard last: a replica that starts, or that was forgotten, takes that
over, so that neither more replicas nor new ones give a tenant a fresh minute's worth.
"""

from collections.abc import Mapping

from phi4ray.serve.limits import Spent

REFILL_S = 60.0
"""A bucket that lacks no more than a minute's worth is full after so long."""

SILENCE_S = 10.0
"""After so long a replica is taken for gone, and what runs at it is not counted any more."""


class Exchange:
    """Takes what one replica's tenants spent, and gives what others' did. Times are seconds."""

    def __init__(self) -> None:
        self._owed: dict[str, dict[str, Spent]] = {}  # replica: tenant: what it has not heard of
        self._running: dict[str, dict[str, int]] = {}
        self._heard_at_s: dict[str, float] = {}
        self._lacking: dict[str, Spent] = {}
        self._lacking_at_s = 0.0

    def exchange(
        self,
        replica: str,
        spent: Mapping[str, Spent],
        lacking: Mapping[str, Spent],
        now_s: float,
    ) -> dict[str, Spent]:
        """Hand in what was spent at a replica; gives what its buckets do not know of yet.

        `spent` is `Limiter.take_spent`, `lacking` is `Limiter.lacking`, after it.
        """
        if replica in self._owed:
            heard = self._owed[replica]
        else:
            heard = self._of_a_newcomer(lacking, now_s)
        for name, owed in self._owed.items():
            if name != replica:
                _add(owed, spent)
        self._owed[replica] = {}
        # Its buckets know all now that the exchange knows.
        self._lacking = {tenant: Spent(one.requests, one.tokens) for tenant, one in heard.items()}
        _add(self._lacking, lacking)
        self._lacking_at_s = now_s
        self._running[replica] = {tenant: one.running for tenant, one in spent.items()}
        self._heard_at_s[replica] = now_s
        # By their silence, not by how many there should be: one that drains goes on for minutes
        # beside the one that follows it.
        for gone in [one for one, at_s in self._heard_at_s.items() if now_s - at_s > SILENCE_S]:
            for known in (self._heard_at_s, self._running, self._owed):
                del known[gone]
        for other, running in self._running.items():
            if other != replica:
                for tenant, count in running.items():
                    heard.setdefault(tenant, Spent()).running += count
        return heard

    def _of_a_newcomer(self, lacking: Mapping[str, Spent], now_s: float) -> dict[str, Spent]:
        """What the fleet's buckets lack more than these."""
        # With all replicas silent, what was lacking is refilled as time goes by.
        left = max(0.0, 1 - (now_s - self._lacking_at_s) / REFILL_S)
        heard = {}
        for tenant, fleet in self._lacking.items():
            own = lacking.get(tenant, Spent())
            heard[tenant] = Spent(
                max(0.0, left * fleet.requests - own.requests),
                max(0.0, left * fleet.tokens - own.tokens),
            )
        return heard


def _add(to: dict[str, Spent], more: Mapping[str, Spent]) -> None:
    for tenant, one in more.items():
        known = to.setdefault(tenant, Spent())
        known.requests += one.requests
        known.tokens += one.tokens
