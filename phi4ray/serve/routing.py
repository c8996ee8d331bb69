"""Which replica a request goes to: where its prefix is cached, while load allows. Pure.

vLLM keeps the KV blocks of recent prompts, and a prompt that begins like one of them skips that
part of its prefill. So prompts with a shared beginning should meet on one replica, unless it has
so much more to do than another that waiting there costs more than computing the prefix again.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field

from phi4ray.config import Config
from phi4ray.demand import Size
from phi4ray.protocol import Json

BLOCK_CHARS = 256
"""Characters of a prompt that are told apart at once: about four of vLLM's blocks of 16 tokens."""

LIKELY_TOKENS, MOST_TOKENS = 256, 4096
"""Of an answer without a limit, and of one with: limits are stated at will, and seldom reached."""


class RoutingConfig(Config):
    """How requests are spread over replicas."""

    prefix_aware: bool = Field(
        True, description="Send prompts with a shared beginning to one replica while load allows"
    )
    max_imbalance: float = Field(
        0.25,
        ge=0,
        description="How much fuller the replica with the prefix may be than the emptiest, "
        "as a fraction of its KV cache",
    )
    remembered_blocks: int = Field(
        200_000, ge=1, description=f"Prefix blocks of {BLOCK_CHARS} characters kept in mind"
    )
    stats_period_s: float = Field(1.0, gt=0, description="How often replicas tell their load")


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica last told: its KV cache, and the demand of what it has and what waits."""

    capacity_tokens: float
    demand_tokens: float
    at_s: float


def likely_demand(body: Json) -> float:
    """Tokens that a request will hold, where no more is known than what it says."""
    size = Size.of(body)
    answers = min(size.limit or LIKELY_TOKENS * size.sequences, MOST_TOKENS * size.sequences)
    return size.ids + size.chars / 4 + answers


class PrefixRouter:
    """Chooses replicas and remembers what it chose. Not for several threads."""

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config
        self._holders: OrderedDict[bytes, dict[str, None]] = OrderedDict()
        # Of each replica: when it told its load, and the tokens sent to it since.
        self._sent: dict[str, tuple[float, float]] = {}

    def rank(self, prompt: str, demand_tokens: float, loads: Mapping[str, Load]) -> list[str]:
        """The replicas for a prompt, the best first, of the given ones (at least one).

        The first is the one that holds the longest part of its prefix and is at most
        `max_imbalance` fuller than the emptiest, else the emptiest; the others follow by load.
        What was sent to a replica since it told its load counts as load, or all requests between
        two tellings would go to one.
        """
        for name, load in loads.items():
            told_at_s, _ = self._sent.get(name, (None, 0.0))
            if told_at_s != load.at_s:
                self._sent[name] = load.at_s, 0.0
        full = {name: self._fullness(name, load) for name, load in loads.items()}
        chosen = emptiest = min(full, key=lambda name: full[name])
        blocks = prefix_blocks(prompt) if self._config.prefix_aware else []
        within = full[emptiest] + self._config.max_imbalance
        for block in reversed(blocks):
            near = [name for name in self._holders.get(block, ()) if full.get(name, 1e9) <= within]
            if near:
                chosen = min(near, key=lambda name: full[name])
                break
        at_s, tokens = self._sent[chosen]
        self._sent[chosen] = at_s, tokens + demand_tokens
        for block in blocks:
            self._remember(block, chosen)
        return [chosen, *sorted(full.keys() - {chosen}, key=lambda name: full[name])]

    def _fullness(self, name: str, load: Load) -> float:
        return (load.demand_tokens + self._sent[name][1]) / max(1.0, load.capacity_tokens)

    def _remember(self, block: bytes, replica: str) -> None:
        holders = self._holders.pop(block, {})
        holders[replica] = None
        self._holders[block] = holders
        if len(self._holders) > self._config.remembered_blocks:
            self._holders.popitem(last=False)

    def forget(self, gone: set[str]) -> None:
        """Forget replicas that are there no more."""
        for name in gone:
            self._sent.pop(name, None)
        for holders in self._holders.values():
            for name in gone:
                holders.pop(name, None)


def prefix_blocks(prompt: str) -> list[bytes]:
    """A digest for each whole block of a prompt, of it and all before it, as vLLM's cache does."""
    chain = hashlib.blake2b(digest_size=8)
    blocks = []
    for start in range(0, len(prompt) - BLOCK_CHARS + 1, BLOCK_CHARS):
        chain.update(prompt[start : start + BLOCK_CHARS].encode("utf-8", "surrogatepass"))
        blocks.append(chain.digest())
    return blocks
