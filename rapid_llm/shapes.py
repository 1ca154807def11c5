"""Sizes of models counted from their configs, and models of a named shape with random weights.

``data/models.json`` has the sizes of common models, named by their hub ids, so that they are known
without a hub; ``tiny`` belongs to no checkpoint and serves the tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

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

from rapid_llm.engine.kv_cache import kv_shape
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.errors import InvalidParameterError, ModelError
from rapid_llm.folders import packaged_text
from rapid_llm.models import load_config
from rapid_llm.tensor_parallel_plan import head_divisor

Precision = Literal["bf16", "int8", "int4", "int4g64"]
"""Formats of weights: ``int4`` of GGUF files and of our drafter on a CPU, ``int4g64`` on CUDA."""

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)

_DATA = json.loads(packaged_text("models.json"))

# By name: the base model's hub id, the suffix of the tuned model's, architecture, values of SIZES,
# maximum length ("positions"), and other values of the config.
_MODELS: dict[str, dict[str, Any]] = _DATA["models"]
_NAMES: dict[str, str] = {
    **_DATA["hub_ids"],  # of tuned models whose ids are not the base model's with a suffix
    **{each["hub"]: name for name, each in _MODELS.items()},
    **{each["hub"] + each["tuned"]: name for name, each in _MODELS.items()},
    **{name: name for name in _MODELS},
}

NAMES = tuple(_MODELS)
"""Names by which the models are known here."""

_ITEMSIZE = 2  # bytes of a 16-bit number: KV, scales, and weights that are not quantized
# Bytes of a weight of the layers, and of the output layer. 32 weights share a 16-bit scale, and in
# int4 a 16-bit minimum too, with an output layer in int8; on CUDA 64 weights share both.
_BYTES: dict[Precision, tuple[float, float]] = {
    "bf16": (2, 2),
    "int8": (1 + 2 / 32, 1 + 2 / 32),
    "int4": (0.5 + 4 / 32, 1 + 2 / 32),
    "int4g64": (0.5 + 4 / 64, 0.5 + 4 / 64),
}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, in parameters where no other unit is given."""

    name: str
    lookup: int  # input embedding, of which a pass reads only some rows; 0 if it is tied
    head: int  # output layer, tied or not; part of ``matrices``
    matrices: int  # weights that every pass reads in full and can be quantized, without experts
    experts: int  # all routed experts of all layers
    expert_share: float  # experts that a token is routed to ÷ experts of a layer
    vectors: int  # norms and biases, never quantized
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    context_window: int  # in tokens
    shared_by: int  # what the number of tensor-parallel ranks divides; 0 if each rank has all KV

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return self.lookup + self.matrices + self.experts + self.vectors

    @property
    def active_parameters(self) -> float:
        """Number of parameters that one token is multiplied with."""
        return self.matrices + self.experts * self.expert_share

    @property
    def kv_bytes_per_token(self) -> int:
        """k = layers · 2 · kv_heads · head_dim · itemsize, in bf16."""
        return self.layers * 2 * self.kv_heads * self.head_dim * _ITEMSIZE

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in bf16."""
        return self.parameters * _ITEMSIZE

    def mapped_bytes(self, devices: int, tokens: int) -> int:
        """Bytes on the fullest device under a device map, with ``tokens`` tokens in the cache.

        A map spreads whole layers with their KV.
        """
        layers = -(-self.layers // devices)
        in_layers = self.matrices + self.experts + self.vectors - self.head
        ends = self.lookup + self.head if devices == 1 else max(self.lookup, self.head)
        weights = in_layers / self.layers * layers + ends
        return round(weights * _ITEMSIZE + self.kv_bytes_per_token * tokens / self.layers * layers)

    def sharded_bytes(self, devices: int, tokens: int) -> int | None:
        """Bytes on each device in tensor parallel, likewise; None where heads do not divide."""
        if self.shared_by and self.shared_by % devices:
            return None
        weights = (self.lookup + self.matrices + self.experts) / devices + self.vectors
        kv = self.kv_bytes_per_token * tokens / (devices if self.shared_by else 1)
        return round(weights * _ITEMSIZE + kv)

    def quantized_bytes(self, precision: Precision) -> int:
        """Bytes of a quantized copy, which shares all other weights with the model."""
        return round(self._matrix_bytes(self.experts, precision))

    def bytes_read(self, tokens: int, precision: Precision) -> float:
        """Bytes of weights that a pass over ``tokens`` tokens reads (W for one token).

        Tokens are assumed to choose experts independently and evenly, so that n tokens read the
        share 1 − (1 − share)ⁿ of the experts.
        """
        experts = self.experts * (1 - (1 - self.expert_share) ** tokens)
        return self._matrix_bytes(experts, precision) + self.vectors * _ITEMSIZE

    def _matrix_bytes(self, experts: float, precision: Precision) -> float:
        """Bytes of the matrices and of ``experts`` weights of experts."""
        layers, head = _BYTES[precision]
        return self.head * head + (self.matrices - self.head + experts) * layers


def read_size(source: str | Path) -> ModelSize:
    """The size of a model that :func:`rapid_llm.models.load_model` would load, from its config.

    :data:`NAMES` are taken too; models that are known need no hub.

    Raises:
        ModelError: there is no such model, or its architecture is not supported.
        MissingDependencyError: the packaged model is not installed.
    """
    name = str(source)
    known = name in _NAMES and not Path(name).expanduser().exists()
    return size_of(shape_config(name) if known else load_config(source), name)


def size_of(config: PretrainedConfig, name: str) -> ModelSize:
    """The size of the language model that a config describes, ``name`` in errors.

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


def shape_config(name: str, positions: int | None = None) -> PretrainedConfig:
    """The config of one of :data:`NAMES`, or of a hub id of such a model.

    Its rotary embedding is not scaled, which takes the same time. ``positions`` is the maximum
    length in tokens; None for the checkpoint's own.

    Raises:
        InvalidParameterError: there is no shape of that name.
    """
    if name not in _NAMES:
        raise InvalidParameterError(f"shape={name!r} is unknown; choose from {', '.join(NAMES)}")
    known = _MODELS[_NAMES[name]]
    others = {k: v for k, v in known.items() if k not in ("hub", "tuned", "model_type", "sizes")}
    own = others.pop("positions")
    return make_config(known["model_type"], *known["sizes"], positions=positions or own, **others)


def make_config(model_type: str, *sizes: int, positions: int, **others: Any) -> PretrainedConfig:
    """A config with values of :data:`SIZES`, ``positions`` tokens at most, and other values.

    It has no end-of-sequence token, so that no answer ends early.
    """
    named: dict[str, Any] = dict(zip(SIZES, sizes, strict=True)) | others
    named |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = CONFIG_MAPPING[model_type](max_position_embeddings=positions, **named)
    return cast(PretrainedConfig, config)


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
