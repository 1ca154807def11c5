"""The command line: what it prints where, and with which status it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import pytest
import typer
from conftest import tiny_model, tiny_tokenizer
from transformers.utils import logging

import rapid_llm
from rapid_llm import ContextBuilder, RapidDecoder, cli
from rapid_llm.answers import PreparedAnswer
from rapid_llm.cli import demo
from rapid_llm.cli.answers import COMPARED
from rapid_llm.cli.flags import with_flags
from rapid_llm.config import Attention
from rapid_llm.context import builder
from rapid_llm.engine.supported import ATTENTION
from rapid_llm.models import LoadedModel

TEXT = " ".join(f"w{3 + i * i % 61}" for i in range(150))


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def save(folder: Path, *, words: int = 64, broken: bool = False, endless: bool = False) -> str:
    """A tiny model on disk, as a user would name it; an endless one never ends its answer."""
    model = tiny_model(vocab_size=words, max_position_embeddings=100_000 if endless else 512)
    if endless:  # a logit of 0 is never the greatest
        model.get_output_embeddings().weight.data[model.config.eos_token_id] = 0
    if broken:
        model.get_input_embeddings().weight.data.fill_(float("nan"))
    tokenizer = tiny_tokenizer(words)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _no_loading_bars() -> Iterator[None]:
    """What TQDM_DISABLE does in a process that has not imported tqdm yet."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "document.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        status = cli.main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def ask(
    run: Callable[..., Outcome], model: str, document: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """``ask`` about a short document: a tiny model, every chunk retrieved, a short answer."""
    monkeypatch.setattr(builder, "load_embedder", _load_embedder)

    def ask(*options: object, threshold: float = -1) -> Outcome:
        return run(
            *("ask", document, "--question", "w5 w6", "--model", model, "--dtype", "float32"),
            *("--chunk-tokens", 32, "--retrieval-tokens", 64, "--threshold", threshold),
            # In paper mode the answer depends on γ, and auto measures anew with every loading.
            *("--max-new-tokens", 12, "--gamma", 10, *options),
        )

    return ask


_load_embedder = cache(builder.load_embedder)


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
    embedder = _load_embedder("all-minilm-l6-v2", "cpu")
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


# --- bad input --------------------------------------------------------------------------------


def assert_refused(outcome: Outcome, *mentions: str) -> None:
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("rapid-llm: error: ")
    assert outcome.err.count("\n") == 1
    for mention in mentions:
        assert mention in outcome.err


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


def test_attention_choices_are_the_engine_s() -> None:
    assert get_args(Attention) == ATTENTION


# --- interrupts, pipes, help ------------------------------------------------------------------


def test_an_interrupt_ends_with_130(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(text="half an ans", stats=None)
        raise KeyboardInterrupt

    monkeypatch.setattr(RapidDecoder, "stream", interrupted)
    monkeypatch.setattr(PreparedAnswer, "_explained", lambda self, deltas: deltas)
    status, out, err = ask()
    assert status == 130
    assert out.startswith("half an ans")
    assert "Traceback" not in err


def test_help_and_no_arguments_show_the_commands(run: Any) -> None:
    for arguments in ([], ["--help"]):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
        assert "ask" in out
        assert "demo" in out


COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_in_full_in_a_narrow_terminal(
    run: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(name, "--help").out
    names = [each for p in COMMANDS[name].params for each in (*p.opts, *p.secondary_opts)]
    for option in ("--help", *(each for each in names if each.startswith("-"))):
        assert re.search(rf"(?<!\S){option}(?![\w-])", shown), option
    assert "\\[" not in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_every_argument_and_option(run: Any, name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        if parameter.param_type_name == "argument":
            assert f"\n  {parameter.metavar}" in run(name, "--help").out


def test_help_says_none_where_it_is_typed(run: Any) -> None:
    shown = " ".join(run("ask", "--help").out.split())
    assert "none uses the original weights" in shown
    assert "None" not in shown


def test_the_list_of_commands_cuts_no_description(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in run("--help").out.replace("[ARGS]...", "")


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A process of its own, offline."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=pipe,
        stderr=pipe,
        env=environment,
        encoding="utf-8",
        **options,
    )


def test_importing_is_light() -> None:
    heavy = "{'torch', 'transformers', 'chromadb', 'sentence_transformers'}"
    code = f"import sys, rapid_llm.cli; print({heavy} & set(sys.modules))"
    out, err = python("-c", code).communicate()
    assert (out, err) == ("set()\n", "")


def test_the_packaged_models_answer_without_noise(tmp_path: Path) -> None:
    path = tmp_path / "garden.md"
    path.write_text(
        "# The garden\n\nThe old lamp stands beside the well.\n\n"
        "Anna waters the roses every evening.\n",
        encoding="utf-8",
    )
    options = (
        "--question",
        "Who waters the roses?",
        "--max-new-tokens",
        "8",
        "--json",
        "--gamma",
        "4",
    )
    process = python("-m", "rapid_llm", "ask", str(path), *options)
    out, err = process.communicate()

    assert (process.returncode, err) == (0, "")
    answer = json.loads(out)
    assert answer["models"] == {
        "target": "smollm2-135m",
        "drafter": "smollm2-135m",
        "embedder": "all-minilm-l6-v2",
    }
    assert answer["chunks"][0]["score"] > 0.3
    assert answer["stats"]["drafted_tokens"] > 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and pipes")
def test_a_closed_pipe_and_a_real_interrupt_leave_no_traceback(
    tmp_path: Path, document: str
) -> None:
    # An answer so long that it cannot have ended before the signal arrives.
    long = save(tmp_path / "long", endless=True)
    options = ("--question", "w5", "--model", long, "--method", "lc", "--max-new-tokens", "90000")
    closed = python("-m", "rapid_llm", "ask", document, *options)
    # A shell starts its background jobs with interrupts ignored, and children inherit that.
    stopped = python(
        "-m",
        "rapid_llm",
        "ask",
        document,
        *options,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert closed.stdout is not None
    assert stopped.stdout is not None
    closed.stdout.close()
    stopped.stdout.read(2)  # the answer has begun
    stopped.send_signal(signal.SIGINT)
    stopped.wait(60)
    closed.wait(60)

    assert closed.returncode == 1
    assert stopped.returncode == 130
    for process in (closed, stopped):
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


# --- demo ---------------------------------------------------------------------------


def test_the_demo_answers_by_every_method(
    run: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "load_embedder", _load_embedder)
    monkeypatch.setattr(demo, "PACKAGED_MODEL", model)
    monkeypatch.setattr(demo, "demo_text", lambda: f"What is w5? {TEXT}")
    status, out, err = run("demo")

    assert (status, err) == (0, "")
    assert demo.DEMO_QUESTION in out
    assert "retrieved" in out
    for method in COMPARED:
        assert f"\n  {method} " in out


def test_the_demo_s_question_finds_its_passage(smollm2_float32: LoadedModel) -> None:
    embedder = _load_embedder("all-minilm-l6-v2", "cpu")
    context = ContextBuilder(
        smollm2_float32.tokenizer,
        embedder,
        chunk_tokens=demo.DEMO_CHUNK_TOKENS,
        retrieval_tokens=demo.DEMO_RETRIEVAL_TOKENS,
    ).build(demo.demo_text(), demo.DEMO_QUESTION)
    best = max(context.chunks, key=lambda chunk: chunk.score)
    assert best.text.startswith("PROPHECY, n.  The art and practice")
    assert context.tokens <= demo.DEMO_RETRIEVAL_TOKENS


FOO = """
import dataclasses, sys
from typing import Annotated
from rapid_llm import config
from rapid_llm.options import Option, check

@dataclasses.dataclass(frozen=True)
class SpeculationConfig(config.SpeculationConfig):
    foo: Annotated[int, Option("Number of foos.", "at least 1", lambda n: n >= 1)] = 7

config.SpeculationConfig = SpeculationConfig
from rapid_llm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ask", "--help"], ["--foo", "Number of foos.", "[default: 7]"]),
        (
            ["ask", "nowhere.txt", "-q", "w5", "--foo", "0"],
            ["--foo 0 is not allowed", "--foo must be at least 1"],
        ),
    ],
    ids=["help", "check"],
)
def test_an_option_that_is_declared_is_an_option_here(
    arguments: list[str], told: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOO, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )
    for part in told:
        assert part in done.stdout + done.stderr


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


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == rapid_llm.__version__


def test_a_token_without_a_name_is_not_shown(ask: Any) -> None:
    outcome = ask("--hub-option", "hf_secret")
    assert_refused(outcome, "name=value")
    assert "hf_secret" not in outcome.err


@pytest.mark.parametrize("option", ["--store", "--embedder", "--kv-cache-dir"])
def test_an_empty_name_is_refused(ask: Any, option: str) -> None:
    assert_refused(ask(option, ""), f"{option} '' is not allowed")


def test_a_seed_of_none_draws_afresh(ask: Any) -> None:
    answers = {ask("--temperature", 5, "--seed", "none").out for _ in range(4)}
    assert len(answers) > 1
    assert_refused(ask("--seed", "some"), "'some' is neither 'none' nor a whole number")


def test_both_names_of_a_length_are_options(ask: Any) -> None:
    assert json.loads(ask("--max-tokens", 3, "--json").out)["stats"]["max_new_tokens"] == 3


def test_bm25_names_no_embedder(ask: Any) -> None:
    assert json.loads(ask("--retriever", "bm25", "--json").out)["models"]["embedder"] is None
    assert "embedder" not in ask("--retriever", "bm25").err
