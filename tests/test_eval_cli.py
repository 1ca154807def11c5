"""``rapid-llm eval``: from a command line to a table and a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import (  # noqa: F401  (fixtures)
    Outcome,
    assert_refused,
    model_fixture,
)
from test_eval_methods import WordCounts, item, words
from transformers.utils import logging

from rapid_llm import RapidDecoder, cli, models
from rapid_llm.cli import evaluate as command
from rapid_llm.cli import report as reporting
from rapid_llm.evaluation import retrieval, runner, tasks
from rapid_llm.evaluation.journal import SETTINGS, Journal, read_records
from rapid_llm.evaluation.tasks.base import Item, Source, Task

LENGTHS = ("short", "long")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logging.disable_progress_bar()
    monkeypatch.setattr(retrieval, "load_embedder", lambda name, device: WordCounts(name))
    monkeypatch.setattr("rapid_llm.context.embedder_loading.require_embedder", lambda name: None)
    yield
    logging.enable_progress_bar()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``load_task`` was called with; it gives a made task."""
    seen: dict[str, Any] = {}

    def load_task(name: str, source: Source) -> Task:
        seen.update(vars(source), name=name)
        items = [
            item(
                str(i),
                " ".join(words(5 + 20 * i + part, 16) for part in range(3)),
                query=f"w{6 + 20 * i}",
                groups={"length": LENGTHS[i % 2]},
            )
            for i in range(3)
        ]
        return Task(name, {"contains": "rate", "f1": "mean"}, items[: source.limit], score)

    monkeypatch.setattr(tasks, "load_task", load_task)
    return seen


def score(item: Item, answer: str) -> dict[str, float]:
    return {"contains": float("w5" in answer), "f1": len(answer) / 100}


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, loaded: dict[str, Any]
) -> Callable[..., Outcome]:
    def run(*options: object, out: str = "out") -> Outcome:
        arguments = (
            *("eval", "made", "--model", model, "--dtype", "float32", "--out", tmp_path / out),
            *("--chunk-tokens", 32, "--retrieval-tokens", 32, "--embedder", "words", *options),
        )
        status = cli.main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


def test_a_table_is_printed_and_answers_are_kept(run: Any, tmp_path: Path) -> None:
    status, out, err = run()
    records = read_records(tmp_path / "out")

    assert (status, err.count("\n")) == (0, 1)
    assert str(tmp_path / "out") in err
    assert [r.method for r in records[:4]] == ["lc", "rag", "sd", "rapid η=10"]
    assert len(records) == 12
    for part in ("items", "contains", "f1", "− lc", "tokens/s", "÷ lc"):
        assert part in out
    for method in ("lc", "rag", "sd", "rapid η=10"):
        assert out.count(f"\n  {method} ") == 2  # scores and speed


def test_json_is_one_object(run: Any, tmp_path: Path) -> None:
    status, out, err = run("--json", "--method", "lc", "--method", "sd")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert (found["task"], found["folder"]) == ("made", str(tmp_path / "out"))
    assert [row["method"] for row in found["rows"]] == ["lc", "sd"]
    assert found["rows"][1]["difference"]["value"] == 0  # lossless
    assert set(found["groups"]["length"]) == set(LENGTHS)


def test_answers_at_once_are_the_same_and_said_to_have_no_speed(run: Any, tmp_path: Path) -> None:
    alone = json.loads(run("--json").out)["rows"]
    status, out, _ = run("--max-sequences", 3, out="together")
    assert status == 0
    assert "Up to 3 answers were decoded at once" in out
    together = read_records(tmp_path / "together")
    assert [r.answer for r in together] == [r.answer for r in read_records(tmp_path / "out")]
    assert all(row["tokens_per_second"] > 0 for row in alone)
    settings = json.loads((tmp_path / "together" / SETTINGS).read_text(encoding="utf-8"))
    assert settings["max_sequences"] == 3
    assert_refused(run(out="together"), "--max-sequences 3", "now it is 1")


def test_options_are_swept(run: Any) -> None:
    rows = json.loads(
        run(
            *("--json", "--limit", 2, "--irrelevant", "--method", "rapid", "--method", "rag"),
            *("--eta", 0, "--eta", 5, "--gamma", 2, "--gamma", 3, "--retriever", "bm25"),
        ).out
    )["rows"]
    assert [row["method"] for row in rows] == [
        *("sd", "sd, irrelevant", "sd, γ=3", "sd, γ=3, irrelevant"),
        *("rapid η=5", "rapid η=5, irrelevant", "rapid η=5, γ=3", "rapid η=5, γ=3, irrelevant"),
        *("rag", "rag, irrelevant"),
    ]
    assert rows[4]["options"] == {
        "gamma": 2,
        "eta": 5.0,
        "mode": "paper",
        "dynamic_eta": False,
        "retrieval_tokens": 32,
        "chunk_tokens": 32,
        "retriever": "bm25",
        "embedder": None,
        "irrelevant": False,
    }


