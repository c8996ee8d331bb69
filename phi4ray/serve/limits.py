"""How much a tenant may ask: requests and tokens a minute, and requests at once. Pure.

Each replica counts for itself, and tells the others now and then what was spent at it. At every
exchange a replica hands in `take_spent()`, and gives to `absorb()` the sum of what the others have
handed in since its last exchange, with the requests that run at them now. Nothing may be handed on
twice, or to the replica it came from. A limit is then exceeded by no more than what the replicas
admit between two exchanges. A replica that starts hears, at its first exchange, what the others'
buckets are lacking: see `phi4ray.serve.exchange`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from phi4ray.serve.tenants import Tenant

LONGEST_RETRY_S = 60
"""Of the wait for a place among the requests at once, which only a mean tells."""


@dataclass(slots=True)
class Spent:
    """What a tenant has used at one replica since the last exchange, and what runs there now."""

    requests: float = 0.0
    tokens: float = 0.0
    running: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """Which limit is reached, and when there is room again."""

    limit: str
    retry_after_s: int


@dataclass(slots=True)
class _Bucket:
    """Holds a minute's worth at most, and is refilled continuously. May be overdrawn."""

    per_minute: float
    level: float
    at_s: float

    def refill(self, now_s: float) -> float:
        # A look that comes late with an early time must not have the same seconds earned twice.
        earned = max(0.0, now_s - self.at_s) * self.per_minute / 60
        self.level = min(self.per_minute, self.level + earned)
        self.at_s = max(self.at_s, now_s)
        return self.level

    def take(self, amount: float, now_s: float) -> None:
        """Take an amount; a negative one is given back."""
        self.level = self.refill(now_s) - amount

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much, or a full bucket if it is more than that, can be taken."""
        missing = min(amount, self.per_minute) - self.refill(now_s)
        return max(0.0, missing * 60 / self.per_minute)


@dataclass(slots=True)
class _Account:
    requests: _Bucket | None
    tokens: _Bucket | None
    running: int = 0
    running_elsewhere: int = 0
    mean_s: float = 0.0
    spent: Spent = field(default_factory=Spent)


@dataclass(slots=True)
class Lease:
    """An admitted request's place; give it back with `Limiter.release`."""

    tenant: str
    tokens: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left to a tenant now, for the `x-ratelimit-` headers; None where no limit is."""

    requests: tuple[float, float] | None
    """Limit a minute and what is left."""
    tokens: tuple[float, float] | None


class Limiter:
    """The accounts of all tenants at one replica. Times are seconds of any steady clock."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def open(self, tenants: Iterable[Tenant], now_s: float) -> None:
        """Have accounts for these tenants, so that what they spend elsewhere counts from now on."""
        for tenant in tenants:
            self._account(tenant, now_s)

    def acquire(self, tenant: Tenant, tokens: float, now_s: float) -> Lease | Refused:
        """Take a request and its expected tokens from a tenant's limits, or say what is reached."""
        account = self._account(tenant, now_s)
        most = tenant.max_concurrency
        running = account.running + account.running_elsewhere
        if most is not None and running >= most:
            # Of n requests that take d seconds each, one ends every d / n (Little's law).
            return Refused("concurrency", _whole_seconds(account.mean_s / running, LONGEST_RETRY_S))
        for limit, bucket, amount in (
            ("requests", account.requests, 1.0),
            ("tokens", account.tokens, tokens),
        ):
            if bucket is not None and (wait_s := bucket.wait_s(amount, now_s)) > 0:
                return Refused(limit, _whole_seconds(wait_s))
        _spend(account, 1.0, tokens, now_s)
        account.running += 1
        return Lease(tenant.name, tokens, now_s)

    def charge(self, lease: Lease, tokens: float, now_s: float) -> Refused | None:
        """Take tokens for a request that is let in already, or say when there are enough."""
        account = self._accounts[lease.tenant]
        bucket = account.tokens
        if bucket is not None and (wait_s := bucket.wait_s(tokens, now_s)) > 0:
            return Refused("tokens", _whole_seconds(wait_s))
        _spend(account, 0.0, tokens, now_s)
        lease.tokens += tokens
        return None

    def cancel(self, lease: Lease, now_s: float) -> None:
        """End a request as if it had never come."""
        account = self._accounts[lease.tenant]
        account.running -= 1
        _spend(account, -1.0, -lease.tokens, now_s)

    def release(self, lease: Lease, used_tokens: float | None, now_s: float) -> None:
        """End a request; the tokens that it did not use go back. None: it used what it took."""
        account = self._accounts[lease.tenant]
        account.running -= 1
        took_s = max(0.0, now_s - lease.at_s)
        account.mean_s += (took_s - account.mean_s) * (0.1 if account.mean_s else 1.0)
        if used_tokens is not None:
            _spend(account, 0.0, used_tokens - lease.tokens, now_s)

    def remaining(self, tenant: Tenant, now_s: float) -> Remaining:
        """What a tenant may still ask for now."""
        account = self._account(tenant, now_s)
        left = [
            None if bucket is None else (bucket.per_minute, max(0.0, bucket.refill(now_s)))
            for bucket in (account.requests, account.tokens)
        ]
        return Remaining(*left)

    def take_spent(self) -> dict[str, Spent]:
        """What was spent here since the last call, for the other replicas.

        Tenants that spent nothing and have nothing running are left out.
        """
        spent = {}
        for name, account in self._accounts.items():
            account.spent.running = account.running
            if account.spent != Spent():
                spent[name], account.spent = account.spent, Spent()
        return spent

    def lacking(self, now_s: float) -> dict[str, Spent]:
        """What each tenant's buckets need to be full; full ones are left out."""
        lacking = {}
        for name, account in self._accounts.items():
            requests, tokens = (
                0.0 if bucket is None else bucket.per_minute - bucket.refill(now_s)
                for bucket in (account.requests, account.tokens)
            )
            if requests > 0 or tokens > 0:
                lacking[name] = Spent(requests, tokens)
        return lacking

    def absorb(self, elsewhere: Mapping[str, Spent], now_s: float) -> None:
        """Count what was spent at the other replicas since the last call."""
        for name, account in self._accounts.items():
            spent = elsewhere.get(name, Spent())
            account.running_elsewhere = spent.running
            for bucket, amount in (
                (account.requests, spent.requests),
                (account.tokens, spent.tokens),
            ):
                if bucket is not None:
                    bucket.take(amount, now_s)

    def _account(self, tenant: Tenant, now_s: float) -> _Account:
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = _Account(None, None)
        account.requests = _bucket(account.requests, tenant.requests_per_minute, now_s)
        account.tokens = _bucket(account.tokens, tenant.tokens_per_minute, now_s)
        return account


def _spend(account: _Account, requests: float, tokens: float, now_s: float) -> None:
    account.spent.requests += requests
    account.spent.tokens += tokens
    if account.requests is not None:
        account.requests.take(requests, now_s)
    if account.tokens is not None:
        account.tokens.take(tokens, now_s)


def _whole_seconds(wait_s: float, most: float = math.inf) -> int:
    return max(1, math.ceil(min(wait_s, most)))


def _bucket(bucket: _Bucket | None, per_minute: float | None, now_s: float) -> _Bucket | None:
    """The bucket for a limit as the keys file has it now."""
    if per_minute is None:
        return None
    if bucket is None:
        return _Bucket(per_minute, per_minute, now_s)
    bucket.per_minute = per_minute
    return bucket
