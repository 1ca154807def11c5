"""The speed model and the plan made with it: counts, formulas, limits; no timings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import GPT2Config, LlamaConfig, T5Config

from rapid_llm import shapes
from rapid_llm.bench.plan import Plan, make_plan, paper_retrieved
from rapid_llm.bench.speed_model import (
    DEVICES,
    described_device,
    named_device,
    pass_seconds,
    prefill_flops,
)
from rapid_llm.bench.this_device import measure_device
from rapid_llm.cli.plan import (
    as_dict,
    assumptions,
    heading,
    kept,
    paper_name,
    paper_plans,
    spread_table,
    tables,
    warnings,
)
from rapid_llm.engine.cpu.blocks import Int4Blocks, Int8Blocks
from rapid_llm.engine.cpu.quantizers import quantized_copy
from rapid_llm.engine.cuda import int4
from rapid_llm.engine.kv_cache import KVCache, cache_argument
from rapid_llm.engine.quantized import quantized_nbytes
from rapid_llm.errors import InvalidParameterError, ModelError
from rapid_llm.shapes import ModelSize, Precision, read_size, shape_config, size_of
from rapid_llm.speculation.schedule import MAX_GAMMA, best_draft, expected_tokens

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    tie_word_embeddings=False,
)
LLAMA_1B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131_072,
    tie_word_embeddings=True,
)
H100 = DEVICES["h100"]
RESULTS = Path(__file__).parents[1] / "cookbook" / "results" / "gpu"


def size(**changes: Any) -> ModelSize:
    return replace(size_of(LLAMA_8B, "8B"), **changes)


def plan(context: int = 131_072, **changes: Any) -> Plan:
    given: dict[str, Any] = {
        "model": size(),
        "drafter": None,
        "device": H100,
        "context": context,
        "retrieval_tokens": paper_retrieved(context),
        "acceptance": 0.8,
    }
    return Plan(**given | changes)


def save(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_are_those_of_the_real_model(architecture: str, tied: bool) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied)
    found = size_of(model.config, "tiny")

    assert found.parameters == model.num_parameters()
    assert found.lookup == (0 if tied else model.get_input_embeddings().weight.numel())
    assert found.head == 64 * 32
    assert found.weight_bytes == model.to(torch.bfloat16).get_memory_footprint() - sum(
        buffer.nbytes for buffer in model.buffers()
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kv_bytes_are_those_of_the_cache(architecture: str) -> None:
    model = tiny_model(architecture).to(torch.bfloat16)
    cache = KVCache(model.config.num_hidden_layers, 10)
    model(torch.tensor([[3, 4, 5]]), **{cache_argument(model.forward): cache})
    assert cache.nbytes == 10 * size_of(model.config, "tiny").kv_bytes_per_token


def test_sizes_of_models_count_their_parameters() -> None:
    assert size_of(LLAMA_8B, "8B").parameters == 8_030_261_248
    assert size_of(LLAMA_1B, "1B").parameters == 1_235_814_400
    assert read_size("smollm2-135m").parameters == 134_515_008
    assert read_size("smollm2-135m").context_window == 8192


@pytest.mark.parametrize("precision", ["int8", "int4", "int4g64"])
def test_quantized_bytes_are_those_of_the_engine(precision: Precision) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "head_dim": 16}
    model = tiny_model(**sizes).to(torch.bfloat16)
    if precision == "int4":
        for parameter in model.model.layers.parameters():
            sixteen = torch.arange(parameter.numel()).view(parameter.shape) % 16
            parameter.data = sixteen.to(torch.bfloat16)
    if precision == "int4g64":
        embedding = model.get_input_embeddings().weight
        matrices = [p for p in model.parameters() if p.dim() > 1 and p is not embedding]
        parts = [part for matrix in matrices for part in int4.quantize(matrix)]
        kept = sum(part.nbytes // (2 if part.dtype == torch.uint8 else 1) for part in parts)
    else:
        kept = quantized_nbytes(
            quantized_copy(model, Int4Blocks if precision == "int4" else Int8Blocks)
        )
    assert size_of(model.config, "t").quantized_bytes(precision) == kept


def test_a_step_reads_no_embedding_and_about_half_or_a_third_of_the_matrices() -> None:
    found = size()
    assert found.bytes_read(1, "bf16") == 2 * (found.parameters - found.lookup)
    assert found.bytes_read(1, "int8") == pytest.approx(found.matrices * 17 / 16, rel=0.001)
    layers = found.matrices - found.head
    read = layers * 5 / 8 + found.head * 17 / 16
    assert found.bytes_read(1, "int4") == pytest.approx(read, rel=0.001)
    assert found.bytes_read(11, "int8") == found.bytes_read(1, "int8")


def test_a_mixture_reads_the_experts_that_its_tokens_choose() -> None:
    found = size_of(tiny_model("mixtral").config, "mixture")  # 2 of 4 experts a token
    dense = found.parameters - found.lookup - found.experts

    assert found.experts == 2 * 4 * (3 * 32 * 48)
    assert found.active_parameters == found.matrices + found.experts / 2
    assert found.bytes_read(1, "bf16") == 2 * (dense + found.experts / 2)
    assert found.bytes_read(2, "bf16") == 2 * (dense + found.experts * 3 / 4)
    assert found.bytes_read(99, "bf16") == pytest.approx(2 * (dense + found.experts))


# --- formulas --------------------------------------------------------------------------------


def test_expected_tokens_follow_the_formula() -> None:
    assert expected_tokens(0, 5) == 1
    assert expected_tokens(1, 5) == 6
    assert expected_tokens(0.9, 0) == 1
    assert expected_tokens(0.7, 4) == pytest.approx((1 - 0.7**5) / (1 - 0.7))


def measured(context: int | None, key: str) -> float:
    """What was measured on an H100, with 4,096 tokens for the drafter: a median."""
    text = (RESULTS / "h100-llama-3.1-8b.json").read_text("utf-8")
    sections = (s for s in json.loads(text)["sections"] if s["context"] == context)
    return next(row["median"] for s in sections for row in s["rows"] if row["key"] == key)


@pytest.mark.parametrize("context", [32_768, 131_072])
def test_an_h100_takes_what_is_predicted(context: int) -> None:
    """Passes, drafts, rounds and what they gain, within a tenth."""
    shape = size_of(shape_config("llama-3.1-8b", 131_072), "8B")
    for tokens in (1, 5, 16):
        found = 1000 * pass_seconds(shape, H100, context, tokens=tokens)
        assert found == pytest.approx(measured(context, f"pass_{tokens}"), rel=0.1)
    for key, precision in (("bfloat16", "bf16"), ("int4", "int4g64")):
        found = 1000 * pass_seconds(shape, H100, 4096, precision=precision)
        assert found == pytest.approx(measured(None, f"draft_{key}"), rel=0.1)
    for a in (0.8, 0.9, 0.95):
        rows = {row.drafter: row for row in plan(context, acceptance=a, retrieval_tokens=4096).rows}
        speedup = measured(context, f"rapid_{a:g}_speedup")
        assert rows["self, int4"].best.speedup == pytest.approx(speedup, rel=0.1)
        plain = 1000 * rows[None].seconds_a_token
        assert plain == pytest.approx(measured(context, "plain"), rel=0.1)
    prefill = {32_768: measured(32_768, "prefill"), 131_072: 11.2}  # the second is in the .txt
    assert rows[None].prefill_seconds == pytest.approx(prefill[context], rel=0.1)


def test_the_paper_retrieves_4096_tokens_or_a_24th() -> None:
    assert [paper_retrieved(n) for n in (100, 4096, 32_768, 131_072)] == [100, 4096, 4096, 5461]


@pytest.mark.parametrize("is_gpu", [True, False])
def test_a_step_is_bounded_by_reading_or_computing(is_gpu: bool) -> None:
    device = replace(H100, is_gpu=is_gpu, flops=1.0)  # which is a prefill's
    combined = max if is_gpu else sum
    for tokens, length in ((1, 0), (1, 131_072), (4096, 0)):
        reading = size().bytes_read(1, "bf16") / H100.bandwidth
        reading += 131_072 * length / H100.kv_bandwidth
        flops = 2 * size().matrices * tokens + 4 * tokens * length * 32 * 4096
        parts = reading, flops / H100.pass_flops
        found = pass_seconds(size(), device, length, tokens=tokens)
        assert found == pytest.approx(combined(parts) + 32 * H100.layer_seconds)


def test_prefill_counts_products_attention_and_one_row_of_logits() -> None:
    length = 1000
    products = 2 * (size().matrices - size().head) * length + 2 * size().head
    attention = 2 * 2 * length**2 / 2 * 32 * 32 * 128
    assert prefill_flops(size(), length) == pytest.approx(products + attention)


rates = st.floats(0, 1)
costs = st.floats(0.01, 2)
lengths = st.integers(1, MAX_GAMMA)


def yields(acceptance: float) -> list[float]:
    return [expected_tokens(acceptance, gamma) for gamma in range(1, MAX_GAMMA + 1)]


def speedup(acceptance: float, c: float, v: float = 1, longest: int = MAX_GAMMA) -> float:
    return best_draft(yields(acceptance), 1, c, [v] * longest)[1]


@given(rates, costs)
def test_nothing_is_drafted_where_nothing_is_gained(acceptance: float, excess: float) -> None:
    verify = [1] * MAX_GAMMA
    assert best_draft(yields(acceptance), 1, acceptance + excess, verify) == (0, 1)


@given(rates, rates, costs, costs)
def test_speedup_grows_with_acceptance_and_falls_with_cost(
    acceptance: float, other: float, c: float, d: float
) -> None:
    low, high = sorted((acceptance, other))
    cheap, dear = sorted((c, d))
    assert 1 <= speedup(low, c) <= speedup(high, c) <= MAX_GAMMA + 1
    assert speedup(low, dear) <= speedup(low, cheap)
    assert speedup(low, c, v=1.5) <= speedup(low, c)


@given(rates, costs, lengths)
def test_the_best_draft_is_no_worse_than_any_other(a: float, c: float, gamma: int) -> None:
    assert speedup(a, c) >= expected_tokens(a, gamma) / (gamma * c + 1)


# --- plans -----------------------------------------------------------------------------------


def test_rows_get_faster_as_the_drafter_gets_cheaper() -> None:
    rows = plan(drafter=size_of(LLAMA_1B, "meta/1B")).rows
    plain, bf16, int4, other = rows

    assert [row.drafter for row in rows] == [None, "self, bf16", "self, int4", "1B, bf16"]
    cpu = plan(device=replace(H100, is_gpu=False)).rows
    assert [row.drafter for row in cpu[1:]] == ["self, bf16", "self, int8", "self, int4"]
    assert plain.best.gamma == 0
    assert plain.best.speedup == 1
    assert other.best.speedup > int4.best.speedup > bf16.best.speedup > 1
    for row in rows:
        assert row.seconds_a_token == pytest.approx(plain.seconds_a_token / row.best.speedup)
    for row in rows[1:]:
        assert row.sensitivity[0.8] == row.best
        speedups = [best.speedup for best in row.sensitivity.values()]
        assert speedups == sorted(speedups)


def test_memory_is_shared_weights_once_and_both_caches() -> None:
    small = size_of(LLAMA_1B, "1B")
    plain, bf16, int4, other = plan(drafter=small).rows
    w, k = size().weight_bytes, size().kv_bytes_per_token

    assert (plain.weight_bytes, plain.kv_bytes) == (w, 131_072 * k)
    assert (bf16.weight_bytes, bf16.kv_bytes) == (w, (131_072 + 5461) * k)
    assert int4.weight_bytes == w + size().quantized_bytes("int4g64")
    assert other.weight_bytes == w + small.weight_bytes
    assert other.kv_bytes == 131_072 * k + 5461 * small.kv_bytes_per_token


def test_a_plan_fits_where_the_memory_holds_it() -> None:
    assert all(row.fits for row in plan().rows)
    assert not any(row.fits for row in plan(device=DEVICES["4090"]).rows)
    assert all(row.fits for row in plan(device=DEVICES["l40s"]).rows)
    plain, bf16, *_ = plan(device=replace(H100, memory=37_100_000_000)).rows
    assert (plain.fits, bf16.fits) == (True, False)
    assert plan(device=replace(H100, memory=None)).rows[0].fits is None


def test_a_window_too_short_is_a_warning() -> None:
    assert warnings(plan()) == []
    small = replace(size_of(LLAMA_1B, "1B"), context_window=2048)
    long, drafter = warnings(plan(200_000, drafter=small))
    assert "131,072" in long
    assert "200,000" in long
    assert "1B was made for 2,048 tokens, fewer than the 8,333" in drafter


def test_a_plan_from_folders_is_json(tmp_path: Path) -> None:
    target = save(LLAMA_8B, tmp_path / "8B")
    drafter = save(LLAMA_1B, tmp_path / "1B")
    made = make_plan(target, 131_072, drafter=drafter, device=H100)

    assert made.retrieval_tokens == 5461
    found = json.loads(json.dumps(as_dict(made)))
    assert found["model"]["name"] == target
    assert found["drafter"]["name"] == drafter
    assert len(found["rows"]) == 4
    assert found["rows"][2]["best"]["speedup"] > 1
    assert make_plan(target, 131_072, retrieval_tokens=100, device=H100).retrieval_tokens == 100


def test_tables_fit_a_terminal_and_show_every_row() -> None:
    made = plan(drafter=size_of(LLAMA_1B, "meta/1B"))
    console = Console(width=80)
    for table in tables(made):
        with console.capture() as capture:
            console.print(table)
        text = capture.get()
        assert "…" not in text
        for drafter in ("self, bf16", "self, int4", "1B, bf16"):
            assert drafter in text
    assert "8B (8.03B parameters), H100 SXM 80 GB: 131,072 tokens, 5,461" in heading(made)
    mixture = size_of(tiny_model("mixtral").config, "mixture")
    assert "active" in heading(plan(model=mixture))


def test_assumptions_name_the_source_of_the_numbers() -> None:
    assert "3,350 GB/s and 989 TFLOP/s" in assumptions(plan())[0]
    assert "weights are read at 2,847.5 GB/s" in assumptions(plan())[0]


def test_this_machine_is_measured() -> None:
    device = measure_device(size_of(tiny_model().config, "tiny"), 512)
    rates = device.bandwidth, device.kv_bandwidth, device.flops, device.pass_flops
    assert min(*rates, device.layer_seconds) > 0
    assert device.is_gpu == torch.cuda.is_available()
    assert "measured just now" in device.source
    assert [row.fits for row in plan(model=size_of(tiny_model().config, "t"), device=device).rows]


# --- several devices and tiers ---------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_devices_share_weights_and_kv(tied: bool) -> None:
    model = size_of(LLAMA_1B if tied else LLAMA_8B, "model")
    whole = model.weight_bytes + 1000 * model.kv_bytes_per_token
    assert model.mapped_bytes(1, 1000) == whole
    assert model.sharded_bytes(1, 1000) == whole
    for devices in (2, 4, 8):
        sharded = model.sharded_bytes(devices, 1000)
        assert sharded is not None
        norms = 2 * model.vectors
        assert sharded == pytest.approx((whole - norms) / devices + norms, abs=2)
        assert (
            whole / devices
            <= model.mapped_bytes(devices, 1000)
            < whole / devices + 2 * (model.lookup + model.head)
        )
    # 16 layers on 5 devices: four of them are on one.
    layers = whole - 2 * (model.lookup + model.head)
    ends = 2 * max(model.lookup, model.head)
    most = -(-model.layers // 5) / model.layers
    assert model.mapped_bytes(5, 1000) == pytest.approx(layers * most + ends, abs=2)


def test_heads_that_do_not_divide_cannot_be_sharded() -> None:
    assert size().shared_by == 8
    assert [size().sharded_bytes(n, 0) is None for n in (1, 2, 3, 8, 16)] == [0, 0, 1, 0, 1]
    gathered = size_of(tiny_model("phi3").config, "phi3")
    assert gathered.shared_by == 0
    some, none = gathered.sharded_bytes(2, 100), gathered.sharded_bytes(2, 0)
    assert some is not None
    assert none is not None
    assert some - none == 100 * gathered.kv_bytes_per_token  # each rank has all KV


def test_the_papers_rows_fit_from_so_many_gpus_on() -> None:
    plans = {paper_name(made): made for made in paper_plans(131_072, H100)}
    fewest = {}
    for name, made in plans.items():
        row = made.rows[-1 if made.drafter else 1]
        fewest[name] = (
            next(each.devices for each in row.spreads if each.mapped_fits),
            [each.devices for each in row.spreads if each.sharded_fits],
        )
    assert fewest == {
        "llama-3.1-8b self": (1, [1, 2, 4, 8]),
        "llama-3.1-70b self": (4, [4, 8]),
        "llama-3.1-8b ← llama-3.1-70b": (4, [4, 8]),
        "qwen2.5-7b self": (1, [1, 2, 4]),  # 4 KV heads
        "qwen2.5-72b self": (4, [4, 8]),
        "qwen2.5-7b ← qwen2.5-72b": (4, [4]),
    }
    shown = Console(width=120)
    with shown.capture() as capture:
        shown.print(spread_table({name: made.rows[1] for name, made in plans.items()}))
    assert "llama-3.1-70b self, TP" in capture.get()


def test_a_quantized_copy_is_of_one_device_only() -> None:
    plain, bf16, int4 = plan().rows
    assert [each.devices for each in plain.spreads] == [1, 2, 4, 8]
    assert bf16.spreads[1].mapped > plain.spreads[1].mapped  # by the drafter's cache
    (alone,) = int4.spreads
    assert alone.mapped == alone.sharded == int4.weight_bytes + int4.kv_bytes


def test_tiers_keep_documents_by_their_kv() -> None:
    device, host, disk = plan().tiers
    kv = 131_072 * 131_072
    assert (device.name, device.documents) == ("device", 20 * 10**9 // kv)
    assert (host.documents, disk.documents) == (10**11 // kv, 10**12 // kv)
    assert host.seconds == pytest.approx(kv / 55e9)
    assert plan().rows[0].prefill_seconds > 20 * host.seconds
    assert "back in 0.31 s" in kept(plan())
    assert [tier.name for tier in plan(device=replace(H100, is_gpu=False)).tiers] == [
        "device",
        "disk",
    ]


@pytest.mark.parametrize(
    ("source", "billions", "kv", "window"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", 70.55, 327_680, 131_072),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.55, 327_680, 131_072),
        ("Qwen/Qwen2.5-72B-Instruct", 72.71, 327_680, 32_768),
        ("Qwen/Qwen3-30B-A3B", 30.53, 98_304, 40_960),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7.25, 131_072, 32_768),
        ("google/gemma-3-27b-it", 27.01, 507_904, 131_072),
        ("microsoft/phi-4", 14.66, 204_800, 16_384),
        ("qwen2.5-7b", 7.62, 57_344, 32_768),
    ],
)
def test_models_that_people_ask_for_need_no_hub(source, billions, kv, window, monkeypatch) -> None:
    monkeypatch.setattr(shapes, "load_config", lambda *_: pytest.fail("a hub was asked"))
    found = read_size(source)
    assert round(found.parameters / 1e9, 2) == billions
    assert found.kv_bytes_per_token == kv
    assert found.context_window == window


# --- refusals --------------------------------------------------------------------------------


def test_a_described_device_predicts_as_a_named_one() -> None:
    described = as_dict(plan(device=described_device(3350, 989, 80)))
    named = as_dict(plan())
    assert described["rows"] == named["rows"]
    unknown = plan(device=described_device(3350, 989))
    assert [row.fits for row in unknown.rows] == [None] * 3
    assert "of the given 3,350 GB/s" in assumptions(unknown)[0]


def test_a_device_without_bfloat16_plans_float16_and_no_4_bit_drafter() -> None:
    made = plan(context=8192, device=DEVICES["t4"])
    assert [row.drafter for row in made.rows] == [None, "self, fp16"]
    assert "dense fp16" in assumptions(made)[0]
    assert "target and KV in fp16" in assumptions(made)[1]


def test_every_device_holds_a_small_model_and_faster_memory_decodes_faster() -> None:
    small = size_of(LLAMA_1B, "1B")
    plans = [plan(context=8192, model=small, device=each) for each in DEVICES.values()]
    assert all(row.fits for made in plans for row in made.rows)
    by_memory = sorted(plans, key=lambda made: made.device.bandwidth)
    times = [made.rows[0].seconds_a_token for made in by_memory]
    assert times == sorted(times, reverse=True)
    assert times[0] > 4 * times[-1]


def test_an_unknown_device_is_refused() -> None:
    assert named_device("4090") is DEVICES["4090"]
    with pytest.raises(InvalidParameterError, match=r"'h900'.*'this'.*'h100'"):
        named_device("h900")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context=0"),
        ({"retrieval_tokens": 0}, "retrieval_tokens=0 .* from 1 to context=10"),
        ({"retrieval_tokens": 11}, "retrieval_tokens=11 .* from 1 to context=10"),
        ({"acceptance": 1.1}, "acceptance=1.1"),
        ({"acceptance": float("nan")}, "acceptance=nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        make_plan(**{"model": "never-read", "context": 10, "device": H100} | options)


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"could not be loaded.*local folder"):
        read_size(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        read_size(tmp_path / "missing.gguf")


def test_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'gpt2'.*not supported"):
        read_size(save(GPT2Config(n_layer=1), tmp_path / "gpt2"))
    with pytest.raises(ModelError, match="'t5' is no decoder-only"):
        read_size(save(T5Config(), tmp_path / "t5"))
