"""What the layers of the online door know of a request, carried in its ASGI scope."""

from dataclasses import dataclass

from starlette.types import Scope

from phi4ray.protocol import Json
from phi4ray.serve.meter import Usage

KEY = "phi4ray"


@dataclass(slots=True)
class State:
    """One request, from the outermost layer inwards and back."""

    request_id: str
    path: str
    """As the application's routes have it, without the prefix under which Serve serves it."""
    body: Json | None = None
    """The decoded JSON object of a request that has one."""
    tenant: str | None = None
    models: tuple[str, ...] | None = None
    """Models that the tenant may name; None: all."""
    priority: int = 0
    queued_s: float = 0.0
    status: int = 0
    """The HTTP status, once it is sent."""
    usage: Usage | None = None
    """What the engine counted, once it is answered or given up."""
    engine_request_id: str = ""
    """What the engine is told instead, where a request that is not answered yet has that id."""

    def __post_init__(self) -> None:
        self.engine_request_id = self.engine_request_id or self.request_id

    @classmethod
    def of(cls, scope: Scope) -> "State":
        """The state of a request that came through `phi4ray.serve.observe.Observe`."""
        found: State = scope["state"][KEY]
        return found
