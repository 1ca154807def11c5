"""Many clients, clients that go away, and clients that may not ask."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import httpx
import pytest
from serving import Server, events, refused, served, tiny_decoder
from test_encoding import user

from rapid_llm import InvalidParameterError, RapidDecoder
from rapid_llm.api_key import API_KEY
from rapid_llm.server.admission import Admission
from rapid_llm.server.answers import EventStream
from rapid_llm.server.errors import ApiError
from rapid_llm.server.settings import ServerConfig

CHAT = user("The fox lives in the den.")
LONG = {"messages": CHAT, "max_tokens": 1500, "ignore_eos": True}
SHORT = {"messages": CHAT, "max_tokens": 4}
PATH = "/v1/chat/completions"
KEY = "a secret key"


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    """One that answers one request at a time."""
    return tiny_decoder(max_sequences=1)


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within a minute")


def send(
    server: Server, body: dict[str, Any], path: str = PATH, buffer: int | None = None
) -> socket.socket:
    """Send a request, and do not wait for its answer.

    Args:
        server: the server.
        body: body of the request.
        path: path of the request.
        buffer: bytes of the answer that wait on this side to be read; by default the system's.
    """
    request = httpx.Request("POST", server.url + path, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", request.url.port or 0))
    connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    return connection


def cancelled(server: Server) -> float:
    """Number of requests whose client went away, as Prometheus reads it."""
    (line,) = (
        line
        for line in httpx.get(server.url + "/metrics").text.splitlines()
        if line.startswith("rapid_llm_cancelled_requests_total ")
    )
    return float(line.split()[1])


# --- clients that go away ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(decoder: RapidDecoder) -> Iterator[Server]:
    with served(decoder, max_queue=2) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation(
    server: Server, decoder: RapidDecoder, stream: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "rapid_llm.server")
    rounds: list[int] = []
    counted = server.service.metrics.generated
    monkeypatch.setattr(
        server.service.metrics,
        "generated",
        lambda stats: (rounds.append(stats.completion_tokens), counted(stats)),
    )
    gone = cancelled(server)
    connection = send(server, LONG | {"stream": stream})
    until(lambda: server.service.admission.active == 1)
    if stream:
        received = b""
        while b"data:" not in received:  # the headers may come alone
            more = connection.recv(4096)
            assert more, received
            received += more
    connection.close()
    until(lambda: server.service.admission.active == 0)
    until(lambda: f"POST '{PATH}' 499" in caplog.text)
    assert httpx.post(server.url + PATH, json=SHORT, timeout=60).status_code == 200
    assert f"POST '{PATH}' 200" in caplog.text
    assert cancelled(server) == gone + 1
    assert rounds == [4] or rounds[0] < 1500
    assert rounds[-1] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_a_prefill(
    server: Server,
    decoder: RapidDecoder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    chunks: list[int] = []
    reading, go_on = threading.Event(), threading.Event()
    read = decoder.stream

    def observed(*prompts: Any, progress: Any, **options: Any) -> Any:
        def report(whose: Any, done: int, total: int) -> None:
            chunks.append(done)
            reading.set()
            assert go_on.wait(60)
            progress(whose, done, total)

        return read(*prompts, progress=report, **options)

    monkeypatch.setattr(server.service._models, "stream", observed)
    body = {"messages": user(f"{stream} " + "fox " * 400), "max_tokens": 1, "stream": stream}
    connection = send(server, body)
    assert reading.wait(60)
    connection.close()
    until(lambda: server.service.admission.active == 0)
    go_on.set()
    monkeypatch.undo()
    assert httpx.post(server.url + PATH, json=SHORT, timeout=60).status_code == 200
    assert len(chunks) == 1
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_a_client_that_leaves_before_the_first_event_frees_its_turn() -> None:
    closed = []

    async def parts() -> AsyncGenerator[Any, None]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.Event().wait()  # nobody reads

    async def leave() -> None:
        async def events() -> AsyncGenerator[bytes, None]:
            async for _ in begun:
                yield b""

        begun = parts()
        await anext(begun)
        left = partial(closed.append, False)
        await EventStream(events(), begun, left)({"type": "http"}, gone, send)
        assert closed == [False, True]

    asyncio.run(leave())


def test_a_client_that_leaves_within_its_upload_is_no_error(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def left() -> bool:
        return 'path="/v1/files",status="499"' in httpx.get(server.url + "/metrics").text

    assert not left()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
    until(left)
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_a_client_that_leaves_the_queue_takes_no_turn(server: Server) -> None:
    admission = server.service.admission
    running = send(server, LONG)
    until(lambda: admission.active == 1)
    waiting = send(server, LONG)
    until(lambda: admission.queued == 1)
    waiting.close()
    until(lambda: admission.queued == 0)
    running.close()
    until(lambda: admission.active == 0)


def test_a_client_that_does_not_read_keeps_its_answer_and_no_turn(server: Server) -> None:
    body = LONG | {"stream": True, "rapid": {"return_tokens": True}}
    with closing(send(server, body, buffer=4096)) as connection:
        until(lambda: server.service.admission.active == 1)
        until(lambda: server.service.admission.active == 0)
        assert httpx.post(server.url + PATH, json=SHORT, timeout=60).status_code == 200
        received = b""
        while b"data: [DONE]" not in received[-64:]:
            received += (part := connection.recv(1 << 20))
            assert part
    assert len(received) > 1 << 19  # more than lies in buffers on the way


# --- the queue ---------------------------------------------------------------------------------


def test_more_than_the_queue_holds_is_refused_until_there_is_room(server: Server) -> None:
    admission = server.service.admission
    held = [send(server, LONG) for _ in range(3)]
    until(lambda: (admission.active, admission.queued) == (1, 2))
    response = httpx.post(server.url + PATH, json=SHORT)
    error = refused(response, 429)
    assert error["code"] == "queue_full"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    text = httpx.get(server.url + "/metrics").text  # answered beside them
    assert "rapid_llm_requests_waiting 2.0" in text
    for connection in held:
        connection.close()
    until(lambda: (admission.active, admission.queued) == (0, 0))
    assert httpx.post(server.url + PATH, json=SHORT, timeout=60).status_code == 200


def test_turns_are_taken_in_the_order_of_arrival() -> None:
    async def run() -> list[int]:
        admission, order = Admission(1, 10), list[int]()

        async def ask(number: int) -> None:
            async with admission.turn():
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*map(ask, range(8)))
        assert (admission.active, admission.queued) == (0, 0)
        return order

    assert asyncio.run(run()) == list(range(8))


def test_a_refusal_leaves_the_queue_as_it_was() -> None:
    async def run() -> None:
        admission = Admission(1, 0)
        async with admission.turn():
            with pytest.raises(ApiError, match="1 requests run and 0 wait"):
                async with admission.turn():
                    pass
        async with admission.turn():
            pass

    asyncio.run(run())


def post(server: Server, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + PATH, json=body, timeout=120)


def load(server: Server, clients: int, each: int) -> int:
    """Requests of several clients, of which a quarter go away; how many were answered."""
    questions = [f"Question {number}: where is the fox?" for number in range(6)]
    alone: dict[tuple[str, int], str] = {}
    for number, question in enumerate(questions):
        body = {"messages": user(question), "max_tokens": 6, "temperature": 1.0, "seed": number}
        reply = httpx.post(server.url + PATH, json=body, timeout=60).json()
        alone[question, number] = reply["choices"][0]["message"]["content"]
    answered, wrong = [], []

    def client(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(each):
            number = chance.randrange(len(questions))
            stream, leaves = chance.random() < 0.5, chance.random() < 0.25
            body = {"messages": user(questions[number]), "max_tokens": 6, "temperature": 1.0,
                    "seed": number, "stream": stream}  # fmt: skip
            if leaves:
                connection = send(server, body)
                time.sleep(chance.random() * 0.1)
                connection.close()
                continue
            while (
                reply := httpx.post(server.url + PATH, json=body, timeout=120)
            ).status_code == 429:
                time.sleep(0.05)
            if stream:
                deltas = (part["choices"][0]["delta"] for part in events(reply))
                text = "".join(delta.get("content", "") for delta in deltas)
            else:
                text = reply.json()["choices"][0]["message"]["content"]
            answered.append(seed)
            if text != alone[questions[number], number]:
                wrong.append((number, text))

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients), timeout=240))
    assert wrong == []
    admission = server.service.admission
    until(lambda: (admission.active, admission.queued) == (0, 0))
    return len(answered)


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("each", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_answers_under_load_are_those_of_one_client(each: int, at_once: int) -> None:
    with served(tiny_decoder(max_sequences=at_once), max_queue=8) as server:
        before = threading.active_count()
        assert load(server, 16, each) > 8 * each
        until(lambda: threading.active_count() <= before + 1)
        assert httpx.post(server.url + PATH, json=SHORT, timeout=60).status_code == 200


# --- who may ask -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(decoder: RapidDecoder) -> Iterator[Server]:
    with served(decoder, api_key=KEY) as server:
        yield server


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY]
)
def test_without_the_key_nothing_is_served(guarded: Server, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    for path in ("/v1/models", "/v1/files", "/metrics"):
        error = refused(httpx.get(guarded.url + path, headers=headers), 401)
        assert error["code"] == "invalid_api_key"
        assert KEY not in str(error)
    refused(httpx.post(guarded.url + PATH, json=SHORT, headers=headers), 401)
    assert httpx.get(guarded.url + "/health").status_code == 200


def test_the_key_opens(guarded: Server) -> None:
    for scheme in ("Bearer", "bearer"):
        headers = {"authorization": f"{scheme} {KEY}"}
        assert httpx.get(guarded.url + "/v1/models", headers=headers).status_code == 200


def test_pages_of_other_origins_and_names_are_refused(server: Server) -> None:
    refused(httpx.get(server.url + "/v1/models", headers={"origin": "http://evil.example"}), 403)
    refused(httpx.get(server.url + "/v1/models", headers={"host": "evil.example"}), 403)
    own = {"origin": server.url}
    assert httpx.get(server.url + "/v1/models", headers=own).status_code == 200
    port = server.url.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "[::1]"):
        reply = httpx.get(server.url + "/v1/models", headers={"host": host})
        assert reply.status_code == 200, host
    text = httpx.post(server.url + PATH, content=b'{"messages": []}',
                      headers={"content-type": "text/plain"})  # fmt: skip
    assert text.status_code == 400


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.0.0.5", True), ("localhost", True), ("::1", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_what_is_local_is_known(host: str, local: bool) -> None:
    assert ServerConfig(host=host).local is local


@pytest.mark.parametrize("key", ["", "sesame\n", " sesame", "sésame"])
def test_a_key_that_no_client_could_send_is_refused_unseen(key: str) -> None:
    with pytest.raises(InvalidParameterError, match="printable ASCII") as refusal:
        ServerConfig(api_key=key)
    assert "same" not in str(refusal.value)


def test_the_key_of_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServerConfig().with_key_of_environment().api_key is None
    monkeypatch.setenv(API_KEY, KEY)
    assert ServerConfig().with_key_of_environment().api_key == KEY
    assert ServerConfig(api_key="own").with_key_of_environment().api_key == "own"


def test_the_key_is_not_shown() -> None:
    with pytest.raises(ValueError, match="api_key=…") as error:
        ServerConfig(api_key=5)  # type: ignore[arg-type]
    assert "5" not in str(error.value).replace("api_key", "")
    assert KEY not in repr(ServerConfig(api_key=KEY))


def test_logs_hold_no_text_of_a_request(server: Server, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    for body in (
        SHORT | {"documents": ["SECRET fox"], "chunks": ["SECRET"]},
        {"messages": [{"role": "SECRET", "content": "SECRET"}]},
        SHORT | {"tools": "SECRET"},
    ):
        httpx.post(server.url + PATH + "?q=SECRET", json=body, timeout=60)
    assert PATH in caplog.text
    own = [r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert not any("SECRET" in message for message in own)
