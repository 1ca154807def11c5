"""Every way to call the LLM, and what the decoder itself says."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core.base.llms.types import ChatMessage

from llama_index.llms.rapid import RapidLLM
from rapid_llm.config import SamplingParams, SpeculationConfig

PROMPT = "What does the keeper of the lighthouse write in his diary?"
DRAFT = "Jonas Vind kept a diary of storms."
ROWS = [
    "complete",
    "stream_complete",
    "acomplete",
    "astream_complete",
    "chat",
    "stream_chat",
    "achat",
    "astream_chat",
]


STREAMS = [row for row in ROWS if "stream" in row]


def user(text):
    return [ChatMessage(role="user", content=text)]


def start(llm, row, prompt=PROMPT, draft=DRAFT, **options):
    """Call a row of the matrix with a prompt that means the same in all of them."""
    if "chat" in row:
        drafts = {"draft_messages": user(draft)} if draft else {}
        return getattr(llm, row)(user(prompt), **drafts, **options)
    drafts = {"draft_prompt": draft} if draft else {}
    return getattr(llm, row)(prompt, **drafts, **options)


def responses(llm, row, **kwargs):
    """All responses of a row; one of them if it does not stream."""
    if row.startswith("a"):

        async def collect():
            answer = await start(llm, row, **kwargs)
            return [r async for r in answer] if "stream" in row else [answer]

        return asyncio.run(collect())
    answer = start(llm, row, **kwargs)
    return list(answer) if "stream" in row else [answer]


def text_of(response):
    return response.message.content if hasattr(response, "message") else response.text


@pytest.fixture(name="llm")
def llm_fixture(decoder):
    return RapidLLM(decoder=decoder, max_tokens=24, gamma=3)


@pytest.fixture(name="expected")
def expected_fixture(decoder):
    """What the decoder itself says."""
    return decoder.generate(
        [{"role": "user", "content": PROMPT}],
        [{"role": "user", "content": DRAFT}],
        sampling=SamplingParams(max_new_tokens=24),
        speculation=SpeculationConfig(gamma=3),
    )
