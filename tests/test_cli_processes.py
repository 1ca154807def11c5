"""The command line as a process: help, imports, noise, pipes and interrupts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from cli_runs import (  # noqa: F401  (fixtures)
    ask_fixture,
    document_fixture,
    model_fixture,
    no_loading_bars,
    run_fixture,
    save,
)

import rapid_llm
from rapid_llm import RapidDecoder, cli
from rapid_llm.answers import PreparedAnswer


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
    code = "import new_option, sys; from rapid_llm.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
        cwd=Path(__file__).parent,
    )
    for part in told:
        assert part in done.stdout + done.stderr


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == rapid_llm.__version__
