"""What works where torch and transformers are installed, and nothing that retrieves or loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import installed

TESTS = Path(__file__).parent

WITHOUT = """
import sys
from importlib.machinery import ModuleSpec

ABSENT = {
    "FlagEmbedding", "chardet", "chromadb", "gguf", "lxml", "pypdfium2",
    "semantic_text_splitter", "sentence_transformers",
}

class Absent:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise ImportError(f"{module.__name__} was imported")

sys.meta_path.insert(0, Absent())
"""

DECODES = """
from conftest import tiny_model, tiny_tokenizer
from rapid_llm import RapidDecoder, SamplingParams

decoder = RapidDecoder(tiny_model(eos_token_id=None), tiny_tokenizer())
sampling = SamplingParams(max_new_tokens=8)
print(len(decoder.generate([3, 4, 5, 6], [4, 5, 6], sampling=sampling).token_ids))
"""

COMMANDS = """
from rapid_llm.cli import main

sys.exit(main(["bench", "--shape", "tiny", "--context", "256"]))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_decoder_needs_torch_and_transformers_alone() -> None:
    done = run(DECODES)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr


def test_the_bench_of_shapes_runs_from_the_command_line_there() -> None:
    done = run(COMMANDS)
    assert done.returncode == 0, done.stderr
    assert "plain step" in done.stdout


def test_the_packages_are_really_kept_away() -> None:
    assert "chromadb was imported" in run("import chromadb").stderr


@pytest.mark.parametrize("package", ["FlagEmbedding", "matplotlib", "torchao", "triton"])
def test_what_is_installed_can_be_imported(package: str) -> None:
    """Tests skip what is not installed, and must not skip over what is broken."""
    installed(package)
