"""What the GPU tests share: where they run, tiny models there, and how far off 16 bits may be.

They need a checkout, torch, transformers and pytest: no embedder, no hub, no packaged model.
``RAPID_TEST_DEVICE=cpu`` runs those elsewhere that ask nothing of CUDA itself.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from transformers import PreTrainedModel

DEVICE = torch.device(os.environ.get("RAPID_TEST_DEVICE", "cuda"))

CAPTURED = DEVICE.type == "cuda"
"""For ``cuda_graphs`` where there is no other question."""

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
"""The marks of every test here."""

cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="asks for what only CUDA has")

GRAPHS = [
    pytest.param(False, id="eager"),
    pytest.param(True, id="captured", marks=cuda_only),
]
"""For ``cuda_graphs``."""

PASSES = [
    *(pytest.param(name, False, id=f"{name}-eager") for name in ARCHITECTURES),
    *(
        pytest.param(name, True, id=f"{name}-captured", marks=cuda_only)
        for name in ARCHITECTURES
        if name.split("-")[0] in {"llama", "mistral", "qwen2", "qwen3"}
    ),
]
"""Every architecture as its passes are launched one by one, and captured where they can be."""

HEADS = {
    "64, group 1": (64, 4, 4),
    "80, group 4": (80, 4, 1),
    "96, group 7": (96, 7, 1),
    "128, group 8": (128, 8, 1),
    "128, group 7": (128, 14, 2),
    "256, group 2": (256, 4, 2),
}
"""Head size, query heads and KV heads."""


def model_on_device(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    model = tiny_model(architecture, seed, **changes)
    for parameter in model.parameters():  # as loading does: buffers stay in float32
        parameter.data = parameter.data.to(dtype)
    return model.to(DEVICE)


def with_heads(heads: str, dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    """A model of the Llama family with heads of ``HEADS``."""
    size, query, kv = HEADS[heads]
    return model_on_device(
        "mistral" if "sliding_window" in changes else "llama",
        dtype,
        hidden_size=16 * query,
        head_dim=size,
        num_attention_heads=query,
        num_key_value_heads=kv,
        initializer_range=0.2,
        max_position_embeddings=16384,
        **changes,
    )


@torch.inference_mode()
def own_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Of the model's own forward over the whole sequence at once: float64 ``[n, vocab]``."""
    logits: torch.Tensor = model(ids[None].to(DEVICE)).logits[0].double()
    return logits


def error(logits: torch.Tensor, reference: torch.Tensor, *, typical: bool = False) -> float:
    """Relative, of all rows together, or (``typical``) of the median row."""
    off = (logits.double() - reference).norm(dim=-1)
    size = reference.norm(dim=-1)
    return float((off / size).median() if typical else off.norm() / size.norm())


def assert_as_good(
    logits: torch.Tensor, model: PreTrainedModel, ids: torch.Tensor, rows: slice
) -> None:
    """No more than twice as far off as the model's own, but for 1e-5 in float32.

    Where experts are chosen, a rounding may choose others, so that there the median row counts.
    """
    assert torch.isfinite(logits).all()
    own = own_logits(model, ids)[rows]
    typical = getattr(model.config, "num_experts_per_tok", None) is not None
    wider = torch.float32 if typical or model.dtype != torch.float32 else torch.float64
    exact = own_logits(copy.deepcopy(model).to(wider), ids)[rows]
    ours, theirs = (error(one, exact, typical=typical) for one in (logits, own))
    rounding = 1e-5 if model.dtype == torch.float32 else 0.0  # a hundredth of what TF32 rounds by
    assert ours <= max(2 * theirs, rounding), (
        f"off by {ours:.2e}, the model's own forward by {theirs:.2e}"
    )


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 is float32: no TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
