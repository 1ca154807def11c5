"""The bench: what it runs, how it counts, what it prints. Never how long things take."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import smollm2, tiny_model, tiny_tokenizer
from transformers import DynamicCache

from rapid_llm import ContextWindowError, InvalidParameterError, RapidDecoder, cli
from rapid_llm.bench import base
from rapid_llm.bench.method_bench import MethodBench, Run, our_methods, peer_methods
from rapid_llm.bench.questions import peer_tokens_per_second
from rapid_llm.bench.timing import Stamps
from rapid_llm.bench.workload import QUESTIONS, Workload, make_workload
from rapid_llm.cli.bench import draw, section_text
from rapid_llm.engine.kv_cache import cache_argument
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.shared_weights import stretched

TARGET = [3 + i * i % 61 for i in range(200)]
WORK = Workload("quoting", 200, TARGET, TARGET[50:90])


@pytest.fixture
def decoder() -> RapidDecoder:
    return RapidDecoder(tiny_model(eos_token_id=None), tiny_tokenizer(), name="tiny")


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REPEATS", 2)
    monkeypatch.setattr(base, "_NUMBERS", {"cpu": 2**16})


def test_every_method_decodes_the_tokens_asked_for(decoder: RapidDecoder) -> None:
    stats = {}
    for name, method in our_methods(decoder).items():
        run = method(WORK, 12)
        assert run.stats is not None
        assert run.stats.completion_tokens == 12, name
        assert run.per_token > 0
        stats[name] = run.stats
    assert {"lc", "rag", "sd", "rapid", "streaming", "triforce", "rest"} <= stats.keys()
    methods = {name: each.method for name, each in stats.items()}
    assert methods["lc"] == "lc"
    assert methods["rag"] == "rag"
    exact = {m for name, m in methods.items() if "η=0" in name or name in ("sd", "rest")}
    assert exact <= {"sd", "lc"}  # where no draft was worth its time
    published = stats["rapid γ=10, as published"]
    assert published.draft_passes == published.drafted_tokens  # no lookup


def test_a_peer_reads_the_whole_prompt_and_every_token_once(decoder: RapidDecoder) -> None:
    passes: list[int] = []

    def spy(module: Any, args: Any, kwargs: Any) -> None:
        assert isinstance(kwargs[cache_argument(module.forward)], DynamicCache)
        passes.append(kwargs["input_ids"].shape[1])

    decoder.target.model.register_forward_pre_hook(spy, with_kwargs=True)
    run = peer_methods(decoder)["transformers generate"](WORK, 5)
    assert passes == [200, 1, 1, 1, 1]
    assert run.prefill is not None
    assert run.prefill > 0
    assert run.stats is None
    for name in ("transformers prompt lookup", "transformers assisted"):
        assert peer_methods(decoder)[name](WORK, 12).per_token > 0


def test_a_peers_tokens_are_timed_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 2.0, 5.0, 8.0])
    monkeypatch.setattr("rapid_llm.bench.timing.time.perf_counter", lambda: next(clock))
    stamps = Stamps()
    for size in (200, 2, 3, 3):  # the prompt, then runs of tokens
        stamps.put(torch.zeros(size))
    assert stamps.prefill == 1
    assert stamps.per_token == 1  # six tokens after the first two


def test_runs_are_interleaved_and_the_first_turn_is_not_counted(decoder: RapidDecoder) -> None:
    order: list[tuple[str, list[int]]] = []

    def method(name: str, work: Workload, new: int) -> Run:
        order.append((name, work.target))
        return Run(float(len(order)), 1 / len(order))

    ours, peer = ({name: partial(method, name)} for name in "ab")
    bench = MethodBench(decoder, ours, [WORK], peers=peer, new_tokens=4, repeats=2)
    told: list[tuple[str, int, int]] = []
    bench.progress = lambda *told_now: told.append(told_now)
    a, b = bench._compared(WORK)
    # A peer warms up on the short prompt.
    assert order == [("a", TARGET), ("b", WORK.draft)] + [("a", TARGET), ("b", TARGET)] * 2
    assert a.samples == pytest.approx([3, 5])
    assert b.columns["prefill, s"] == 5
    assert told[-1] == ("quoting, 200 tokens: runs", 5, 6)


def test_ratios_are_of_medians(decoder: RapidDecoder) -> None:
    names = {"lc": [0, 4, 6, 5], "transformers generate": [0, 8, 9, 90], "x": [0, 1, 2, 9]}
    runs = {name: iter(ms) for name, ms in names.items()}
    methods = {
        name: lambda work, new, name=name: Run(None, next(runs[name]) or 1) for name in names
    }
    rows = MethodBench(decoder, methods, [WORK], new_tokens=4, repeats=3)._compared(WORK)
    columns = {row.key: row.columns for row in rows}
    assert columns["x"] == {"÷ lc": pytest.approx(2.5), "÷ generate": pytest.approx(4.5)}
    assert columns["lc"] == {"÷ lc": 1, "÷ generate": pytest.approx(1.8)}


@pytest.mark.usefixtures("_few")
def test_the_report_says_it_all(decoder: RapidDecoder, tmp_path: Path) -> None:
    ours, peers = our_methods(decoder), peer_methods(decoder)
    free = Workload("free", 200, TARGET, TARGET[20:80])
    bench = MethodBench(decoder, ours, [WORK, free], peers=peers, new_tokens=6, repeats=1)
    text = "".join(section_text(section) for section in bench.run())
    for part in (*ours, *peers, "÷ generate", "pass of 5 ÷ of 1", "share of the limit", "prefill",
                 "next question"):  # fmt: skip
        assert part in text
    report = bench.report
    names = ["memory", "quoting", "free", "passes", "prefill"]
    assert [section.name for section in report.sections] == names
    assert not report.failed

    rapid = report.row("rapid γ=10, as published", 200)
    assert rapid is not None
    assert {"÷ lc", "÷ generate", "a", "E", "c", "v", "γ"} <= rapid.columns.keys()
    assert rapid.columns["c"] > 0
    saved = json.loads(json.dumps(report.as_dict()))
    assert (saved["model"], saved["draft_tokens"]) == ("tiny", 60)
    assert [row["key"] for row in saved["sections"][1]["rows"]] == [*ours, *peers]
    draw(report, tmp_path / "speeds.png")
    assert (tmp_path / "speeds.png").read_bytes().startswith(b"\x89PNG")


def test_questions_at_once_are_measured_beside_transformers(
    decoder: RapidDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = MethodBench(decoder, {}, [WORK], new_tokens=12, repeats=2, questions=(1, 3))
    bench._until = math.inf
    asked: list[tuple[list[int], int]] = []

    def generate_batch(
        model: Any, prompts: Any, *, generation_config: Any, record_timestamps: bool
    ) -> Any:
        assert record_timestamps
        asked.append((prompts[0], len(prompts)))
        tokens = generation_config.max_new_tokens
        times = [[0.5 * late + i for i in range(tokens)] for late in range(len(prompts))]
        return {i: SimpleNamespace(error=None, timestamps=each) for i, each in enumerate(times)}

    # Of the class: a model with a method of its own takes the passes that read one sequence.
    peer = type(decoder.target.model)
    monkeypatch.setattr(peer, "generate_batch", generate_batch)
    rows = {row.key: row for row in bench._asked(WORK)}
    ways = "lc", "rapid", "transformers generate_batch"
    assert list(rows) == [f"questions_{n}_{way}" for way in ways for n in (1, 3)]
    assert all(len(row.samples) == 2 and min(row.samples) > 0 for row in rows.values())
    assert asked == [(TARGET, 1), (TARGET, 3)] * 3  # the first turn warms up
    one, three = (rows[f"questions_{n}_{ways[2]}"] for n in (1, 3))
    assert one.samples == [1, 1]
    # All three decode from 1.0 to 11.0: 10 tokens, 10 at the halves, and 10.
    assert three.samples == [3, 3]
    assert three.columns == {"÷ 1": 3}

    def refuse(model: Any, prompts: Any, **options: Any) -> Any:
        return {0: SimpleNamespace(error="no paged attention", timestamps=None)}

    monkeypatch.setattr(peer, "generate_batch", refuse)
    *ours, last = bench._asked(WORK)
    assert [row.key for row in ours] == list(rows)[:4]
    assert last.samples == []
    assert last.note == "does not run here (RuntimeError: no paged attention)"


@pytest.mark.slow
def test_continuous_batching_of_transformers_runs_in_the_bench(decoder: RapidDecoder) -> None:
    with torch.inference_mode():
        speed = peer_tokens_per_second(decoder.target.model, TARGET, 8, 2)
    assert speed is None or speed > 0


def test_a_prompt_beyond_the_window_is_refused(decoder: RapidDecoder) -> None:
    with pytest.raises(ContextWindowError, match=r"200 tokens and 313 .*513.*tiny has 512"):
        MethodBench(decoder, {}, [WORK], new_tokens=313, repeats=1)


@pytest.mark.parametrize("context", [300, 1700, 9000])
def test_a_workload_has_the_length_asked_for(context: int, dictionary: str) -> None:
    quote, free = (make_workload(task, context, dictionary, smollm2()) for task in QUESTIONS)
    for work in (quote, free):
        assert context - 24 <= len(work.target) <= context + 4
        assert len(work.draft) < 600
        assert "The art and practice of selling" in smollm2().decode(work.target)
    # Both tasks ask about one document.
    same = [a == b for a, b in zip(quote.target, free.target, strict=False)].index(False)
    assert same > context - 60
    assert "The art and practice of selling" in smollm2().decode(quote.draft)


def test_a_stretched_model_shares_its_weights_and_reads_more() -> None:
    with pytest.raises(InvalidParameterError, match=r"600 tokens .* 512 of gemma3"):
        stretched(tiny_model("gemma3_text"), 600)
    model = tiny_model()
    assert stretched(model, 512) is model
    longer = stretched(model, 1500)
    assert ModelRunner(longer, "longer").context_window == 1536
    assert ModelRunner(model, "model").context_window == 512
    weights = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in longer.parameters()} == weights
    ids = torch.tensor([TARGET])
    assert not torch.equal(longer(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("_few")
def test_the_command_runs_what_it_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On a machine without an embedder, a hub or packages of ours, from a folder."""
    model = tiny_model(vocab_size=len(smollm2()), eos_token_id=None)
    model.save_pretrained(tmp_path / "model")
    smollm2().save_pretrained(tmp_path / "model")
    chosen = ("--context", "400", "--task", "quoting", "--method", "rapid", "--method", "res")
    saved = tmp_path / "results" / "one.json"
    options = ("--new-tokens", "4", "--repeats", "1", "--json", "--save", str(saved))
    status = cli.main(["bench", "--model", str(tmp_path / "model"), *chosen, *options])
    captured = capsys.readouterr()
    assert status == 0
    report = json.loads(captured.out)
    assert report["model"] == str(tmp_path / "model")
    assert report == json.loads(saved.read_text("utf-8"))
    quoting = report["sections"][1]
    assert quoting["name"] == "quoting"
    assert [row["key"] for row in quoting["rows"]] == ["rapid", "rest"]


