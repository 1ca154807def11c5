"""KV on disk: one safetensors file a prompt, checked before it is believed.

A file holds ``tokens``, int32 ``[n]``, and for each layer i ``keys.i`` and ``values.i``,
``[1, kv_heads, n, dim]`` in the model's dtype. Its metadata names the format and the model, and
gives a checksum of all tensors. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rapid_llm.engine.forward import Forward
from rapid_llm.engine.kv_cache import KVCache, kv_shape
from rapid_llm.engine.rounding import rounding

FORMAT = "rapid-llm-kv/2"

COVERED = 0.9
"""Share of a prompt that a file must hold for another one not to be written."""

_SAMPLES = 256  # values of each parameter that go into a model's fingerprint

TokenIds: TypeAlias = npt.NDArray[np.int32]


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """How many tokens two sequences, int32 ``[n]`` and ``[m]``, have in common at their start."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if differing.size else n


@dataclass(frozen=True)
class _Header:
    """What a file claims to hold."""

    model: str
    checksum: str
    tokens: TokenIds


class KVFiles:
    """The KV files in a folder, of any number of models. Safe to use from several threads.

    A damaged file is named in a warning and otherwise ignored, as is a failure to write one:
    files only save time. A model with offloaded weights has none.

    Args:
        directory: made when the first file is written, readable by its owner only.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fingerprints: WeakKeyDictionary[Forward, str | None] = WeakKeyDictionary()
        # The version of each file that was looked at (mtime, size), and what it claims to hold;
        # None if it is of no use.
        self._seen: dict[Path, tuple[tuple[int, int], _Header | None]] = {}

    def find(self, forward: Forward, tokens: TokenIds) -> tuple[Path | None, int]:
        """The file of this model that shares most tokens with a prompt, and how many."""
        best, most = None, 0
        model = self._fingerprint(forward)
        if model is not None:
            for path in self._directory.glob(f"{model[:16]}-*.safetensors"):
                header = self._header(path)
                if header is not None and header.model == model:
                    shared = common_prefix(header.tokens, tokens)
                    if shared > most:
                        best, most = path, shared
        return best, most

    def load(self, path: Path, forward: Forward, length: int, capacity: int) -> KVCache | None:
        """The first ``length`` tokens of a file that :meth:`find` has found; None if damaged."""
        version, header = self._seen[path]
        if header is None:
            return None
        try:
            return _read(path, header, forward, length, capacity)
        except (SafetensorError, OSError, ValueError) as error:
            self._reject(path, version, error)
            return None

    def save(self, forward: Forward, tokens: TokenIds, cache: KVCache) -> None:
        """Write the KV of ``tokens``, which ``cache`` begins with, unless a file has most of it."""
        model = self._fingerprint(forward)
        if model is None or self.find(forward, tokens)[1] >= COVERED * len(tokens):
            return
        name = f"{model[:16]}-{hashlib.sha256(tokens.tobytes()).hexdigest()[:16]}.safetensors"
        path = self._directory / name
        # Readers never see half a file, and two writers do not mix.
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(unfinished, model, tokens, cache)
            os.replace(unfinished, path)
        except (SafetensorError, OSError, RuntimeError) as error:  # torch's if memory is short
            warnings.warn(
                f"the KV of {len(tokens)} tokens could not be written to {path}: {error}; "
                "free some space or choose another directory, or this prompt is read again in "
                "the next process",
                stacklevel=2,
            )
        finally:
            with suppress(OSError):
                unfinished.unlink()

    def _header(self, path: Path) -> _Header | None:
        try:
            stat = path.stat()
        except OSError:  # deleted since it was listed
            return None
        version = stat.st_mtime_ns, stat.st_size
        if path not in self._seen or self._seen[path][0] != version:
            try:
                self._seen[path] = version, _read_header(path)
            except (SafetensorError, OSError, ValueError) as error:
                self._reject(path, version, error)
        return self._seen[path][1]

    def _reject(self, path: Path, version: tuple[int, int], error: Exception) -> None:
        self._seen[path] = version, None
        warnings.warn(
            f"the KV file {path} is damaged or unreadable, and ignored: {error}; delete it, or "
            "let it be replaced when its prompt is read again",
            stacklevel=2,
        )

    def _fingerprint(self, forward: Forward) -> str | None:
        """Of a model and how its passes round: another thread count's KV is not this one's."""
        if forward not in self._fingerprints:
            self._fingerprints[forward] = fingerprint(forward.model)
        model = self._fingerprints[forward]
        if model is None:
            return None
        return hashlib.sha256(f"{model} {rounding(forward)}".encode()).hexdigest()


def fingerprint(model: PreTrainedModel) -> str | None:
    """Identifies what a model computes: a SHA-256 of its config, modules and sampled weights.

    None if some weights are elsewhere (on the meta device).
    """
    sha = hashlib.sha256()
    config = model.config.to_dict()
    for where_it_came_from in ("_name_or_path", "transformers_version"):
        config.pop(where_it_came_from, None)
    sha.update(json.dumps(config, sort_keys=True, default=str).encode())
    sha.update(repr(model).encode())  # the same weights behind other layers, such as int8
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return None
        values = parameter.detach().reshape(-1)
        step = max(1, len(values) // _SAMPLES) | 1  # odd, or it would stay in a few columns
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        sha.update(_bytes_of(values[::step]))
    return sha.hexdigest()


def _read_header(path: Path) -> _Header | None:
    """None for another format; ValueError or SafetensorError for a damaged file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            return None
        tokens = file.get_tensor("tokens")
    if tokens.dtype != torch.int32 or tokens.ndim != 1:
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}, not int32 [n]")
    # A copy: the tensor would keep the whole file mapped.
    return _Header(metadata.get("model", ""), metadata.get("sha256", ""), tokens.numpy().copy())


