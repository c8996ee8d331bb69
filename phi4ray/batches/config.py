"""Configuration of the Batch API."""

import re

from pydantic import Field, field_validator

from phi4ray.config import Config

DAY_S = 24 * 3600.0

_WINDOW = re.compile(r"([1-9]\d{0,4})([smhd])")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}


class BatchesConfig(Config):
    """Files and batches: where they are kept, how large they may be, how long they live."""

    store: str = Field(
        min_length=1, description="Folder of files and batches, as s3://bucket/phi4/; only ours"
    )
    max_file_mib: float = Field(200.0, gt=0, description="Largest file that is taken")
    max_file_rows: int = Field(50_000, ge=1, description="Most requests in a batch")
    max_row_mib: float = Field(32.0, gt=0, le=1024, description="Largest line of a batch's file")
    completion_windows: tuple[str, ...] = Field(
        ("24h",), min_length=1, description="Those that may be asked for: a number and s, m, h or d"
    )
    file_expiry_s: float | None = Field(
        30 * DAY_S, gt=0, description="Life of an upload that does not say it; None: no end"
    )
    output_expiry_s: float | None = Field(
        30 * DAY_S, gt=0, description="Life of a batch's files where the batch does not say it"
    )
    max_concurrent_batches: int = Field(
        4, ge=1, description="Batches that are answered at once; their owners take turns"
    )
    shard_rows: int = Field(500, ge=1, description="Rows that a crash may cost to answer again")
    poll_interval_s: float = Field(
        2.0, gt=0, description="Between looks at the store, and between writes of a batch's counts"
    )
    retry_interval_s: float = Field(
        30.0, gt=0, description="Until a batch that engine or store failed is taken up again"
    )
    sweep_interval_s: float = Field(3600.0, gt=0, description="Between looks for expired files")

    @field_validator("completion_windows")
    @classmethod
    def _check(cls, windows: tuple[str, ...]) -> tuple[str, ...]:
        for window in windows:
            if not _WINDOW.fullmatch(window):
                raise ValueError(f"{window!r} is no window: write a number and s, m, h or d")
        return windows

    @property
    def max_file_bytes(self) -> int:
        """`max_file_mib` in bytes."""
        return int(self.max_file_mib * (1 << 20))


def window_s(window: str) -> float:
    """The length of a completion window such as `24h`, in seconds."""
    found = _WINDOW.fullmatch(window)
    assert found is not None, "windows are checked by the configuration"
    return int(found[1]) * _UNITS[found[2]]
