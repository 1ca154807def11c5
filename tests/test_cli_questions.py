"""``rapid-llm ask``: folders of documents, files of questions, questions typed at a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from cli_runs import (  # noqa: F401  (fixtures)
    TEXT,
    Outcome,
    assert_refused,
    load_embedder_once,
    model_fixture,
    no_loading_bars,
)

from rapid_llm import RapidDecoder, cli
from rapid_llm.cli import documents as cli_documents
from rapid_llm.cli.documents import read_documents
from rapid_llm.context import builder, documents
from rapid_llm.errors import DocumentError, GenerationTimeoutError
from rapid_llm.generation_factory import GenerationFactory


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    monkeypatch.setattr(builder, "load_embedder", load_embedder_once)

    def run(*arguments: object) -> Outcome:
        status = cli.main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def ask(run: Any, model: str, tmp_path: Path) -> Callable[..., Outcome]:
    """``ask`` about a short document, without its question."""
    path = tmp_path / "document.txt"
    path.write_text(TEXT, encoding="utf-8")

    def ask(*options: object) -> Outcome:
        return run(
            *("ask", path, "--model", model, "--dtype", "float32", "--threshold", -1),
            *("--chunk-tokens", 32, "--retrieval-tokens", 64),
            *("--max-new-tokens", 12, "--gamma", 10, *options),
        )

    return ask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts in folders, beside what is hidden, blank, or no text."""
    files = {
        "b.txt": b"second",
        "a/one.md": b"first",
        "a/page.html": b"<html><body>page</body></html>",
        "notes": b"no suffix",
        ".hidden.txt": b"hidden",
        ".git/config": b"hidden too",
        "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "a/binary.dat": bytes(range(256)),
        "blank.txt": b" \n",
        "broken.pdf": b"%PDF-1.4 nothing follows",
    }
    root = tmp_path / "library"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def names(texts: dict[str, str], folder: Path) -> list[str]:
    return [os.path.relpath(name, folder) for name in texts]


# --- documents --------------------------------------------------------------------------------


def test_a_folder_is_its_readable_files_in_order(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = read_documents([str(folder)])
    assert names(texts, folder) == ["a/one.md", "a/page.html", "b.txt", "notes"]
    assert [text.strip() for text in texts.values()] == ["first", "page", "second", "no suffix"]

    out, err = capsys.readouterr()
    notes = err.splitlines()
    assert out == ""
    assert len(notes) == 3
    broken, blank, unknown = notes
    assert "broken.pdf" in broken
    assert broken.endswith("passed over")
    assert blank == f"{folder}/blank.txt holds no text and is passed over"
    assert unknown.startswith(f"{folder}/a/binary.dat, {folder}/picture.png are passed over")
    assert "hidden" not in err
    assert "config" not in err


def test_pipes_and_dangling_links_in_a_folder_are_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "link.txt").symlink_to("nowhere")
    (folder / "loop").symlink_to(folder)
    assert len(read_documents([str(folder)])) == 4


def test_a_pattern_is_what_it_matches(folder: Path) -> None:
    texts = read_documents([f"{folder}/**/*.md", f"{folder}/?.txt"])
    assert names(texts, folder) == ["a/one.md", "b.txt"]
    assert names(read_documents([f"{folder}/*"]), folder) == [
        *("a/one.md", "a/page.html", "b.txt", "notes")
    ]
    with pytest.raises(DocumentError, match=r"no file matches .*\*\.rst"):
        read_documents([f"{folder}/*.rst"])


def test_a_name_with_the_signs_of_a_pattern_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "note[1].txt").write_text("one")
    (tmp_path / "note1.txt").write_text("other")
    assert list(read_documents([f"{tmp_path}/note[1].txt"]).values()) == ["one"]


