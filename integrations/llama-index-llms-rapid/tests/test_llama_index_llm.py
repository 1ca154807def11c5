"""The LLM: every way to call it gives the decoder's answer; options, prompts, loading."""

from __future__ import annotations

import asyncio
import copy
import json

import pytest
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts import PromptTemplate
from llm_calls import (  # noqa: F401  (fixtures)
    DRAFT,
    PROMPT,
    ROWS,
    STREAMS,
    expected_fixture,
    llm_fixture,
    responses,
    start,
    text_of,
    user,
)

from llama_index.llms.rapid import RapidLLM
from rapid_llm import models
from rapid_llm.encoding import encode_prompt
from rapid_llm.errors import ContextWindowError, InvalidParameterError, ModelError

# --- the matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_every_row_gives_the_decoders_answer(llm, expected, row):
    found = responses(llm, row)
    assert text_of(found[-1]) == expected.text
    raw = found[-1].raw
    assert raw["usage"] == {
        "prompt_tokens": expected.stats.prompt_tokens,
        "completion_tokens": 24,
        "total_tokens": expected.stats.prompt_tokens + 24,
        "prompt_tokens_details": {"cached_tokens": raw["rapid"]["cached_tokens"]},
    }
    assert raw["finish_reason"] == "length"
    counts = expected.stats.as_dict()
    for name in ("method", "drafted_tokens", "accepted_tokens", "draft_prompt_tokens", "rounds"):
        assert raw["rapid"][name] == counts[name], name
    json.dumps(raw)
    if hasattr(found[-1], "message"):
        assert found[-1].message.role == MessageRole.ASSISTANT


@pytest.mark.parametrize("row", STREAMS)
def test_streams_carry_deltas_and_the_text_so_far(llm, expected, row):
    found = responses(llm, row)
    assert len(found) == expected.stats.rounds > 1
    so_far = ""
    for response in found:
        so_far += response.delta
        assert text_of(response) == so_far
    assert so_far == expected.text


@pytest.mark.parametrize("row", ROWS)
def test_without_a_draft_the_target_decodes_plainly(llm, row):
    raw = responses(llm, row, draft=None)[-1].raw
    assert raw["rapid"]["method"] == "lc"
    assert raw["rapid"]["drafted_tokens"] == 0


@pytest.mark.parametrize("row", ["complete", "achat"])
def test_the_real_model_answers_without_an_echo(smollm2, row):
    llm = RapidLLM(decoder=smollm2, max_tokens=12)
    question = "What is the capital of France? Answer in one word."
    answer = text_of(responses(llm, row, prompt=question, draft=None)[-1])
    assert "Paris" in answer
    assert "capital of France?" not in answer
    assert "<|im" not in answer


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_options_of_a_call_count_before_those_of_the_object(llm, row):
    assert responses(llm, row, max_tokens=5)[-1].raw["usage"]["completion_tokens"] == 5
    assert responses(llm, row, max_tokens=None)[-1].raw["usage"]["completion_tokens"] == 24
    drafted = responses(llm, row, gamma=1, max_tokens=6)[-1].raw["rapid"]
    assert drafted["drafted_tokens"] <= drafted["rounds"]
    assert responses(llm, row, mode="exact", max_tokens=2)[-1].raw["rapid"]["method"] == "sd"


def test_sampling_is_reproducible_by_its_seed(llm):
    def sample(seed):
        return llm.complete(PROMPT, temperature=1.0, seed=seed).text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert RapidLLM(decoder=llm.decoder, max_tokens=24, seed=1, temperature=1.0).complete(
        PROMPT
    ).text == sample(1)


@pytest.mark.parametrize("row", ROWS)
def test_unknown_options_are_refused_by_name(llm, row):
    with pytest.raises(InvalidParameterError, match="unknown option 'max_length'; known are"):
        responses(llm, row, max_length=5)


@pytest.mark.parametrize("row", ROWS)
def test_bad_values_are_refused(llm, row):
    with pytest.raises(InvalidParameterError, match="temperature=-1"):
        responses(llm, row, temperature=-1)


