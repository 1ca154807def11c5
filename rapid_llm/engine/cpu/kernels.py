"""The compiled CPU kernels of ``kernels.cpp``, where they were built and the CPU runs them."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from rapid_llm.engine.cpu.products import fast_dtype
from rapid_llm.engine.identity import is_plain_tensor
from rapid_llm.limits import processors

_PREFERRED = ("_kernels_avx512bf16", "_kernels_avx2")
UNLIMITED = 1 << 62
"""A sliding window that no sequence fills."""

_MULTIPLE = 32  # of numbers that the kernels take at a time


@cache
def load(name: str) -> ctypes.CDLL | None:
    """One build of the kernels; None where it is not there or this CPU cannot run it."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(name + suffix)
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # another platform's, or OpenMP's library is missing
                return None
            return library if library.rapid_supported() else None
    return None


def kernels() -> ctypes.CDLL | None:
    """The best build for this CPU, or None: PyTorch's operators do the same, more slowly.

    ``RAPID_LLM_NATIVE=0`` in the environment leaves the work to PyTorch, whose roundings differ.
    """
    if os.environ.get("RAPID_LLM_NATIVE") == "0":
        return None
    return next((found for name in _PREFERRED if (found := load(name)) is not None), None)


def fits(size: int) -> bool:
    """Whether the kernels take vectors of this size."""
    return size % _MULTIPLE == 0


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`attend` takes these and is the fastest there is.

    The build without bfloat16 instructions is so on a CPU without them: elsewhere PyTorch's matrix
    products keep up with it.
    """
    return (
        all(
            tensor.dtype == torch.bfloat16
            and tensor.device.type == "cpu"
            and tensor.ndim == 3
            and is_plain_tensor(tensor)
            for tensor in (query, key, value)
        )
        and fits(query.shape[-1])
        and query.shape[-1] == key.shape[-1]
        and query.shape[1] <= key.shape[1]
        and query.shape[0] % key.shape[0] == 0
        and key.shape == value.shape
        and key.stride() == value.stride()
        and key.stride()[1:] == (key.shape[-1], 1)
        and (library := kernels()) is not None
        and (library is load(_PREFERRED[0]) or fast_dtype(query.dtype) != query.dtype)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """As :func:`rapid_llm.engine.attention.attend`, for what :func:`serves`."""
    library = kernels()
    assert library is not None
    query = query.contiguous()
    out = torch.empty_like(query)
    heads, n, dim = query.shape
    kv_heads, length = key.shape[:2]
    library.rapid_attend(
        *map(pointer, (query, key, value)),
        *map(ctypes.c_int64, (heads, kv_heads, n, length - n, dim, key.stride(0))),
        ctypes.c_int64(UNLIMITED if window is None else window),
        ctypes.c_float(scaling),
        ctypes.c_int64(threads()),
        pointer(out),
    )
    return out


def threads() -> int:
    """Threads of a kernel: as many as PyTorch's, but none that would wait for a processor."""
    return min(torch.get_num_threads(), processors())


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor's numbers are; whoever passes it on keeps the tensor alive."""
    return ctypes.c_void_p(tensor.data_ptr())
