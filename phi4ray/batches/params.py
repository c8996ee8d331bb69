"""What clients send to the Batch API, checked. Pure."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from phi4ray.config import Endpoint

HOUR_S, MONTH_S = 3600, 30 * 24 * 3600

M = TypeVar("M", bound=BaseModel)


class ApiError(Exception):
    """A request that is refused, in the words of OpenAI's API."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(status, code, message, param)
        self.status, self.code, self.message, self.param = status, code, message, param


class Params(BaseModel):
    """What may come with a request; clients may send what this service does not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ExpiresAfter(Params):
    """When a file expires, in seconds after its `anchor`."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=HOUR_S, le=MONTH_S)


class CreateBatch(Params):
    """The body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: str
    metadata: (
        Annotated[
            Mapping[
                Annotated[str, StringConstraints(max_length=64)],
                Annotated[str, StringConstraints(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None


class ListBatches(Params):
    """The query of `GET /v1/batches`."""

    after: str | None = None
    limit: int = Field(20, ge=1, le=100)


class ListFiles(Params):
    """The query of `GET /v1/files`."""

    after: str | None = None
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


def parsed(model: type[M], given: Mapping[str, Any]) -> M:
    """Check what a client sent.

    Raises:
        ApiError: names the first parameter that is wrong.
    """
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"])) or None
        missing = first["type"] == "missing"
        code = "missing_required_parameter" if missing else "invalid_value"
        raise ApiError(400, code, f"Invalid {param!r}: {first['msg']}.", param) from error
