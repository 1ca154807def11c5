"""Sizes of models counted from their configs, and models of a named shape with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rapid_llm.bench.known_models import NAMES, known_config
from rapid_llm.bench.speed_model import ModelSize
from rapid_llm.engine.kv_cache import kv_shape
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.errors import InvalidParameterError, ModelError
from rapid_llm.models import load_config
from rapid_llm.tensor_parallel import head_divisor


def read_size(source: str | Path) -> ModelSize:
    """The size of a model that :func:`rapid_llm.models.load_model` would load, from its config.

    Args:
        source: the model, or a name of :data:`rapid_llm.bench.known_models.NAMES`. Models that are
            known there need no hub.

    Raises:
        ModelError: there is no such model, or its architecture is not supported.
        MissingDependencyError: the packaged model is not installed.
    """
    name = str(source)
    known = None if Path(name).expanduser().exists() else known_config(name)
    return size_of(known or load_config(source), name)


def size_of(config: PretrainedConfig, name: str) -> ModelSize:
    """The size of the language model that a config describes.

    Args:
        config: config of the model.
        name: name of the model in errors.

    Raises:
        ModelError: it describes no causal language model, or its architecture is not supported.
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
    runner = ModelRunner(model, name)  # refuses unsupported architectures
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
        shared_by=head_divisor(text),
    )


def shape_config(name: str, positions: int) -> PretrainedConfig:
    """The config of a shape; its rotary embedding is not scaled, which takes the same time.

    Args:
        name: name of the shape.
        positions: maximum length in tokens.

    Raises:
        InvalidParameterError: there is no shape of that name.
    """
    config = known_config(name, positions)
    if config is None:
        raise InvalidParameterError(f"shape={name!r} is unknown; choose from {', '.join(NAMES)}")
    return config


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model with random weights, drawn on the device."""
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def number_tokenizer(words: int) -> PreTrainedTokenizerBase:
    """A tokenizer in which token 17 is the word "17", for models with random weights."""
    known = models.WordLevel({str(word): word for word in range(words)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(known))
