"""RapidLLM on tiny models: completion of text as it stands."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from rapid_llm.errors import ContextWindowError, InvalidParameterError
from tiny import WINDOW

from langchain_rapid import GenerationTimeoutError, RapidLLM


@pytest.fixture
def llm(decoder) -> RapidLLM:
    return RapidLLM(decoder=decoder, max_tokens=20)


def test_text_is_completed_as_it_stands(llm, prompts):
    answer = llm.invoke("Once upon")
    assert prompts == ["<s>Once upon"]
    assert len(answer) == 20
    assert "Once" not in answer


async def test_every_way_to_call_agrees(llm):
    answer = llm.invoke("Once upon")
    assert "".join(llm.stream("Once upon")) == answer
    assert len(list(llm.stream("Once upon"))) == 20
    assert await llm.ainvoke("Once upon") == answer
    assert "".join([piece async for piece in llm.astream("Once upon")]) == answer
    other = llm.invoke("Twice")
    assert llm.batch(["Once upon", "Twice"]) == [answer, other]
    assert await llm.abatch(["Once upon", "Twice"]) == [answer, other]


async def test_batches_are_answered_at_once_and_single_calls_alone(llm, together):
    texts = ["Once upon", "Twice", "Thrice"]
    alone = [llm.invoke(text) for text in texts]
    assert together == []
    assert llm.batch(texts) == alone
    assert await llm.abatch(texts) == alone
    assert [g[0].text for g in llm.generate(texts).generations] == alone
    assert [g[0].text for g in (await llm.agenerate(texts)).generations] == alone
    assert max(together) == len(texts)
    together.clear()
    assert llm.batch(texts, {"max_concurrency": 1}) == alone
    assert max(together, default=1) == 1


async def test_an_error_of_one_prompt_leaves_the_others_of_a_batch(llm):
    texts = ["Once upon", "x" * 2 * WINDOW, "Twice"]
    for answers in (
        llm.batch(texts, return_exceptions=True),
        await llm.abatch(texts, return_exceptions=True),
    ):
        assert [answers[0], answers[2]] == [llm.invoke(texts[0]), llm.invoke(texts[2])]
        assert isinstance(answers[1], ContextWindowError)
    with pytest.raises(ContextWindowError):
        llm.batch(texts)
    with pytest.raises(ContextWindowError):
        await llm.agenerate(texts)
    assert llm.invoke(texts[0]) == answers[0]


def test_a_call_may_have_a_draft_and_options_of_its_own(llm, prompts):
    answer = llm.invoke("Once upon")
    prompts.clear()
    assert llm.invoke("Once upon", draft_prompt="Once", mode="exact") == answer
    assert prompts == ["<s>Once upon", "<s>Once"]
    assert llm.bind(max_tokens=4).invoke("Once upon") == answer[:4]
    assert llm.invoke("Once upon", stop=[answer[5:8]]) == answer[: answer.index(answer[5:8])]
    with pytest.raises(InvalidParameterError, match="tempature"):
        llm.invoke("Once upon", tempature=1)


def test_a_completion_describes_itself_and_its_usage(llm):
    result = llm.generate(["Once upon", "Twice"])
    info = result.generations[0][0].generation_info
    assert (info["model_name"], info["finish_reason"]) == ("tiny-0", "length")
    assert info["rapid"]["method"] == "lc"
    assert info["usage_metadata"]["output_tokens"] == 20
    assert result.llm_output == {
        "token_usage": {"prompt_tokens": 16, "completion_tokens": 40, "total_tokens": 56}
    }
    assert llm.get_num_tokens("Once upon") == 9
    assert llm._get_ls_params(model="x")["ls_model_name"] == "x"


def test_callbacks_see_every_piece_once(llm, everything):
    answer = "".join(llm.stream("Once upon", {"callbacks": [everything]}))
    pieces = [d["token"] for name, d in everything.events if name == "on_llm_new_token"]
    assert "".join(pieces) == answer


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_call_is_given_is_part_of_the_cache_key(decoder, prompts, asynchronous):
    llm = RapidLLM(decoder=decoder, max_tokens=5, cache=InMemoryCache())

    def runs(**call: Any) -> int:
        prompts.clear()
        if asynchronous:
            asyncio.run(llm.ainvoke("Once", **call))
        else:
            llm.invoke("Once", **call)
        return len(prompts)

    assert runs(draft_prompt="a") == 2
    assert runs(draft_prompt="a") == 0
    assert runs(draft_prompt="b") == 2
    assert runs() == 1
    assert runs(max_tokens=4) == 1
    assert runs() == 0


def test_a_prompt_beyond_the_window_is_refused_or_cut(llm, prompts):
    with pytest.raises(ContextWindowError, match=str(WINDOW)):
        llm.invoke("x" * 3000)
    prompts.clear()
    text = "BEGIN" + "x" * 3000 + "END"
    llm.invoke(text, truncate="middle")
    assert prompts[0].startswith("<s>BEGINx")
    assert prompts[0].endswith("xEND")
    assert len(prompts[0]) == WINDOW - 20 + len("<s>") - 1
    prompts.clear()
    for short in ("x", "xy"):
        llm.invoke(short, truncate="middle")
    assert prompts == ["<s>x", "<s>xy"]


async def test_the_event_loop_runs_and_a_timeout_stops(llm, slow_passes):
    task, ticks = asyncio.ensure_future(llm.ainvoke("Once")), 0
    while not task.done():
        ticks += 1
        await asyncio.sleep(0.001)
    assert ticks > 2 * len(slow_passes)
    with pytest.raises(GenerationTimeoutError):
        await llm.ainvoke("Once", timeout=0.1, max_tokens=500)
    assert len(llm.invoke("Once")) == 20
