"""``rapid-llm ask`` and ``demo``: answers, options and documents."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from cli_runs import (  # noqa: F401  (fixtures)
    TEXT,
    ask_fixture,
    assert_refused,
    document_fixture,
    load_embedder_once,
    model_fixture,
    no_loading_bars,
    run_fixture,
)

from rapid_llm import ContextBuilder, RapidDecoder
from rapid_llm.cli import demo
from rapid_llm.cli.answers import COMPARED
from rapid_llm.context import builder
from rapid_llm.models import LoadedModel

# --- answers ----------------------------------------------------------------------------------


def test_the_answer_goes_to_stdout_and_a_summary_to_stderr(ask: Any, model: str) -> None:
    status, out, err = ask()
    answer = json.loads(ask("--json").out)["text"]

    assert status == 0
    assert out == answer + "\n"
    assert err.count("\n") == 1
    for part in (f"target {model}", "embedder all-minilm-l6-v2", "| rapid |", "tokens/s"):
        assert part in err
    assert "acceptance ratio" in err
    assert "tokens a round" in err


def test_json_is_one_object(ask: Any, model: str, document: str) -> None:
    status, out, err = ask("--json")
    answer = json.loads(out)

    assert (status, err) == (0, "")
    assert list(answer) == [
        *("text", "token_ids", "finish_reason", "method", "stats", "chunks", "models", "memory")
    ]
    assert len(answer["token_ids"]) == answer["stats"]["completion_tokens"] == 12
    assert answer["finish_reason"] == "length"
    assert answer["method"] == answer["stats"]["method"] == "rapid"
    assert answer["models"] == {
        "target": model,
        "drafter": model,
        "embedder": "all-minilm-l6-v2",
    }
    assert answer["memory"]["target_weights"] > answer["memory"]["drafter_weights"] == 0
    assert answer["chunks"]
    for chunk in answer["chunks"]:
        assert set(chunk) == {"document", "start", "end", "score"}
        assert chunk["document"] == document
        assert 0 < len(TEXT[chunk["start"] : chunk["end"]].split()) <= 32


def test_lc_loads_no_embedder(ask: Any, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(ContextBuilder, "__init__", None)
    answer = json.loads(ask("--json", "--method", "lc").out)

    assert answer["chunks"] == []
    assert answer["models"] == {"target": model, "drafter": None, "embedder": None}
    assert answer["stats"]["draft_prompt_tokens"] == 0


def test_rag_runs_the_drafter_alone(ask: Any, model: str) -> None:
    answer = json.loads(ask("--json", "--method", "rag").out)
    assert answer["models"]["target"] is None
    assert answer["models"]["drafter"] == model
    assert answer["stats"]["prompt_tokens"] < 150


def test_nothing_retrieved_is_said(ask: Any) -> None:
    for options in (), ("--method", "sd"), ("--method", "rag"), ("--compare",):
        status, out, err = ask(*options, threshold=1)
        assert status == 0
        assert out == "\n" or "--compare" in options
        for part in ("no chunk reached similarity 1", "--on-empty read_all", "--threshold"):
            assert part in err

    status, out, err = ask("--json", threshold=1)
    answer = json.loads(out)
    assert status == 0
    assert "--on-empty read_all" in err
    assert (answer["text"], answer["token_ids"], answer["chunks"]) == ("", [], [])
    assert (answer["method"], answer["finish_reason"]) == ("rapid", "stop")
    assert answer["models"]["target"] is answer["models"]["drafter"] is None
    assert "similarity 1" in answer["stats"]["draft_skipped"]


def test_the_whole_documents_are_read_where_that_was_asked_for(ask: Any) -> None:
    plain = ask("--method", "lc").out
    status, out, err = ask("--on-empty", "read_all", threshold=1)
    assert (status, out) == (0, plain)
    assert "| lc (no chunk reached similarity 1" in err
    assert "--on-empty" not in err

    answer = json.loads(ask("--json", "--on-empty", "read_all", threshold=1).out)
    assert answer["method"] == "rapid"
    assert answer["stats"]["method"] == "lc"
    assert "similarity 1" in answer["stats"]["draft_skipped"]


def test_a_blank_document_among_others_is_passed_over(
    ask: Any, run: Any, model: str, tmp_path: Path
) -> None:
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n")
    status, out, err = ask(blank)
    assert (status, out) == (0, ask().out)
    assert f"{blank} holds no text and is passed over" in err
    second = tmp_path / "second.txt"
    second.write_text("")
    assert_refused(
        run("ask", blank, second, "-q", "w5", "--model", model), str(blank), str(second), "no text"
    )


def test_compare_shows_every_method(ask: Any) -> None:
    status, out, err = ask("--compare")
    rows = [line.split()[0] for line in out.splitlines() if line.strip()]

    assert status == 0
    assert [row for row in rows if row in COMPARED] == ["lc", "rag", "sd", "rapid"]
    assert "tokens/s" in out
    assert "acceptance" in out
    assert err.count("\n") == 1

    results = json.loads(ask("--compare", "--json").out)["results"]
    assert [result["method"] for result in results] == ["lc", "rag", "sd", "rapid"]
    assert results[2]["token_ids"] == results[0]["token_ids"]


def test_every_option_reaches_the_decoder(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    stream = RapidDecoder.stream

    def spy(self: RapidDecoder, *prompts: Any, **options: Any) -> Any:
        seen.update(options, attn_implementation=self.target.attn_implementation)
        return stream(self, *prompts, **options)

    monkeypatch.setattr(RapidDecoder, "stream", spy)
    options = {
        "gamma": 3,
        "eta": 7.5,
        "alpha": 0.2,
        "mode": "augmented",
        "temperature": 0.9,
        "top-p": 0.8,
        "top-k": 20,
        "seed": 11,
        "stop": "w9 w9",
        "attn-implementation": "eager",
        "timeout": 100,
        "min-confidence": 0.1,
        "repetition-penalty": 1.1,
    }
    outcome = ask(*(part for name, value in options.items() for part in (f"--{name}", value)))

    assert outcome.status == 0
    values = asdict(seen["sampling"]) | asdict(seen["speculation"]) | seen
    values["stop"] = values["stop"][0]
    assert {name: values[name.replace("-", "_")] for name in options} == options
    assert values["max_new_tokens"] == 12


def test_documents_are_read_by_format_and_from_stdin(
    run: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html><body><p>w3 w4</p><script>w7</script></body></html>", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"w5 w6")))
    outcome = run(
        *("ask", page, "-", "--question", "w8", "--model", model, "--method", "lc"),
        *("--max-new-tokens", 1, "--json"),
    )
    plain = tmp_path / "plain.md"
    plain.write_text("w3 w4\n\nw5 w6", encoding="utf-8")
    expected = run(
        *("ask", plain, "--question", "w8", "--model", model, "--method", "lc"),
        *("--max-new-tokens", 1, "--json"),
    )
    numbers = [json.loads(o.out)["stats"]["prompt_tokens"] for o in (outcome, expected)]
    assert numbers[0] == numbers[1]


def test_a_store_keeps_the_vectors(ask: Any, tmp_path: Path) -> None:
    embedder = load_embedder_once("all-minilm-l6-v2", "cpu")
    embedded: list[int] = []
    embed = embedder.embed_documents

    def counting(texts: Any) -> Any:
        embedded.append(len(texts))
        return embed(texts)

    try:
        embedder.embed_documents = counting  # type: ignore[method-assign]
        first = ask("--json", "--store", tmp_path / "store")
        assert embedded
        embedded.clear()
        second = ask("--json", "--store", tmp_path / "store")
    finally:
        embedder.embed_documents = embed  # type: ignore[method-assign]
    assert not embedded
    assert json.loads(first.out)["chunks"] == json.loads(second.out)["chunks"]


def test_a_long_document_is_refused_or_truncated(ask: Any, document: str) -> None:
    Path(document).write_text(" ".join([TEXT] * 4), encoding="utf-8")
    assert_refused(ask(), "512", "--max-new-tokens 12", "--truncate middle")
    outcome = ask("--truncate", "middle", "--json")
    assert outcome.status == 0
    stats = json.loads(outcome.out)["stats"]
    assert stats["prompt_tokens"] <= 500
    assert 100 < stats["omitted_tokens"] < 600


def test_several_documents_are_truncated_around_what_was_retrieved(
    ask: Any, document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second.txt"
    texts = [" ".join([TEXT] * 3), f"{TEXT} {TEXT} w1 w1 w1 {TEXT}"]
    for path, text in zip((document, second), texts, strict=True):
        Path(path).write_text(text, encoding="utf-8")
    seen: list[str] = []
    stream = RapidDecoder.stream

    def spy(self: RapidDecoder, target: Any, *prompts: Any, **options: Any) -> Any:
        seen.append(target[0]["content"] if target else "")
        return stream(self, target, *prompts, **options)

    monkeypatch.setattr(RapidDecoder, "stream", spy)
    answer = json.loads(ask(second, "--truncate", "middle", "--json").out)
    assert answer["chunks"]
    for chunk in answer["chunks"]:
        text = texts[chunk["document"] != document]
        assert text[chunk["start"] : chunk["end"]] in seen[0]
    omitted = answer["stats"]["omitted_tokens"]
    assert 400 < omitted < 903

    status, _, err = ask(second, "--truncate", "middle")
    assert status == 0
    assert f"| {omitted} tokens of the documents left out |" in err
    assert f" tokens in {len(answer['chunks'])} chunk" in err
    status, out, _ = ask(second, "--truncate", "middle", "--compare")
    assert status == 0
    assert f"{omitted} tokens of the documents were left out" in out


# --- demo ---------------------------------------------------------------------------


def test_the_demo_answers_by_every_method(
    run: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "load_embedder", load_embedder_once)
    monkeypatch.setattr(demo, "PACKAGED_MODEL", model)
    monkeypatch.setattr(demo, "demo_text", lambda: f"What is w5? {TEXT}")
    status, out, err = run("demo")

    assert (status, err) == (0, "")
    assert demo.DEMO_QUESTION in out
    assert "retrieved" in out
    for method in COMPARED:
        assert f"\n  {method} " in out


def test_the_demo_s_question_finds_its_passage(smollm2_float32: LoadedModel) -> None:
    embedder = load_embedder_once("all-minilm-l6-v2", "cpu")
    context = ContextBuilder(
        smollm2_float32.tokenizer,
        embedder,
        chunk_tokens=demo.DEMO_CHUNK_TOKENS,
        retrieval_tokens=demo.DEMO_RETRIEVAL_TOKENS,
    ).build(demo.demo_text(), demo.DEMO_QUESTION)
    best = max(context.chunks, key=lambda chunk: chunk.score)
    assert best.text.startswith("PROPHECY, n.  The art and practice")
    assert context.tokens <= demo.DEMO_RETRIEVAL_TOKENS


def test_a_seed_of_none_draws_afresh(ask: Any) -> None:
    answers = {ask("--temperature", 5, "--seed", "none").out for _ in range(4)}
    assert len(answers) > 1
    assert_refused(ask("--seed", "some"), "'some' is neither 'none' nor a whole number")


def test_both_names_of_a_length_are_options(ask: Any) -> None:
    assert json.loads(ask("--max-tokens", 3, "--json").out)["stats"]["max_new_tokens"] == 3


def test_bm25_names_no_embedder(ask: Any) -> None:
    assert json.loads(ask("--retriever", "bm25", "--json").out)["models"]["embedder"] is None
    assert "embedder" not in ask("--retriever", "bm25").err
