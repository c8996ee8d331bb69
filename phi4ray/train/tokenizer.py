"""The tokenizer that chats are learned with: its chat template, and a pad token of its own.

If the pad token were the end token, a trainer that leaves padding out of the loss would leave the
end of every answer out of it too, and the model would never learn to stop. Phi-4 has spare tokens
for this, such as `<|dummy_85|>`; none is ever added, so that the embeddings keep their size.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4ray.errors import ConfigError

PHI_4_PAD = "<|dummy_85|>"
"""What Phi-4's tokenizer names as its pad token."""

SPARE = re.compile(r"<\|dummy_\d+\|>")


def load_tokenizer(folder: Path | str, pad_token: str | None) -> Any:
    """Load a checkpoint's tokenizer and give it a pad token.

    Raises:
        ConfigError: the checkpoint has no tokenizer or chat template, or no token to pad with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer can be loaded from {folder}: {error}") from error
    if not tokenizer.chat_template:
        raise ConfigError(f"{folder} has no chat template: give its tokenizer one")
    tokenizer.pad_token = choose_pad_token(
        tokenizer.get_vocab(), tokenizer.eos_token, tokenizer.pad_token, pad_token
    )
    tokenizer.padding_side = "right"
    return tokenizer


def choose_pad_token(
    vocabulary: Mapping[str, int], eos: str | None, own: str | None, wanted: str | None
) -> str:
    """The token to pad with: the one wanted, the tokenizer's own, or a spare one; never the end.

    Raises:
        ConfigError: the one wanted does not do, or there is no spare one.
    """
    if wanted is not None:
        if wanted not in vocabulary or wanted == eos:
            why = "the end token" if wanted == eos else "not in the vocabulary"
            raise ConfigError(f"pad_token {wanted!r} is {why}: choose a spare token of the model")
        return wanted
    if own is not None and own != eos:
        return own
    if PHI_4_PAD in vocabulary:
        return PHI_4_PAD
    if spare := sorted(filter(SPARE.fullmatch, vocabulary)):
        return spare[-1]
    raise ConfigError(
        f"the tokenizer pads with its end token {eos!r} and has no spare one: name a token of its "
        "vocabulary that no text contains, as pad_token"
    )