def test_a_file_named_twice_is_read_once(folder: Path) -> None:
    texts = read_documents([f"{folder}/b.txt", str(folder), f"{folder}/./b.txt", f"{folder}/a"])
    assert names(texts, folder) == ["b.txt", "a/one.md", "a/page.html", "notes"]


def test_a_folder_without_readable_files_is_refused(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DocumentError, match=r"empty holds no text .*give text"):
        read_documents([f"{folder}/b.txt", str(empty)])
    (empty / "picture.png").write_bytes((folder / "picture.png").read_bytes())
    (empty / "blank.txt").write_text("\n")
    with pytest.raises(DocumentError, match=r"empty holds no text .*picture\.png is a PNG image"):
        read_documents([str(empty)])


def test_a_folder_that_cannot_be_listed_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk(top: str, onerror: Any) -> Iterator[Any]:
        onerror(PermissionError(13, "Permission denied", f"{top}/a"))
        yield top, [], ["b.txt"]

    monkeypatch.setattr(cli_documents.os, "walk", walk)
    with pytest.raises(DocumentError, match=r"library/a cannot be listed \(Permission denied\)"):
        read_documents([str(folder)])


def test_a_file_that_was_named_must_be_readable(folder: Path) -> None:
    for name in ("picture.png", "broken.pdf", "missing.txt"):
        with pytest.raises(DocumentError, match=name):
            read_documents([str(folder), f"{folder}/{name}"][:: -1 if name == "broken.pdf" else 1])


def test_answers_name_the_file_in_a_folder(run: Any, ask: Any, model: str, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "text.txt").write_text(TEXT)
    (library / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    status, out, err = run(
        *("ask", library, "-q", "w5", "--model", model, "--threshold", -1, "--json"),
        *("--chunk-tokens", 32, "--retrieval-tokens", 64, "--max-new-tokens", 4),
    )
    assert status == 0
    assert {chunk["document"] for chunk in json.loads(out)["chunks"]} == {f"{library}/text.txt"}
    assert "picture.png is passed over" in err


# --- files of questions -----------------------------------------------------------------------


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    kept = ("text", "token_ids", "finish_reason", "method", "chunks", "models")
    return {key: answer[key] for key in kept}


def test_each_question_gets_a_line_and_documents_are_read_once(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [json.loads(ask("--question", q, "--json").out) for q in ("w5 w6", "w7")]
    read: list[Any] = []
    original = documents.read_document
    monkeypatch.setattr(
        documents, "read_document", lambda p, **kw: (read.append(p), original(p, **kw))[1]
    )
    loaded: list[Any] = []
    from_config = RapidDecoder.from_config
    monkeypatch.setattr(
        RapidDecoder, "from_config", lambda config: (loaded.append(1), from_config(config))[1]
    )
    questions = tmp_path / "questions.txt"
    questions.write_text("w5 w6\r\n\n  w7  \n", encoding="utf-8")
    status, out, err = ask("--questions", questions)

    lines = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [(line["id"], line["question"]) for line in lines] == [(1, "w5 w6"), (2, "w7")]
    assert [without_times(line) for line in lines] == [without_times(each) for each in alone]
    assert list(lines[0])[2:] == list(alone[0])
    assert len(loaded) == 1
    assert read.count(str(tmp_path / "document.txt")) == 1


def test_json_lines_keep_their_ids(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = '{"question": "w5", "id": "q-7"}\n{"question": "w7 \\u2028 w8"}\n'
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(given.encode())))
    status, out, _ = ask("--questions", "-", "--method", "lc")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line["id"] for line in lines] == ["q-7", 2]
    assert lines[1]["question"] == "w7 \u2028 w8"


