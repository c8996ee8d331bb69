"""Lines of JSONL: which are rows, and that a limit of their length changes no count of them."""

import io
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phi4ray.batch import files, lines
from phi4ray.batch.lines import BOM, lines_of, next_line, row_of
from phi4ray.batch.plan import Input
from phi4ray.batch.scan import Cut, scan_unit, units_of
from phi4ray.errors import PlanMismatchError
from phi4ray.protocol import RowError
from phi4ray.storage import storage_for
from tests.small_jobs import answers, job, parts, prompts, run, write_lines

pieces = st.sampled_from([b"a", b"aaaa", b" ", b"      ", b"\n", b"\r\n", b"\t", BOM, b"\r"])
contents = st.lists(pieces, max_size=30).map(b"".join)


def rows(data: bytes, max_row_bytes: int) -> list[bytes | RowError]:
    return list(lines_of(io.BytesIO(data), "a.jsonl", max_row_bytes))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_a_line_may_have_as_many_bytes_as_are_allowed_and_no_more(end: bytes) -> None:
    assert rows(b"a" * 50 + end, 50) == [b"a" * 50]
    assert rows(BOM + b"a" * 47 + end, 50) == [b"a" * 47]
    (error,) = rows(b"a" * 51 + end, 50)
    assert isinstance(error, RowError)
    assert error.code == "row_too_long"
    assert "max_row_mib allows 50" in error.message


@given(contents, st.integers(1, 9), st.integers(1, 4))
@example(b" " * 30 + b"\na", 5, 3)
@example(b" " * 30 + b"b\na", 5, 3)
def test_a_limit_changes_no_count_of_rows(data: bytes, most: int, skip: int) -> None:
    whole = rows(data, 1 << 20)
    with mock.patch.object(lines, "SKIP_BYTES", skip):
        limited = rows(data, most)
        stream, sizes = io.BytesIO(data), []
        while size := next_line(stream, most)[1]:
            sizes.append(size)
    assert sum(sizes) == len(data)
    written = [line for line in data.split(b"\n") if row_of(line) is not None]
    for line, long, short in zip(written, whole, limited, strict=True):
        assert isinstance(long, bytes)
        assert short == long or (isinstance(short, RowError) and len(line) > most)
        assert isinstance(short, RowError) or len(short) <= most


@given(contents, st.integers(1, 9), st.integers(1, 40), st.integers(1, 4))
def test_nor_of_rows_in_units_cut_anywhere(
    data: bytes, most: int, unit_bytes: int, skip: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(lines, "SKIP_BYTES", skip):
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        etag = storage_for(str(path)).head(str(path)).etag
        item = Input(uri=str(path), size=len(data), etag=etag)
        cut = Cut(rows=1, bytes=1 << 20, max_row_bytes=most)
        found = [
            piece
            for unit in units_of([item], unit_bytes)
            for piece in scan_unit(item, unit, cut).slices
        ]
    texts = [data[piece.start : piece.end].rstrip(b"\r\n") for piece in found]
    whole = rows(data, 1 << 20)
    assert [text.removeprefix(BOM) for text in texts] == whole


def test_a_row_that_is_too_long_is_an_error_row_and_the_others_are_answered(
    tmp_path: Path,
) -> None:
    long = {"id": "long", "prompt": "x" * 3000}
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(2), long, *prompts(2, start=2)])
    summary = run(job(tmp_path, max_row_mib=1 / 1024, shard_rows=2))
    assert (summary.rows, summary.errors) == (5, {"row_too_long": 1})
    assert [row["id"] for row in answers(job(tmp_path)) if row["error_code"]] == ["long"]


def test_slices_with_a_very_long_row_are_read_piece_by_piece(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(2), b"x" * 5000, *prompts(2, start=2)])
    config = job(tmp_path, max_row_mib=1 / 1024)
    with mock.patch.object(files, "WHOLE_BYTES", 1000):
        summary = run(config)
    assert (summary.rows, summary.errors) == (5, {"row_too_long": 1})
    assert len(parts(config)) == 1


def test_the_limit_is_part_of_what_a_job_is(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(2))
    run(job(tmp_path))
    with pytest.raises(PlanMismatchError, match=r"max_row_mib was 32\.0 and is now 64\.0"):
        run(job(tmp_path, max_row_mib=64.0))
