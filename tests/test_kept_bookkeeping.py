"""What keeping KV costs a call does not grow with what is kept, in memory or in a folder.

Function calls are counted, Python's and those of builtins, not seconds.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import tiny_model, tiny_tokenizer

from rapid_llm.config import SamplingParams
from rapid_llm.decoder import RapidDecoder

ONE = SamplingParams(max_new_tokens=1, ignore_eos=True)
LOOKS = ("stat", "lstat", "scandir", "listdir", "open", "safe_open")


def prompt(seed: int, length: int = 20) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 64) for _ in range(length)]


def calls_of(act: Callable[[], Any]) -> Counter[str]:
    """Names of the functions that are called, and how often."""
    called: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            called[frame.f_code.co_name] += 1
        elif event == "c_call":
            called[argument.__name__] += 1

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return called


# --- in memory ------------------------------------------------------------------------------------


def keeping(count: int) -> RapidDecoder:
    """A decoder that keeps the KV of so many prompts, which all begin otherwise."""
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), kv_cache_bytes=1 << 30)
    for seed in range(count):
        decoder.generate(prompt(seed), sampling=ONE)
    return decoder


def test_a_call_costs_the_same_beside_few_prompts_and_many() -> None:
    costs = {}
    for count in (10, 150):
        decoder = keeping(count)
        each = [
            calls_of(partial(decoder.generate, prompt(1000 + i), sampling=ONE)).total()
            for i in range(5)
        ]
        costs[count] = min(each)
    # 140 prompts more, and not one look at each of them.
    assert costs[150] - costs[10] < 140


def test_a_prompt_that_needs_all_the_room_evicts_many_in_one_go() -> None:
    def cost(count: int) -> int:
        decoder = keeping(count)
        decoder._prefixes._budget = decoder.memory.kept_kv  # as if that had been the limit
        long = prompt(7, 500)
        return calls_of(lambda: decoder.generate(long, sampling=ONE)).total()

    few, many, most = cost(10), cost(60), cost(110)
    assert most - many < 1.5 * (many - few) + 500  # in proportion to what is evicted


def test_what_was_kept_is_still_found_among_many() -> None:
    decoder = keeping(60)
    again = prompt(30)
    assert decoder.generate(again, sampling=ONE).stats.cached_tokens == len(again) - 1
    assert decoder.generate(prompt(9999), sampling=ONE).stats.cached_tokens == 0


# --- in a folder ----------------------------------------------------------------------------------

LONG = 1100


def with_folder(folder: Path) -> RapidDecoder:
    model = tiny_model(max_position_embeddings=4096)
    # Nothing in memory, so that a call looks into the folder.
    return RapidDecoder(model, tiny_tokenizer(), kv_cache_bytes=0, kv_cache_dir=folder)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The file of one long prompt."""
    with_folder(tmp_path).generate(prompt(1, LONG), sampling=ONE)
    (path,) = tmp_path.rglob("*.safetensors")
    return path


def beside(path: Path, number: int) -> Path:
    """Another name of the same form, for the same model."""
    return path.with_name(f"{path.stem[:-8]}{number:08x}{path.suffix}")


def test_a_folder_of_many_files_costs_a_call_nothing(
    written: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for number in range(1000):
        beside(written, number).write_bytes(b"not a file of ours")
        path = beside(written, number)
        path.rename(path.with_name("0" * 16 + path.name[16:]))  # of another model
    an_hour_ago = time.time() - 3600
    os.utime(written.parent, (an_hour_ago, an_hour_ago))  # the last change is not of this moment

    def second_call(folder: Path) -> Counter[str]:
        decoder = with_folder(folder)
        decoder.generate(prompt(2, 600), sampling=ONE)
        return calls_of(lambda: decoder.generate(prompt(3, 600), sampling=ONE))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many, none = second_call(written.parent), second_call(tmp_path_factory.mktemp("none"))
        decoder = with_folder(written.parent)
    assert sum(many[name] for name in LOOKS) < 20
    assert many.total() - none.total() < 500  # beside 1,000 files
    assert decoder.generate(prompt(1, LONG), sampling=ONE).stats.cached_tokens > 0


def test_what_a_killed_writer_left_is_swept_and_nothing_else(written: Path) -> None:
    folder = written.parent
    long_ago = time.time() - 7 * 24 * 3600
    unfinished = folder / ".unfinished"
    ours = unfinished / "0123456789abcdef0123456789abcdef-100.tmp"
    library = folder / ".tmpAb12Cd"  # of safetensors
    theirs = folder / "report.tmp"
    new = unfinished / "fedcba9876543210fedcba9876543210-32.tmp"
    (folder / "notes.tmp").mkdir()
    for path in (ours, library, theirs):
        path.write_bytes(b"0" * 100)
        os.utime(path, (long_ago, long_ago))
    new.write_bytes(b"of a process that is writing now")
    decoder = with_folder(folder)
    decoder.generate(prompt(4, LONG), sampling=ONE)
    assert not ours.exists()
    assert not library.exists()
    assert all(path.exists() for path in (theirs, new, folder / "notes.tmp", written))


PASSES_OVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_kept_bookkeeping import LONG, ONE, prompt, with_folder
print(with_folder(Path({folder!r})).generate(prompt(1, LONG), sampling=ONE).stats.cached_tokens)
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs")
def test_fifos_folders_and_dangling_links_are_passed_over(written: Path) -> None:
    os.mkfifo(beside(written, 1))  # whose opening would wait for a writer for ever
    beside(written, 2).mkdir()
    beside(written, 3).symlink_to("nowhere.safetensors")
    script = PASSES_OVER.format(tests=str(Path(__file__).parent), folder=str(written.parent))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) > 0


def test_a_folder_that_is_gone_or_closed_costs_no_answer(written: Path) -> None:
    folder = written.parent
    decoder = with_folder(folder)
    expected = decoder.generate(prompt(1, LONG), sampling=ONE).token_ids
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    assert decoder.generate(prompt(1, LONG), sampling=ONE).token_ids == expected
