"""What a fine-tune's output prefix is for: written once, so that it never holds two runs."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from pydantic_core import from_json, to_json

from phi4ray.batch.identity import check_same_job
from phi4ray.batch.plan import Input
from phi4ray.config import Config
from phi4ray.errors import ConfigError, ObjectNotFoundError, PreconditionError
from phi4ray.storage import expand, join, storage_for
from phi4ray.train.chats import CHAT_ENDINGS
from phi4ray.train.config import FinetuneConfig

PLAN_NAME = "_finetune.json"

FREE = frozenset(
    {
        "input",
        "output",
        "checkpoint_every_steps",
        "checkpoints_kept",
        "logging_steps",
        "cpus_per_worker",
        "max_failures",
    }
)
"""Settings that may change between runs of one fine-tune, as they do not decide what comes out."""


class FinetunePlan(Config):
    """The inputs and settings of a fine-tune, and what its chats came to."""

    plan_id: str
    identity: dict[str, Any]
    inputs: tuple[Input, ...]
    chats: int
    refused: int
    tokens: int
    answer_tokens: int


def list_chats(config: FinetuneConfig, tell: Callable[[str], object]) -> list[Input]:
    """The input objects, in order; `tell` is told of files among them that are none.

    Raises:
        InputError: a pattern matches nothing.
    """
    found = expand(config.input, CHAT_ENDINGS, tell)
    return [Input(uri=item.uri, size=item.size, etag=item.etag) for item in found]


def identity_of(config: FinetuneConfig) -> dict[str, Any]:
    """What decides the trained weights, by its configuration names."""
    settings = config.model_dump(exclude=set(FREE))
    lora = settings.pop("lora")
    if config.method == "lora":
        settings |= {f"lora.{name}": value for name, value in lora.items()}
    identity: dict[str, Any] = from_json(to_json(settings, fallback=str))
    return identity


def find_plan(config: FinetuneConfig, inputs: Sequence[Input]) -> FinetunePlan | None:
    """The plan under the output prefix, if there is one.

    Raises:
        PlanMismatchError: it is another fine-tune's.
        ConfigError: it is no plan.
    """
    uri = join(config.output, PLAN_NAME)
    try:
        data = storage_for(uri).read(uri)
    except ObjectNotFoundError:
        return None
    try:
        plan = FinetunePlan.model_validate_json(data)
    except ValueError as error:
        raise ConfigError(
            f"{uri} is not a plan that this version of phi4ray can read: use a new --output"
        ) from error
    check_same_job(plan, identity_of(config), inputs)
    return plan


def keep_plan(config: FinetuneConfig, inputs: Sequence[Input], **facts: int) -> FinetunePlan:
    """Write the plan, unless another driver was faster: then its plan, if it is the same one.

    Raises:
        PlanMismatchError: the other driver runs another fine-tune.
    """
    identity = identity_of(config)
    digest = hashlib.sha256(to_json(identity) + to_json(list(inputs)))
    plan = FinetunePlan(
        plan_id=digest.hexdigest()[:12], identity=identity, inputs=tuple(inputs), **facts
    )
    uri = join(config.output, PLAN_NAME)
    with contextlib.suppress(PreconditionError):
        storage_for(uri).write_new(uri, plan.model_dump_json(indent=1).encode())
    return find_plan(config, inputs) or plan
