"""The ingress of replicas, without Ray's processes: where requests go, and what is tried again."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import installed
from starlette.requests import Request
from starlette.testclient import TestClient

installed("ray")
from ray.exceptions import ActorDiedError, TaskCancelledError  # noqa: E402
from ray.serve.exceptions import RayServeException  # noqa: E402

from rapid_llm import InvalidParameterError  # noqa: E402
from rapid_llm.server import ray  # noqa: E402
from rapid_llm.server.errors import ApiError  # noqa: E402
from rapid_llm.server.ray import Ingress, _web, session_of  # noqa: E402
from rapid_llm.server.settings import ServerConfig  # noqa: E402

CHAT = "/v1/chat/completions"
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


def request(body: Any = None, path: str = CHAT, root: str = "", **headers: str) -> Request:
    data = json.dumps(body).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "root_path": root,
        "query_string": b"",
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }
    return Request(scope, receive)


def session(body: Any, **headers: str) -> str | None:
    return session_of(request(**headers), json.dumps(body).encode())


class Replicas:
    """Replicas that say what they are told to: messages and errors, for one try after another."""

    def __init__(self, *tries: list[Any]) -> None:
        self._tries: Iterator[list[Any]] = iter(tries)
        self.asked = 0
        self.forward = self

    def options(self, **_: Any) -> Replicas:
        return self

    async def remote(self, scope: Any, body: bytes) -> Any:
        self.asked += 1
        for message in next(self._tries):
            if isinstance(message, Exception):
                raise message
            yield pickle.dumps(message)


def answered(replicas: Replicas, path: str = CHAT, root: str = "") -> tuple[int, bytes]:
    async def ask() -> tuple[int, bytes]:
        response: Any = await Ingress(replicas).answer(request({}, path, root))
        return response.status_code, b"".join([part async for part in response.body_iterator])

    return asyncio.run(ask())


def says(text: str, headers: Any = ()) -> list[Any]:
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    return [1, start, {"type": "http.response.body", "body": text.encode()}]


def test_the_same_documents_have_one_session() -> None:
    owl, fox = {"id": "a", "text": "The owl."}, {"text": "The fox.", "id": "b"}
    first = session({"documents": [owl, fox], "messages": [1]})
    assert first is not None
    assert session({"messages": [2], "documents": [fox, owl]}) == first
    assert session({"documents": [owl]}) != first
    assert session({"documents": ["The owl."]}) == session({"documents": [{"text": "The owl."}]})
    assert session({"documents": [owl], "prompt_cache_key": "k"}) == "k"
    assert session({"documents": [owl]}, x_session_id="s") == "s"


@pytest.mark.parametrize("begin", ["The owl. ", [7]])
def test_prompts_that_begin_alike_have_one_session(begin: Any) -> None:
    common = begin * 600
    first = session({"prompt": common + begin})
    assert first is not None
    assert session({"prompt": common}) == session({"prompt": [common]}) == first
    assert session({"prompt": common[5:] if isinstance(begin, str) else [8]}) != first


def test_a_body_that_is_nested_too_deeply_is_a_replica_s_to_refuse() -> None:
    for broken in (b"[" * 100_000, b'{"documents": ' + b"[" * 100_000, b"\xff", b""):
        assert session_of(request(), broken) is None


@pytest.mark.parametrize("body", [{}, {"documents": []}, {"documents": None}, [], "text", 3])
def test_what_has_no_documents_goes_anywhere(body: Any) -> None:
    assert session(body) is None


def test_a_replica_that_dies_before_it_answers_is_replaced() -> None:
    replicas = Replicas([ActorDiedError()], [1, ActorDiedError()], says("well"))
    assert answered(replicas) == (200, b"well")
    dead = Replicas(*[[ActorDiedError()]] * 9)
    with pytest.raises(ApiError) as refusal:
        answered(dead)
    assert (refusal.value.status_code, refusal.value.code) == (503, "replica_died")
    assert dead.asked == 3


@pytest.mark.parametrize("root", ["", "/here"])
def test_an_upload_is_not_sent_twice(root: str) -> None:
    replicas = Replicas([ActorDiedError()], says("well"))
    with pytest.raises(ApiError):
        answered(replicas, f"{root}/v1/files", root)
    assert replicas.asked == 1


def test_what_the_ingress_itself_refuses_has_the_form_of_an_error() -> None:
    with TestClient(_web(ServerConfig()), base_url="http://127.0.0.1") as client:
        reply = client.put(CHAT)
    assert reply.status_code == 405
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_request_whose_client_left_is_not_sent_again() -> None:
    replicas = Replicas([TaskCancelledError()], says("well"))
    with pytest.raises(TaskCancelledError):
        answered(replicas)
    assert replicas.asked == 1


def test_no_replica_is_an_error_to_try_again() -> None:
    with pytest.raises(ApiError) as refusal:
        answered(Replicas([RayServeException("deployment is gone")]))
    assert refusal.value.status_code == 503


def test_a_death_within_an_answer_ends_a_stream_with_an_error_and_breaks_another_body() -> None:
    status, body = answered(Replicas([*says("data: {}\n\n", EVENTS), ActorDiedError()]))
    first, died, done, end = body.split(b"\n\n")
    assert (status, first, done, end) == (200, b"data: {}", b"data: [DONE]", b"")
    assert json.loads(died.removeprefix(b"data: "))["error"]["code"] == "replica_died"
    with pytest.raises(ActorDiedError):
        answered(Replicas([*says("{"), ActorDiedError()]))


def test_options_of_the_command_line_of_ray_reach_the_application(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: dict[str, Any] = {}

    def application(*options: Any, **deployment: Any) -> None:
        made.update({type(each).__name__: each for each in options}, deployment=deployment)

    monkeypatch.setattr(ray, "application", application)
    ray.app(
        {"model": "2024", "gamma": "3", "dtype": "float32", "retriever": "bm25", "max_queue": 5,
         "ray_actor_options": '{"num_gpus": 1}', "num_replicas": "auto"}
    )  # fmt: skip
    assert (made["EngineConfig"].model, made["EngineConfig"].dtype) == ("2024", "float32")
    assert made["SpeculationConfig"].gamma == 3
    assert made["RetrievalConfig"].retriever == "bm25"
    assert made["SamplingParams"].seed is None
    assert made["ServerConfig"].max_queue == 5
    assert made["deployment"] == {"ray_actor_options": {"num_gpus": 1}, "num_replicas": "auto"}
    with pytest.raises(InvalidParameterError, match="unknown option 'gama'"):
        ray.app({"gama": "3"})


def test_an_application_that_others_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAPID_LLM_API_KEY", raising=False)
    with pytest.raises(InvalidParameterError, match="a key is needed"):
        ray.application(server=ServerConfig(host="0.0.0.0"))
