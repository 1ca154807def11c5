"""A program may end at any time; its last passes end before the interpreter does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import asyncio
from conftest import tiny_model, tiny_tokenizer
from rapid_llm import RapidDecoder, SamplingParams

decoder = RapidDecoder(tiny_model(eos_token_id=None), tiny_tokenizer())
call = dict(sampling=SamplingParams(max_new_tokens=400))
prompt = list(range(3, 40))
"""
ENDS = {
    "a stream": "stream = decoder.scheduler.stream(prompt, **call)\nnext(stream)",
    "many": """
stream = decoder.stream_many([GenerationRequest(prompt, **call) for _ in range(6)])
next(stream)""",
    "asyncio": """
loop = asyncio.new_event_loop()
stream = decoder.astream(prompt, **call)
loop.run_until_complete(anext(stream))
asyncio.ensure_future(anext(stream), loop=loop)
loop.run_until_complete(asyncio.sleep(0))""",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_program_that_ends_within_an_answer_ends_quietly(how: str) -> None:
    script = BEGIN + "from rapid_llm import GenerationRequest\n" + ENDS[how] + "\nprint('ended')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr
    assert "terminate called" not in done.stderr
