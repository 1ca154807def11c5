"""The bench: what it runs, how it counts, what it prints. Never how long things take."""

from __future__ import annotations

import json
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import smollm2, tiny_model, tiny_tokenizer
from rich.console import Console
from transformers import DynamicCache

from rapid_llm import ContextWindowError, InvalidParameterError, RapidDecoder, cli
from rapid_llm.bench import measure as measuring
from rapid_llm.bench.measure import Cell, Row, measure
from rapid_llm.bench.methods import Run, our_methods, peer_methods
from rapid_llm.bench.report import cell_table, engine_lines, heading, plot
from rapid_llm.bench.speed_model import named_device
from rapid_llm.bench.timing import Stamps
from rapid_llm.bench.workload import QUESTIONS, Workload, make_builder, make_workload, stretched
from rapid_llm.engine.forward import Forward
from rapid_llm.engine.kv_cache import cache_argument

TARGET = [3 + i * i % 61 for i in range(200)]
WORK = Workload("quoting", 200, TARGET, TARGET[50:90])


@pytest.fixture
def decoder() -> RapidDecoder:
    return RapidDecoder(tiny_model(eos_token_id=None), tiny_tokenizer(), name="tiny")


@pytest.fixture
def _known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure_device", lambda *_: named_device("h100"))
    monkeypatch.setattr(measuring, "read_bandwidth", lambda *_: 1e10)


def test_every_method_decodes_the_tokens_asked_for(decoder: RapidDecoder) -> None:
    ours = our_methods(decoder)
    for name, method in ours.items():
        run = method(WORK, 12)
        assert run.stats is not None
        assert run.stats.completion_tokens == 12, name
        assert run.per_token > 0
    assert {"lc", "rag", "sd", "rapid", "streaming", "triforce", "rest"} <= ours.keys()
    stats = {name: method(WORK, 12).stats for name, method in ours.items()}
    assert all(stats.values())
    methods = {name: s.method for name, s in stats.items() if s is not None}
    assert methods["lc"] == "lc"
    assert methods["rag"] == "rag"
    exact = {m for name, m in methods.items() if "η=0" in name or name in ("sd", "rest")}
    assert exact <= {"sd", "lc"}  # where no draft was worth its time
    published = stats["rapid γ=10, as published"]
    assert published is not None
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


@pytest.mark.usefixtures("_known_device")
def test_runs_are_interleaved_and_the_first_turn_is_not_counted(
    decoder: RapidDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, list[int]]] = []

    def method(name: str, work: Workload, new: int) -> Run:
        order.append((name, work.target))
        return Run(float(len(order)), float(len(order)))

    ours, peer = ({name: partial(method, name)} for name in "ab")
    report = measure(decoder, ours, [WORK], peers=peer, new_tokens=4, repeats=2)
    # A peer warms up on the short prompt.
    assert order == [("a", TARGET), ("b", WORK.draft)] + [("a", TARGET), ("b", TARGET)] * 2
    rows = report.cells[0].rows
    assert rows["a"].ms_per_token == [3000, 5000]
    assert rows["b"].prefill == [4, 6]


def test_ratios_are_of_medians() -> None:
    rows = {
        name: Row(name, ms, [], None)
        for name, ms in (("lc", [4, 6, 5]), ("transformers generate", [8, 9, 90]), ("x", [1, 2, 9]))
    }
    cell = Cell("quoting", 200, 200, 40, rows)  # type: ignore[arg-type]
    assert cell.ratio("x", "lc") == 2.5
    assert cell.ratio("x", "transformers generate") == 4.5
    assert cell.ratio("x", "nothing") is None


