"""A tiny checkpoint of the true Phi-4 architecture, made here in seconds, the same every time.

    python -m phi4ray.train.tiny FOLDER

`Phi3ForCausalLM` with Phi-4's proportions: four query heads to a KV head, an FFN 3.5 times the
hidden size, RoPE base 250,000, untied embeddings, Phi-4's chat markers and template, and a byte
BPE tokenizer trained on the text beside this file, with a token for each digit. Its weights are
random: answers are noise, until it is trained as `jobs/circle.py` does.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4ray.errors import ConfigError
from phi4ray.models import find_model

CORPUS = Path(__file__).with_name("corpus.txt")
MARKER = "phi4ray.json"
"""Says what a folder was made from; written last."""

BOS, EOS, PAD = "<|endoftext|>", "<|im_end|>", "<|dummy_87|>"
SPECIAL = (BOS, "<|im_start|>", "<|im_sep|>", EOS, PAD)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

ROPE_THETA = 250_000.0
VOCAB_SIZE = 1536
INITIALIZER_RANGE = 0.2
"""Ten times the usual: wide enough for logits that differ, so that answers are lively."""


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    hidden_size: int = 256,
    num_hidden_layers: int = 4,
    max_model_len: int = 16384,
    initializer_range: float = INITIALIZER_RANGE,
) -> Path:
    """Make the checkpoint, unless the folder holds this very one; returns the folder.

    `hidden_size` is a multiple of 128: heads are 32 wide, and come in fours to a KV head. A model
    that is to be trained wants an `initializer_range` of about 0.02, as Phi-4 had.
    """
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 7 // 2,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 128,
        "max_position_embeddings": max_model_len,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
        "initializer_range": initializer_range,
    }
    return _make(folder, sizes, seed=seed)


def make_dummy_model(folder: Path, model: str) -> Path:
    """Make a folder of a catalogued model's full shape without weights; returns it.

    For engines with `load_format="dummy"`: true speed and memory without the weights.

    Raises:
        ConfigError: the catalogue has no such model.
    """
    entry = find_model(model)
    if entry is None:
        raise ConfigError(f"{model!r} is not in the catalogue of phi4ray.models")
    shape = entry.shape
    sizes = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": shape.max_model_len,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "partial_rotary_factor": shape.partial_rotary_factor,
    }
    return _make(folder, sizes, seed=None)


def _make(folder: Path, sizes: Mapping[str, Any], *, seed: int | None) -> Path:
    """Make a folder beside the target, then put it there: a run that is cut off leaves nothing."""
    made_from = {"sizes": dict(sizes), "seed": seed, "version": 3}
    marker = folder / MARKER
    if marker.exists() and json.loads(marker.read_text()) == made_from:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tiny-", dir=folder.parent) as name:
        new = Path(name) / "model"
        new.mkdir()
        _save_tokenizer(new, sizes["max_position_embeddings"], sizes["vocab_size"])
        config = _config(sizes)
        if seed is None:
            config.save_pretrained(new)
        else:
            _save_weights(new, config, seed)
        (new / MARKER).write_text(json.dumps(made_from))
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    return folder


def _save_tokenizer(folder: Path, max_model_len: int, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Phi-4's takes digits in threes at most; numbers are learned soonest one by one.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.read_text("utf-8").splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(_filled(tokenizer.to_str(), vocab_size))),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_model_len,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _filled(tokenizer: str, vocab_size: int) -> dict[str, Any]:
    """Give each further token of the vocabulary a word, a number that no text is split into.

    Engines decode a token without text together with all those after it, again at each: a model
    that answers with such tokens has a front end ten times as slow as it would be.
    """
    state: dict[str, Any] = json.loads(tokenizer)
    vocab = state["model"]["vocab"]
    vocab |= {f"Ġ{number}": number for number in range(len(vocab), vocab_size)}
    return state


def _config(sizes: Mapping[str, Any]) -> Any:
    from transformers import Phi3Config

    return Phi3Config(
        **sizes,
        architectures=["Phi3ForCausalLM"],
        original_max_position_embeddings=sizes["max_position_embeddings"],
        rope_theta=ROPE_THETA,
        rms_norm_eps=1e-5,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
        dtype="bfloat16",
    )


def _save_weights(folder: Path, config: Any, seed: int) -> None:
    import torch
    from transformers import Phi3ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Phi3ForCausalLM(config)
    with torch.no_grad():
        # Random answers would end at random, and show markers: give markers no weight.
        model.lm_head.weight[: len(SPECIAL)] = 0
    model.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    """Make a checkpoint from the command line."""
    parser = argparse.ArgumentParser(prog="python -m phi4ray.train.tiny", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--shape-of", help="a catalogued model's full shape, without weights")
    arguments = parser.parse_args()
    if arguments.shape_of:
        print(make_dummy_model(arguments.folder, arguments.shape_of))
    else:
        print(
            make_tiny_model(
                arguments.folder, seed=arguments.seed, max_model_len=arguments.max_model_len
            )
        )


if __name__ == "__main__":
    main()