def test_an_answer_is_written_while_others_are_under_way(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one at a time the second question begins, here, once the first answer is written."""
    written: list[int] = []
    opened = GenerationFactory.open

    def spy(self: GenerationFactory, *request: Any, **options: Any) -> Any:
        deadline = time.monotonic() + 60
        while sum(written) < opening[0] and time.monotonic() < deadline:
            written.append(capsys.readouterr().out.count("\n"))
            time.sleep(0.01)
        opening[0] += 1
        return opened(self, *request, **options)

    opening = [0]
    monkeypatch.setattr(GenerationFactory, "open", spy)
    questions = tmp_path / "questions.txt"
    questions.write_text("w5\nw6\nw7\n")
    assert ask("--questions", questions, "--max-sequences", 1).status == 0
    assert sum(written) == 2


def test_a_failed_question_is_reported_and_the_others_are_answered(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = RapidDecoder.request

    def failing(self: RapidDecoder, target: Any, *prompts: Any, **options: Any) -> Any:
        if "w7" in target[-1]["content"].split("\n")[-1]:
            raise GenerationTimeoutError("3 seconds passed")
        return request(self, target, *prompts, **options)

    monkeypatch.setattr(RapidDecoder, "request", failing)
    monkeypatch.setattr("rapid_llm.context.prompts.build_messages", lambda text, question: [
        {"role": "user", "content": f"{text}\n{question}"}])  # fmt: skip
    questions = tmp_path / "questions.txt"
    questions.write_text(f"w5\nw7\n{'w9 ' * 600}\nw6\n")
    status, out, err = ask("--questions", questions, "--method", "lc")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert ["error" in line for line in lines] == [False, True, True, False]
    assert lines[1] == {"id": 2, "question": "w7", "error": "3 seconds passed"}
    assert "512" in lines[2]["error"]
    assert err == "2 of 4 questions failed: see their errors\n"


def test_an_embedder_that_cannot_be_loaded_fails_at_once(ask: Any, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("w5\nw7\n")
    assert_refused(ask("--questions", questions, "--embedder", tmp_path / "nowhere"), "nowhere")


def test_all_methods_answer_each_question(ask: Any, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("w5\n")
    line = json.loads(ask("--questions", questions, "--compare").out)
    assert [each["method"] for each in line["results"]] == ["lc", "rag", "sd", "rapid"]
    assert line["question"] == "w5"


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        ("", ["--questions ", "questions.txt holds no question", "on each line"]),
        (" \n\n", ["questions.txt holds no question", "on each line"]),
        ('{"question": "w5"}\nw6\n', ["line 2 of", "not JSON"]),
        ('{"question": "w5"}\n\n{"Question": "w6"}\n', ["line 3 of", "no question"]),
        ('{"question": 5}\n', ["line 1 of", "no question"]),
        ('{"question": " "}\n', ["line 1 of", "no question"]),
        ('{"question": "w5"}\n[1]\n', ["line 2 of", "no question"]),
    ],
)
def test_a_bad_file_of_questions_is_refused_before_a_model_is_loaded(
    ask: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    mentions: list[str],
) -> None:
    monkeypatch.setattr(RapidDecoder, "from_config", None)
    questions = tmp_path / "questions.txt"
    questions.write_text(content)
    assert_refused(ask("--questions", questions), *mentions)


def test_questions_have_one_source(ask: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(RapidDecoder, "from_config", None)
    assert_refused(ask("--questions", tmp_path / "missing.txt"), "missing.txt")
    assert_refused(ask("--questions", "-", "-"), "standard input")
    assert_refused(ask("--questions", "-", "--question", "w5"), "--question", "--questions")


# --- a session --------------------------------------------------------------------------------


@pytest.fixture
def session(ask: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """``ask`` at a terminal where these lines are typed, and then Ctrl-D."""

    def session(*lines: str, options: tuple[object, ...] = ()) -> Outcome:
        typed = TextIOWrapper(BytesIO("".join(f"{line}\n" for line in lines).encode()))
        monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stdin", typed)
        return ask(*options)

    return session


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The target's messages of each call."""
    seen: list[Any] = []
    stream = RapidDecoder.stream

    def spy(self: RapidDecoder, target: Any, *prompts: Any, **options: Any) -> Any:
        seen.append(target)
        return stream(self, target, *prompts, **options)

    monkeypatch.setattr(RapidDecoder, "stream", spy)
    return seen


def test_a_session_answers_what_is_typed_and_follow_ups_know_what_was_said(
    session: Any, ask: Any, prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask("--question", "w5 w6").out
    prompts.clear()
    loaded: list[int] = []
    from_config = RapidDecoder.from_config
    monkeypatch.setattr(
        RapidDecoder, "from_config", lambda config: (loaded.append(1), from_config(config))[1]
    )
    status, out, err = session("w5 w6", "w7")
    assert status == 0
    assert out.startswith(first)
    assert out.count("\n") == 2
    assert err.count("| rapid |") == 2
    assert err.count("> ") == 3
    assert len(loaded) == 1
    assert [len(messages) for messages in prompts] == [1, 3]
    assert prompts[1][0] == prompts[0][0]
    assert prompts[1][1] == {"role": "assistant", "content": first[:-1]}
    assert prompts[1][2]["content"] == "w7"


def test_an_empty_line_ends_a_session(session: Any, prompts: list[Any]) -> None:
    assert session("w5", "", "w6").status == 0
    assert len(prompts) == 1


def test_an_interrupt_stops_the_answer_and_not_the_session(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = RapidDecoder.stream
    seen: list[Any] = []

    def interrupted(self: RapidDecoder, target: Any, *prompts: Any, **options: Any) -> Any:
        seen.append(target)
        deltas = stream(self, target, *prompts, **options)
        yield next(deltas)
        if len(seen) == 1:
            raise KeyboardInterrupt
        yield from deltas

    monkeypatch.setattr(RapidDecoder, "stream", interrupted)
    status, _, err = session("w5 w6", "w7", "w8")
    assert status == 0
    assert "Stopped" in err
    assert err.count("| rapid |") == 2
    assert [len(messages) for messages in seen] == [1, 1, 3]
    assert "w5 w6" not in seen[2][0]["content"].splitlines()


def test_an_interrupt_at_the_prompt_ends_a_session(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", pressed)
    assert session().status == 130


def test_a_failed_question_does_not_end_a_session(session: Any, prompts: list[Any]) -> None:
    status, _, err = session("w5", "w9 " * 600, "w7", options=("--method", "lc"))
    assert status == 0
    assert "Error: " in err
    assert "512" in err
    assert err.count("| lc |") == 2
    assert len(prompts[-1]) == 3  # the first question and its answer are still known
    assert prompts[-1][-1]["content"] == "w7"


def test_the_oldest_questions_are_forgotten_when_the_window_is_full(
    session: Any, prompts: list[Any]
) -> None:
    long = " ".join(f"w{3 + i % 61}" for i in range(150))
    status, _, err = session(long, long, long, "w7", options=("--method", "lc"))
    assert status == 0
    assert err.count("| lc |") == 4
    assert "The context window is full: the oldest" in err
    assert len(prompts[-1]) < 7
    assert prompts[-1][0]["role"] == "user"
    assert prompts[-1][-1]["content"] == "w7"


def test_an_empty_answer_is_no_part_of_a_session(session: Any, prompts: list[Any]) -> None:
    status, out, err = session("w5", "w6", options=("--threshold", 1))
    assert (status, out) == (0, "\n\n")
    assert err.count("Nothing was retrieved") == 2
    assert prompts == []


@pytest.mark.parametrize("options", [("--json",), ("--compare",), ("-",)])
def test_a_session_needs_a_terminal_and_prints_text(
    session: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(RapidDecoder, "from_config", None)
    assert_refused(session("w5", options=options), "--question", "--questions", "terminal")


def test_without_a_terminal_a_question_is_asked_for(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RapidDecoder, "from_config", None)
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"w5\n")))
    assert_refused(ask(), "--question", "--questions", "terminal")
