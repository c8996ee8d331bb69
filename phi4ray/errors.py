"""Every error phi4ray raises.

    Phi4rayError
    ├── ConfigError                 arguments, config file or recipe are wrong
    ├── InputError                  an input file cannot be read as what it claims to be
    │   └── InputChangedError       an input is no longer the object that was planned
    ├── PlanMismatchError           the output prefix holds the answers of another plan
    ├── TooManyErrorsError          more rows failed than `max_error_fraction` allows
    ├── IncompleteOutputError       the parts do not add up to the plan
    ├── StorageError                the object store refused or failed
    │   ├── ObjectNotFoundError     no object at that URI
    │   ├── AccessDeniedError       credentials are missing or do not suffice
    │   ├── PreconditionError       the object is not the expected one (etag, or it exists already)
    │   └── TransientStorageError   it failed after all retries and may work later
    ├── EngineError                 the inference engine failed
    │   ├── EngineStartError        it cannot start: wrong model, no memory
    │   └── EngineDeadError         it ran and died: the process that hosts it must go
    ├── DivergedError               a fine-tune's loss or weights are no numbers any more
    ├── QuantizationError           AutoRound or llm-compressor failed
    └── ClusterError                Ray lost the cluster or cannot give what the job needs

A bad *row* is no exception: it is an error row in the output, see `phi4ray.protocol.RowError`.
Every class takes one message, which says what to do next, so that all of them pickle.
"""

__all__ = [
    "AccessDeniedError",
    "ClusterError",
    "ConfigError",
    "DivergedError",
    "EngineDeadError",
    "EngineError",
    "EngineStartError",
    "IncompleteOutputError",
    "InputChangedError",
    "InputError",
    "ObjectNotFoundError",
    "Phi4rayError",
    "PlanMismatchError",
    "PreconditionError",
    "QuantizationError",
    "StorageError",
    "TooManyErrorsError",
    "TransientStorageError",
]


class Phi4rayError(Exception):
    """Base of all errors raised on purpose by phi4ray."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class ConfigError(Phi4rayError):
    """Arguments, the config file or a recipe are wrong; nothing was started."""


class InputError(Phi4rayError):
    """An input file cannot be read as the format its name claims."""


class InputChangedError(InputError):
    """An input object is no longer the one that was planned (its etag or size differs)."""


class PlanMismatchError(Phi4rayError):
    """The output prefix belongs to a plan with other inputs, model, template or sampling."""


class TooManyErrorsError(Phi4rayError):
    """The share of error rows passed `max_error_fraction`."""


class IncompleteOutputError(Phi4rayError):
    """Parts are missing or their receipts do not add up to the plan."""


class StorageError(Phi4rayError):
    """The object store refused or failed a request."""


class ObjectNotFoundError(StorageError):
    """There is no object at that URI."""


class AccessDeniedError(StorageError):
    """Credentials are missing, or do not allow this."""


class PreconditionError(StorageError):
    """The object is not the expected one: its etag differs, or it exists already."""


class TransientStorageError(StorageError):
    """Still failing after every retry; the same command may work later."""


class EngineError(Phi4rayError):
    """The inference engine failed."""


class EngineStartError(EngineError):
    """The engine cannot start; starting it again would fail the same way."""


class EngineDeadError(EngineError):
    """The engine died; its process must exit so that another one takes its place."""


class DivergedError(Phi4rayError):
    """A fine-tune's loss or weights are no numbers any more; the same would come again."""


class QuantizationError(Phi4rayError):
    """The tool that quantizes failed or was killed; nothing was written to the output."""


class ClusterError(Phi4rayError):
    """Ray lost the cluster, or cannot give the resources that the job asks for."""
