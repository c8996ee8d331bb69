"""No input makes a process take more memory than a few rows of the largest size need."""

from operator import mul
from pathlib import Path

import pytest

from tests import bombs
from tests.bounded import MIB, within

pytestmark = pytest.mark.slow

MAKING_MIB = 8192
"""For a bomb's maker: what counts is what it takes to read it."""


@pytest.mark.parametrize(
    ("name", "limit_mib", "found"),
    [
        ("endless_line.jsonl", 192, ["", "row_too_long", ""]),
        ("endless_packed_line.jsonl.gz", 192, ["", "row_too_long"]),
        ("endless_packed_line.jsonl.zst", 192, ["", "row_too_long"]),
        ("endless_blank_line.jsonl.gz", 192, [""]),
        ("large_rows.jsonl.gz", 384, [""] * 25),
        ("lists.jsonl", 256, ["", "too_many_values"]),
    ],
)
def test_rows_that_are_too_much_have_errors(
    tmp_path: Path, name: str, limit_mib: int, found: list[str]
) -> None:
    within(MAKING_MIB, bombs.make, name, tmp_path)
    assert within(limit_mib, bombs.read_all, tmp_path) == found


@pytest.mark.parametrize(
    ("name", "limit_mib", "said"),
    [
        ("members.jsonl", 512, "more than max_columns=1,000"),
        ("members_of_all.jsonl", 256, "more than max_columns=1,000"),
        ("columns.parquet", 512, "more than max_columns=1,000"),
        ("large_dictionary.parquet", 256, "a dictionary of 67,108,868 bytes for column 'prompt'"),
        ("often_used_dictionary.parquet", 256, "rows 0 to 999 take more than 1,073,741,824 bytes"),
        ("ids_of_a_dictionary.parquet", 384, "has ids that take more than 500 times its size"),
        ("pages.parquet", 256, "unpacks column 'prompt' of row group 0 to 545,"),
        ("claims.parquet", 256, "claims 1,048,575 rows in"),
    ],
)
def test_files_that_are_too_much_are_refused_by_name(
    tmp_path: Path, name: str, limit_mib: int, said: str
) -> None:
    within(MAKING_MIB, bombs.make, name, tmp_path)
    (refusal,) = within(limit_mib, bombs.read_all, tmp_path)
    assert refusal.startswith(f"InputError: {tmp_path}/in/{name}")
    assert said in refusal


@pytest.mark.parametrize("taken_mib", [100, 8192])
def test_what_takes_more_than_its_limit_fails(taken_mib: int) -> None:
    assert within(100, mul, b"x", 50 * MIB)
    with pytest.raises(MemoryError):
        within(50, mul, b"x", taken_mib * MIB)


def test_a_body_of_small_lists_is_refused_before_it_is_decoded() -> None:
    body = b'{"model": "m", "messages": [' + b"[]," * (10 * MIB) + b"1]}"
    assert within(256, bombs.ask, body) == (413, "body_too_complex")


@pytest.mark.parametrize(
    "nested", ["a: &a {b: *a}", "a: " + "[" * 100_000, "a: " + "{a: " * 100_000]
)
def test_config_files_without_an_end_are_refused(nested: str) -> None:
    assert within(256, bombs.load, nested).startswith("ConfigError: a.yaml ")


def test_config_files_whose_aliases_lie_in_each_other_are_refused() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    refusal = within(256, bombs.load, "\n".join(levels))
    assert refusal.startswith("ConfigError: a.yaml stands for more than 100,000 values")
