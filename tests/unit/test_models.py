"""The catalogue, against the configs that were published with the models."""

import json
from pathlib import Path

import pytest

from phi4ray.errors import ConfigError
from phi4ray.models import (
    CATALOGUE,
    CatalogueEntry,
    extra_parameters_of,
    find_model,
    scheme_of,
    shape_of,
    weight_scheme,
)
from phi4ray.shapes import ModelShape

PHI_4 = {
    "model_type": "phi3", "vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 17920,
    "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10,
    "max_position_embeddings": 16384, "tie_word_embeddings": False,
}  # fmt: skip
PHI_4_MINI = {
    "model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "partial_rotary_factor": 0.75,
}  # fmt: skip


# As the hub has them, to what this library reads; head_dim is left out there, and derived.
PUBLISHED = {
    "microsoft/phi-4": PHI_4,
    "microsoft/Phi-4-reasoning": {**PHI_4, "max_position_embeddings": 32768},
    "microsoft/Phi-4-reasoning-plus": {**PHI_4, "max_position_embeddings": 32768},
    "microsoft/Phi-4-mini-instruct": PHI_4_MINI,
    "microsoft/Phi-4-mini-reasoning": PHI_4_MINI,
    "microsoft/Phi-4-multimodal-instruct": {**PHI_4_MINI, "model_type": "phi4mm"},
}


def entry_of(name: str) -> CatalogueEntry:
    entry = find_model(name)
    assert entry is not None
    return entry


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_those_of_the_published_configs(name: str) -> None:
    shape = entry_of(name).shape
    assert shape == ModelShape.from_hf_config(PUBLISHED[name])
    assert shape.head_dim == 128


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("phi-4", 14_659_507_200),  # the hub's exact count
        ("Phi-4-mini-instruct", 3_836_021_760),
        ("Phi-4-multimodal-instruct", 5_570_000_000),  # to three digits
    ],
)
def test_parameters_are_as_the_hub_counts_them(name: str, parameters: int) -> None:
    assert entry_of(name).parameters == parameters


def test_the_adapters_of_the_multimodal_model_are_the_size_of_their_files() -> None:
    entry = entry_of("Phi-4-multimodal-instruct")
    assert 2 * entry.lora_parameters == pytest.approx(738e6 + 923e6, rel=0.001)


def test_the_family_is_complete() -> None:
    assert {entry.hub_id for entry in CATALOGUE} == PUBLISHED.keys()
    assert {entry.license for entry in CATALOGUE} == {"MIT"}


def test_every_way_of_quantizing_phi_4_has_a_known_checkpoint() -> None:
    assert set(entry_of("phi-4").quantized.values()) == {"fp8", "w8a8", "w4a16"}
    named = " ".join(entry_of("phi-4").quantized)
    for maker in ("AutoRound-GPTQ", "AWQ", "FP8-dynamic", "w8a8", "w4a16"):
        assert maker in named


def test_models_that_think_need_a_parser_and_sampling_and_never_greedy() -> None:
    thinking = [entry for entry in CATALOGUE if "reasoning" in entry.name]
    assert len(thinking) == 3
    for entry in CATALOGUE:
        assert (entry.reasoning_parser == "deepseek_r1") == (entry in thinking)
    for entry in thinking:
        assert entry.recommended_sampling["temperature"] == 0.8
        assert entry.recommended_sampling["top_p"] == 0.95


def test_tools_of_the_mini_model_need_a_template_that_its_checkpoint_lacks() -> None:
    with_tools = [entry for entry in CATALOGUE if entry.tool_call_parser]
    assert [entry.name for entry in with_tools] == ["Phi-4-mini-instruct"]
    assert with_tools[0].tool_chat_template == "tool_chat_template_phi4_mini.jinja"


def test_each_kind_writes_its_own_marks_around_a_message() -> None:
    for entry in CATALOGUE:
        mark = "<|im_sep|>" if entry.shape.vocab_size == 100352 else "<|end|>"
        assert mark in entry.chat_format


def test_names_are_found_in_any_case_and_folders_are_not_taken_for_names() -> None:
    assert find_model("MICROSOFT/PHI-4") is find_model("phi-4") is not None
    assert find_model("RedHatAI/phi-4-FP8-dynamic") is find_model("phi-4")
    assert find_model("/models/phi-4") is None


def test_a_folder_tells_its_own_shape_and_scheme(tmp_path: Path) -> None:
    quantized = {"quant_method": "gptq", "bits": 4}
    config = {**PHI_4, "num_hidden_layers": 2, "quantization_config": quantized}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = shape_of(str(tmp_path))
    assert found is not None
    assert found.num_hidden_layers == 2
    assert weight_scheme(str(tmp_path)) == "w4a16"


def test_a_folder_of_the_multimodal_model_has_its_encoders(tmp_path: Path) -> None:
    entry = entry_of("Phi-4-multimodal-instruct")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**PHI_4_MINI, "model_type": "phi4mm"}))
    assert extra_parameters_of(str(tmp_path)) == entry.encoder_parameters
    assert (
        extra_parameters_of(str(tmp_path), enable_lora=True)
        == entry.encoder_parameters + entry.lora_parameters
    )
    config.write_text(json.dumps(PHI_4_MINI))
    assert extra_parameters_of(str(tmp_path)) == extra_parameters_of("phi-4") == 0


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({"quant_method": "awq", "bits": 4}, "w4a16"),
        ({"quant_method": "auto-round", "bits": 4}, "w4a16"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        *(
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": bits, "type": kind}}},
                },
                scheme,
            )
            for bits, kind, scheme in ((4, "int", "w4a16"), (8, "int", "w8a8"), (8, "float", "fp8"))
        ),
    ],
)
def test_a_quantization_config_tells_its_scheme(settings: dict[str, object], scheme: str) -> None:
    assert scheme_of(str(settings["quant_method"]), settings) == scheme


def test_a_scheme_that_is_not_planned_is_no_other_one() -> None:
    with pytest.raises(ConfigError, match="quantization 'modelopt'"):
        scheme_of("modelopt", {"quant_algo": "NVFP4"})
    with pytest.raises(ConfigError, match="quantization 'gptq'"):
        scheme_of("gptq", {"bits": 8})


def test_schemes_are_told_by_name_or_by_argument() -> None:
    assert weight_scheme("microsoft/phi-4") == "bf16"
    assert weight_scheme("microsoft/phi-4", "fp8") == "fp8"
    assert weight_scheme("RedHatAI/phi-4-quantized.w4a16") == "w4a16"
    with pytest.raises(
        ConfigError, match="memory cannot be planned for quantization 'bitsandbytes'"
    ):
        weight_scheme("microsoft/phi-4", "bitsandbytes")


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ConfigError, match="'llama' is not of the Phi-4 family"):
        ModelShape.from_hf_config({"model_type": "llama"})
    with pytest.raises(ConfigError, match="lacks 'vocab_size'"):
        ModelShape.from_hf_config({k: v for k, v in PHI_4.items() if k != "vocab_size"})
