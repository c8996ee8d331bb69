"""Parts of the week in which other bounds hold for the number of replicas."""

from datetime import datetime, time
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator

from phi4ray.config import Config

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Window(Config):
    """Other bounds for a part of the day; one that ends before it starts goes over midnight."""

    days: tuple[Weekday, ...] = Field(WEEKDAYS, min_length=1, description="Days on which it starts")
    start: time = Field(description="Local time, as '08:00'")
    end: time = Field(description="Local time, as '20:00'")
    timezone: str = Field("UTC", description="As 'Europe/Berlin'")
    min_replicas: int = Field(ge=0)
    max_replicas: int | None = Field(None, ge=1, description="None: as outside of the window")

    @field_validator("start", "end", mode="before")
    @classmethod
    def _quoted(cls, value: object) -> object:
        # YAML takes 20:00 for a number in base 60, which would be another time.
        if isinstance(value, int | float):
            raise ValueError("a time stands in quotes, as '20:00'")
        return value

    @field_validator("start", "end")
    @classmethod
    def _local(cls, value: time) -> time:
        if value.tzinfo is not None:
            raise ValueError("a time is local to 'timezone', and has no zone of its own")
        return value

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"there is no time zone {name!r}") from error
        return name

    def holds(self, now_s: float) -> bool:
        """Whether a moment, in Unix seconds, lies in the window."""
        now = datetime.fromtimestamp(now_s, ZoneInfo(self.timezone))
        clock, today = now.time(), now.weekday()
        if self.start < self.end:
            return self.start <= clock < self.end and WEEKDAYS[today] in self.days
        if clock >= self.start:
            return WEEKDAYS[today] in self.days
        return clock < self.end and WEEKDAYS[today - 1] in self.days
