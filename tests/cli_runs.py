"""Runs of the command line on a tiny model in a folder, and a short document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import tiny_model, tiny_tokenizer
from transformers.utils import logging

from rapid_llm import cli
from rapid_llm.context import builder

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
def no_loading_bars() -> Iterator[None]:
    """What TQDM_DISABLE does in a process that has not imported tqdm yet."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(name="model", scope="session")
def model_fixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(name="document")
def document_fixture(tmp_path: Path) -> str:
    path = tmp_path / "document.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(name="run")
def run_fixture(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        status = cli.main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture(name="ask")
def ask_fixture(
    run: Callable[..., Outcome], model: str, document: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """``ask`` about a short document: a tiny model, every chunk retrieved, a short answer."""
    monkeypatch.setattr(builder, "load_embedder", load_embedder_once)

    def ask(*options: object, threshold: float = -1) -> Outcome:
        return run(
            *("ask", document, "--question", "w5 w6", "--model", model, "--dtype", "float32"),
            *("--chunk-tokens", 32, "--retrieval-tokens", 64, "--threshold", threshold),
            # In paper mode the answer depends on γ, and auto measures anew with every loading.
            *("--max-new-tokens", 12, "--gamma", 10, *options),
        )

    return ask


load_embedder_once = cache(builder.load_embedder)


def assert_refused(outcome: Outcome, *mentions: str) -> None:
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("rapid-llm: error: ")
    assert outcome.err.count("\n") == 1
    for mention in mentions:
        assert mention in outcome.err
