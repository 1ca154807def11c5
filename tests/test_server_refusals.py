"""Requests that a server refuses, and the field that each refusal names."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from server_fixtures import decoder_fixture, post_fixture, server_fixture  # noqa: F401
from serving import CHAT, TOOLS, Server, events, refused
from test_encoding import user

from rapid_llm import RapidDecoder


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
