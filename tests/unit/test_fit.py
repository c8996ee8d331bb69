"""Engines that certainly cannot start are refused, with what would; all others may try."""

from typing import Any

import pytest

from phi4ray.config import EngineConfig
from phi4ray.errors import ConfigError
from phi4ray.fit import cards, misfit, refuse_misfit
from phi4ray.gpus import find_gpu


def engine(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"model": "microsoft/phi-4"} | settings)


@pytest.mark.parametrize(
    ("settings", "card", "why", "remedy"),
    [
        (
            {},
            "rtx-12",
            r"it does not fit: of 10\.34 GiB a GPU",
            "max_num_seqs=8 and max_model_len=8",
        ),
        ({}, "l4-24", "it does not fit", "tensor_parallel_size=2"),
        ({"kv_cache_memory_bytes": 1 << 40}, "h200", "kv_cache_memory_bytes asks for", "no kv_ca"),
        ({"tensor_parallel_size": 5}, "h200", "does not divide 40 heads", "use one of 1, 2"),
        ({"max_model_len": 99_999}, "h200", "is more than the model's 16384", ""),
    ],
)
def test_what_cannot_start_is_refused_with_what_would(
    settings: dict[str, Any], card: str, why: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=why) as refusal:
        refuse_misfit(engine(**settings), [card])
    assert remedy in str(refusal.value)
    assert "--gpu names another card" in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "card"),
    [
        ({"kind": "fake", "model": "phi-4"}, "rtx-12"),
        ({"num_gpus": 0}, "rtx-12"),
        ({"model": "someone/a-model"}, "rtx-12"),
        ({"engine_args": {"cpu_offload_gb": 30}}, "rtx-12"),
        ({}, "B9000"),
        ({"max_num_batched_tokens": 131_072}, "a100-40"),  # only by estimate
        ({}, "h200"),
    ],
)
def test_what_may_start_is_not_refused(settings: dict[str, Any], card: str) -> None:
    assert misfit(engine(**settings), card) is None
    refuse_misfit(engine(**settings), [card])


def test_one_card_that_fits_is_enough() -> None:
    refuse_misfit(engine(), ["l4-24", "h200"])
    refuse_misfit(engine(), [])
    with pytest.raises(ConfigError, match=r"on L4 24 GB: .* on A10 24 GB: "):
        refuse_misfit(engine(), ["l4", "a10"])


def test_what_is_said_wins_over_the_cluster_and_that_over_the_recipe() -> None:
    assert cards("h100", ["H200"], "l4-24") == ("h100",)
    assert cards(None, ["H200", "L4"], "l4-24") == ("H200", "L4")
    assert cards(None, [], "l4-24") == ("l4-24",)
    assert cards(None, [], None) == ()
    with pytest.raises(ConfigError, match="GPU 'b9000' is not known"):
        cards("b9000", [], None)


@pytest.mark.parametrize(
    ("label", "recipe", "planned"),
    [
        ("GeForce-RTX-4090", "l4-24", ["RTX 4090 24 GB"]),
        ("A10G", "l4-24", ["A10G 24 GB"]),
        ("A100", "a100-40", ["A100 SXM 40 GB"]),
        ("A100", "a100-80", ["A100 SXM 80 GB"]),
        ("A100", "h200", ["A100 SXM 80 GB", "A100 SXM 40 GB"]),
        ("A100", None, ["A100 SXM 80 GB", "A100 SXM 40 GB"]),
        ("A100-40G", None, ["A100 SXM 40 GB"]),
        ("H100", "h100-80", ["H100 SXM 80 GB"]),
        ("H200", "l4-24", ["H200 SXM 141 GB"]),
    ],
)
def test_rays_label_of_a_card_is_the_recipes_where_it_stands_for_several(
    label: str, recipe: str | None, planned: list[str]
) -> None:
    assert [find_gpu(card).title for card in cards(None, [label], recipe)] == planned


@pytest.mark.parametrize("label", ["L40", "RTX-6000", "GeForce-RTX-4070-Ti-SUPER", "B200"])
def test_a_card_that_is_not_in_the_catalogue_is_planned_as_the_recipes_and_refuses_nothing(
    label: str,
) -> None:
    assert cards(None, [label], "l4-24") == (label, "l4-24")
    assert cards(None, [label, "L4"], "h200") == (label, "L4")
    refuse_misfit(engine(), cards(None, [label], "l4-24"))


def test_an_engine_that_fits_on_one_card_of_a_label_is_not_refused() -> None:
    refuse_misfit(engine(gpu_memory_utilization=0.7), cards(None, ["A100"], "h200"))
    with pytest.raises(ConfigError, match=r"on A100 SXM 40 GB: "):
        refuse_misfit(engine(gpu_memory_utilization=0.7), cards(None, ["A100"], "a100-40"))
