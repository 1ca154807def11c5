"""Models of a named shape with random weights: what speed depends on, and nothing to download."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rapid_llm.errors import InvalidParameterError


@dataclass(frozen=True)
class Shape:
    """What a config says of a model's size; ``others`` goes to the config as it is."""

    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def embedding(self) -> int:
        """Weights of the input embedding that no step reads whole; 0 where the head is the same."""
        return 0 if self.others.get("tie_word_embeddings") else self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Weights of all matrices."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate
        return self.embedding + self.vocabulary * self.hidden + self.layers * layer

    @property
    def kv_per_token(self) -> int:
        """Numbers that the KV cache holds of a token."""
        return self.layers * 2 * self.kv_heads * self.head_dim


_TIED = {"tie_word_embeddings": True}

SHAPES = {
    "llama-3.1-8b": Shape("llama", 128256, 4096, 14336, 32, 32, 8),
    "llama-3.1-70b": Shape("llama", 128256, 8192, 28672, 80, 64, 8),
    "llama-3.2-1b": Shape("llama", 128256, 2048, 8192, 16, 32, 8, 64, _TIED),
    "llama-3.2-3b": Shape("llama", 128256, 3072, 8192, 28, 24, 8, 128, _TIED),
    "mistral-7b": Shape("mistral", 32768, 4096, 14336, 32, 32, 8, 128, {"sliding_window": None}),
    "qwen2.5-7b": Shape("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "qwen3-8b": Shape("qwen3", 151936, 4096, 12288, 36, 32, 8),
    "smollm2-135m": Shape("llama", 49152, 576, 1536, 30, 9, 3, 64, _TIED),
    "tiny": Shape("llama", 512, 64, 128, 2, 4, 2, 32),
}
"""From the checkpoints' own configs; ``tiny`` is no checkpoint's, and there for the tests."""


def named_shape(name: str) -> Shape:
    """Raises InvalidParameterError where there is no shape of that name."""
    if name not in SHAPES:
        raise InvalidParameterError(f"shape={name!r} is unknown; choose from {', '.join(SHAPES)}")
    return SHAPES[name]


def random_model(
    shape: Shape, positions: int, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model of a shape, its weights drawn on the device.

    Args:
        shape: of its matrices.
        positions: how many it takes; the rotary embedding is not scaled, which costs the same.
        dtype: of the weights.
        device: where they are.
    """
    config = CONFIG_MAPPING[shape.model_type](
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,  # an answer never ends before it was measured
        pad_token_id=None,
        **shape.others,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def number_tokenizer(words: int) -> PreTrainedTokenizerBase:
    """Token 17 is the word "17": for models that mean nothing."""
    vocabulary = {str(word): word for word in range(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    )