@pytest.mark.usefixtures("_known_device")
def test_the_report_says_it_all(decoder: RapidDecoder, tmp_path: Path) -> None:
    ours, peers = our_methods(decoder), peer_methods(decoder)
    free = Workload("free", 200, TARGET, TARGET[20:80])
    report = measure(decoder, ours, [WORK, free], peers=peers, new_tokens=6, repeats=1)

    engine = report.engines[0]
    # A tiny model's weights once, and the keys and values of the prompt.
    assert engine.bytes_read > sum(
        p.numel() for n, p in decoder.target.model.named_parameters() if "layers" in n
    )
    assert len(engine.predicted) == 4
    as_json = json.loads(json.dumps(report.as_dict()))
    rapid = next(r for r in as_json["cells"][0]["rows"] if r["method"] == "rapid")
    assert rapid["ratio_to_generate"] > 0
    assert rapid["stats"]["completion_tokens"] == 6

    out = Console(file=StringIO(), width=120)
    out.print(heading(report), cell_table(report.cells[1]), *engine_lines(report))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    for part in (*ours, *peers, "verification of 5", "first prefill", "next question", "predicted"):
        assert part in text
    plot(report, tmp_path / "speeds.png")
    assert (tmp_path / "speeds.png").read_bytes().startswith(b"\x89PNG")


def test_bad_numbers_are_refused(decoder: RapidDecoder) -> None:
    with pytest.raises(InvalidParameterError, match="new_tokens=1 "):
        measure(decoder, {}, [WORK], new_tokens=1, repeats=1)
    with pytest.raises(InvalidParameterError, match="repeats=0 "):
        measure(decoder, {}, [WORK], new_tokens=2, repeats=0)
    with pytest.raises(ContextWindowError, match=r"200 tokens and 313 .*513.*tiny has 512"):
        measure(decoder, {}, [WORK], new_tokens=313, repeats=1)


@pytest.mark.parametrize("context", [500, 1700, 9000])
def test_a_workload_has_the_length_asked_for(context: int, dictionary: str) -> None:
    builder = make_builder(smollm2(), "all-minilm-l6-v2", context)
    works = [make_workload(task, context, dictionary, smollm2(), builder) for task in QUESTIONS]
    for work in works:
        assert context - 24 <= len(work.target) <= context + 4
        assert len(work.draft) < 650
        assert "The art and practice of selling" in smollm2().decode(work.target)
    # Both tasks ask about one document.
    shared = [a == b for a, b in zip(*(work.target for work in works), strict=False)].index(False)
    assert shared > context - 60
    quote = next(work for work in works if work.task == "quoting")
    assert "The art and practice of selling" in smollm2().decode(quote.draft)


def test_a_stretched_model_shares_its_weights_and_reads_more() -> None:
    model = tiny_model()
    assert stretched(model, 512) is model
    longer = stretched(model, 1500)
    assert Forward(longer, "longer").context_window == 1536
    assert Forward(model, "model").context_window == 512
    weights = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in longer.parameters()} == weights
    ids = torch.tensor([TARGET])
    assert not torch.equal(longer(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("_known_device")
def test_the_command_runs_what_it_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = ("--context", "400", "--task", "quoting", "--method", "rapid", "--method", "res")
    status = cli.main(["bench", *chosen, "--new-tokens", "4", "--repeats", "1", "--json"])
    captured = capsys.readouterr()
    assert status == 0
    report = json.loads(captured.out)
    assert [row["method"] for row in report["cells"][0]["rows"]] == ["rapid", "rest"]
    assert report["cells"][0]["task"] == "quoting"


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        (("--task", "singing"), "'singing'"),
        (("--method", "magic"), "'magic'"),
        (("--context", "100"), "context=100"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(
    capsys: pytest.CaptureFixture[str], options: tuple[str, str], mention: str
) -> None:
    assert cli.main(["bench", *options]) == 2
    assert mention in capsys.readouterr().err


def test_plan_prints_tables_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["plan", "--model", "smollm2-135m", "--context", "8000", "--device", "h100"]
    assert cli.main(chosen) == 0
    out = capsys.readouterr().out
    for part in ("134.5M parameters", "H100", "self, int8", "Assumed:"):
        assert part in out
    assert cli.main([*chosen, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["context"] == 8000
    assert cli.main(["plan", "--context", "90000", "--device", "4090"]) == 0
    assert "made for 8,192 tokens" in capsys.readouterr().out
