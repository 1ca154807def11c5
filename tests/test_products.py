"""Products of 16-bit numbers where the CPU has no instructions for them."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from rapid_llm.engine.attention import attend
from rapid_llm.engine.cpu import products
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session


@pytest.fixture(params=[False, True], ids=["converted", "native"])
def multiplies(request, monkeypatch):
    """Whether the CPU is taken to have products in 16 bits."""
    monkeypatch.setattr(products, "_multiplies", lambda dtype: request.param or dtype.itemsize > 2)
    return request.param


def seen_dtypes(monkeypatch):
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        products.F, "linear", lambda x, w, b: seen.append((x.dtype, w.dtype)) or linear(x, w, b)
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_several_rows_are_multiplied_in_float32_where_16_bits_are_slow(
    multiplies, dtype, rows, monkeypatch
):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 64), torch.randn(32, 64), torch.randn(32)
    x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
    seen = seen_dtypes(monkeypatch)
    for each in (bias, None):
        out = products.linear(x, weight, each)
        exact = x.double() @ weight.double().T + (0 if each is None else each.double())
        assert out.dtype == dtype
        assert (out.double() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()
    converted = dtype.itemsize == 2 and rows > 1 and not multiplies
    assert {each for pair in seen for each in pair} == {torch.float32 if converted else dtype}


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("n", "length"), [(40, 1200), (5, 1200), (5, 300)])
def test_attention_by_products_stays_in_its_dtype(multiplies, n, length, window, monkeypatch):
    monkeypatch.setenv("RAPID_LLM_NATIVE", "0")
    torch.manual_seed(0)
    query = torch.randn(6, n, 32).bfloat16()
    key, value = torch.randn(2, 2, length, 32).bfloat16()
    exact = attend(query.double(), key.double(), value.double(), 0.2, window)
    out = attend(query, key, value, 0.2, window)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() < 0.01 * exact.norm()


def test_a_prompt_read_so_is_nearer_to_float32(monkeypatch):
    monkeypatch.setenv("RAPID_LLM_NATIVE", "0")
    model = tiny_model("llama", initializer_range=0.1).to(torch.bfloat16)
    exact = tiny_model("llama", initializer_range=0.1)
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(3, 60, (200,), generator=torch.Generator().manual_seed(1))
    errors = []
    with torch.inference_mode():
        expected = exact(ids[None]).logits[0].log_softmax(-1)
        for multiplies in (True, False):
            monkeypatch.setattr(products, "_multiplies", lambda dtype, known=multiplies: known)
            runner = ModelRunner(model, "model")
            logits = Session(runner, runner.new_cache(200)).extend(ids)
            errors.append((logits.log_softmax(-1) - expected).norm())
    assert errors[1] < errors[0]
