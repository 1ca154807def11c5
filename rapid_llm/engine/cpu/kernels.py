"""Load the compiled kernels of ``kernels.cpp``, and call the attention kernel."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from rapid_llm.engine.cpu.products import fast_dtype
from rapid_llm.engine.snapshot import is_plain_tensor
from rapid_llm.limits import processors

_PREFERRED = ("_kernels_avx512bf16", "_kernels_avx2")
_INSTRUCTIONS = ("AVX-512 with bfloat16", "AVX2")
_INTERFACE = 2  # rapid_interface() of kernels.cpp
UNLIMITED = 1 << 62
"""Sliding window for full attention: longer than any sequence."""

_MULTIPLE = 32  # required divisor of the sizes of vectors


def load(name: str) -> ctypes.CDLL | None:
    """Load one build of the kernels; None where it is missing or the CPU does not support it."""
    found = _opened(name)
    return None if isinstance(found, str) else found


@cache
def _opened(name: str) -> ctypes.CDLL | str:
    """One build of the kernels, or the reason why it does not serve."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(name + suffix)
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:  # built for another platform, or without the OpenMP library
                return f"its build cannot be loaded ({error})"
            if not hasattr(library, "rapid_interface") or library.rapid_interface() != _INTERFACE:
                return "its build is of another version: install again, which compiles it"
            return library if library.rapid_supported() else "this CPU lacks its instructions"
    return "it was not built: install where there is a C++ compiler, or from a wheel with it"


def refusals() -> dict[str, str | None]:
    """Why each build does not serve, by the instructions it uses; None for the one that does."""
    disabled = "RAPID_LLM_NATIVE=0 disables it" if _disabled() else None
    reasons: dict[str, str | None] = {}
    for name, instructions in zip(_PREFERRED, _INSTRUCTIONS, strict=True):
        found = _opened(name)
        if isinstance(found, str):
            reasons[instructions] = found
        elif found is kernels():
            reasons[instructions] = None
        else:
            reasons[instructions] = disabled or "a faster one serves"
    return reasons


def _disabled() -> bool:
    return os.environ.get("RAPID_LLM_NATIVE") == "0"


def kernels() -> ctypes.CDLL | None:
    """The best build for this CPU; None if there is none, and PyTorch's operators are used.

    ``RAPID_LLM_NATIVE=0`` in the environment disables the kernels. PyTorch rounds differently.
    """
    if _disabled():
        return None
    return next((found for name in _PREFERRED if (found := load(name)) is not None), None)


def fits(size: int) -> bool:
    """Whether the kernels support vectors of this size."""
    return size % _MULTIPLE == 0


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`attend` and :func:`attend_part` support these tensors and are the fastest.

    The build without bfloat16 instructions is fastest only on a CPU without them; elsewhere
    PyTorch's matrix products are as fast.
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
    """See :func:`rapid_llm.engine.attention.attend`, for tensors accepted by :func:`serves`."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    visible = key.shape[1] - query.shape[1] + 1
    _attend(query, key, value, scaling, window, visible, (out, None, None))
    return out


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention to a part of the keys, for tensors accepted by :func:`serves`.

    Args:
        query: ``[heads, n, dim]``.
        key, value: ``[kv_heads, keys, dim]``.
        scaling: factor on the scores.
        causal: whether the last keys are the queries' own; else each query sees all keys.

    Returns:
        Results as of :func:`rapid_llm.engine.sdpa.attend_part`: float32 ``[heads, n, dim]``, and
        the log-sum-exp, float32 ``[heads, n]``.
    """
    out = query.new_empty(query.shape, dtype=torch.float32)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    visible = key.shape[1] - query.shape[1] + 1 if causal else key.shape[1]
    _attend(query, key, value, scaling, None, visible, (None, out, lse))
    return out, lse


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    visible: int,
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    library = kernels()
    assert library is not None
    query = query.contiguous()
    heads, n, dim = query.shape
    kv_heads, length = key.shape[:2]
    library.rapid_attend(
        *map(pointer, (query, key, value)),
        *map(ctypes.c_int64, (heads, kv_heads, n, visible, length, dim, key.stride(0))),
        ctypes.c_int64(UNLIMITED if window is None else window),
        ctypes.c_float(scaling),
        ctypes.c_int64(threads()),
        *(None if each is None else pointer(each) for each in results),
    )


def threads() -> int:
    """Threads of a kernel: as many as PyTorch's, but none that would wait for a processor."""
    return min(torch.get_num_threads(), processors())


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Pointer to a tensor's data; the caller keeps the tensor alive."""
    return ctypes.c_void_p(tensor.data_ptr())
