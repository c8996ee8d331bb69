"""Every recipe is complete, valid, and fits the card that it names."""

import io

import pytest
from rich.console import Console

from phi4ray.batch.describe import describe_plan
from phi4ray.batch.plan import Input, Shard, Slice, make_plan
from phi4ray.config import BatchConfig, batch_config
from phi4ray.errors import ConfigError
from phi4ray.memory import GPUS, place, plan_memory
from phi4ray.models import shape_of, weight_scheme
from phi4ray.recipes import RECIPES, Recipe, find_recipe
from phi4ray.serve.config import serve_config

NAMED = {"input": ["in"], "output": "out"}


def config_of(recipe: Recipe) -> BatchConfig:
    given = {} if "model" in recipe.settings["engine"] else {"engine": {"model": "tiny"}}
    return batch_config(recipe.settings, NAMED, given)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_it_is_a_valid_configuration(recipe: Recipe) -> None:
    config = config_of(recipe)
    assert config.engine.gpus_per_replica == (0 if recipe.gpu is None else pytest.approx(1, abs=1))
    assert recipe.description.endswith(".") or "--model" in recipe.description


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.gpu])
def test_it_fits_its_card_with_room_for_its_sequences(name: str) -> None:
    recipe = find_recipe(name)
    engine = config_of(recipe).engine
    shape = shape_of(engine.model)
    assert shape is not None
    assert recipe.gpu is not None
    scheme = weight_scheme(engine.model, engine.quantization)
    plan = plan_memory(place(engine, shape, GPUS[recipe.gpu], scheme))
    assert plan.max_concurrency >= 1
    # So many requests of ordinary length are in the cache at once: more would only be preempted.
    assert engine.max_num_seqs <= max(8, plan.kv_cache_size_tokens // 256)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_service_scales_by_what_is_known_of_its_speed_unless_told_otherwise(
    recipe: Recipe,
) -> None:
    layers = {"recipe": recipe.name}, {"engine": {"model": "some"}}
    told = {"autoscaling": {"half_speed_tokens": 5.0}, "harvest": {"prefill_tokens": 5}}
    config = serve_config(*layers)
    scaling, harvest = config.autoscaling.model_dump(), config.harvest.model_dump()
    assert scaling == scaling | recipe.autoscaling
    assert harvest == harvest | recipe.harvest
    changed = serve_config(*layers, told)
    assert changed.autoscaling.half_speed_tokens == 5.0
    assert changed.harvest.prefill_tokens == 5


def test_an_unknown_name_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="'phi5': known are phi4-fp8-h200"):
        find_recipe("phi5")


def test_flags_win_over_a_recipe() -> None:
    config = batch_config(
        find_recipe("phi4-fp8-h200").settings, NAMED, {"engine": {"model": "other"}}
    )
    assert config.engine.model == "other"
    assert config.engine.quantization == "fp8"


def described(config: BatchConfig, *cards: str) -> str:
    slices = (Slice(file=0, row_start=0, rows=1200, size=480_000),)
    plan = make_plan(
        {}, [Input(uri="s3://b/a.jsonl", size=480_000, etag="e")], [Shard(index=0, slices=slices)],
        carried="", prompt_bytes=480_000, duplicate_ids=2, duplicate_example="a#1 and a#7",
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    describe_plan(config, plan, console, cards)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


def test_a_dry_run_tells_rows_tokens_and_memory() -> None:
    text = described(config_of(find_recipe("phi4-fp8-h200")), "h200")
    for told in (
        "1,200", "2 (first: a#1 and a#7)", "120,000", "at most 1,228,800", "KV cache, tokens",
        "s3://b/a.jsonl: 1,200 rows", "nothing was written",
    ):  # fmt: skip
        assert told in text


def test_a_dry_run_says_where_memory_is_not_planned() -> None:
    assert "the fake engine needs none" in described(config_of(find_recipe("fake")))
    assert "its replicas take no GPU" in described(config_of(find_recipe("tiny-cpu")))
