"""Four-bit drafters: packing against unpacking, on a CPU with torch's operators for it."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from torch import nn

from rapid_llm.config import SamplingParams
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.cuda import int4
from rapid_llm.engine.cuda.device import CUDA
from rapid_llm.engine.cuda.int4 import (
    GROUP,
    MAX_QUANTIZED_ROWS,
    Int4Linear,
    Int4Together,
    dequantize,
    int4_copy,
    quantize,
)
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.quantized import quantized_nbytes
from rapid_llm.engine.quantized_drafter import fastest_weights
from rapid_llm.errors import InvalidParameterError

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.05}
IDS = torch.randint(3, 64, (30,), generator=torch.Generator().manual_seed(1))


def test_every_weight_is_within_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(24, 4 * GROUP)
    numbers, scales = quantize(weight)
    assert int(numbers.min()) == 0
    assert int(numbers.max()) == 15
    step = scales[..., 0].float().T.repeat_interleave(GROUP, dim=1)
    # Steps and middles are rounded to 8 bits.
    assert ((dequantize(numbers, scales) - weight).abs() <= 0.5 * step + 0.02).all()


def test_weights_of_four_bits_come_back_as_they_were():
    steps = torch.tensor([0.5, 0.25]).repeat_interleave(GROUP)
    weight = (torch.arange(2 * GROUP) % 16 - 8) * steps + 1
    weight = weight.repeat(8, 1)
    assert torch.equal(dequantize(*quantize(weight)), weight)


def test_a_layer_of_many_rows_is_quantized_by_and_by(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(40, 2 * GROUP)
    before, whole = weight.clone(), quantize(weight)
    monkeypatch.setattr(int4, "_ROWS", 16)
    for one, other in zip(quantize(weight), whole, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(weight, before)


def test_equal_weights_have_a_step_all_the_same():
    weight = torch.full((8, GROUP), 0.75)
    torch.testing.assert_close(dequantize(*quantize(weight)), weight)


@pytest.mark.parametrize("n", [1, 3, MAX_QUANTIZED_ROWS, MAX_QUANTIZED_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_few_tokens_meet_four_bits_and_many_the_whole_weights(n, bias):
    torch.manual_seed(0)
    layers = [nn.Linear(128, out, bias=bias) for out in (48, 16)]
    x = torch.randn(n, 128)
    for layer in layers:
        weight = layer.weight if n > MAX_QUANTIZED_ROWS else dequantize(*quantize(layer.weight))
        expected = nn.functional.linear(x, weight, layer.bias)
        torch.testing.assert_close(Int4Linear(layer)(x), expected, rtol=1e-4, atol=1e-5)
    apart = [Int4Linear(layer)(x) for layer in layers]
    together = Int4Together(*layers)
    for one, other in zip(together(x), apart, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(together.product(x), torch.cat(apart, dim=1))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@torch.inference_mode()
def test_a_copy_computes_the_same_whether_its_products_are_fused_or_not(architecture):
    model = tiny_model(architecture, **SIZES)
    logits = []
    for lean in (True, False):
        runner = ModelRunner(int4_copy(model, lean=lean), "int4")
        assert runner.lean  # it is the model that it was made of
        cache = runner.new_cache(64)
        runner(IDS[:12], cache, 1)
        logits.append(runner(IDS[12:17], cache, 5))
    torch.testing.assert_close(*logits)


def test_a_copy_shares_the_weights_and_counts_what_it_adds():
    model = tiny_model(**SIZES)
    copy = int4_copy(model, lean=True)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in copy.parameters()} == own
    numbers = sum(layer.weight.numel() for layer in model.modules() if type(layer) is nn.Linear)
    assert quantized_nbytes(copy) == numbers // 2 + 4 * numbers // GROUP


def test_a_layer_that_the_operators_do_not_take_stays_as_it_is():
    copy = int4_copy(tiny_model(hidden_size=96, head_dim=32, intermediate_size=256), lean=True)
    layer = copy.model.layers[0]
    assert type(layer.self_attn.q_proj) is nn.Linear
    assert not hasattr(layer.self_attn, "qkv_proj")
    assert type(layer.mlp.down_proj) is Int4Linear


def test_int4_is_refused_where_it_would_not_run():
    with pytest.raises(InvalidParameterError, match=r"int4.*on a CPU.*4-bit weights.*use 'int8'"):
        RapidDecoder(tiny_model(), tiny_tokenizer(), drafter_quantization="int4")


def test_auto_takes_no_int4_on_a_cpu():
    decoder = RapidDecoder(tiny_model(**SIZES), tiny_tokenizer())
    decoder.generate([3, 4, 5], [3, 4], sampling=SamplingParams(max_new_tokens=2))
    assert decoder.draft_runner is decoder.target


def test_auto_takes_int4_for_large_models_on_a_gpu_only(monkeypatch):
    model = tiny_model(**SIZES)
    monkeypatch.setattr(int4, "runs_on", lambda model: True)
    monkeypatch.setattr(CPU, "quantizers", CUDA.quantizers)
    runner = ModelRunner(model, "m")
    assert fastest_weights(runner) is None
    monkeypatch.setattr(int4, "_LARGE", sum(p.nbytes for p in model.parameters()))
    assert fastest_weights(runner) == "int4"
    decoder = RapidDecoder(model, tiny_tokenizer())
    assert type(decoder.draft_runner.model.lm_head) is Int4Linear
    assert decoder.draft_runner is decoder.draft_runner
    assert decoder.memory.drafter_weights == quantized_nbytes(decoder.draft_runner.model)
    result = decoder.generate([3, 4, 5], [3, 4], sampling=SamplingParams(max_new_tokens=4))
    assert len(result.token_ids) == 4