def _read(path: Path, header: _Header, forward: Forward, length: int, capacity: int) -> KVCache:
    """The cache, once every tensor has the right shape and all of them the right checksum."""
    layers, heads, dim = kv_shape(forward.config)
    shape, dtype = (1, heads, len(header.tokens), dim), forward.model.dtype
    cache = forward.new_cache(capacity)
    sha = hashlib.sha256(header.tokens.tobytes())
    devices = [next(layer.parameters()).device for layer in forward.model.get_decoder().layers]
    with safe_open(path, "pt") as file:
        if len(file.keys()) != 1 + 2 * layers:
            raise ValueError(f"it has {len(file.keys())} tensors, not {1 + 2 * layers}")
        for index, layer in enumerate(cache.layers):
            pair = [file.get_tensor(f"{kind}.{index}") for kind in ("keys", "values")]
            for tensor in pair:
                if tensor.shape != shape or tensor.dtype != dtype:
                    raise ValueError(
                        f"layer {index} is {tensor.dtype} {list(tensor.shape)}, "
                        f"not {dtype} {list(shape)}"
                    )
                sha.update(_bytes_of(tensor))
            keys, values = (tensor[:, :, :length].to(devices[index]) for tensor in pair)
            layer.update(keys, values)
    if sha.hexdigest() != header.checksum:
        raise ValueError("its checksum does not match")
    return cache


def _write(path: Path, model: str, tokens: TokenIds, cache: KVCache) -> None:
    tensors = {"tokens": torch.from_numpy(tokens)}
    for index, layer in enumerate(cache.layers):
        for kind, buffer in (("keys", layer.keys), ("values", layer.values)):
            tensors[f"{kind}.{index}"] = buffer[:, :, : len(tokens)].cpu().contiguous()
    sha = hashlib.sha256()
    for tensor in tensors.values():  # in the order in which they are read
        sha.update(_bytes_of(tensor))
    save_file(tensors, path, {"format": FORMAT, "model": model, "sha256": sha.hexdigest()})


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
