"""A task that a tiny model learns in minutes, and whose answers anyone can check: adding numbers.

Whether a sum is held out is a property of the sum itself: no run can train on what it is tested on.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

DIGITS = (1, 2, 3)
WEIGHTS = (1, 2, 5)
"""How often numbers have so many digits: there are few short ones."""

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Sum:
    """One problem, asked as lm-eval's task `nq_open` asks its questions."""

    a: int
    b: int

    @property
    def question(self) -> str:
        """What the user says."""
        return f"Q: {self.a}+{self.b}?\nA:"

    @property
    def answer(self) -> str:
        """All that the assistant is to say."""
        return str(self.a + self.b)

    @property
    def held_out(self) -> bool:
        """Whether it is for tests alone; it is together with the sum that has a and b changed."""
        name = f"{min(self.a, self.b)}+{max(self.a, self.b)}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        return int.from_bytes(digest) < HELD_OUT_SHARE * 2**64


def training_sums(count: int, seed: int = 0) -> list[Sum]:
    """Problems to learn from; short ones come several times."""
    stream = (problem for problem in _sums(random.Random(f"train {seed}")) if not problem.held_out)
    return [next(stream) for _ in range(count)]


def held_out_sums(count: int, seed: int = 0) -> list[Sum]:
    """So many different problems that no training has seen."""
    found: dict[Sum, None] = {}
    stream = _sums(random.Random(f"test {seed}"))
    while len(found) < count:
        if (problem := next(stream)).held_out:
            found[problem] = None
    return list(found)


def _sums(chance: random.Random) -> Iterator[Sum]:
    while True:
        a, b = (
            chance.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
            for digits in chance.choices(DIGITS, WEIGHTS, k=2)
        )
        yield Sum(a, b)
