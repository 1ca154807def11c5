"""Run shell scripts whose ``rapid-llm`` commands are run by this process, which has all loaded."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from rapid_llm.cli import main

# What stands for the command: it hands its words over, and prints and ends as it is told.
_PROGRAM = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect({address!r})
    link.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode() + b"\\n")
    out, err, status = json.load(link.makefile(encoding="utf-8"))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(status)
"""


class Shell:
    """Runs scripts by bash.

    Args:
        folder: folder for the program ``rapid-llm``; its path is short, as a socket's must be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listener = socket.socket(socket.AF_UNIX)
        address = str(folder / "link")
        self._listener.bind(address)
        self._listener.listen()
        self._listener.settimeout(0.05)
        program = folder / "rapid-llm"
        program.write_text(_PROGRAM.format(python=sys.executable, address=address))
        program.chmod(0o755)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script in the current folder until it ends; the first failure ends it."""
        path = f"{self._folder}{os.pathsep}{os.environ['PATH']}"
        with subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PATH": path},
        ) as process:
            while process.poll() is None:
                try:
                    link, _ = self._listener.accept()
                except TimeoutError:
                    continue
                with link:
                    self._answer(link)
            out, err = process.communicate()
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def _answer(self, link: socket.socket) -> None:
        link.settimeout(None)
        folder, words = json.loads(link.makefile(encoding="utf-8").readline())
        assert Path(folder) == Path.cwd()
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main(words)
        link.sendall(json.dumps([out.getvalue(), err.getvalue(), status]).encode())

    def close(self) -> None:
        self._listener.close()
