"""``rapid-llm bench --shape``: what it runs, counts and says. Never how long things take."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import installed

from rapid_llm import InvalidParameterError, cli
from rapid_llm.bench import base, shape_bench
from rapid_llm.bench.report import Report, Row, Section
from rapid_llm.bench.shape_bench import ShapeBench
from rapid_llm.bench.timing import Stopwatch
from rapid_llm.cli.bench import draw, heading
from rapid_llm.engine import device as devices
from rapid_llm.engine.cpu.device import CPU as CPUDevice  # noqa: N811
from rapid_llm.shapes import NAMES, random_model, shape_config, size_of

CPU = torch.device("cpu")


def make_bench(contexts: tuple[int, ...] = (256,), seconds: float = 120.0) -> ShapeBench:
    return ShapeBench("tiny", contexts, [0.8, 0.95], "float32", seconds)


@pytest.fixture(autouse=True, scope="module")
def _few() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as few:
        few.setattr(shape_bench, "_REPEATS", 2)
        few.setattr(shape_bench, "_TURNS", 2)
        few.setattr(base, "_REPEATS", 2)
        few.setattr(base, "_NUMBERS", {"cpu": 2**16})
        yield


# --- shapes ------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_models_they_are_named_after() -> None:
    sizes = {name: size_of(shape_config(name, 64), name) for name in NAMES}
    billions = {name: round(size.parameters / 1e9, 2) for name, size in sizes.items()}
    assert billions == {
        "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "llama-3.3-70b": 70.55,
        "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21,
        "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.62,
        "qwen2.5-14b": 14.77, "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.71,
        "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19,
        "qwen3-14b": 14.77, "qwen3-32b": 32.76, "qwen3-30b-a3b": 30.53, "qwen3-235b-a22b": 235.09,
        "mistral-7b": 7.25, "mistral-nemo-12b": 12.25, "mistral-small-24b": 23.57,
        "gemma-3-1b": 1.0, "gemma-3-4b": 3.88, "gemma-3-12b": 11.77, "gemma-3-27b": 27.01,
        "phi-4": 14.66, "smollm2-135m": 0.13, "tiny": 0,
    }  # fmt: skip
    assert sizes["llama-3.1-8b"].kv_bytes_per_token == 131_072


def test_weights_are_random_and_of_the_dtype_asked_for() -> None:
    model = random_model(shape_config("tiny", 64), torch.bfloat16, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.float().std() > 0 for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "llama-9"}, r"shape='llama-9'.*choose from llama-3\.1-8b"),
        ({"contexts": [255]}, "context=255 is not allowed: it must be at least 256"),
        ({"acceptances": [0.5, 1.0]}, r"acceptance=1\.0 is not allowed.*between 0 and 1"),
        ({"shape": "llama-3.1-70b", "contexts": [10**8]}, r"needs [\d,]+ GB, more than"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"shape": "tiny", "contexts": [256], "acceptances": [0.8]}
    options |= {"dtype": "float32", "seconds": 9.0}
    with pytest.raises(InvalidParameterError, match=message):
        ShapeBench(**options | changes)


# --- what is measured --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> Report:
    bench = make_bench((256, 320))
    assert [section for section in bench.run() if section.failed] == []
    return bench.report


def test_every_section_is_measured_at_every_context(report: Report) -> None:
    names = Counter(section.name for section in report.sections)
    once, each = ("memory", "draft steps"), (
        "passes", "rounds", "transformers", "prefill", "static cache"
    )  # fmt: skip
    assert names == dict.fromkeys(once, 1) | dict.fromkeys(each, 2)
    assert not report.failed


def test_ratios_are_of_what_they_say(report: Report) -> None:
    def value(key: str) -> float:
        row = report.row(key, 320)
        assert row is not None
        assert row.median is not None
        return row.median

    def samples(key: str) -> list[float]:
        row = report.row(key, 320)
        assert row is not None
        return row.samples

    pairs = zip(samples("pass_5"), samples("pass_1"), strict=True)
    assert samples("pass_5_to_1") == pytest.approx([five / one for five, one in pairs])
    assert samples("share") == pytest.approx([100 * value("limit") / s for s in samples("pass_1")])
    assert samples("plain_to_generate") == pytest.approx(
        [value("generate") / ms for ms in samples("plain")]
    )
    assert value("prefill_ratio") == pytest.approx(value("prefill") / value("prefill_transformers"))
    shares = [100 * s / value("first_question") for s in samples("second_question_rapid")]
    assert samples("second_question_rapid_share") == pytest.approx(shares)
    for a in ("0.8", "0.95"):
        tokens, ms = samples(f"rapid_{a}_tokens"), samples(f"rapid_{a}_round")
        expected = [p * t / r for p, t, r in zip(samples("plain"), tokens, ms, strict=True)]
        assert samples(f"rapid_{a}_speedup") == pytest.approx(expected)


def test_the_limit_counts_weights_and_kv(report: Report) -> None:
    read = report.row("bandwidth_read")
    limit = report.row("limit", 256)
    assert read is not None
    assert limit is not None
    model = random_model(shape_config("tiny", 64), torch.float32, CPU)
    weights = sum(p.nbytes for p in model.parameters())
    kv = 256 * 2 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, KV heads, head size, float32
    assert limit.samples[0] / 1000 * max(read.samples) * 1e9 == pytest.approx(weights + kv)


def test_rows_of_simulated_acceptance_say_so(report: Report) -> None:
    rows = [row for section in report.sections for row in section.rows]
    simulated = {row.key for row in rows if row.simulated}
    assert simulated == {row.key for row in rows if row.key.startswith("rapid_")}
    assert simulated
    assert "acceptance: simulated in rows marked *" in heading(report)
    assert report.as_dict()["weights"] == "random"


@pytest.mark.parametrize(("a", "gamma"), [(0.8, 3), (0.9, 6)])
def test_simulated_acceptance_accepts_at_the_given_rate(a: float, gamma: int) -> None:
    """The mean of a block is E(a, γ) tokens a round, and its rounds differ."""
    bench = make_bench()
    rounds = 60
    said: list[int] = []
    with torch.inference_mode(), bench._open(256, draft=True, gamma=gamma) as generation:
        keep = generation.keep
        generation.keep = lambda tokens: (said.append(len(tokens)), keep(tokens))
        _, tokens = bench._block(generation, rounds, a)
        assert generation.stats.drafted_tokens == rounds * gamma
        assert generation.target.length == 255 + tokens
    assert tokens == sum(said)
    expected = sum(a**i for i in range(gamma + 1))
    assert tokens / rounds == pytest.approx(expected, rel=0.03)
    shares = Counter(said)
    for n in range(gamma):  # P(n accepted) = aⁿ (1 - a)
        assert shares[n + 1] == pytest.approx(rounds * a**n * (1 - a), abs=2)


def test_kv_is_made_up_once_and_then_taken_over() -> None:
    bench = make_bench()
    kept: list[int] = []
    with torch.inference_mode():
        for _ in range(2):
            with bench._open(256, draft=False) as generation:
                kept.append(generation.stats.cached_tokens)
                assert generation.target.length == 255
                layer = generation.target.cache.layers[0]
                assert layer.keys[0, :, :254].std() == pytest.approx(1, abs=0.1)
    assert kept == [0, 255]


def test_calls_are_counted_of_plain_and_of_drafted_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench()
    drafted: list[int] = []

    def count(work: Any, device: torch.device) -> dict[str, float]:
        stats = work.args[0].stats
        before = stats.drafted_tokens
        work()
        drafted.append(stats.drafted_tokens - before)
        return {"launches": 40.0, "graphs": 2.0, "waits": 1.0}

    monkeypatch.setattr(shape_bench, "host_calls", count)
    with torch.inference_mode():
        rows = {row.key: row.samples for row in bench._host_calls(256)}
    assert drafted == [0, 3]
    for name in ("plain", "rapid"):
        counts = [rows[f"{name}_{key}"] for key in ("launches", "graphs", "waits")]
        assert counts == [[40.0], [2.0], [1.0]]


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_section_that_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench()

    def half(context: int) -> Any:
        yield Row("first", "first", "ms", [1.0])
        raise RuntimeError("out of\n order")

    monkeypatch.setattr(bench, "_rounds", half)
    sections = {section.name: section for section in bench.run()}
    assert sections["rounds"].failed == "RuntimeError: out of order"
    assert [row.key for row in sections["rounds"].rows] == ["first"]
    assert [name for name, section in sections.items() if section.failed] == ["rounds"]
    assert bench.report.failed
    assert bench.report.row("generate", 256) is not None
    assert bench.report.row("plain_to_generate", 256) is None  # there is nothing to compare


def test_without_time_sections_are_reported_as_not_measured() -> None:
    sections = list(make_bench(seconds=1.0).run())
    assert len(sections) == 7
    assert not any(section.rows for section in sections)
    for section in sections:
        assert section.failed == "too little time is left of 1 s"


def test_a_step_that_is_slow_repeats_less(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench()
    bench._until = time.perf_counter() - 1
    assert list(bench._turns(5, warm=2)) == [-2, -1, 0]
    bench._until = math.inf
    assert list(bench._turns(3)) == [-1, 0, 1, 2]


def test_pieces_are_timed_by_key_and_warm_ups_forgotten() -> None:
    watch = Stopwatch(CPU)
    with watch("a"):
        pass
    watch.clear()
    for key in "aab":
        with watch(key):
            pass
    assert {key: len(samples) for key, samples in watch.samples().items()} == {"a": 2, "b": 1}


# --- what is said ------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["bench", *arguments])
    return status, *capsys.readouterr()


def test_the_command_prints_saves_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    installed("matplotlib")
    folder, png = tmp_path / "results", tmp_path / "speeds.png"
    options = ("--shape", "tiny", "--context", "256", "--dtype", "float32", "--acceptance", "0.9")
    status, out, err = run(capsys, *options, "--save", str(folder), "--plot", str(png))
    assert (status, err) == (0, "")
    assert "RAPID ÷ plain, a = 0.9 *" in out
    assert "simulated" in out
    saved = json.loads((folder / "tiny.json").read_text("utf-8"))
    assert [s["name"] for s in saved["sections"]][:2] == ["memory", "draft steps"]
    assert all(math.isfinite(x) for s in saved["sections"] for r in s["rows"] for x in r["samples"])
    assert (folder / "tiny.txt").read_text("utf-8") == out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_questions_at_once_are_measured_plainly_and_by_coin() -> None:
    bench = ShapeBench("tiny", [600], [0.9], "float32", 180, questions=(1, 3))
    bench._until = math.inf
    rows = {row.key: row for row in bench._asked(600)}
    ways = "plain", "RAPID, a = 0.9"
    assert list(rows) == [f"questions_{n}_{way}" for way in ways for n in (1, 3)]
    assert all(speed > 0 for row in rows.values() for speed in row.samples)
    assert [row.simulated for row in rows.values()] == [False, False, True, True]
    assert rows["questions_1_plain"].columns == {"÷ 1": 1}


def test_questions_are_asked_at_the_longest_context_and_within_the_time() -> None:
    bench = ShapeBench("tiny", [256, 600], [0.9], "float32", 180, questions=(1, 3))
    assert [step.context for step in bench.steps() if step.name == "questions at once"] == [600]
    bench._until = time.perf_counter() - 1  # the time is up: the first counted run only
    assert [len(row.samples) for row in bench._asked(600)] == [1] * 4


def test_json_is_all_that_is_printed_and_a_failure_is_the_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShapeBench, "_prefills", lambda *_: iter([1 / 0]))
    status, out, _ = run(capsys, "--shape", "tiny", "--context", "256", "--json")
    assert status == 1
    sections = {section["name"]: section for section in json.loads(out)["sections"]}
    assert sections["prefill"]["failed"] == "ZeroDivisionError: division by zero"
    assert sections["passes"]["failed"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "tiny", "--task", "free"), "--task"),
        (("--shape", "tiny", "--repeats", "2"), "--repeats"),
        (("--shape", "huge"), "--shape huge is unknown"),
        (("--acceptance", "0.9"), "--acceptance"),
        (("--seconds", "9"), "--seconds"),
    ],
    ids=str,
)
def test_options_of_the_other_bench_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_what_is_saved_survives_an_end_that_comes_too_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShapeBench, "_rounds", interrupted)
    options = ["--shape", "tiny", "--context", "256", "--json", "--save", str(tmp_path)]
    assert cli.main(["bench", *options]) == 130
    saved = json.loads((tmp_path / "tiny.json").read_text("utf-8"))
    assert [section["name"] for section in saved["sections"]] == ["memory", "draft steps", "passes"]


def test_a_chart_is_drawn_of_what_there_is(tmp_path: Path, report: Report) -> None:
    installed("matplotlib")
    failed = Section("rounds", 256, [], "no", 1.0)
    draw(Report("tiny", {}, [report.sections[2], failed]), tmp_path / "less.png")
    assert (tmp_path / "less.png").read_bytes().startswith(b"\x89PNG")


def test_the_hosts_tier_is_measured_where_a_device_has_memory_of_its_own(monkeypatch) -> None:
    class Apart(CPUDevice):
        own_memory = True

    monkeypatch.setitem(devices._devices, "cpu", Apart())
    bench = make_bench(contexts=(1024,))
    with torch.inference_mode():
        rows = {row.key: row for row in bench._host_tier(1024)}
    assert set(rows) == {"host_out", "host_back", "host_question", "host_question_share"}
    assert min(sample for row in rows.values() for sample in row.samples) > 0
