"""Clients that know nothing of this library, against a real server."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from conftest import installed
from serving import Server, served, tiny_decoder
from test_encoding import user

KEY = "the key"
OWL = "The owl sleeps in the tree. " * 6
CHAT: Any = user("Where does the owl sleep?")
RAPID = {"documents": [OWL], "rapid": {"eta": 5.0, "gamma": 3}}
PLAINLY = {"chat_template_kwargs": {"enable_thinking": False}}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(tiny_decoder(), api_key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def test_openai_answers_and_streams(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    call: Any = {"model": model.id, "messages": CHAT, "extra_body": RAPID}
    answer = client.chat.completions.create(**call)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 40
    rapid: Any = answer.model_extra["rapid"] if answer.model_extra else {}
    assert rapid["stats"]["drafted_tokens"] > 0
    assert OWL[rapid["chunks"][0]["start"] :].startswith(rapid["chunks"][0]["text"])
    options = {"include_usage": True}
    parts = list(client.chat.completions.create(**call, stream=True, stream_options=options))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == answer.choices[0].message.content
    assert parts[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_openai_completes_and_tells_logprobs(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt="The owl", max_tokens=5)
    assert completion.choices[0].finish_reason == "length"
    scored = client.chat.completions.create(
        model="tiny", messages=CHAT, logprobs=True, top_logprobs=2, max_completion_tokens=5
    )
    content = scored.choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(token.top_logprobs) == 2 for token in content)


def test_openai_calls_tools_and_parses_schemas(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    called = client.chat.completions.create(
        model="tiny", messages=CHAT, tools=[tool], tool_choice="required", max_tokens=120,
        parallel_tool_calls=False, extra_body=PLAINLY,
    )  # fmt: skip
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    form: Any = {"type": "json_schema",
                 "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}  # fmt: skip
    held = client.chat.completions.create(
        model="tiny", messages=CHAT, response_format=form, max_tokens=60, extra_body=PLAINLY
    )
    assert json.loads(held.choices[0].message.content)["city"] in ("Rome", "Oslo")


def test_openai_uploads_and_asks(client: openai.OpenAI) -> None:
    file = client.files.create(file=("owl.txt", OWL.encode()), purpose="user_data")
    assert [each.id for each in client.files.list()] == [file.id]
    body: Any = {"documents": [{"file_id": file.id}]}
    answer = client.chat.completions.create(model="tiny", messages=CHAT, extra_body=body)
    assert answer.usage.prompt_tokens > 40
    assert "owl" in client.files.content(file.id).text
    assert client.files.delete(file.id).deleted


def test_openai_raises_its_own_errors(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown field 'documets'"):
        client.chat.completions.create(model="tiny", messages=CHAT, extra_body={"documets": []})
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.chat.completions.create(model="gpt-4o", messages=CHAT)
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
    with pytest.raises(openai.APIError, match="timeout"):
        list(client.chat.completions.create(
            model="tiny", messages=CHAT, stream=True, extra_body={"timeout": 1e-6}
        ))  # fmt: skip


def test_langchain_openai_works(server: Server) -> None:
    chat_openai = installed("langchain_openai").ChatOpenAI
    model = chat_openai(
        base_url=f"{server.url}/v1", api_key=KEY, model="tiny", max_tokens=60, max_retries=0,
        extra_body=RAPID | PLAINLY, stream_usage=True,
    )  # fmt: skip
    answer = model.invoke("Where does the owl sleep?")
    assert answer.usage_metadata["input_tokens"] > 40
    chunks = list(model.stream("Where does the owl sleep?"))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    schema = SCHEMA | {"title": "place", "description": "a place"}
    assert model.with_structured_output(schema).invoke("Where?")["city"] in ("Rome", "Oslo")
    bound = model.bind_tools([schema], tool_choice="any", parallel_tool_calls=False)
    (call,) = bound.invoke("Where?", max_tokens=120).tool_calls
    assert call["args"]["city"] in ("Rome", "Oslo")


def test_llamaindex_openai_like_works(server: Server) -> None:
    # Its releases take no newer openai than 2, so it is not among the pinned packages.
    if importlib.util.find_spec("llama_index.llms.openai_like") is None:
        pytest.skip(
            "llama-index-llms-openai-like is not installed, and takes no openai 3: run "
            "pip install --no-deps --target FOLDER llama-index-llms-openai-like "
            "llama-index-llms-openai 'openai<3', and the test with FOLDER first in PYTHONPATH"
        )
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    common: Any = {"model": "tiny", "api_base": f"{server.url}/v1", "api_key": KEY,
                   "max_tokens": 12, "max_retries": 0,
                   "context_window": 2048, "temperature": 0.0}  # fmt: skip
    plain = OpenAILike(**common)
    assert plain.complete("The owl").text
    chat = OpenAILike(**common, is_chat_model=True, additional_kwargs={"extra_body": RAPID})
    messages = [ChatMessage(role="user", content="Where does the owl sleep?")]
    answer = chat.chat(messages)
    assert answer.raw.usage.prompt_tokens > 40
    assert "".join(part.delta for part in chat.stream_chat(messages)) == answer.message.content


def test_curl_works(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    headers = ("-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json")
    body = json.dumps({"messages": CHAT, "documents": [OWL]})
    ran = subprocess.run(
        ["curl", "-s", "--fail", f"{server.url}/v1/chat/completions", *headers, "-d", body],
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(ran.stdout)["choices"][0]["finish_reason"] == "length"
