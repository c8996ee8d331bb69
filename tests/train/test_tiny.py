"""The tiny model is of the true architecture, and the same every time."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from phi4ray.models import ModelShape, find_model
from phi4ray.train.tiny import VOCAB_SIZE, make_dummy_model, make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def test_it_has_phi_4s_proportions(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Phi3ForCausalLM"]
    assert config["num_attention_heads"] == 4 * config["num_key_value_heads"]
    assert config["intermediate_size"] / config["hidden_size"] == 17920 / 5120
    assert config["rope_parameters"]["rope_theta"] == 250_000
    assert config["tie_word_embeddings"] is False
    assert config["pad_token_id"] not in (config["eos_token_id"], config["bos_token_id"])
    assert ModelShape.from_hf_config(config).max_model_len == 16384


def test_it_is_the_same_every_time_and_another_with_another_seed(
    folder: Path, tmp_path: Path
) -> None:
    again = make_tiny_model(tmp_path / "again")
    other = make_tiny_model(tmp_path / "other", seed=1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() != (other / weights).read_bytes()


def test_it_is_made_once_and_repaired_when_it_is_not_whole(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    made = (folder / "config.json").stat().st_mtime_ns
    assert make_tiny_model(folder).joinpath("config.json").stat().st_mtime_ns == made
    (folder / "phi4ray.json").unlink()
    assert make_tiny_model(folder).joinpath("config.json").stat().st_mtime_ns != made
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_chats_are_written_with_phi_4s_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Hello"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system<|im_sep|>You are brief.<|im_end|>"
        "<|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant<|im_sep|>"
    )
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token != tokenizer.eos_token


@pytest.mark.parametrize(
    "text", ["Hello, world!\n\ttabs", "树枝上有十只鸟。", "naïve façade 🙂", "\x00\x7f", "a" * 1000]
)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_full_size_shape_comes_without_weights(tmp_path: Path) -> None:
    folder = make_dummy_model(tmp_path / "phi-4", "microsoft/phi-4")
    entry = find_model("phi-4")
    assert entry is not None
    config = json.loads((folder / "config.json").read_text())
    assert ModelShape.from_hf_config(config) == entry.shape
    assert not list(folder.glob("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("hi")
    # Whatever the made-up weights answer is text: to decode anything else takes far longer.
    assert len(tokenizer) == entry.shape.vocab_size
    texts = tokenizer.batch_decode([[number] for number in range(VOCAB_SIZE, len(tokenizer))])
    assert all(texts)
    assert "\ufffd" not in "".join(texts)
