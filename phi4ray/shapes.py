"""The sizes of one decoder of Phi-4's architecture, as its `config.json` has them.

Every model of the family has the Phi-3 architecture: fused qkv and gate_up projections, RMSNorm,
grouped-query attention, no biases.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi4ray.errors import ConfigError

_ARCHITECTURES = {"phi3", "phi4mm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of one decoder, under the names of its `config.json`.

    `max_model_len` is the context in tokens (`max_position_embeddings`), `head_dim` the width of
    one attention head, `partial_rotary_factor` the share of it that carries positions.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    tie_word_embeddings: bool = False
    partial_rotary_factor: float = 1.0

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' projections: what quantization packs and a token multiplies."""
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        qkv = self.hidden_size * heads * self.head_dim
        o = self.num_attention_heads * self.head_dim * self.hidden_size
        gate_up_and_down = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (qkv + o + gate_up_and_down)

    @property
    def parameters(self) -> int:
        """Exact count: linear layers, two norms a layer, final norm, embedding, untied lm_head."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.linear_parameters + norms + embeddings

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read a decoded Hugging Face `config.json`.

        Raises:
            ConfigError: it is of another architecture, or lacks a size.
        """
        model_type = config.get("model_type")
        if model_type not in _ARCHITECTURES:
            raise ConfigError(
                f"model_type {model_type!r} is not of the Phi-4 family: "
                f"expected one of {sorted(_ARCHITECTURES)}"
            )
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            # Transformers 5 writes the rotary settings into one mapping, 4 beside the sizes.
            rotary = {**config, **(config.get("rope_parameters") or {})}
            return cls(
                num_hidden_layers=int(config["num_hidden_layers"]),
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                vocab_size=int(config["vocab_size"]),
                max_model_len=int(config["max_position_embeddings"]),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                partial_rotary_factor=float(rotary.get("partial_rotary_factor", 1.0)),
            )
        except KeyError as error:
            raise ConfigError(f"the model's config.json lacks {error}") from error
        except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise ConfigError(f"a size in the model's config.json is wrong: {error}") from error
