"""Plans for several devices, tiers of kept KV and described devices; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from plans import H100, LLAMA_1B, LLAMA_8B, plan, save, size
from rich.console import Console
from transformers import GPT2Config, T5Config

from rapid_llm import shapes
from rapid_llm.bench.plan import make_plan
from rapid_llm.bench.speed_model import DEVICES, described_device, named_device
from rapid_llm.cli.plan import as_dict, assumptions, kept, paper_name, paper_plans, spread_table
from rapid_llm.errors import InvalidParameterError, ModelError
from rapid_llm.shapes import read_size, size_of

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
