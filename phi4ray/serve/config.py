"""Configuration of the online service: one engine configuration, and what is around it."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from phi4ray.batches.config import BatchesConfig
from phi4ray.config import Config, EngineConfig, check_text, merge, validated
from phi4ray.recipes import find_recipe
from phi4ray.serve.admission import AdmissionConfig
from phi4ray.serve.autoscaling import AutoscalingPolicyConfig
from phi4ray.serve.gate import GateConfig
from phi4ray.serve.routing import RoutingConfig
from phi4ray.serve.slack import HarvestConfig


class ServeConfig(Config):
    """One Serve application: replicas of one engine behind one OpenAI API."""

    name: str = Field(
        "phi4",
        min_length=1,
        description="Name of the Ray Serve application that jobs/serve.py starts. In a Serve "
        "config file it is the `name` beside `args` that counts",
    )
    engine: EngineConfig
    admission: AdmissionConfig = AdmissionConfig()
    autoscaling: AutoscalingPolicyConfig = AutoscalingPolicyConfig()
    routing: RoutingConfig = RoutingConfig()
    gate: GateConfig = GateConfig()
    harvest: HarvestConfig = HarvestConfig()
    batches: BatchesConfig | None = Field(None, description="The Batch API; None: there is none")
    drain_timeout_s: float = Field(
        600.0, gt=0, description="Longest that a leaving replica finishes its running requests"
    )

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        check_text(self)
        return self


def serve_config(*layers: Mapping[str, Any]) -> ServeConfig:
    """Validate merged layers (YAML file, flags) into a `ServeConfig`.

    `recipe`, in any layer, names the recipe whose engine, autoscaling and harvest are below them
    all.

    Raises:
        ConfigError: names every field that is wrong.
    """
    given = merge(*layers)
    recipe = given.pop("recipe", None)
    lowest: dict[str, Any] = {}
    if recipe:
        found = find_recipe(recipe)
        lowest = {
            "engine": found.settings["engine"],
            "autoscaling": found.autoscaling,
            "harvest": found.harvest,
        }
    # A server is watched: vLLM's metrics are on unless a layer says otherwise.
    watched = {"disable_log_stats": False}
    return validated(ServeConfig, {"engine": watched}, lowest, given)
