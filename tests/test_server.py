"""What the server answers and tells, over HTTP, with a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fixtures import decoder_fixture, post_fixture, server_fixture  # noqa: F401
from serving import (
    CHAT,
    PLACE,
    SAMPLING,
    SPECULATION,
    TOOLS,
    Server,
    events,
    refused,
)
from test_encoding import user

from rapid_llm import RapidDecoder
from rapid_llm.tools.answers import chat as chat_with
from rapid_llm.tools.definitions import ChatOptions

TOKENS = {"return_tokens": True}
PLAINLY = {"enable_thinking": False}


# --- answers -----------------------------------------------------------------------------------


def test_a_chat_is_answered_as_the_decoder_answers_it(post: Any, decoder: RapidDecoder) -> None:
    body = post().json()
    expected = decoder.generate(CHAT, sampling=SAMPLING, speculation=SPECULATION)
    (choice,) = body["choices"]
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == expected.finish_reason
    assert body["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
    assert body["usage"]["completion_tokens"] == len(expected.token_ids)
    assert body["rapid"]["stats"]["method"] == "lc"


def test_a_stream_says_what_a_whole_answer_says(post: Any) -> None:
    whole = post().json()
    first, *parts = events(post(stream=True))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert {part["id"] for part in parts} == {first["id"]}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["choices"][0]["message"]["content"]
    assert [part["choices"][0]["finish_reason"] for part in parts][-1] == "length"
    assert all("usage" not in part for part in parts)


def test_usage_of_a_stream_comes_last_and_only_when_asked_for(post: Any) -> None:
    *parts, last = events(post(stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == []
    assert last["usage"] == post().json()["usage"]
    assert all(part.get("usage") is None for part in parts)


@pytest.mark.parametrize("prompt", ["The fox", ["The fox"], [5, 6, 7], [[5, 6, 7]]])
def test_a_completion_continues_text_or_tokens(
    post: Any, decoder: RapidDecoder, prompt: Any
) -> None:
    read = prompt[0] if isinstance(prompt[0], str | list) and prompt != "The fox" else prompt
    expected = decoder.generate(read, sampling=SAMPLING)
    body = post("/v1/completions", prompt=prompt).json()
    assert body["choices"][0]["text"] == expected.text
    streamed = events(post("/v1/completions", prompt=prompt, stream=True))
    assert "".join(part["choices"][0]["text"] for part in streamed) == expected.text
    assert {part["object"] for part in streamed} == {"text_completion"}


def test_both_prompts_of_the_decoder_can_be_given(post: Any, decoder: RapidDecoder) -> None:
    draft = user("The den.")
    speculation = replace(SPECULATION, eta=5.0, mode="augmented")
    expected = decoder.generate(CHAT, draft, sampling=SAMPLING, speculation=speculation)
    rapid = {"draft_messages": draft, "eta": 5.0, "mode": "augmented", "return_tokens": True}
    body = post(rapid=rapid).json()
    assert [token["id"] for token in body["rapid"]["tokens"]] == expected.token_ids
    assert "".join(token["text"] for token in body["rapid"]["tokens"]) == expected.text
    assert body["rapid"]["stats"]["drafted_tokens"] == expected.stats.drafted_tokens > 0
    alone = post(rapid=rapid | {"method": "rag"}).json()
    drafted = decoder.generate(None, draft, sampling=SAMPLING)
    assert [token["id"] for token in alone["rapid"]["tokens"]] == drafted.token_ids
    plain = post(rapid=rapid | {"method": "lc"}).json()
    assert plain["rapid"]["stats"]["drafted_tokens"] == 0


def test_sampling_fields_reach_the_decoder(post: Any, decoder: RapidDecoder) -> None:
    fields = {"temperature": 0.9, "top_p": 0.95, "top_k": 20, "seed": 7, "max_tokens": 9}
    sampling = replace(SAMPLING, temperature=0.9, top_p=0.95, top_k=20, seed=7, max_new_tokens=9)
    expected = decoder.generate(CHAT, sampling=sampling)
    assert post(**fields).json()["choices"][0]["message"]["content"] == expected.text
    body = post(max_completion_tokens=5, ignore_eos=True).json()
    assert body["usage"]["completion_tokens"] == 5


def test_a_new_option_of_speculation_is_a_field_of_requests() -> None:
    code = """
