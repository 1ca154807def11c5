"""KV on disk: one safetensors file per prompt, verified by a checksum when it is loaded.

A file contains ``tokens``, int32 ``[n]``, all tokens that a prefill has read, and for each layer i
``keys.i`` and ``values.i``, ``[1, kv_heads, n, dim]`` in the model's dtype. Its metadata has the
format, a fingerprint of the model and a checksum of all tensors. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
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
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rapid_llm.engine.chunks import common_end, pass_ends
from rapid_llm.engine.kv_cache import KVCache, KVOrigin, kv_shape
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.model_state import ModelState
from rapid_llm.engine.rounding import rounding

FORMAT = "rapid-llm-kv/1"

COVERED = 0.9
"""Share of a prompt from which on an existing file is enough, and no other is written."""

_CHUNK = 1 << 26  # bytes of a tensor that are hashed at a time on a device

TokenIds: TypeAlias = npt.NDArray[np.int32]


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Length of the common prefix of two sequences, int32 ``[n]`` and ``[m]``."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if differing.size else n


@dataclass(frozen=True)
class _Header:
    """Header of a file: fingerprint of the model, checksum and tokens."""

    model: str
    checksum: str
    tokens: TokenIds


class KVFiles:
    """KV files of any number of models in a folder; safe to use from several threads.

    Damaged files and failures to write are reported in a warning and otherwise ignored. A file is
    valid for a model with the same bytes of all weights, adapters and settings. Their fingerprint
    is computed once, and again before a file is written or loaded. There are no files for models
    with offloaded weights, tensor subclasses, hooks, or methods and classes of the user's own,
    because their results do not follow from their tensors and settings.

    Args:
        directory: the folder, created with the first file, with access for its owner only.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._contents: WeakKeyDictionary[ModelRunner, dict[int, str | None]] = WeakKeyDictionary()
        # For each file its version (mtime, size) and header; None for a file that is not usable.
        self._seen: dict[Path, tuple[tuple[int, int], _Header | None]] = {}

    def find(
        self, runner: ModelRunner, tokens: TokenIds, origin: KVOrigin
    ) -> tuple[Path | None, int]:
        """Find the file that shares the longest reusable prefix with a prefill.

        Args:
            runner: the model.
            tokens: tokens of the prefill.
            origin: current state of the model.

        Returns:
            The file and the length of the prefix in tokens, by
            :func:`rapid_llm.engine.chunks.common_end`; None and 0 if there is none.
        """
        sizes = runner.prefill_sizes
        ends = pass_ends(len(tokens), sizes)
        best, most = None, 0
        model = self._model(runner, origin)
        if model is not None:
            for path in self._directory.glob(f"{model[:16]}-*.safetensors"):
                header = self._header(path)
                if header is not None and header.model == model:
                    theirs = pass_ends(len(header.tokens), sizes)
                    shared = common_end(theirs, ends, common_prefix(header.tokens, tokens))
                    if shared > most:
                        best, most = path, shared
        return best, most

    def load(
        self, path: Path, runner: ModelRunner, origin: KVOrigin, length: int, capacity: int
    ) -> KVCache | None:
        """Load the first ``length`` tokens of a file from :meth:`find` into a new cache.

        Args:
            path: the file.
            runner: the model.
            origin: state of the model at the call of :meth:`find`.
            length: number of tokens to load.
            capacity: capacity of the cache in tokens.

        Returns:
            The cache; None if the file is damaged, or the model has changed.
        """
        version, header = self._seen[path]
        if header is None or not self._is_unchanged(runner, origin):
            return None
        try:
            return _read(path, header, runner, origin, length, capacity)
        except (SafetensorError, OSError, ValueError) as error:
            self._reject(path, version, error)
            return None

    def save(self, runner: ModelRunner, tokens: TokenIds, cache: KVCache) -> None:
        """Write the KV of a prefill to a file, unless an existing file has most of it.

        Args:
            runner: the model.
            tokens: tokens of the prefill.
            cache: cache that begins with all of them.
        """
        assert cache.origin is not None
        model = self._model(runner, cache.origin)
        if (
            model is None
            or self.find(runner, tokens, cache.origin)[1] >= COVERED * len(tokens)
            or not self._is_unchanged(runner, cache.origin)
        ):
            return
        content = hashlib.sha256(model.encode() + tokens.tobytes())
        name = f"{model[:16]}-{content.hexdigest()[:16]}.safetensors"
        path = self._directory / name
        # Write to a unique name, so that readers never see half a file, nor two writers mix.
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(unfinished, model, tokens, cache)
            os.replace(unfinished, path)
        except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
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

    def _model(self, runner: ModelRunner, origin: KVOrigin) -> str | None:
        """Key of files for a model; None if it cannot have files.

        It includes everything on which KV depends: the model's fingerprint, its rotary scale, the
        rounding of its passes, and the sizes of prefill passes.
        """
        known = self._contents.setdefault(runner, {})
        if origin.number not in known:
            known[origin.number] = fingerprint(runner.model, runner.state)
        name = known[origin.number]
        return name and f"{name} beyond {origin.scale}, {rounding(runner)}, {runner.prefill_sizes}"

    def _is_unchanged(self, runner: ModelRunner, origin: KVOrigin) -> bool:
        """Whether the fingerprint still matches: some edits of weights are not detected."""
        now = fingerprint(runner.model, runner.state)
        if self._contents[runner][origin.number] == now:
            return True
        runner.state.renew()
        return False


