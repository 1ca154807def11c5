"""The int8 copy of a model: its numbers, what it shares with the model, and who drafts with it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, counting_model, tiny_model, tiny_tokenizer, transformers_greedy
from torch import nn

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.cpu.blocks import (
    BlockLinear,
    Int4Blocks,
    Int8Blocks,
    eight_bits,
    four_bits_if_exact,
    unpacked,
)
from rapid_llm.engine.cpu.int8 import Int8Linear, Int8Projections
from rapid_llm.engine.cpu.quantizers import CPUQuantizer, quantized_copy
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.quantized import MAX_QUANTIZED_ROWS, quantized_nbytes
from rapid_llm.engine.quantized_drafter import fastest_weights
from rapid_llm.errors import InvalidParameterError

FAMILY = [name for name in ARCHITECTURES if name.split("-")[0] in {"llama", "mistral", "qwen2"}]
FAMILY += ["qwen3"]
PROMPT = [5, 9, 31, 7, 44, 12, 8, 30, 21, 17, 60, 3]
DRAFT_PROMPT = [31, 7, 44, 3]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)


def make_linear(bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 48, bias=bias, dtype=dtype)


def int8_layers(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Int8Linear)}


# --- blocks ----------------------------------------------------------------------------------


def four_bit_weights(out: int, into: int) -> torch.Tensor:
    """As GGUF's Q4_1: 16 values a group of 32, from a float16 smallest and step."""
    torch.manual_seed(0)
    groups = (out, into // 32, 1)
    smallest, step = (-torch.rand(groups)).half(), (0.01 + 0.1 * torch.rand(groups)).half()
    whole = torch.randint(0, 16, (out, into // 32, 32))
    whole[..., 3], whole[..., 30] = 0, 15
    return (smallest.float() + step.float() * whole).flatten(1)


def eight_bit_weights(out: int, into: int) -> torch.Tensor:
    """As GGUF's Q8_0: whole numbers of 8 bits, with a float16 step for 32."""
    torch.manual_seed(0)
    whole = torch.randint(-126, 127, (out, into // 32, 32))
    whole[..., 9] = -127
    step = (0.001 + 0.01 * torch.rand(out, into // 32, 1)).half()
    return (step.float() * whole).flatten(1)


def test_weights_of_4_bits_come_back_as_they_were_before_they_were_rounded():
    weight = four_bit_weights(40, 96)  # not a multiple of 16 rows
    blocks = four_bits_if_exact(weight.bfloat16())
    assert blocks is not None
    assert (blocks.dtype, blocks.shape) == (torch.uint8, (3, 3, 320))
    back = unpacked(blocks, 4)
    assert torch.equal(back[40:], torch.zeros(8, 96))
    assert (back[:40] - weight).norm() < 0.6 * (weight.bfloat16() - weight).norm()
    # Row 17 is the second of its 16; weights 32 to 63 are the second group.
    step, smallest = blocks[1, 1, :64].view(torch.float16).float().view(2, 16)[:, 1]
    group = weight[17, 32:64]
    assert smallest == pytest.approx(group.min().item(), abs=0.002)
    assert step == pytest.approx((group.max() - group.min()).item() / 15, rel=0.002)
    words = blocks[1, 1, 64:].contiguous().view(torch.int16).int().view(4, 16, 2)[:, 1]
    whole = torch.stack([words >> 4 * i & 15 for i in range(4)], dim=1).flatten()
    assert whole.tolist() == ((group - group.min()) / step).round().tolist()


def test_weights_of_8_bits_come_back():
    weight = eight_bit_weights(40, 96)
    blocks = eight_bits(weight)
    assert (blocks.dtype, blocks.shape) == (torch.uint8, (3, 3, 544))
    back = unpacked(blocks, 8)
    assert torch.equal(back[40:], torch.zeros(8, 96))
    assert torch.equal(back[:40], weight)
    step = blocks[1, 1, :32].view(torch.float16)[1].float()
    pairs = blocks[1, 1, 32:].view(torch.int8).view(16, 16, 2)[:, 1]
    assert pairs.flatten().tolist() == (weight[17, 32:64] / step).round().tolist()


def test_other_weights_are_rounded_to_8_bits_and_not_4():
    weight = torch.randn(48, 96).bfloat16()
    assert four_bits_if_exact(weight) is None
    groups = weight.float().unflatten(1, (-1, 32))
    lost = (unpacked(eight_bits(weight), 8) - weight.float()).unflatten(1, (-1, 32))
    steps = lost / groups.abs().amax(dim=-1, keepdim=True) * 127
    assert steps.square().mean().sqrt() < 0.29  # as of any number that is rounded
    assert four_bits_if_exact(eight_bit_weights(48, 96).bfloat16()) is None
    few = torch.cat([four_bit_weights(16, 96), torch.randn(16, 96)])
    assert four_bits_if_exact(few.bfloat16()) is None


@pytest.mark.parametrize("number", [0.75, 0.0])
def test_constant_weights_come_back(number):
    weight = torch.full((16, 32), number).bfloat16()
    blocks = four_bits_if_exact(weight)
    assert blocks is not None
    assert torch.equal(unpacked(blocks, 4), weight.float())
    torch.testing.assert_close(unpacked(eight_bits(weight), 8), weight.float(), rtol=1e-3, atol=0)


def test_a_nan_is_not_packed_away():
    weight = four_bit_weights(16, 64)
    weight[3, 40] = float("nan")
    assert four_bits_if_exact(weight) is None
    back = unpacked(eight_bits(weight), 8)
    assert back[3, 32:].isnan().all()
    assert back.isnan().sum() == 32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_few_rows_are_multiplied_with_blocks_and_many_with_the_full_weights(bits, bias):
    linear = nn.Linear(64, 40, bias=bias)
    if bits == 4:
        linear.weight.data = four_bit_weights(40, 64).bfloat16().float()
    layer = (Int4Blocks if bits == 4 else Int8Blocks)(linear)
    assert layer.bits == bits
    assert (layer.weight is linear.weight, layer.bias is linear.bias) == (True, True)
    for shape in ((MAX_QUANTIZED_ROWS,), (2, 4)):
        x = torch.randn(*shape, 64)
        assert torch.equal(layer(x), F.linear(x, unpacked(layer.blocks, bits)[:40], linear.bias))
        assert not torch.equal(layer(x), linear(x))
    x = torch.randn(MAX_QUANTIZED_ROWS + 1, 64)
    assert torch.equal(layer(x), linear(x))


# --- one layer -------------------------------------------------------------------------------


def test_values_follow_the_formula():
    linear = make_linear()
    layer = Int8Linear(linear)
    for row, int8, scale in zip(linear.weight.detach(), layer.int8, layer.scale, strict=True):
        assert scale == row.abs().max() / 127
        assert int8.tolist() == (row / scale).round().tolist()
        assert int8.abs().max() == 127
        assert ((row - scale * int8).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizing_leaves_the_weights_as_they_were(dtype):
    linear = make_linear(bias=True, dtype=dtype)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = Int8Linear(linear)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, bias)
    assert (layer.weight is linear.weight, layer.bias is linear.bias) == (True, True)
    assert (layer.int8.dtype, layer.scale.dtype) == (torch.int8, dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (MAX_QUANTIZED_ROWS,), (1, 3), (2, 4)], ids=str)
def test_few_rows_are_multiplied_with_int8_weights(shape, bias):
    linear = make_linear(bias)
    layer = Int8Linear(linear)
    x = torch.randn(*shape, 32)
    with torch.inference_mode():
        expected = F.linear(x, layer.int8.float() * layer.scale[:, None], linear.bias)
        torch.testing.assert_close(layer(x), expected)
        assert not torch.allclose(layer(x), linear(x), atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(MAX_QUANTIZED_ROWS + 1,), (1, 20), (3, 3)], ids=str)
def test_many_rows_are_multiplied_with_the_full_weights(shape, bias):
    linear = make_linear(bias)
    x = torch.randn(*shape, 32)
    assert torch.equal(Int8Linear(linear)(x), linear(x))


def test_a_row_of_zeros_gives_the_bias():
    linear = make_linear(bias=True)
    with torch.no_grad():
        linear.weight[7] = 0
    out = Int8Linear(linear)(torch.randn(3, 32))
    assert torch.equal(out[:, 7], linear.bias[7].expand(3))
    assert out.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, MAX_QUANTIZED_ROWS, MAX_QUANTIZED_ROWS + 1])
def test_projections_of_one_product_equal_separate_ones(rows, bias):
    torch.manual_seed(0)
    layers = [Int8Linear(nn.Linear(32, out, bias=bias)) for out in (48, 16, 16)]
    x = torch.randn(rows, 32)
    with torch.inference_mode():
        apart = [layer(x) for layer in layers]
        for part, alone in zip(Int8Projections(*layers)(x), apart, strict=True):
            assert torch.equal(part, alone)
        for layer, alone in zip(layers, apart, strict=True):
            assert torch.equal(layer(x), alone)


def test_projections_together_are_one_product_and_store_nothing_twice():
    model = tiny_model()
    quantized = quantized_copy(model, Int8Linear)
    storages = {b.untyped_storage().data_ptr(): b.untyped_storage() for b in quantized.buffers()}
    shared = {b.untyped_storage().data_ptr() for b in model.buffers()}
    own = sum(storage.nbytes() for start, storage in storages.items() if start not in shared)
    assert own == quantized_nbytes(quantized)

    with torch.profiler.profile() as profiler:
        logits_after(quantized, torch.arange(3, 20))
    products = [e.count for e in profiler.key_averages() if e.key == "aten::_weight_int8pack_mm"]
    # The head of either pass, and of the one of few tokens, in each layer: query, key and value
    # together, the output, three of the MLP.
    assert products == [2 + 5 * len(quantized.model.layers)]


# --- a model ---------------------------------------------------------------------------------


def test_a_copy_for_the_kernels_has_blocks_of_4_bits_where_the_weights_have_no_more():
    model = tiny_model(intermediate_size=96).bfloat16()
    up = model.model.layers[1].mlp.up_proj.weight
    up.data = four_bit_weights(*up.shape).bfloat16()
    eight, blocks = quantized_copy(model, Int8Linear), quantized_copy(model, Int4Blocks)
    assert quantized_copy(model, Int8Linear) is eight
    assert quantized_copy(model, Int4Blocks) is blocks
    layers = {n: m for n, m in blocks.named_modules() if isinstance(m, BlockLinear)}
    assert layers.keys() == int8_layers(eight).keys()
    assert [n for n, m in layers.items() if m.bits == 4] == ["model.layers.1.mlp.up_proj"]
    sizes = {n: m.weight.shape.numel() // 32 for n, m in layers.items()}
    expected = sum(sizes[n] * (20 if m.bits == 4 else 34) for n, m in layers.items())
    assert quantized_nbytes(blocks) == expected
    ids = torch.arange(3, 30)
    exact, ours, coarse = (logits_after(m, ids).float() for m in (model, blocks, eight))
    assert 0 < (ours - exact).norm() < (coarse - exact).norm()


@torch.inference_mode()
def logits_after(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of the last 8 tokens, read in one pass of few rows."""
    runner = ModelRunner(model, "tiny")
    cache = runner.new_cache(len(ids))
    runner(ids[:-8], cache, keep_logits=1)
    return runner(ids[-8:], cache, keep_logits=8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_quantized_copy_of_every_architecture_is_close_to_the_model(architecture):
    model = tiny_model(architecture)
    quantized = quantized_copy(model, Int8Linear)
    assert int8_layers(quantized)
    assert (
        ModelRunner(quantized, "quantized").lean
        == ModelRunner(model, "model").lean
        == (architecture in FAMILY)
    )
    ids = torch.randint(3, 64, (40,), generator=torch.Generator().manual_seed(1))
    before, after = logits_after(model, ids), logits_after(quantized, ids)
    error = (after - before).norm() / before.norm()
    # A router of experts may choose another one.
    assert 0 < error < (0.05 if architecture in FAMILY else 0.2)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=str)
def test_the_quantized_copy_shares_every_weight_and_the_model_is_unchanged(changes):
    model = tiny_model("qwen2", **changes)  # has biases
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantized = quantized_copy(model, Int8Linear)
    assert int8_layers(quantized).keys() == linears.keys()
    assert not int8_layers(model)
    ours, theirs = dict(model.named_parameters()), dict(quantized.named_parameters())
    assert ours.keys() == theirs.keys() == values.keys()
    for name, parameter in ours.items():
        assert theirs[name].data_ptr() == parameter.data_ptr()
        assert torch.equal(parameter, values[name])
    assert quantized.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    buffers = dict(quantized.named_buffers())
    for name, buffer in model.named_buffers():
        assert buffers[name].data_ptr() == buffer.data_ptr()


def test_quantized_nbytes_counts_what_the_quantized_copy_adds():
    model = tiny_model()
    sizes = [m.weight.shape for m in model.modules() if type(m) is nn.Linear]
    expected = sum(rows * columns + 4 * rows for rows, columns in sizes)  # int8, float32 scales
    assert quantized_nbytes(quantized_copy(model, Int8Linear)) == expected
    assert quantized_nbytes(model) == 0


def test_a_model_has_one_quantized_copy_and_keeps_it_alive():
    model = tiny_model()
    quantized = quantized_copy(model, Int8Linear)
    assert quantized_copy(model, Int8Linear) is quantized
    assert quantized_copy(tiny_model(), Int8Linear) is not quantized
    freed = weakref.ref(model), weakref.ref(quantized)
    del model, quantized
    gc.collect()
    assert [reference() for reference in freed] == [None, None]


# --- who drafts with it ----------------------------------------------------------------------


def drafts_in_int8(decoder: RapidDecoder) -> bool:
    quantized = bool(int8_layers(decoder.draft_runner.model))
    assert quantized == decoder.draft_runner.name.endswith(" (int8)")
    assert quantized != (decoder.draft_runner is decoder.drafter)
    assert not int8_layers(decoder.target.model)
    return quantized


def test_auto_is_for_a_bfloat16_target_that_drafts_for_itself():
    def decides(dtype, drafter=None, **options):
        return drafts_in_int8(
            RapidDecoder(tiny_model().to(dtype), tiny_tokenizer(), drafter, **options)
        )

    half = tiny_model(seed=1).to(torch.bfloat16)
    assert decides(torch.bfloat16)
    assert not decides(torch.float32)
    assert not decides(torch.float16)
    assert not decides(torch.bfloat16, half)
    assert not decides(torch.bfloat16, drafter_quantization=None)
    assert decides(torch.bfloat16, half, drafter_quantization="int8")
    assert decides(torch.float32, drafter_quantization="int8")


def test_nothing_is_quantized_before_the_first_draft(monkeypatch):
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), drafter_quantization="int8")
    monkeypatch.setattr(CPUQuantizer, "copy", lambda *_: 1 / 0)
    reference = transformers_greedy(tiny_model(eos_token_id=None), PROMPT, 40)
    # Where the drafter answers alone, it does so with its full weights.
    for prompts in ((PROMPT, None), (None, PROMPT)):
        assert decoder.generate(*prompts, sampling=GREEDY).token_ids == reference
    with pytest.raises(ZeroDivisionError):
        decoder.generate(PROMPT, DRAFT_PROMPT, sampling=GREEDY)


def test_other_devices_are_refused_with_the_remedy():
    with torch.device("meta"):
        elsewhere = tiny_model()
    assert fastest_weights(ModelRunner(elsewhere.to(torch.bfloat16), "elsewhere")) is None
    remedy = r"int8.*does not serve on meta.*quantization_config.*drafter="
    with pytest.raises(InvalidParameterError, match=remedy):
        RapidDecoder(tiny_model(), tiny_tokenizer(), elsewhere, drafter_quantization="int8")
    assert not drafts_in_int8(RapidDecoder(tiny_model(), tiny_tokenizer(), elsewhere))


def test_an_unknown_quantization_is_named():
    with pytest.raises(InvalidParameterError, match=r"'int3'.*one of auto, int8, int4 or None"):
        RapidDecoder(tiny_model(), tiny_tokenizer(), drafter_quantization="int3")


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    """How many rows each int8 layer was given."""
    seen: list[int] = []
    original = Int8Linear.forward

    def spy(layer, x):
        seen.append(x.shape.numel() // x.shape[-1])
        return original(layer, x)

    monkeypatch.setattr(Int8Linear, "forward", spy)
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("gamma", [1, 4, 10])
def test_greedy_without_transfer_is_what_transformers_generates(architecture, gamma, rows):
    model = tiny_model(architecture, eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer(), drafter_quantization="int8")
    result = decoder.generate(
        PROMPT, DRAFT_PROMPT, sampling=GREEDY, speculation=SpeculationConfig(gamma=gamma, eta=0)
    )
    assert result.token_ids == transformers_greedy(model, PROMPT, 40)
    assert result.stats.drafted_tokens > 0
    assert rows


def test_no_guess_is_so_long_that_its_pass_leaves_the_int8_weights(rows):
    decoder = RapidDecoder(counting_model(), tiny_tokenizer(), drafter_quantization="int8")
    result = decoder.generate(
        [3, 4, 5],
        [3, 4, 5],
        sampling=SamplingParams(max_new_tokens=150, ignore_eos=True),
        speculation=SpeculationConfig(gamma=14, eta=0),
    )
    # The first time all words are drafted one by one, then by guesses.
    assert result.stats.drafted_tokens > 1.5 * result.stats.draft_passes
    assert max(rows) == MAX_QUANTIZED_ROWS