import httpx, new_option
from serving import served, tiny_decoder

decoder = tiny_decoder()
validated, seen = decoder.request, []
decoder.request = lambda *p, **o: seen.append(o["speculation"].foo) or validated(*p, **o)
with served(decoder) as server:
    assert server.post(max_tokens=1).status_code == 200
    assert server.post(max_tokens=1, rapid={"foo": 5}).status_code == 200
    error = server.post(rapid={"foo": 0}).json()["error"]
    assert error["message"] == "foo=0 is not allowed: foo must be at least 1"
    assert error["param"] == "rapid.foo"
    assert "min_confidence, foo, " in server.post(rapid={"fo": 1}).json()["error"]["message"]
    schemas = httpx.get(server.url + "/openapi.json").json()["components"]["schemas"]
    field = schemas["RapidOptions"]["properties"]["foo"]
    assert (field["description"], field["default"]) == ("Number of foos.", 7)
assert seen == [7, 5]
"""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert ran.returncode == 0, ran.stderr


def test_stop_strings_end_an_answer(post: Any) -> None:
    text = post().json()["choices"][0]["message"]["content"]
    stop = text[4:6]
    for given in (stop, [stop]):
        choice = post(stop=given).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == text[: text.index(stop)]


def test_a_seed_repeats_an_answer_and_none_draws_afresh(post: Any) -> None:
    def texts(**seed: Any) -> set[str]:
        answers = [post(temperature=2.0, max_tokens=30, **seed).json() for _ in range(3)]
        return {answer["choices"][0]["message"]["content"] for answer in answers}

    assert len(texts(seed=3)) == 1
    assert len(texts()) > 1


def test_null_is_no_field(post: Any) -> None:
    fields = ("temperature", "tools", "stop", "response_format", "documents", "user", "n", "rapid")
    assert post(**dict.fromkeys(fields)).json()["choices"] == post().json()["choices"]


# --- probabilities -----------------------------------------------------------------------------


def test_logprobs_are_the_target_s_own(post: Any, decoder: RapidDecoder) -> None:
    body = post(logprobs=True, top_logprobs=3, temperature=0.7, seed=1, rapid=TOKENS).json()
    content = body["choices"][0]["logprobs"]["content"]
    ids = [token["id"] for token in body["rapid"]["tokens"]]
    expected = decoder.logprobs(CHAT, ids)
    assert [entry["logprob"] for entry in content] == pytest.approx([e.logprob for e in expected])
    for entry in content:
        assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]
        best = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert entry["logprob"] <= best[0]
    assert math.fsum(e.logprob for e in expected) < 0


def test_a_stream_tells_logprobs_with_its_last_part(post: Any) -> None:
    whole = post(logprobs=True).json()["choices"][0]["logprobs"]
    parts = events(post(logprobs=True, stream=True))
    told = [part["choices"][0].get("logprobs") for part in parts]
    assert told[-1] == whole
    assert not any(told[:-1])


def test_a_completion_has_its_own_form_of_logprobs(post: Any) -> None:
    told = post("/v1/completions", prompt="The fox", logprobs=2).json()["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 16
    assert all(len(top) == 2 for top in told["top_logprobs"])


# --- tools and forms ---------------------------------------------------------------------------


def test_a_required_tool_is_called_streamed_or_not(post: Any, decoder: RapidDecoder) -> None:
    options = ChatOptions(TOOLS, "required", parallel_tool_calls=False)
    sampling = replace(SAMPLING, max_new_tokens=100)
    expected = chat_with(
        decoder, CHAT, options=options, sampling=sampling, chat_template_kwargs=PLAINLY
    )
    body = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 100,
        "chat_template_kwargs": PLAINLY,
    }
    (choice,) = post(**body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert call["function"]["arguments"] == expected.tool_calls[0].arguments
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    deltas = [p["choices"][0]["delta"] for p in events(post(stream=True, **body))]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert [part["function"].get("name") for part in parts if "id" in part] == ["weather"]
    arguments = "".join(part["function"]["arguments"] for part in parts)
    assert arguments == call["function"]["arguments"]


def test_a_stream_has_no_part_without_text_or_a_call_or_an_end(post: Any) -> None:
    calling = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 100}
    for body in (calling, {"response_format": {"type": "json_object"}}):
        streamed = events(post(stream=True, chat_template_kwargs=PLAINLY, **body))
        for (choice,) in (part["choices"] for part in streamed):
            assert any(choice["delta"].values()) or choice["finish_reason"]
    told = events(post(stream=True, rapid=TOKENS, chat_template_kwargs=PLAINLY, **calling))
    rounds = [part["rapid"]["tokens"] for part in told if "rapid" in part]
    assert all(rounds)  # but where tokens are asked for, each round tells its own


def test_results_of_tools_are_read(post: Any) -> None:
    call = {"id": "abcdefghi", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    history = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
    ]
    assert post(messages=history, tools=TOOLS).status_code == 200


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PLACE}}},
        {"constraint": {"json": PLACE}},
    ],
)
def test_an_answer_has_the_form_of_its_schema(post: Any, form: Any) -> None:
    body = post(max_tokens=100, chat_template_kwargs=PLAINLY, **form).json()
    assert json.loads(body["choices"][0]["message"]["content"])["city"] in ("Rome", "Oslo")


# --- information -------------------------------------------------------------------------------


def test_models_tell_the_window(server: Server, decoder: RapidDecoder) -> None:
    (model,) = httpx.get(server.url + "/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["max_model_len"] == decoder.target.context_window
    assert httpx.get(server.url + "/v1/models/tiny").json() == model
    refused(httpx.get(server.url + "/v1/models/a/b"), 404)


def test_metrics_count_what_was_answered(server: Server, post: Any) -> None:
    def value(name: str) -> float:
        text = httpx.get(server.url + "/metrics").text
        return sum(float(row.split()[-1]) for row in text.splitlines() if row.startswith(name))

    names = ("prompt_tokens_total", "completion_tokens_total", "cached_tokens_total",
             "drafted_tokens_total", "accepted_tokens_total", "rounds_total")  # fmt: skip
    before = {name: value(f"rapid_llm_{name}") for name in names}
    stats = post(rapid={"draft_messages": user("den")}).json()["rapid"]["stats"]
    for name in names:
        counted = value(f"rapid_llm_{name}") - before[name]
        assert counted == stats[name.removesuffix("_total")], name
    ok = 'rapid_llm_requests_total{path="/v1/chat/completions",status="200"}'
    assert value(ok) >= 1
    assert value("rapid_llm_requests_running") == value("rapid_llm_requests_waiting") == 0
    assert 0 <= value("rapid_llm_acceptance_ratio") <= 1
    assert value("rapid_llm_tokens_per_round") >= 1
    assert value('rapid_llm_kv_bytes{tier="device"}') > 0
    assert value("rapid_llm_time_to_first_token_seconds_count") >= 1


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/metrics"])
def test_a_probe_may_ask_for_the_head_alone(server: Server, path: str) -> None:
    response = httpx.head(server.url + path)
    assert response.status_code == 200
    assert response.headers["content-type"] == httpx.get(server.url + path).headers["content-type"]
    assert response.content == b""
    assert httpx.head(server.url + "/v1/chat/completions").status_code == 405


def test_every_response_has_an_id(server: Server) -> None:
    ids = {httpx.get(server.url + path).headers["x-request-id"] for path in ("/health", "/nothing")}
    assert len(ids) == 2
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert "version" in httpx.get(server.url + "/version").json()
