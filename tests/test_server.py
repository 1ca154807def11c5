"""The server's protocol, over HTTP, with a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from serving import SAMPLING, SPECULATION, Server, served, tiny_decoder
from test_encoding import user

from rapid_llm import RapidDecoder
from rapid_llm.tools.answers import chat as chat_with
from rapid_llm.tools.definitions import ChatOptions

CHAT = user("The fox lives in the den.")
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOKENS = {"return_tokens": True}
PLAINLY = {"enable_thinking": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PLACE}}]


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def server(decoder: RapidDecoder) -> Iterator[Server]:
    with served(decoder) as server:
        yield server


@pytest.fixture
def post(server: Server) -> Any:
    def post(path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        if path == "/v1/chat/completions":
            body.setdefault("messages", CHAT)
        return httpx.post(server.url + path, json=body, timeout=60)

    return post


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Objects of a stream, which ends as OpenAI's does."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a refusal, which has OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


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


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "unknown field 'temprature'; known are"),
        ({"rapid": {"gama": 3}}, "rapid.gama", "unknown field 'rapid.gama'; known are method, "),
        (
            {"stream_options": {"usage": 1}, "stream": True},
            "stream_options.usage",
            "known are include_usage",
        ),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unknown field"),
        ({"temperature": -1}, "temperature", "temperature=-1"),
        ({"rapid": {"gamma": 0}}, "rapid.gamma", "gamma=0"),
        ({"rapid": {"embedder": "x"}}, "rapid.embedder", "unknown field"),
        ({"rapid": {"store": "/"}}, "rapid.store", "unknown field"),
        ({"n": 2}, "n", "n=2 is not supported, only 1: send the request n times"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty=0.5"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0 is not allowed: max_tokens must be"),
        ({"max_completion_tokens": "x"}, "max_completion_tokens", "max_completion_tokens='x'"),
        ({"temprature": 1}, "temprature", " max_tokens,"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "are one"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is for streams"),
        (
            {"stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "include_obfuscation",
        ),
        ({"messages": []}, "messages", "messages"),
        ({"messages": [{"content": "x"}]}, "messages", "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "image_url",
        ),
        ({"messages": user("fox " * 2500)}, "messages", "context window"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0]"),
        ({"tools": TOOLS, "tool_choice": "pray"}, "tool_choice", "pray"),
        ({"response_format": {"type": "xml"}}, "response_format", "response_format"),
        ({"constraint": {"regex": "("}}, "constraint", "constraint"),
        ({"chunks": ["x"]}, "chunks", "without documents"),
        ({"rapid": {"method": "rag"}}, "rapid.method", "needs documents"),
        ({"documents": [{"txt": "x"}]}, "documents", "documents[0]"),
        ({"documents": [{"text": "x", "url": "y"}]}, "documents", "unknown field 'url'"),
        ({"documents": []}, "documents", "documents is empty"),
        ({"documents": [" "]}, "documents", "all documents are empty"),
        ({"documents": [{"text": "x", "id": "a"}] * 2}, "documents", "have the id 'a'"),
        ({"documents": ["x", "y"], "chunks": ["z"]}, "chunks", ""),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_field(
    post: Any, body: Any, param: str, words: str
) -> None:
    for stream in (True, False):
        own = {"stream": stream and "stream_options" not in body}
        error = refused(post(**own | body))
        assert words in error["message"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "the field 'prompt' is missing"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": ["a", "b"]}, "prompt", "2 prompts were given"),
        ({"prompt": "fox " * 2500}, "prompt", "context window"),
        ({"prompt": [1, 100_000]}, None, "outside the vocabulary"),
        ({"prompt": "x", "echo": True}, "echo", "echo=True"),
        ({"prompt": "x", "messages": []}, "messages", "unknown field 'messages'"),
        (
            {"prompt": "x", "rapid": {"draft_messages": CHAT}},
            "rapid.draft_messages",
            "rapid.draft_prompt",
        ),
        (
            {"prompt": "x", "documents": ["x"], "rapid": {"draft_prompt": "x"}},
            "rapid.draft_prompt",
            "leave the draft to the server",
        ),
        ({"prompt": [5], "documents": ["x"]}, "documents", "token ids"),
        ({"prompt": "x", "rapid": {"method": "rag"}}, "rapid.method", "needs documents"),
        ({"prompt": "x", "rapid": {"method": "sd"}}, "rapid.method", "needs documents"),
    ],
)
def test_a_completion_is_refused_likewise(
    post: Any, body: Any, param: str | None, words: str
) -> None:
    error = refused(post("/v1/completions", **body))
    assert words in error["message"]
    assert error["param"] == param


def test_another_model_is_not_found(post: Any) -> None:
    error = refused(post(model="gpt-4o"), 404)
    assert error["code"] == "model_not_found"
    assert "'tiny'" in error["message"]
    assert post(model="tiny").status_code == 200


def test_a_prompt_that_does_not_fit_says_so(post: Any) -> None:
    error = refused(post(messages=user("fox " * 2500)))
    assert error["code"] == "context_length_exceeded"


def test_a_timeout_is_not_sent_again(post: Any) -> None:
    response = post(timeout=1e-6, stream=False)
    assert refused(response, 504)["code"] == "timeout"
    assert response.headers["x-should-retry"] == "false"


def test_an_error_in_a_stream_is_an_event(post: Any) -> None:
    *_, last = events(post(timeout=1e-6, stream=True))
    assert last["error"]["code"] == "timeout"
    assert post().status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON (Expecting property name"),
        (b"[1]", "not a JSON object"),
        (b"", "the body is missing"),
        (b'{"user": "\xff"}', "not JSON (its bytes are not UTF-8)"),
        (b'{"messages": ' + b"[" * 100_000, "not JSON (it is nested too deep)"),
        (b'{"seed": ' + b"1" * 5_000 + b"}", "not JSON (a number in it has too many digits)"),
    ],
)
def test_what_is_no_json_is_refused_with_the_reason(
    server: Server, body: bytes, words: str
) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(server.url + "/v1/chat/completions", content=body, headers=headers)
    assert words in refused(response)["message"]


def test_a_form_in_the_place_of_json_is_told_what_to_send(server: Server) -> None:
    response = httpx.post(server.url + "/v1/chat/completions", data={"messages": "hi"})
    assert "Content-Type: application/json" in refused(response)["message"]


def test_unknown_paths_and_methods_have_errors_of_the_same_form(server: Server) -> None:
    unknown = refused(httpx.get(server.url + "/v1/embeddings"), 404)["message"]
    assert "known are /v1/chat/completions, " in unknown
    doubled = refused(httpx.post(server.url + "/v1/v1/chat/completions", json={}), 404)
    assert "ends in /v1, once" in doubled["message"]
    response = httpx.get(server.url + "/v1/chat/completions")
    assert "does not take GET: send POST" in refused(response, 405)["message"]
    assert response.headers["allow"] == "POST"
    response = httpx.delete(server.url + "/v1/files")
    assert refused(response, 405)["message"].endswith("send GET or POST")


def test_a_role_that_openai_does_not_know_is_refused_by_its_name(post: Any) -> None:
    wizard = {"role": "wizard", "content": "Who?"}
    error = refused(post(messages=[*user("Hello"), wizard]))
    assert error["param"] == "messages.1.role"
    assert "'wizard' is not allowed: take one of system, developer, user" in error["message"]
    draft = refused(post(rapid={"draft_messages": [wizard]}))
    assert draft["param"] == "rapid.draft_messages.0.role"
    assert post(messages=[{"role": "developer", "content": "Be brief."}, *user("Hi")]).is_success


def test_an_unexpected_error_quotes_nothing(
    post: Any, decoder: RapidDecoder, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("SECRET DOCUMENT")

    monkeypatch.setattr(decoder.tokenizer, "get_chat_template", fail)
    response = post()
    error = refused(response, 500)
    assert error["type"] == "server_error"
    assert f"{response.headers['x-request-id']} KeyError at" in caplog.text
    assert "SECRET" not in error["message"] + caplog.text
    monkeypatch.undo()
    assert post().status_code == 200


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
