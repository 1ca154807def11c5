"""Runs: what each method is asked, what is kept, and that an interrupt changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_eval_methods import WordCounts, item, tokenizer, words

from rapid_llm import InvalidParameterError, RapidDecoder, Stats
from rapid_llm.errors import DataError
from rapid_llm.evaluation import retrieval as retrieval_module
from rapid_llm.evaluation.journal import RESULTS, SETTINGS, Journal, Record, read_records
from rapid_llm.evaluation.methods import Sweep
from rapid_llm.evaluation.retrieval import Retrieval
from rapid_llm.evaluation.runner import Evaluation, accepted_at
from rapid_llm.evaluation.speculative_rag import RATIONALE_TOKENS
from rapid_llm.evaluation.tasks.base import Item, Task

SWEEP = Sweep(
    gamma=(3,),
    eta=(10,),
    retrieval_tokens=(64,),
    chunk_tokens=(32,),
    retriever=("dense",),
    embedder=("words",),
    irrelevant=True,
)
SINGLE = replace(SWEEP, irrelevant=False)
METHODS = ("lc", "rag", "sd", "rapid", "rest", "streaming", "speculative-rag")
SETTINGS_OF_THE_RUN = {"model": "tiny", "seed": 0}


def make_task(items: int = 3, **changes: Any) -> Task:
    made = [
        item(
            str(i),
            # Two questions on each document.
            " ".join(words(5 + 9 * (i // 2) + part, 16, 12) for part in range(6)),
            query=f"w{7 + i} w{8 + i}",
            **changes,
        )
        for i in range(items)
    ]
    return Task("made", {"first": "rate"}, made, score)


def score(item: Item, answer: str) -> dict[str, float]:
    return {"first": float(answer.startswith("w3"))}


def make_decoder(max_sequences: int = 1) -> RapidDecoder:
    model = tiny_model(eos_token_id=None)
    return RapidDecoder(model, tokenizer(), max_sequences=max_sequences)


@pytest.fixture(autouse=True)
def _words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_module, "load_embedder", lambda name, device: WordCounts(name))


def run(
    folder: Path,
    task: Task,
    methods: Any = METHODS,
    *,
    decoder: RapidDecoder | None = None,
    sweep: Sweep = SWEEP,
    settings: dict[str, Any] = SETTINGS_OF_THE_RUN,
    **options: Any,
) -> list[Record]:
    specs = sweep.methods(methods)
    decoder = decoder or make_decoder()
    wanted = dict.fromkeys(spec.retrieval for spec in specs if spec.retrieval is not None)
    made = Retrieval(decoder.tokenizer, wanted)
    journal = Journal(folder, settings)
    Evaluation(decoder, task, specs, made).run(journal, **options)
    return read_records(folder)


def untimed(records: list[Record]) -> list[dict[str, Any]]:
    """Everything but how long it took."""
    timed = {"time_to_first_token", "tokens_per_second"}
    return [
        record.model_dump()
        | {
            "stats": {
                name: value
                for name, value in record.stats.items()
                if not name.endswith("_seconds") and name not in timed
            }
        }
        for record in records
    ]


# --- what a run writes ------------------------------------------------------------------------


def test_every_item_is_answered_by_every_method(tmp_path: Path) -> None:
    task, progress = make_task(), []
    records = run(tmp_path, task, progress=lambda *at: progress.append(at))
    names = [spec.name for spec in SWEEP.methods(METHODS)]

    assert len(names) == 11
    assert [(r.item, r.method) for r in records] == [(i.id, n) for i in task.items for n in names]
    assert progress == [(done, 33) for done in range(34)]
    for record in records:
        assert record.scores == score(task.items[0], record.answer)
        assert record.stats["draft_skipped"] is None
        longest = 8 + RATIONALE_TOKENS * (record.base == "speculative-rag")
        assert 1 <= record.stats["completion_tokens"] <= longest
    first = {record.method: record for record in records[:11]}
    assert first["sd"].answer == first["rest"].answer == first["lc"].answer  # lossless
    assert first["rag"].answer != first["lc"].answer
    assert first["rapid η=10"].options["eta"] == 10
    for name in ("sd", "rapid η=10", "rest", "streaming"):
        stats, accepted = first[name].stats, first[name].accepted_at
        judged = stats["accepted_tokens"] + stats["rejections"]
        assert sum(n for n, _ in accepted) == judged
        assert judged > 0 or name == "rest"  # which may find nothing
        assert sum(k for _, k in accepted) == stats["accepted_tokens"]
        assert len(accepted) <= 3
    for name in ("lc", "rag", "speculative-rag"):
        assert first[name].accepted_at == ()


def test_the_target_reads_a_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)
    records = run(tmp_path, make_task(), ("lc", "sd", "rapid"))
    for record in records:
        assert record.stats["cached_tokens"] == record.stats["prompt_tokens"] - 1


def test_target_and_drafter_read_their_own_context(tmp_path: Path) -> None:
    decoder, seen = make_decoder(), []
    stream = decoder.stream

    def spy(target: Any, draft: Any = None, **options: Any) -> Any:
        seen.append((target, draft, options))
        return stream(target, draft, **options)

    decoder.stream = spy  # type: ignore[method-assign]
    task = make_task(3)
    run(tmp_path, task, ("lc", "rag", "rapid"), decoder=decoder)
    # The first call only reads the target's prompt.
    calls = [(t, d, o) for t, d, o in seen if o["sampling"].max_new_tokens == 8][:5]
    (lc, none, _), (no_target, rag, _), (_, far, _), (target, draft, options), *_ = calls
    context = task.items[0].context

    assert none is None
    assert no_target is None
    assert lc == target
    assert decoder.tokenizer.decode(lc) == f"w3 {context} w4 w5"
    assert rag == draft
    (message,) = draft
    before, after = message["content"].removeprefix("w3 ").removesuffix(" w4 w5"), far[0]["content"]
    assert before != context
    assert all(part in context for part in before.split("\n\n"))
    other = task.items[2].context
    assert all(part in other for part in after[3:-6].split("\n\n"))
    assert options["speculation"].gamma == 3
    assert options["sampling"].temperature == 0


def test_a_document_too_long_loses_its_middle(tmp_path: Path) -> None:
    long = " ".join(f"w{10 + i % 50}" for i in range(900))
    task = Task("made", {"first": "rate"}, [item("1", long)], score)
    (record,) = run(tmp_path, task, ("lc",))
    assert 495 <= record.stats["prompt_tokens"] <= 504
    assert 390 <= record.stats["omitted_tokens"] < 500


def test_nothing_retrieved_is_recorded(tmp_path: Path) -> None:
    sweep = replace(SWEEP, retriever=("bm25",), irrelevant=False)
    context = words(30, 60)
    task = Task("made", {"first": "rate"}, [item("1", context, references=("w30",))], score)
    records = run(tmp_path, task, ("lc", "rag", "rapid", "speculative-rag"), sweep=sweep)
    lc, *others = records
    for record in others:
        assert record.answer == lc.answer
        assert "no chunk has a word of the question" in record.stats["draft_skipped"]
        assert record.retrieved is None
        assert record.base != "lc"


def test_whether_the_answer_was_retrieved(tmp_path: Path) -> None:
    task = make_task(3, references=("w8 w9",))
    records = {r.method: r for r in run(tmp_path, task, ("lc", "rag")) if r.item == "0"}
    assert records["lc"].retrieved is None
    assert records["rag"].retrieved is True
    assert records["rag, irrelevant"].retrieved is False


def test_an_answer_is_followed_up(tmp_path: Path) -> None:
    decoder, seen = make_decoder(), []
    stream = decoder.stream

    def spy(target: Any, draft: Any = None, **options: Any) -> Any:
        seen.append((target, draft, options["sampling"].max_new_tokens))
        return stream(target, draft, **options)

    decoder.stream = spy  # type: ignore[method-assign]
    task = make_task(follow_up="w6 {context} w7 {answer} w8", follow_up_tokens=5)
    plain = run(tmp_path / "plain", make_task(), ("lc",))
    records = run(tmp_path / "followed", task, ("lc", "rapid"), decoder=decoder)
    first, second = (call for call in seen[1:3])
    said = next(r.answer for r in plain if r.method == "lc")
    assert decoder.tokenizer.decode(second[0]) == f"w6 {task.items[0].context} w7 {said} w8"
    assert (first[2], second[2]) == (8, 5)
    assert records[0].stats["completion_tokens"] == 13
    rapid = next(r for r in records if r.method == "rapid η=10")
    assert rapid.stats["completion_tokens"] == 13
    judged = rapid.stats["accepted_tokens"] + rapid.stats["rejections"]
    assert sum(n for n, _ in rapid.accepted_at) == judged


# --- at once ----------------------------------------------------------------------------------


def counted(records: list[Record]) -> list[dict[str, Any]]:
    """Everything but times, and where KV came from."""
    return [
        each
        | {
            "at_once": 1,
            "stats": {k: v for k, v in each["stats"].items() if not k.startswith("cached_tokens")},
        }
        for each in untimed(records)
    ]


@pytest.mark.parametrize("changes", [{}, {"follow_up": "w6 {context} w7 {answer} w8"}])
def test_answers_at_once_are_those_of_one_by_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    task = make_task(4, **changes)
    alone = run(tmp_path / "alone", task)
    together = run(tmp_path / "together", task, decoder=make_decoder(max_sequences=5))
    assert counted(together) == counted(alone)
    assert {record.at_once for record in alone} == {1}
    assert {record.at_once for record in together} == {5}


def test_the_questions_and_methods_on_a_document_are_asked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, groups = make_decoder(max_sequences=8), []
    many = decoder.stream_many
    monkeypatch.setattr(
        decoder, "stream_many", lambda asked: (groups.append(len(list(asked))), many(asked))[1]
    )
    records = run(tmp_path, make_task(5), ("lc", "sd", "speculative-rag"), decoder=decoder)
    # Of lc and sd, plain and irrelevant: three for each question; two questions a document.
    assert groups == [6, 6, 3]
    assert [record.at_once for record in records[-5:]] == [5] * 5
    for record in records:
        if record.base in ("lc", "sd"):  # one document is read once for all
            assert record.stats["prompt_tokens"] == 99
            assert record.stats["cached_tokens"] > 90


@pytest.mark.parametrize("stop", [1, 7, 22, 30])
def test_an_interrupt_at_once_changes_no_answer(tmp_path: Path, stop: int) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    task, decoder = make_task(), make_decoder(max_sequences=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", task, decoder=decoder, progress=interrupt)
    assert len(read_records(tmp_path / "cut")) == stop
    whole = counted(run(tmp_path / "whole", task, decoder=decoder))
    assert counted(run(tmp_path / "cut", task, decoder=decoder)) == whole


def test_a_model_whose_passes_cannot_be_joined_answers_all_the_same(tmp_path: Path) -> None:
    made = [
        RapidDecoder(tiny_model("gemma3_text", eos_token_id=None), tokenizer(), max_sequences=n)
        for n in (1, 4)
    ]
    assert not made[0].target.joins
    alone, together = (
        run(tmp_path / str(n), make_task(2), ("lc", "rapid"), decoder=each, sweep=SINGLE)
        for n, each in enumerate(made)
    )
    assert [r.answer for r in together] == [r.answer for r in alone]


def test_positions_are_counted_until_a_rejection() -> None:
    totals = [(3, 3), (6, 4), (6, 4), (8, 4), (9, 5)]  # drafted, accepted after each round
    chunks: Any = [
        SimpleNamespace(stats=Stats(drafted_tokens=n, accepted_tokens=k)) for n, k in totals
    ]
    # Rounds: 3 of 3; 1 of 3; nothing drafted; 0 of 2; 1 of 1.
    assert accepted_at(chunks) == ((4, 3), (2, 1), (1, 1))
    assert accepted_at([]) == ()


# --- going on ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_module, "load_embedder", lambda name, device: WordCounts(name))
        return untimed(run(tmp_path_factory.mktemp("whole"), make_task()))


@pytest.mark.parametrize("stop", [0, 1, 4, 11, 17, 32])
def test_an_interrupt_changes_nothing(
    tmp_path: Path, uninterrupted: list[dict[str, Any]], stop: int
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, make_task(), progress=interrupt)
    assert len(read_records(tmp_path)) == stop
    # Even how much of each prompt was reused is the same, and so is the rounding.
    assert untimed(run(tmp_path, make_task())) == uninterrupted


POINTS = ((0, 0), (3, 1), (12, 40), (25, 10**6))
"""Where to be killed: (answers before, bytes of the next one written; the last: all of them)."""


def be_killed(folder: Path) -> None:
    """For each point, a process that is killed there by SIGKILL."""
    torch.set_num_threads(1)  # threads do not survive a fork
    retrieval_module.load_embedder = lambda name, device: WordCounts(name)  # type: ignore
    as_line = Record.model_dump_json
    for point in POINTS:
        child = os.fork()
        if child == 0:
            counter = iter(range(10**6))

            def torn(self: Record, at: tuple[int, int] = point, counter: Any = counter) -> str:
                line = as_line(self)
                if next(counter) == at[0]:
                    with (folder / str(at[0]) / RESULTS).open("ab") as file:
                        file.write(f"{line}\n".encode()[: at[1]])
                    os.kill(os.getpid(), signal.SIGKILL)
                return line

            Record.model_dump_json = torn  # type: ignore[method-assign]
            run(folder / str(point[0]), make_task())
        assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_being_killed_changes_nothing(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    code = f"import test_eval_runner as t; t.be_killed(t.Path({str(tmp_path)!r}))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True)
    for answers, written in POINTS:
        folder = tmp_path / str(answers)
        assert len(read_records(folder)) == answers + (written > 1000)
        assert untimed(run(folder, make_task())) == uninterrupted
        lines = (folder / RESULTS).read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(uninterrupted)


def test_a_finished_run_asks_nothing(tmp_path: Path) -> None:
    before = run(tmp_path, make_task(), ("lc", "rag"))
    decoder = make_decoder()
    decoder.stream = None  # type: ignore[method-assign, assignment]
    progress = []
    after = run(
        tmp_path,
        make_task(),
        ("lc", "rag"),
        decoder=decoder,
        progress=lambda *at: progress.append(at),
    )
    assert after == before
    assert progress == [(9, 9)]


def test_more_items_and_methods_may_be_asked(
    tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    whole, part = make_task(), make_task()
    part.items = whole.items[:1]
    run(tmp_path, part, ("lc",))
    run(tmp_path, whole, ("lc", "sd"))
    records = untimed(run(tmp_path, whole))
    assert sorted(records, key=repr) == sorted(uninterrupted, key=repr)


def test_kv_that_is_not_kept_changes_no_answer(
    tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    forgetful = RapidDecoder(
        tiny_model(eos_token_id=None), tokenizer(), kv_cache_bytes=0, max_sequences=1
    )
    records = run(tmp_path, make_task(), decoder=forgetful)
    assert all(record.stats["cached_tokens"] == 0 for record in records)
    assert [r.answer for r in records] == [r["answer"] for r in uninterrupted]


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"seed": 1}, ["seed=0", "now it is 1"]),
        ({"model": "other"}, ['model="tiny"', '"other"']),
        ({"layers": 3}, ["layers=null", "3"]),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, changes: dict[str, Any], mentions: list[str]
) -> None:
    before = run(tmp_path, make_task(1), ("lc",))
    with pytest.raises(InvalidParameterError, match="--limit") as caught:
        run(tmp_path, make_task(1), ("lc",), settings=SETTINGS_OF_THE_RUN | changes)
    for mention in [*mentions, str(tmp_path)]:
        assert mention in str(caught.value)
    assert read_records(tmp_path) == before


def test_a_setting_that_is_gone_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, SETTINGS_OF_THE_RUN | {"old": 1})
    with pytest.raises(InvalidParameterError, match="old=1"):
        Journal(tmp_path, SETTINGS_OF_THE_RUN)


def test_settings_are_compared_as_json_has_them(tmp_path: Path) -> None:
    settings = {"lengths": (1, 2), "threshold": 0.3, "name": "η"}
    for _ in range(2):
        Journal(tmp_path, settings)
    assert json.loads((tmp_path / SETTINGS).read_text(encoding="utf-8"))["lengths"] == [1, 2]


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*--out"):
        Journal(tmp_path / "file", {})
    (tmp_path / RESULTS).write_text("{}\n")
    with pytest.raises(DataError, match=f"without {SETTINGS}"):
        Journal(tmp_path, {})


def test_irrelevant_needs_another_document(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="irrelevant"):
        run(tmp_path, make_task(2), ("rag",))


def test_what_was_answered_before_an_error_is_kept(tmp_path: Path) -> None:
    calls: Iterator[int] = iter(range(100))

    def failing(item: Item, answer: str) -> dict[str, float]:
        if next(calls) == 2:
            raise DataError("the judge is out")
        return score(item, answer)

    task = make_task()
    task.score = failing
    with pytest.raises(DataError, match="the judge is out"):
        run(tmp_path, task, ("lc", "sd"))
    assert len(read_records(tmp_path)) == 2
    assert len(run(tmp_path, task, ("lc", "sd"))) == 9
