"""Configuration: closed to misspelt keys, merged by layers, and JSON where it is sent on."""

import datetime
from typing import Any

import pytest
from pydantic import ValidationError

from phi4ray.config import BatchConfig, EngineConfig, batch_config, load_yaml, merge
from phi4ray.errors import ConfigError

BASE: dict[str, Any] = {"input": ["in/"], "output": "out/", "engine": {"model": "tiny"}}


@pytest.mark.parametrize(
    ("layer", "field"),
    [
        ({"shard_row": 5}, "shard_row"),
        ({"engine": {"max_seqs": 5}}, "engine.max_seqs"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"limit": 0}, "limit"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"max_error_fraction": 1.5}, "max_error_fraction"),
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"output_format": "csv"}, "output_format"),
        ({"input": []}, "input"),
        ({"output": ""}, "output"),
        ({"engine": {"gpu_memory_utilization": 0}}, "engine.gpu_memory_utilization"),
        ({"system_prompt": "\udcff"}, "not UTF-8"),
        ({"sampling": {"stop": ["\udcff"]}}, "not UTF-8"),
        ({"sampling": {"stream": True}}, "stream"),
        ({"sampling": {"messages": []}}, "messages"),
        ({"sampling": {"model": "x"}}, "model"),
        ({"sampling": {"top_p": float("nan")}}, "sampling"),
        ({"sampling": {"x": {datetime.date(2026, 1, 2): 1}}}, "sampling"),
        (
            {"sampling": {"max_tokens": 512, "max_completion_tokens": 64}},
            "max_tokens and max_completion_tokens",
        ),
        ({"min_replicas": 4, "max_replicas": 2}, "max_replicas"),
    ],
)
def test_what_is_wrong_is_named(layer: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        batch_config(BASE, layer)


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)limit.*shard_rows"):
        batch_config(BASE, {"limit": 0, "shard_rows": 0})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)input.*output.*engine"):
        batch_config()


def test_a_configuration_cannot_be_changed() -> None:
    config = batch_config(BASE)
    with pytest.raises(ValidationError):
        config.limit = 5  # type: ignore[misc]


def test_later_layers_win_and_nested_ones_merge_by_key() -> None:
    recipe = {"engine": {"model": "a", "dtype": "bfloat16"}, "sampling": {"top_p": 0.5, "n": 1}}
    flags = {"engine": {"model": "b"}, "sampling": {"n": 2}, "limit": None}
    assert merge({"limit": 5}, recipe, flags) == {
        "engine": {"model": "b", "dtype": "bfloat16"},
        "sampling": {"top_p": 0.5, "n": 2},
        "limit": None,
    }


def test_a_limit_of_answers_wins_over_one_below_by_whichever_name() -> None:
    recipe, flags = {"max_tokens": 512, "top_p": 0.9}, {"max_completion_tokens": 64}
    config = batch_config(BASE | {"sampling": recipe}, {"sampling": flags})
    assert config.sampling == {"top_p": 0.9, "max_completion_tokens": 64}


def test_merging_changes_no_layer() -> None:
    low, high = {"engine": {"model": "a"}}, {"engine": {"model": "b"}}
    merge(low, high)
    assert (low, high) == ({"engine": {"model": "a"}}, {"engine": {"model": "b"}})


def test_sampling_is_what_an_engine_can_be_sent() -> None:
    sampling = {"logit_bias": {50256: -100}, "stop": ["a"], "since": datetime.date(2026, 1, 2)}
    assert batch_config(BASE, {"sampling": sampling}).sampling == {
        "logit_bias": {"50256": -100},
        "stop": ["a"],
        "since": "2026-01-02",
    }


@pytest.mark.parametrize(("text", "value"), [("", {}), ("# none", {}), ("limit: 5", {"limit": 5})])
def test_yaml_is_a_mapping(text: str, value: dict[str, Any]) -> None:
    assert load_yaml(text, "job.yaml") == value


@pytest.mark.parametrize("text", ["- a", "5", "a: [", "a: b: c"])
def test_yaml_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load_yaml(text, "job.yaml")


def test_a_configuration_survives_json() -> None:
    config = batch_config(BASE, {"sampling": {"n": 2}, "engine": {"engine_args": {"a": [1]}}})
    assert BatchConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("engine", "gpus"),
    [
        ({"model": "m"}, 1),
        ({"model": "m", "tensor_parallel_size": 4}, 4),
        ({"model": "m", "num_gpus": 0.5}, 0.5),
        ({"model": "m", "kind": "fake"}, 0),
        ({"model": "m", "kind": "fake", "num_gpus": 1}, 1),
    ],
)
def test_a_replica_reserves_the_gpus_it_spreads_over(engine: dict[str, Any], gpus: float) -> None:
    assert EngineConfig.model_validate(engine).gpus_per_replica == gpus


def test_answers_carry_the_served_name_or_the_models() -> None:
    assert EngineConfig(model="m").model_name == "m"
    assert EngineConfig(model="m", served_model_name="s").model_name == "s"