def fingerprint(model: PreTrainedModel, state: ModelState | None = None) -> str | None:
    """Hash of everything that determines a model's results: modules, tensors and settings.

    Settings are the plain data in modules and configs, such as the active adapter. The current
    frequencies of scaled rotary embeddings are left out, as they change from pass to pass.

    Args:
        model: the model.
        state: its state, if there is one.

    Returns:
        The hash; None where it would not determine the results (:attr:`ModelState.portable`).
    """
    state = ModelState(model) if state is None else state
    if not state.portable:
        return None
    whole = xxhash.xxh3_128()
    whole.update(repr(state.settings).encode())
    for name, module in model.named_modules():
        kind = type(module)
        whole.update(f"{name} {kind.__module__}.{kind.__qualname__}".encode())
        scaled = getattr(module, "rope_type", "default") != "default"
        for each, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not (scaled and each.endswith("inv_freq")):
                whole.update(f"{each} {tuple(tensor.shape)} {tensor.dtype}".encode())
                whole.update(_digest(tensor.detach()))
    return whole.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    """Hash of a tensor's bytes: by xxh3 on a CPU, by :func:`mixed` on other devices."""
    if tensor.device.type == "cpu":
        return xxhash.xxh3_128(_bytes_of(tensor)).digest()
    return mixed(tensor).cpu().numpy().tobytes()


def mixed(tensor: Tensor) -> Tensor:
    """Hash of a tensor's bytes, int64 ``[1]``, computed on its device.

    All 64-bit words are combined with their index by a mixing function, and summed.
    """
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    total = torch.zeros(1, dtype=torch.long, device=tensor.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        words = F.pad(part, (0, -len(part) % 8)).view(torch.long)
        first = start // 8
        total += _mix(
            words ^ _mix(torch.arange(first, first + len(words), device=flat.device))
        ).sum()
    return total


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64, a bijection in which every bit depends on every other."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def _read_header(path: Path) -> _Header | None:
    """Read the header of a file; None for another format.

    Raises:
        ValueError, SafetensorError: the file is damaged.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            return None
        tokens = file.get_tensor("tokens")
    if tokens.dtype != torch.int32 or tokens.ndim != 1:
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}, not int32 [n]")
    # A copy, because the tensor would keep the whole file mapped.
    return _Header(metadata.get("model", ""), metadata.get("sha256", ""), tokens.numpy().copy())


def _read(
    path: Path, header: _Header, runner: ModelRunner, origin: KVOrigin, length: int, capacity: int
) -> KVCache:
    """Read a file into a new cache, and verify shapes, dtypes and checksum.

    Raises:
        ValueError, SafetensorError, OSError: the file is damaged or unreadable.
    """
    layers, heads, dim = kv_shape(runner.config)
    shape, dtype = (1, heads, len(header.tokens), dim), runner.model.dtype
    cache = runner.new_cache(capacity)
    sha = hashlib.sha256(header.tokens.tobytes())
    devices = [next(layer.parameters()).device for layer in runner.model.get_decoder().layers]
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
    cache.origin = origin
    return cache


def _write(path: Path, model: str, tokens: TokenIds, cache: KVCache) -> None:
    tensors = {"tokens": torch.from_numpy(tokens)}
    for index, layer in enumerate(cache.layers):
        for kind, buffer in (("keys", layer.keys), ("values", layer.values)):
            tensors[f"{kind}.{index}"] = buffer[:, :, : len(tokens)].cpu().contiguous()
    sha = hashlib.sha256()
    for tensor in tensors.values():  # in the order of reading
        sha.update(_bytes_of(tensor))
    save_file(tensors, path, {"format": FORMAT, "model": model, "sha256": sha.hexdigest()})


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
