"""The command-line application and its entry point, with error messages and exit statuses."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

import rapid_llm
from rapid_llm.cli.flags import with_flags
from rapid_llm.cli.help import Application
from rapid_llm.cli.ranks import RANK, printing_once, require_shareable
from rapid_llm.errors import DocumentError, InvalidParameterError, RankError, RapidError
from rapid_llm.old_names import RENAMED

_LEAVE = 5  # seconds

app = Application(
    help="Answers about long documents, drafted from what was retrieved (RAPID).",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(rapid_llm.__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    require_shareable(context.invoked_subcommand)


_RENAMED = {
    f"--{old}".replace("_", "-"): f"--{new}".replace("_", "-") for old, new in RENAMED.items()
}
_RENAMED |= {  # old names that only the command line had
    "--context-tokens": "--retrieval-tokens",
    "--kv-cache": "--kv-cache-dir",
    "--retrieved": "--retrieval-tokens",
}

# typer carries click or needs it, depending on its version; this is its base of usage errors.
_UsageError: Any = typer.BadParameter.__base__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's) and return its exit status.

    0 is success; 2 bad input and 1 a failure of the system, each with one line on stderr; 130 an
    interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer may not fit the locale
    try:
        with _quiet(), printing_once():
            status = app(arguments or ["--help"], prog_name="rapid-llm", standalone_mode=False)
    except (InvalidParameterError, DocumentError, RankError) as error:
        return _fail(2, str(error)) if RANK == 0 else _left(2)  # rank 0 raises it too
    except RapidError as error:
        return _fail(2, str(error))
    except _UsageError as error:
        return _fail(2, _usage_message(error)) if RANK == 0 else _left(2)
    except OSError as error:  # a full disk, for one
        return _fail(1, str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    return _left(status) if isinstance(status, int) else 0


def _fail(status: int, message: str) -> int:
    who = f"rank {RANK}: " if RANK else ""
    print(f"rapid-llm: {who}error:", " ".join(with_flags(message).split()), file=sys.stderr)
    return _left(status)


def _left(status: int) -> int:
    """The exit status; a failed rank waits until rank 0 has printed, before torchrun ends all."""
    if RANK and status:
        time.sleep(_LEAVE)
    return status


def _usage_message(error: Any) -> str:
    option = getattr(error, "option_name", None)
    if option in _RENAMED:
        return f"{option} is now {_RENAMED[option]}"
    message: str = error.format_message().replace("Value error, ", "")
    # Where typer validates with pydantic, the message may leave out the value.
    details: Any = getattr(error.__cause__, "errors", list)()
    value = repr(details[0]["input"]) if details else ""
    return message if value in message else f"{message} (given: {value})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars, warnings and log lines of libraries."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
