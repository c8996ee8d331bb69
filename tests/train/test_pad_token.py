"""Padding is never the end token: else the end of answers would not be learned."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from phi4ray.errors import ConfigError
from phi4ray.train.tokenizer import choose_pad_token, load_tokenizer
from tests.chat_models import small_model

PHI_4 = {"<|endoftext|>": 0, "<|im_end|>": 1, "<|dummy_85|>": 2, "<|dummy_87|>": 3, "a": 4}


def test_the_tokenizers_own_is_kept_if_it_is_another_one() -> None:
    assert choose_pad_token(PHI_4, "<|im_end|>", "<|dummy_87|>", None) == "<|dummy_87|>"
    assert choose_pad_token(PHI_4, "<|im_end|>", "<|endoftext|>", None) == "<|endoftext|>"


@pytest.mark.parametrize("own", [None, "<|im_end|>"])
def test_else_it_is_phi_4s_or_another_spare_token(own: str | None) -> None:
    assert choose_pad_token(PHI_4, "<|im_end|>", own, None) == "<|dummy_85|>"
    spare = {name: at for name, at in PHI_4.items() if name != "<|dummy_85|>"}
    assert choose_pad_token(spare, "<|im_end|>", own, None) == "<|dummy_87|>"


def test_one_may_be_named_but_not_the_end_token_nor_an_unknown_one() -> None:
    assert choose_pad_token(PHI_4, "<|im_end|>", "<|dummy_87|>", "a") == "a"
    for wanted, why in (("<|im_end|>", "the end token"), ("<pad>", "not in the vocabulary")):
        with pytest.raises(ConfigError, match=why):
            choose_pad_token(PHI_4, "<|im_end|>", None, wanted)


def test_without_a_spare_token_one_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match="name a token"):
        choose_pad_token({"</s>": 0}, "</s>", "</s>", None)


def test_a_checkpoint_that_pads_with_its_end_token_is_mended(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model")
    spoiled = AutoTokenizer.from_pretrained(folder)
    spoiled.pad_token = spoiled.eos_token
    spoiled.save_pretrained(folder)
    tokenizer = load_tokenizer(folder, None)
    assert tokenizer.pad_token == "<|dummy_87|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(spoiled)


def test_a_folder_without_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(tmp_path, None)
    folder = small_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(folder, None)
