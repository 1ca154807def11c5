"""The files of kept KV: safetensors, verified by a checksum when they are loaded.

A file contains ``tokens``, int32 ``[n]``, all tokens that a prefill has read, and for each layer i
``keys.i`` and ``values.i``, ``[1, kv_heads, n, dim]`` in the model's dtype, of a model that is
divided among processes the heads of one of them. Its metadata has the
format, a key of the model and a checksum of all tensors. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rapid_llm.engine.kv_cache import KVCache, KVOrigin, kv_shape
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.placement import layer_devices
from rapid_llm.engine.prefix_cache.chain import TokenIds
from rapid_llm.engine.prefix_cache.fingerprint import bytes_of

FORMAT = "rapid-llm-kv/2"

_CHECKSUM = "xxh3_128"


@dataclass(frozen=True)
class Header:
    """Header of a file.

    Attributes:
        model: key of the model.
        checksum: hexadecimal xxh3 of 128 bits of all tensors, in the order of writing.
    """

    model: str
    checksum: str


def read_header(path: Path) -> tuple[Header, TokenIds] | None:
    """Read the header of a file, and the tokens of its prefill; None for another format.

    Raises:
        ValueError, SafetensorError, OSError: the file is damaged or unreadable.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            return None
        tokens = file.get_tensor("tokens")
    if tokens.dtype != torch.int32 or tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}, not int32 [n]")
    return Header(metadata.get("model", ""), metadata.get(_CHECKSUM, "")), tokens.numpy()


def read(
    path: Path, header: Header, runner: ModelRunner, origin: KVOrigin, length: int, capacity: int
) -> KVCache:
    """Read a file into a new cache, and verify shapes, dtypes and checksum.

    Args:
        path: the file.
        header: its header.
        runner: the model.
        origin: state of the model.
        length: number of first tokens that the cache will have.
        capacity: capacity of the cache in tokens.

    Raises:
        ValueError, SafetensorError, OSError: the file is damaged or unreadable.
    """
    layers, heads, dim = kv_shape(runner.config)
    cache, dtype = runner.new_cache(capacity), runner.model.dtype
    devices = layer_devices(runner.model)
    with safe_open(path, "pt") as file:
        if len(file.keys()) != 1 + 2 * layers:
            raise ValueError(f"it has {len(file.keys())} tensors, not {1 + 2 * layers}")
        tokens = file.get_tensor("tokens")
        checksum = xxhash.xxh3_128(bytes_of(tokens))
        shape = (1, heads // runner.kv_shares, len(tokens), dim)
        for index, layer in enumerate(cache.layers):
            pair = [file.get_tensor(f"{kind}.{index}") for kind in ("keys", "values")]
            for tensor in pair:
                if tensor.shape != shape or tensor.dtype != dtype:
                    raise ValueError(
                        f"layer {index} is {tensor.dtype} {list(tensor.shape)}, "
                        f"not {dtype} {list(shape)}"
                    )
                checksum.update(bytes_of(tensor))
            keys, values = (tensor[:, :, :length].to(devices[index]) for tensor in pair)
            layer.update(keys, values)
    if checksum.hexdigest() != header.checksum:
        raise ValueError("its checksum does not match")
    cache.origin = origin
    return cache


def write(path: Path, model: str, tokens: TokenIds, cache: KVCache) -> None:
    """Write the KV of a prefill to a file.

    Raises:
        SafetensorError, OSError: the file cannot be written.
        RuntimeError: there is too little memory for a copy.
    """
    tensors = {"tokens": torch.from_numpy(tokens)}
    for index, layer in enumerate(cache.layers):
        for kind, buffer in (("keys", layer.keys), ("values", layer.values)):
            tensors[f"{kind}.{index}"] = buffer[:, :, : len(tokens)].cpu().contiguous()
    checksum = xxhash.xxh3_128()
    for tensor in tensors.values():  # in the order of reading
        checksum.update(bytes_of(tensor))
    save_file(tensors, path, _metadata(model) | {_CHECKSUM: checksum.hexdigest()})


def nbytes_at_most(model: str, tokens: TokenIds, cache: KVCache) -> int:
    """An upper bound of the bytes of the file that :func:`write` writes."""
    buffers = list(_buffers(cache))
    data = sum(b.nbytes // b.shape[2] * len(tokens) for b in buffers)
    names = 300 * (1 + len(buffers))  # name, dtype, shape and place of a tensor in the header
    return data + tokens.nbytes + names + len(str(_metadata(model))) + 4096


def _buffers(cache: KVCache) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def _metadata(model: str) -> dict[str, str]:
    return {"format": FORMAT, "model": model}
