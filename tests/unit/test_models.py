"""The catalogue, against the configs that were published with the models."""

import json
from pathlib import Path

import pytest

from phi4ray.errors import ConfigError
from phi4ray.models import CATALOGUE, ModelShape, find_model, shape_of, weight_scheme

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


@pytest.mark.parametrize(
    ("name", "config", "billions"),
    [("microsoft/phi-4", PHI_4, 14.66), ("microsoft/Phi-4-mini-instruct", PHI_4_MINI, 3.84)],
)
def test_shapes_are_those_of_the_published_configs(
    name: str, config: dict[str, object], billions: float
) -> None:
    entry = find_model(name)
    assert entry is not None
    assert entry.shape == ModelShape.from_hf_config(config)
    assert entry.shape.head_dim == 128
    assert entry.shape.parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_family_is_complete() -> None:
    names = {entry.name for entry in CATALOGUE}
    assert names >= {
        "phi-4", "Phi-4-reasoning", "Phi-4-reasoning-plus", "Phi-4-mini-instruct",
        "Phi-4-mini-reasoning", "Phi-4-multimodal-instruct",
    }  # fmt: skip
    for name in ("Phi-4-reasoning", "Phi-4-reasoning-plus"):
        entry = find_model(name)
        assert entry is not None
        assert entry.shape.max_model_len == 32768


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