def test_the_constructor_checks_its_arguments(decoder):
    with pytest.raises(InvalidParameterError, match="top_p=0"):
        RapidLLM(decoder=decoder, top_p=0)
    with pytest.raises(ValueError, match="max_token"):
        RapidLLM(decoder=decoder, max_token=5)
    with pytest.raises(InvalidParameterError, match="leave one of them out"):
        RapidLLM("smollm2-135m", decoder=decoder)
    with pytest.raises(InvalidParameterError, match="RapidDecoder"):
        RapidLLM(decoder=decoder, drafter="other")
    with pytest.raises(InvalidParameterError, match="documents of type int"):
        RapidLLM(decoder=decoder, documents=5)


@pytest.mark.parametrize("row", ROWS)
def test_stop_strings_end_the_answer_and_are_cut(llm, expected, row):
    stop = expected.text[8:11]
    found = responses(llm, row, stop=[stop])
    assert text_of(found[-1]) == expected.text[: expected.text.index(stop)]
    assert all(stop not in text_of(response) for response in found)
    assert found[-1].raw["finish_reason"] == "stop"


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_both_prompts_pass_the_template_with_one_bos(llm, spy, row):
    responses(llm, row)
    assert spy.target() == f"<s><|user>{PROMPT}\n<|assistant>"
    assert spy.draft() == f"<s><|user>{DRAFT}\n<|assistant>"
    bos = llm.decoder.tokenizer.bos_token_id
    assert spy.target_ids().count(bos) == spy.draft_ids().count(bos) == 1


def test_a_formatted_prompt_is_taken_as_it_is(llm, spy):
    llm.complete("<s><|user>Hi\n<|assistant>", formatted=True, draft_prompt="<s>Hi", max_tokens=1)
    assert spy.target() == "<s><|user>Hi\n<|assistant>"
    assert spy.draft() == "<s>Hi"


def test_a_model_without_a_template_gets_text_with_one_bos(make_decoder, spy):
    llm = RapidLLM(decoder=make_decoder(chat=False), max_tokens=2)
    assert not llm.metadata.is_chat_model
    llm.complete("Once", draft_prompt="upon")
    assert (spy.target(), spy.draft()) == ("<s>Once", "<s>upon")
    llm.chat(user("Once"))
    assert spy.target() == "<s>user: Once\nassistant: "
    assert isinstance(llm.predict(PromptTemplate("Say {word}."), word="this"), str)
    assert spy.target() == "<s>Say this."


def test_ones_own_formatting_functions_go_first(decoder, spy):
    llm = RapidLLM(
        decoder=decoder,
        max_tokens=1,
        messages_to_prompt=lambda messages: "M:" + messages[0].content,
        completion_to_prompt=lambda prompt: "C:" + prompt,
    )
    llm.complete("a")
    assert spy.target() == "<s>C:a"
    llm.chat(user("b"))
    assert spy.target() == "<s>M:b"


def test_messages_keep_their_roles_and_text_parts(llm, spy):
    history = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", blocks=[TextBlock(text="One."), TextBlock(text="Two.")]),
        ChatMessage(role="assistant", content="Three."),
        ChatMessage(role="user", content="Four? <s>"),
    ]
    llm.chat(history, max_tokens=1)
    assert spy.target() == (
        "<s><|system>Be brief.\n<|user>One.\nTwo.\n<|assistant>Three.\n<|user>Four? <s>\n"
        "<|assistant>"
    )
    assert spy.target_ids().count(1) == 1  # the one in the text is text
    image = ChatMessage(role="user", blocks=[ImageBlock(image=b"x", image_mimetype="image/png")])
    with pytest.raises(InvalidParameterError, match="'image' is not allowed: this is a text model"):
        llm.chat([image])


@pytest.mark.parametrize("row", ROWS)
def test_a_prompt_too_long_is_refused_with_the_numbers(make_decoder, row):
    llm = RapidLLM(decoder=make_decoder(window=64), max_tokens=30)
    length = len(f"?<|user>{PROMPT}\n<|assistant>") - 2
    with pytest.raises(ContextWindowError, match=rf"{length} tokens.* window .* 64"):
        responses(llm, row, draft=None)


@pytest.mark.parametrize("row", ["stream_complete", "stream_chat"])
def test_errors_do_not_wait_for_the_first_token(make_decoder, row):
    llm = RapidLLM(decoder=make_decoder(window=64), max_tokens=30)
    with pytest.raises(ContextWindowError):
        start(llm, row)


