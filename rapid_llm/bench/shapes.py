"""Shapes of models: sizes counted from a config, and named ones with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rapid_llm.bench.speed_model import ModelSize
from rapid_llm.engine.kv_cache import kv_shape
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.errors import InvalidParameterError, ModelError
from rapid_llm.models import load_config

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_TIED = {"tie_word_embeddings": True}

# Model type, SIZES, and what else the config has.
_SHAPES: dict[str, tuple[Any, ...]] = {
    "llama-3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, {}),
    "llama-3.1-70b": ("llama", 128256, 8192, 28672, 80, 64, 8, 128, {}),
    "llama-3.2-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, _TIED),
    "llama-3.2-3b": ("llama", 128256, 3072, 8192, 28, 24, 8, 128, _TIED),
    "mistral-7b": ("mistral", 32768, 4096, 14336, 32, 32, 8, 128, {"sliding_window": None}),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, {}),
    "qwen3-8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, {}),
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, 64, _TIED),
    "tiny": ("llama", 512, 64, 128, 2, 4, 2, 32, {}),
}
SHAPES = tuple(_SHAPES)
"""From the checkpoints' own configs; ``tiny`` is no checkpoint's, and there for the tests."""


def read_size(source: str | Path) -> ModelSize:
    """The size of a model that :func:`rapid_llm.models.load_model` would load; no weights are.

    Raises:
        ModelError: there is no such model, or its architecture is not supported.
        MissingDependencyError: the packaged model is not installed.
    """
    return size_of(load_config(source), str(source))


def size_of(config: PretrainedConfig, name: str) -> ModelSize:
    """The size of the language model that a config describes.

    Raises:
        ModelError: it describes none, or one whose architecture is not supported.
    """
    text = config.get_text_config()
    try:
        with torch.device("meta"):  # tensors there have a shape and no memory
            model = AutoModelForCausalLM.from_config(text)
    except ValueError as error:
        raise ModelError(
            f"{name}: architecture {config.model_type!r} is no decoder-only language model; "
            "choose a causal one, such as Llama or Qwen"
        ) from error
    runner = ModelRunner(model, name)  # refuses what could not be decoded with
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    lookup = 0 if embedding is head else embedding.numel()
    # transformers stacks the routed experts of a layer: [experts, out, in].
    experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
    stacks = [weight for module in experts for weight in module.parameters()]
    routed = sum(weight.numel() for weight in stacks)
    weights = list(model.parameters())  # a tied one comes once
    layers, kv_heads, head_dim = kv_shape(text)
    return ModelSize(
        name=name,
        lookup=lookup,
        head=head.numel(),
        matrices=sum(w.numel() for w in weights if w.dim() > 1) - lookup - routed,
        experts=routed,
        expert_share=text.num_experts_per_tok / stacks[0].shape[0] if stacks else 0,
        vectors=sum(w.numel() for w in weights if w.dim() == 1),
        layers=layers,
        heads=text.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=text.hidden_size,
        context_window=runner.context_window,
    )


def shape_config(name: str, positions: int) -> PretrainedConfig:
    """The config of a shape; its rotary embedding is not scaled, which costs the same.

    Raises:
        InvalidParameterError: there is no shape of that name.
    """
    if name not in _SHAPES:
        raise InvalidParameterError(f"shape={name!r} is unknown; choose from {', '.join(SHAPES)}")
    *sizes, others = _SHAPES[name]
    return make_config(*sizes, positions=positions, **others)


def make_config(model_type: str, *sizes: int, positions: int, **others: Any) -> PretrainedConfig:
    """A config of the sizes that :data:`SIZES` names, without an end-of-sequence token: no answer
    ends before it was measured."""
    named: dict[str, Any] = dict(zip(SIZES, sizes, strict=True))
    named["max_position_embeddings"] = positions
    named |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**named, **others)
    return config


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model whose weights are drawn on the device."""
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def number_tokenizer(words: int) -> PreTrainedTokenizerBase:
    """Token 17 is the word "17": for models that mean nothing."""
    known = models.WordLevel({str(word): word for word in range(words)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(known))
