"""The prompts of a fault campaign, and what its output must hold."""

import io
import json
from dataclasses import dataclass

import pyarrow.parquet as pq

from phi4ray.fake import fake_text
from phi4ray.storage import join, storage_for

FILES = 8


def prompt_of(row: int) -> str:
    return f"Prompt {row}: what is {row} plus {row * 7 % 1000}, and why does it matter?"


def write_prompts(prompts: str, rows: int) -> None:
    for file in range(FILES):
        lines = [
            json.dumps({"id": f"row-{row}", "prompt": prompt_of(row)}) + "\n"
            for row in range(file, rows, FILES)
        ]
        storage_for(prompts).write(join(prompts, f"{file}.jsonl"), "".join(lines).encode())


@dataclass(frozen=True)
class Found:
    """What stands in the output."""

    lost: int
    duplicates: int
    wrong: int


def check(answers: str, rows: int, *, fake: bool) -> Found:
    """Read every part, and hold its rows against the prompts.

    What a real engine answers is right if it is there.
    """
    storage = storage_for(answers)
    assert storage.read(join(answers, "_SUCCESS")) == b""
    counts = bytearray(rows)
    wrong = 0
    for item in storage.list(answers):
        if not item.uri.endswith(".parquet"):
            continue
        table = pq.read_table(io.BytesIO(storage.read(item.uri)), columns=["id", "text"])
        for name, text in zip(*(column.to_pylist() for column in table.columns), strict=True):
            row = int(name.removeprefix("row-"))
            counts[row] += 1
            right = fake_text(prompt_of(row)) if fake else text
            wrong += text is None or text != right
    return Found(counts.count(0), sum(count - 1 for count in counts if count > 1), wrong)
