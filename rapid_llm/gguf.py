"""Convert GGUF files once: later loads read safetensors from a cache folder."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.folders import cache_folder

_CHECKSUMS = "checksums.json"
_BLOCK = 1 << 24  # bytes read at a time


def load_gguf(
    path: Path, dtype: torch.dtype, options: dict[str, Any], files: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a GGUF file.

    Converting takes many times as long as loading, so the result is kept in the folder ``gguf`` of
    :func:`rapid_llm.folders.cache_folder`, under a checksum of the file's bytes, and is verified
    before it is used. Where it cannot be kept, a warning says so.

    Args:
        path: path of the file.
        dtype: dtype of the weights.
        options: arguments of ``from_pretrained`` for the model.
        files: arguments of ``from_pretrained`` for the tokenizer.

    Raises:
        Exception: whatever transformers raises for a file that it cannot read.
    """
    name = f"{_checksum(path)}-{str(dtype).removeprefix('torch.')}-{transformers.__version__}"
    folder = cache_folder() / "gguf" / name
    if not (kept := _is_whole(folder)):
        # Without options: they may change the model, and the next load may have others.
        plain, tokenizer = _converted(path, dtype, {}, {})
        kept = _keep(folder, plain, tokenizer)
        if options in ({}, {"device_map": {"": "cpu"}}):  # they change nothing
            return plain, tokenizer
    if not kept:
        return _converted(path, dtype, options, files)
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options),
        AutoTokenizer.from_pretrained(folder, **files),
    )


def _converted(
    path: Path, dtype: torch.dtype, options: dict[str, Any], files: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    packed = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **packed, **files)
    # Packed weights would be multiplied in float32, slower than plain bfloat16.
    how = {"quantization_config": GgufConfig(dequantize=True), **options}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **packed, **how)
    return model, tokenizer


def _keep(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Write model and tokenizer to a folder atomically; returns whether the folder exists."""
    new = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        new.mkdir(parents=True)
        size = sum(tensor.nbytes for tensor in model.parameters())
        if shutil.disk_usage(new).free < 2 * size:
            raise OSError(f"less than {2 * size / 2**30:.1f} GiB are free")
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        sums = {file.name: _checksum(file) for file in new.iterdir()}
        (new / _CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
        if not _is_whole(folder):  # another process may have written it, and may be reading it
            shutil.rmtree(folder, ignore_errors=True)  # a damaged folder
            os.replace(new, folder)
        return True
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if not (kept := _is_whole(folder)):
            warnings.warn(
                f"the converted GGUF file cannot be kept in {folder.parent} ({error}), so that it "
                "is converted at each start: set RAPID_LLM_CACHE to a folder with room for it",
                stacklevel=2,
            )
        return kept
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether a folder's files match the checksums that were written with them."""
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        return bool(sums) and all(_checksum(folder / name) == each for name, each in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(path: Path) -> str:
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()
