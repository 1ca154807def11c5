"""RemoteDecoder: the decoder of a server, as one of this process."""

from __future__ import annotations

import asyncio
import copy
import pickle
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from dataclasses import replace
from typing import Any

import httpx
import pytest
from serving import SAMPLING, SPECULATION, Server, served, tiny_decoder
from test_encoding import user
from test_server_clients import until

from rapid_llm import (
    ContextWindowError,
    Delta,
    GenerationRequest,
    GenerationTimeoutError,
    InvalidParameterError,
    RapidDecoder,
    RapidPipeline,
    RemoteDecoder,
    SamplingParams,
    ServerError,
)
from rapid_llm.tools.answers import chat
from rapid_llm.tools.definitions import ChatOptions

CHAT = user("The fox lives in the den.")
DRAFT = user("The den.")
COUNTS = ("method", "prompt_tokens", "draft_prompt_tokens", "completion_tokens", "rounds",
          "drafted_tokens", "accepted_tokens", "rejections", "max_new_tokens")  # fmt: skip


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def server(decoder: RapidDecoder) -> Iterator[Server]:
    with served(decoder, max_queue=1) as server:
        yield server


@pytest.fixture(scope="module")
def remote(server: Server) -> RemoteDecoder:
    return RemoteDecoder(f"{server.url}/v1/")


def test_models_and_tokenizer_are_the_server_s(
    remote: RemoteDecoder, decoder: RapidDecoder
) -> None:
    assert remote.target.name == "tiny"
    assert remote.target.context_window == decoder.target.context_window
    assert remote.drafter is remote.target
    assert remote.tokenizer.chat_template == decoder.tokenizer.chat_template
    text = "The fox <tool_call> sees é"
    assert remote.tokenizer(text)["input_ids"] == decoder.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "sampling", [SAMPLING, replace(SAMPLING, temperature=1.0, seed=5, top_k=9, stop=("e", "a"))]
)
@pytest.mark.parametrize(
    "prompts", [(CHAT,), (CHAT, DRAFT), (None, DRAFT), ("The fox",), ([5, 6, 7], [7, 8])]
)
def test_deltas_are_the_decoder_s(
    remote: RemoteDecoder, decoder: RapidDecoder, prompts: Any, sampling: Any
) -> None:
    here = list(decoder.stream(*prompts, sampling=sampling, speculation=SPECULATION))
    there = list(remote.stream(*prompts, sampling=sampling, speculation=SPECULATION))
    for own, other in zip(here, there, strict=True):
        assert other.text == own.text
        assert other.token_ids == own.token_ids
        assert other.origins == own.origins
        assert other.finish_reason == own.finish_reason
        assert [getattr(other.stats, n) for n in COUNTS] == [getattr(own.stats, n) for n in COUNTS]


def test_without_a_seed_each_answer_is_another(remote: RemoteDecoder) -> None:
    sampling = replace(SAMPLING, temperature=2.0, seed=None)
    assert len({remote.generate(CHAT, sampling=sampling).text for _ in range(3)}) > 1


def test_tools_and_pipelines_work_on_it(remote: RemoteDecoder, decoder: RapidDecoder) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    options, plainly = ChatOptions(response_format=form), {"enable_thinking": False}
    sampling = replace(SAMPLING, max_new_tokens=60)
    there, here = (
        chat(one, CHAT, options=options, sampling=sampling, chat_template_kwargs=plainly)
        for one in (remote, decoder)
    )
    assert there.content == here.content
    asked = [
        RapidPipeline(one, "The fox lives in the den.", sampling=SAMPLING).ask("Who?", "lc")
        for one in (remote, decoder)
    ]
    assert asked[0].token_ids == asked[1].token_ids
    many = [
        RapidPipeline(one, "The fox lives in the den.", sampling=SAMPLING).ask_many(
            ["Who?", "Where?"], "lc"
        )
        for one in (remote, decoder)
    ]
    assert [each.token_ids for each in many[0]] == [each.token_ids for each in many[1]]
    assert many[0][0].token_ids == asked[0].token_ids
    assert remote.generate_many([], return_exceptions=True) == []


def test_errors_are_those_of_a_decoder(remote: RemoteDecoder) -> None:
    with pytest.raises(ContextWindowError, match="context window of tiny"):
        remote.generate(user("fox " * 2500))
    with pytest.raises(GenerationTimeoutError, match="timeout"):
        remote.generate(CHAT, sampling=replace(SAMPLING, timeout=1e-6))
    with pytest.raises(InvalidParameterError, match="confidence"):
        remote.generate(CHAT, confidence=2.0)
    with pytest.raises(InvalidParameterError, match="both None"):
        remote.stream(None)


PIECE = (
    b'data: {"choices": [{"text": "a", "finish_reason": null}], '
    b'"rapid": {"stats": {}, "tokens": []}}'
)


