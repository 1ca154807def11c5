"""Plans: the formulas, what an H100 took, rows, memory and warnings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from plans import H100, LLAMA_1B, LLAMA_8B, plan, save, size
from rich.console import Console

from rapid_llm.bench.plan import make_plan, paper_retrieved
from rapid_llm.bench.speed_model import DEVICES, pass_seconds, prefill_flops
from rapid_llm.bench.this_device import measure_device
from rapid_llm.cli.plan import as_dict, assumptions, heading, tables, warnings
from rapid_llm.shapes import shape_config, size_of
from rapid_llm.speculation.schedule import MAX_GAMMA, best_draft, expected_tokens

RESULTS = Path(__file__).parents[1] / "cookbook" / "results" / "gpu"


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