# --- metadata and loading ------------------------------------------------------------------------


def test_the_metadata_are_the_models(smollm2, decoder):
    llm = RapidLLM(decoder=smollm2, max_tokens=7)
    assert llm.metadata.context_window == smollm2.target.config.max_position_embeddings == 8192
    message = [{"role": "user", "content": "a"}]
    beside = len(encode_prompt(message, smollm2.tokenizer)) - 1
    assert llm.metadata.num_output == 7 + beside  # what is kept free of the window
    assert llm.metadata.is_chat_model
    assert llm.metadata.model_name == "smollm2-135m"
    assert RapidLLM(decoder=decoder).metadata.context_window == 16384


def test_the_model_is_loaded_at_first_use_and_in_a_thread(monkeypatch):
    def fail(*args, **kwargs):
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        raise ModelError("asked for")

    monkeypatch.setattr("rapid_llm.decoder.load_model", fail)
    monkeypatch.setattr("rapid_llm.preflight.require_model", lambda *_, **__: None)
    llm = RapidLLM("some/model", documents="a text", callback_manager=CallbackManager([]))
    assert llm.to_payload() == {"class_name": "RapidLLM", "model_name": "some/model"}
    assert "a text" not in repr(llm) + str(llm.to_dict())
    template = PromptTemplate("{query_str}")
    with pytest.raises(ModelError, match="asked for"):
        llm.complete("x")
    for call in (
        lambda: llm.acomplete("x"),
        lambda: llm.astream_complete("x"),
        lambda: llm.achat(user("x")),
        lambda: llm.astream_chat(user("x")),
        lambda: llm.apredict(template, query_str="x"),
        lambda: llm.astream(template, query_str="x"),
    ):
        with pytest.raises(ModelError, match="asked for"):
            asyncio.run(call())


def test_one_loaded_model_serves_many_objects(smollm2):
    kept = models.load_model("smollm2-135m", dtype="float32", device="cpu").model
    one = RapidLLM("smollm2-135m", dtype="float32", device="cpu", max_tokens=3)
    two = RapidLLM(model="smollm2-135m", dtype="float32", device="cpu", drafter="smollm2-135m")
    assert one.decoder.target.model is kept
    third = copy.deepcopy(one)
    assert smollm2.target.model is kept
    for llm in (one, two, third):
        assert llm.decoder.target.model is kept
        assert llm.decoder.drafter.model is kept
    third.max_tokens = 9
    assert one.max_tokens == 3


def test_the_decoders_own_options_reach_it(tmp_path, decoder):
    decoder.target.model.save_pretrained(tmp_path / "tiny")
    decoder.tokenizer.save_pretrained(tmp_path / "tiny")
    options = {"model": tmp_path / "tiny", "max_tokens": 4, "drafter_quantization": "int8"}
    prompt, kept = "abcdefgh" * 150, tmp_path / "kv"
    for cached in (False, True):  # from the folder, as nothing is kept in memory
        llm = RapidLLM(**options, kv_cache_bytes=0, kv_cache_dir=kept)
        for again in (False, True):
            rapid = llm.complete(prompt).raw["rapid"]
            assert (rapid["cached_tokens"] > 0) == (cached or again)
        assert len(list(kept.glob("*.safetensors"))) == 1
    assert llm.decoder.draft_runner.name.endswith("tiny (int8)")
    without = RapidLLM(**options, kv_cache_bytes=0)
    for _ in range(2):
        assert without.complete(prompt).raw["rapid"]["cached_tokens"] == 0


def test_gamma_may_follow_the_costs(decoder):
    llm = RapidLLM(decoder=decoder, max_tokens=24, mode="exact")
    assert llm.gamma == "auto"
    plain = llm.complete(PROMPT).text
    assert llm.complete(PROMPT, draft_prompt=DRAFT).text == plain
    assert llm.complete(PROMPT, draft_prompt=DRAFT, gamma="auto").text == plain
    json.dumps(llm.to_dict())
    for wrong in ({"gamma": "all"}, {"drafter_quantization": "int3"}, {"kv_cache_bytes": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RapidLLM(decoder=decoder, **wrong)