def test_a_bench_needs_no_package_but_those_of_a_gpu_machine() -> None:
    absent = "chromadb", "gguf", "semantic_text_splitter", "sentence_transformers", "bm25s", "pypdf"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
from rapid_llm.cli import main
import rapid_llm.bench.method_bench, rapid_llm.bench.workload, rapid_llm.bench.shape_bench
sys.exit(main(["bench", "--help"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for default in ("1700, 7500; with --shape 32768", "smollm2-135m", "64", "0.8, 0.9, 0.95"):
        assert f"[default: ({default})" in said


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        (("--task", "singing"), "--task singing is"),
        (("--method", "magic"), "--method magic names"),
        (("--context", "100"), "--context 100"),
        (("--model", "no-such-folder"), "'no-such-folder'"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, str],
    mention: str,
) -> None:
    if options[0] in ("--task", "--method"):
        monkeypatch.setattr("rapid_llm.models.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["bench", *options]) == 2
    assert mention in capsys.readouterr().err


def test_plan_prints_tables_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["plan", "--model", "smollm2-135m", "--context", "8000", "--device", "h100"]
    assert cli.main(chosen) == 0
    out = capsys.readouterr().out
    for part in ("134.5M parameters", "H100", "self, int4", "Assumed:"):
        assert part in out
    assert cli.main([*chosen, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["context"] == 8000
    assert cli.main(["plan", "--context", "90000", "--device", "4090"]) == 0
    assert "made for 8,192 tokens" in capsys.readouterr().out
