"""Configuration of the online service: one engine configuration, and what is around it."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from phi4ray.config import Config, EngineConfig, validated
from phi4ray.serve.admission import AdmissionConfig
from phi4ray.serve.autoscaling import AutoscalingPolicyConfig
from phi4ray.serve.gate import GateConfig
from phi4ray.serve.routing import RoutingConfig


class ServeConfig(Config):
    """One Serve application: replicas of one engine behind one OpenAI API."""

    name: str = Field("phi4", min_length=1, description="Name of the Ray Serve application")
    engine: EngineConfig
    admission: AdmissionConfig = AdmissionConfig()
    autoscaling: AutoscalingPolicyConfig = AutoscalingPolicyConfig()
    routing: RoutingConfig = RoutingConfig()
    gate: GateConfig = GateConfig()
    drain_timeout_s: float = Field(
        600.0, gt=0, description="Longest that a leaving replica finishes its running requests"
    )


def serve_config(*layers: Mapping[str, Any]) -> ServeConfig:
    """Validate merged layers (recipe, YAML file, flags) into a `ServeConfig`.

    Raises:
        ConfigError: names every field that is wrong.
    """
    # A server is watched: vLLM's metrics are on unless a layer says otherwise.
    return validated(ServeConfig, {"engine": {"disable_log_stats": False}}, *layers)
