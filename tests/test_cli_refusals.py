"""What the command line refuses, in one line that names the option as it was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from cli_runs import (  # noqa: F401  (fixtures)
    ask_fixture,
    assert_refused,
    document_fixture,
    model_fixture,
    no_loading_bars,
    run_fixture,
    save,
)

from rapid_llm import RapidDecoder
from rapid_llm.cli.flags import with_flags
from rapid_llm.config import Attention
from rapid_llm.engine.supported import ATTENTION


def test_variables_of_the_chat_template_are_json_or_text(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    stream = RapidDecoder.stream

    def spy(self: RapidDecoder, *prompts: Any, **options: Any) -> Any:
        seen.append(options["chat_template_kwargs"])
        return stream(self, *prompts, **options)

    monkeypatch.setattr(RapidDecoder, "stream", spy)
    given = ["enable_thinking=false", "effort=low", 'date={"year": 2026}', "a=b=c", "n=3", 's="3"']
    assert ask(*(part for value in given for part in ("--chat-template-kwarg", value))).status == 0
    assert seen == [
        {
            "enable_thinking": False,
            "effort": "low",
            "date": {"year": 2026},
            "a": "b=c",
            "n": 3,
            "s": "3",
        }
    ]


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (["--question", ""], ["question", "empty"]),
        (["--question", " \n"], ["question", "empty"]),
        (["--method", "magic"], ["'magic'", "rapid", "sd", "lc", "rag"]),
        (["--mode", "fast"], ["'fast'", "exact", "augmented", "paper"]),
        (["--truncate", "end"], ["'end'", "middle"]),
        (["--dtype", "int8"], ["--dtype int8 is", "bfloat16"]),
        (["--attn-implementation", "flash"], ["'flash'", "sdpa"]),
        (["--gamma", "0"], ["--gamma 0 is", "--gamma must be", "at least 1"]),
        (["--gamma", "many"], ["gamma", "many", "auto", "whole number"]),
        (["--eta", "-1"], ["eta", "-1.0", "at least 0"]),
        (["--eta", "nan"], ["eta", "nan"]),
        (["--alpha", "2"], ["alpha", "2.0", "[0, 1]"]),
        (["--temperature", "-0.5"], ["temperature", "-0.5", "at least 0"]),
        (["--top-p", "0"], ["--top-p", "0.0", "(0, 1]"]),
        (["--top-p", "1.5"], ["--top-p", "1.5", "(0, 1]"]),
        (["--top-k", "-1"], ["--top-k", "-1", "at least 0"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "0", "at least 1"]),
        (["--max-new-tokens", "1e3"], ["max-new-tokens", "1e3"]),
        (["--stop", ""], ["stop"]),
        (["--chunk-tokens", "31"], ["--chunk-tokens", "31", "32"]),
        (["--threshold", "1.5"], ["threshold", "1.5", "1"]),
        (["--retrieval-tokens", "31"], ["--retrieval-tokens", "31", "32"]),
        (["--compression", "0.5"], ["compression", "0.5", "1"]),
        (["--chat-template-kwarg", "thinking"], ["'thinking'", "a name and a value"]),
        (["--chat-template-kwarg", "=1"], ["'=1'", "a name and a value"]),
        (["--colour", "red"], ["--colour"]),
        (["no-such-file.txt"], ["no-such-file.txt"]),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    run: Any,
    document: str,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    mentions: list[str],
) -> None:
    monkeypatch.setattr(RapidDecoder, "from_pretrained", None)
    question = [] if "--question" in options else ["--question", "w5"]
    assert_refused(run("ask", document, *question, *options), *mentions)


@pytest.mark.parametrize(
    ("name", "content", "mention"),
    [
        ("empty.txt", b" \n", "no text"),
        ("binary.txt", b"\x00\x01\x02\xff" * 50, "binary"),
        ("broken.pdf", b"%PDF-1.4 nothing follows", "PDF"),
    ],
)
def test_unreadable_documents_are_refused(
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    mention: str,
) -> None:
    monkeypatch.setattr(RapidDecoder, "from_pretrained", None)
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(run("ask", path, "--question", "w5"), name, mention)
    assert_refused(run("ask", tmp_path, "--question", "w5"), str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["ask"], "DOCUMENT"),
        (["ask", "document.txt"], "--question"),
        (["sing"], "'sing'"),
        (["--loud"], "--loud"),
        (["bench", "--repeats", "0"], "repeats"),
        (["bench", "--new-tokens", "1"], "new-tokens"),
        (["plan"], "--context"),
        (["plan", "--context", "9", "--device", "h1000"], "--device h1000 is"),
        (["plan", "--context", "9", "--acceptance", "2"], "acceptance"),
        (["plan", "--context", "9", "--bandwidth", "300"], "--tflops"),
        (["plan", "--context", "9", "--memory", "24"], "--bandwidth"),
        (["plan", "--context", "9", "--device", "h100", "--tflops", "9"], "--device h100"),
        (["plan", "--context", "9", "--bandwidth", "0", "--tflops", "9"], "--bandwidth 0"),
        (["plan", "--context", "9", "--bandwidth", "9", "--tflops", "nan"], "--tflops nan"),
    ],
)
def test_bad_usage_is_refused(run: Any, arguments: list[str], mention: str) -> None:
    assert_refused(run(*arguments), mention)


def test_bad_models_are_refused(ask: Any, tmp_path: Path, model: str) -> None:
    other = save(tmp_path / "other", words=60)
    broken = save(tmp_path / "broken", broken=True)

    assert_refused(ask("--model", tmp_path / "nowhere"), "nowhere", "could not be loaded")
    assert_refused(ask("--drafter", other), model, other, "tokenizer")
    assert_refused(ask("--model", broken), broken, "NaN")
    assert_refused(ask("--embedder", tmp_path / "nowhere"), "nowhere")
    assert_refused(ask("--device", "abacus"), "abacus")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--drafter", "could not be loaded"),
        ("--embedder", "cannot be loaded"),
        ("--store", "cannot be opened"),
        ("--kv-cache-dir", "is no folder"),
    ],
)
def test_a_name_of_nothing_is_refused_before_any_model_is_loaded(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, says: str
) -> None:
    monkeypatch.setattr("rapid_llm.decoder.load_model", lambda *_, **__: pytest.fail("loaded"))
    place = tmp_path / "nowhere"
    if option in ("--store", "--kv-cache-dir"):
        place.touch()  # a file
    assert_refused(ask(option, place), "nowhere", says)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cut its middle (truncate='middle')", "cut its middle (--truncate middle)"),
        ("lower max_new_tokens.", "lower --max-new-tokens."),
        ("set cuda_graphs=True.", "set --cuda-graphs."),
        ("give drafter= and no top_p", "give --drafter and no --top-p"),
        ("seed=-1: seed must be 0", "--seed -1: --seed must be 0"),
        ("the seed and the model", "the seed and the model"),
        ("not chat_template_kwargs", "not --chat-template-kwarg"),
        ("EngineConfig(device='cpu')", "EngineConfig(device='cpu')"),
        ("/top_k/max_new_tokens.txt has 'top_p'", "/top_k/max_new_tokens.txt has 'top_p'"),
    ],
)
def test_errors_name_options_as_they_are_typed(text: str, told: str) -> None:
    assert with_flags(text) == told


def test_a_key_is_asked_for_by_its_option(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAPID_LLM_API_KEY", raising=False)
    assert_refused(run("serve", "--host", "0.0.0.0"), "give one as --api-key")


def test_a_schema_that_is_not_json_names_its_file_and_option(
    run: Any, document: str, tmp_path: Path
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text("a string")
    outcome = run("ask", document, "-q", "w5", "--schema", schema)
    assert_refused(outcome, f"--schema {schema}: ", "JSON")
    assert "constraint" not in outcome.err


def test_attention_choices_are_the_engine_s() -> None:
    assert get_args(Attention) == ATTENTION


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--target", "--model"),
        ("--embed-model", "--embedder"),
        ("--kv-cache", "--kv-cache-dir"),
        ("--retrieved", "--retrieval-tokens"),
    ],
)
def test_an_old_option_names_the_new_one(ask: Any, old: str, new: str) -> None:
    assert_refused(ask(old, "x"), f"{old} is now {new}")


def test_a_token_without_a_name_is_not_shown(ask: Any) -> None:
    outcome = ask("--hub-option", "hf_secret")
    assert_refused(outcome, "name=value")
    assert "hf_secret" not in outcome.err


@pytest.mark.parametrize("option", ["--store", "--embedder", "--kv-cache-dir"])
def test_an_empty_name_is_refused(ask: Any, option: str) -> None:
    assert_refused(ask(option, ""), f"{option} '' is not allowed")