@pytest.mark.parametrize(
    ("head", "body", "words"),
    [
        (b"", b"", "closed the connection"),
        (b"200 OK", b"", "closed the connection within an answer"),
        (b"200 OK", PIECE + b"\n\n", "closed the connection within an answer"),
        (b"200 OK\r\nContent-Length: 9999", PIECE + b"\n\n", "closed the connection"),
        (b"200 OK", b"data: <html>\n\n", "cannot be read"),
        (b"200 OK", b'data: {"choices": []}\n\n', "cannot be read"),
        (b"200 OK", b'data: {"error": {"message": "it died"}}\n\n', "it died"),
        (b"502 Bad Gateway", b"<html>", "status 502"),
        (b"301 Moved\r\nLocation: https://example.org", b"", "status 301"),
    ],
)
def test_a_server_that_fails_within_an_answer_is_a_server_s_error(
    server: Server, head: bytes, body: bytes, words: str
) -> None:
    remote = RemoteDecoder(server.url)
    assert remote.tokenizer  # of the real server; the answer is of another
    with socket.create_server(("127.0.0.1", 0)) as failing, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            connection, _ = failing.accept()
            with connection:
                while not connection.recv(1 << 16).endswith(b"}"):
                    pass
                if head:
                    connection.sendall(b"HTTP/1.1 " + head + b"\r\n\r\n" + body)

        async def read() -> None:
            async for _ in remote.astream(CHAT):
                pass

        remote.base_url = f"http://127.0.0.1:{failing.getsockname()[1]}"
        for ask in (lambda: remote.generate(CHAT), lambda: asyncio.run(read())):
            answered = pool.submit(answer)
            with pytest.raises(ServerError, match=words):
                ask()
            answered.result(60)


def test_a_closed_stream_stops_the_server(remote: RemoteDecoder, server: Server) -> None:
    endless = replace(SAMPLING, max_new_tokens=1500, ignore_eos=True)
    with closing(remote.stream(CHAT, sampling=endless)) as deltas:  # type: ignore[type-var]
        next(deltas)
        assert server.service.admission.active == 1
    until(lambda: server.service.admission.active == 0)

    async def cancelled() -> None:
        async with aclosing(remote.astream(CHAT, sampling=endless)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                assert delta.token_ids
                break

    asyncio.run(cancelled())
    until(lambda: server.service.admission.active == 0)


def test_closed_streams_stop_prompts_that_the_server_still_reads(
    remote: RemoteDecoder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, given_up = server.service._engine.stream, threading.Event()

    def reading(*prompts: Any, progress: Any, **options: Any) -> Iterator[Delta]:
        while not given_up.wait(0.01):
            progress("target", 0, 9)
        yield from answer(*prompts, progress=progress, **options)

    def stream(*prompts: Any, sampling: SamplingParams, **options: Any) -> Iterator[Delta]:
        begun = answer if sampling.max_new_tokens == 1 else reading
        return begun(*prompts, sampling=sampling, **options)

    monkeypatch.setattr("rapid_llm.server.answers._PATIENCE", 0.01)
    monkeypatch.setattr(server.service._engine, "stream", stream)
    told: list[int] = []
    short, long = (replace(SAMPLING, max_new_tokens=n) for n in (1, 9))
    requests = [
        GenerationRequest(CHAT, sampling=long, progress=lambda *each: told.append(1)),
        GenerationRequest(CHAT, sampling=short),
    ]
    try:
        with closing(remote.stream_many(requests)) as deltas:  # type: ignore[type-var]
            assert next(deltas)[0] == 1
            until(lambda: bool(told))
            assert server.service.admission.active >= 1
        until(lambda: server.service.admission.active == 0)
    finally:
        given_up.set()


def test_characters_that_end_lines_elsewhere_are_text(remote: RemoteDecoder) -> None:
    text = "a\u2028b\u2029c\x85d"
    sampling = replace(SAMPLING, max_new_tokens=40, constraint={"choice": [text]})
    assert remote.generate(CHAT, sampling=sampling).text == text


def test_asyncio_gives_the_same(remote: RemoteDecoder, decoder: RapidDecoder) -> None:
    async def tokens() -> list[int]:
        return [t async for d in remote.astream(CHAT, sampling=SAMPLING) for t in d.token_ids]

    assert asyncio.run(tokens()) == decoder.generate(CHAT, sampling=SAMPLING).token_ids


def test_progress_is_told_while_a_prompt_is_read(
    remote: RemoteDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rapid_llm.server.answers._PATIENCE", 0.001)
    told: list[tuple[str, int, int]] = []
    remote.generate(user("den " * 300), sampling=SAMPLING, progress=lambda *each: told.append(each))
    assert told
    assert all(whose == "target" and 0 <= done <= total for whose, done, total in told)


@pytest.mark.parametrize("key", ["secret\n", "se\ncret", "ключ"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    server: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in (key, None):
        with pytest.raises(InvalidParameterError, match="printable ASCII") as refusal:
            RemoteDecoder(server.url, given)
        assert "cret" not in str(refusal.value)
        assert "ключ" not in str(refusal.value)
        monkeypatch.setenv("RAPID_LLM_API_KEY", key)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host", "http://", "http://a:x", "http://[1]", ""]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidParameterError, match="base_url"):
        RemoteDecoder(url)


def test_an_address_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(InvalidParameterError, match="api_key") as refusal:
        RemoteDecoder("http://me:sesame@127.0.0.1:8000")
    assert "sesame" not in str(refusal.value)


def test_another_kind_of_server_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(200, text="<html>"))
    with pytest.raises(ServerError, match="no server of rapid-llm"):
        _ = RemoteDecoder(server.url).tokenizer


def test_what_cannot_be_reached_is_named(decoder: RapidDecoder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServerError, match=f"http://127.0.0.1:{port} cannot be reached"):
        _ = RemoteDecoder(f"http://127.0.0.1:{port}").target
    with pytest.raises(InvalidParameterError, match="ftp://x"):
        RemoteDecoder("ftp://x")
    with served(decoder, api_key="secret") as guarded:
        with pytest.raises(ServerError, match="API key is missing or wrong"):
            _ = RemoteDecoder(guarded.url, "wrong").target
        keyed = RemoteDecoder(guarded.url, "secret")
        for each in (keyed, copy.copy(keyed), copy.deepcopy(keyed)):
            assert each.generate(CHAT, sampling=SAMPLING).token_ids
        assert b"secret" not in pickle.dumps(keyed)
        assert "secret" not in repr(keyed)
