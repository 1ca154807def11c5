"""Fingerprint of a model: a hash of all that its results depend on, the same in all processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from rapid_llm.engine.model_state import ModelState
from rapid_llm.engine.snapshot import shard_of

_CHUNK = 1 << 26  # bytes of a tensor that are hashed at a time on a device


def fingerprint(model: PreTrainedModel, state: ModelState | None = None) -> str | None:
    """Hash of everything that determines a model's results: modules, tensors and settings.

    Of a model that is divided among processes it is the hash of this one's part.

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
                whole.update(_digest(shard_of(tensor).detach()))
    return whole.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    """Hash of a tensor's bytes: by xxh3 on a CPU, by :func:`mixed` on other devices."""
    if tensor.device.type == "cpu":
        return xxhash.xxh3_128(bytes_of(tensor)).digest()
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


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in host memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