def test_the_task_gets_its_options(run: Any, loaded: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text("{}")
    options = ("--data", data, "--limit", 1, "--seed", 7, "--context-tokens", 99)
    assert run(*options, "--method", "lc").status == 0
    wanted = {"name": "made", "data": data, "limit": 1, "seed": 7, "context_tokens": 99}
    assert {name: loaded[name] for name in wanted} == wanted
    assert loaded["judge"] is None
    assert loaded["tokenizer"].vocab_size == 64


def test_settings_are_written_and_hold_no_path(run: Any, tmp_path: Path, model: str) -> None:
    data = tmp_path / "data.json"
    data.write_text("{}")
    run("--data", data, "--method", "lc")
    settings = json.loads((tmp_path / "out" / SETTINGS).read_text(encoding="utf-8"))
    assert settings["model"] == model
    assert settings["data"] == "data.json"
    assert settings["metrics"] == {"contains": "rate", "f1": "mean"}
    assert settings["retrieval_tokens"] == 32
    assert settings["gamma"] == 4
    assert settings["threshold"] == "the embedder's"
    for name in ("torch", "transformers", "rapid_llm", "seed", "dtype", "device", "task"):
        assert settings[name] is not None
    assert "limit" not in settings
    assert "method" not in settings


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", 1),
        ("--dtype", "bfloat16"),
        ("--gamma", 5),
        ("--mode", "augmented"),
        ("--context-tokens", 50),
        ("--layers", 1),
        ("--attn-implementation", "eager"),
        ("--drafter-quantization", "none"),
    ],
)
def test_other_settings_are_refused(run: Any, options: tuple[str, object]) -> None:
    assert run("--method", "lc", "--limit", 1).status == 0
    assert_refused(run("--method", "lc", *options), f"{options[0]} ", "--out")


def test_other_data_is_refused(run: Any, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text("{}")
    options = ("--data", data, "--method", "lc", "--limit", 1)
    assert run(*options).status == 0
    data.write_text("[]")
    assert_refused(run(*options), "data_sha256")


def test_more_items_and_methods_are_added(run: Any, tmp_path: Path) -> None:
    assert run("--method", "lc", "--limit", 1).status == 0
    first = read_records(tmp_path / "out")
    assert run("--method", "lc", "--method", "rapid", "--eta", 5).status == 0
    records = read_records(tmp_path / "out")
    assert records[0] == first[0]
    assert [(r.item, r.method) for r in records] == [
        *(("0", "lc"), ("0", "rapid η=5"), ("1", "lc"), ("1", "rapid η=5")),
        *(("2", "lc"), ("2", "rapid η=5")),
    ]


def test_the_first_layers_can_be_the_target(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[RapidDecoder] = []
    run_all = runner.Evaluation.run

    def spy(self: runner.Evaluation, *arguments: Any) -> None:
        seen.append(self.decoder)
        run_all(self, *arguments)

    monkeypatch.setattr(runner.Evaluation, "run", spy)
    options = ("--method", "rapid", "--limit", 1, "--attn-implementation", "eager")
    assert run("--layers", 1, *options).status == 0
    (decoder,) = seen
    assert decoder.target.attn_implementation == "eager"
    assert decoder.target.config.num_hidden_layers == 1
    assert decoder.drafter.config.num_hidden_layers == 2
    assert "first 1 layers" in decoder.target.name
    assert_refused(run("--layers", 3, out="other"), "--layers 3", "2 layers")


def test_an_interrupt_leaves_a_folder_to_go_on_with(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all = runner.Evaluation.run

    def interrupted(self: runner.Evaluation, journal: Journal, _: object) -> None:
        def progress(done: int, total: int) -> None:
            if done == 5:
                raise KeyboardInterrupt

        run_all(self, journal, progress)

    with monkeypatch.context() as patch:
        patch.setattr(runner.Evaluation, "run", interrupted)
        status, out, err = run()
    assert (status, out) == (130, "")
    assert "after 5 answers" in err
    assert str(tmp_path / "out") in err
    assert "Traceback" not in err
    before = read_records(tmp_path / "out")
    assert run().status == 0
    after = read_records(tmp_path / "out")
    assert (len(before), len(after)) == (5, 12)
    assert after[:5] == before


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (["--method", "magic"], ["--method magic is", "speculative-rag"]),
        (["--eta", "-1"], ["--eta -1.0"]),
        (["--gamma", "many"], ["many", "auto"]),
        (["--gamma", "0"], ["--gamma 0"]),
        (["--mode", "fast"], ["--mode fast is", "augmented"]),
        (["--retriever", "sparse"], ["--retriever sparse is", "hybrid"]),
        (["--dtype", "int8"], ["int8"]),
        (["--layers", "1", "--drafter", "x"], ["--layers 1", "--drafter x"]),
        (["--layers", "1", "--drafter-device", "cpu"], ["--layers 1", "--drafter-device cpu"]),
        (["--judge-url", "http://localhost"], ["--judge-model"]),
        (["--data", "no-such-file"], ["no-such-file"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    run: Any, monkeypatch: pytest.MonkeyPatch, options: list[str], mentions: list[str]
) -> None:
    monkeypatch.setattr(models, "_load", None)
    assert_refused(run(*options), *mentions)


def test_packages_of_the_extra_that_are_missing_are_named_with_the_remedy(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = reporting.find_spec
    monkeypatch.setattr(
        reporting, "find_spec", lambda name: (name != "scipy" and there(name)) or None
    )
    assert_refused(run(), "eval needs scipy", 'pip install "rapid-llm[eval]"')
    status = cli.main(["report", "runs"])
    assert_refused(Outcome(status, *capsys.readouterr()), "report needs scipy")


def test_a_folder_s_checksum_follows_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("1")
    (tmp_path / "b.json").write_text("2")
    first = command._checksum(tmp_path)
    (tmp_path / ".cache").write_text("3")
    assert command._checksum(tmp_path) == first
    (tmp_path / "b.json").rename(tmp_path / "c.json")
    assert command._checksum(tmp_path) != first
    moved = tmp_path / "elsewhere.json"
    same = command._checksum(tmp_path / "a.json")
    (tmp_path / "a.json").rename(moved)
    assert command._checksum(moved) == same


def test_an_unknown_task_lists_those_there_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    status = cli.main(["eval", "haystack", "--model", model, "--out", str(tmp_path)])
    assert status == 2
    assert "needle" in capsys.readouterr().err
