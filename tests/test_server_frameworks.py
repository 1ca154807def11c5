"""Both wheels on a server: ``base_url=`` in the place of models of this process."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import installed
from serving import Server, served, tiny_decoder

from rapid_llm import InvalidParameterError, RapidDecoder, ServerError

langchain_rapid = installed("langchain_rapid")
llama_index_rapid = installed("llama_index.llms.rapid")

from langchain_core.documents import Document  # noqa: E402
from langchain_core.retrievers import BaseRetriever  # noqa: E402
from llama_index.core import Document as LlamaDocument  # noqa: E402
from llama_index.core import VectorStoreIndex  # noqa: E402
from llama_index.core.embeddings import MockEmbedding  # noqa: E402
from llama_index.core.llms import ChatMessage  # noqa: E402
from pydantic import ValidationError  # noqa: E402

FOX, OWL = "The fox lives in the den. " * 6, "The owl sleeps in the tree. " * 6
OPTIONS: dict[str, Any] = {"max_tokens": 12, "gamma": 3, "eta": 5.0, "seed": 3, "temperature": 0.8}
KEY = "the key"


class Fixed(BaseRetriever):
    """Finds one chunk."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document("The owl sleeps in the tree.", metadata={"source": "owl"})]


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def server(decoder: RapidDecoder) -> Iterator[Server]:
    with served(decoder, api_key=KEY) as server:
        yield server


@pytest.fixture
def chats(server: Server, decoder: RapidDecoder) -> Any:
    """A model on the server and one in this process, otherwise alike."""

    def chats(**more: Any) -> tuple[Any, Any]:
        there = langchain_rapid.ChatRapid(base_url=server.url, api_key=KEY, **OPTIONS, **more)
        return there, langchain_rapid.ChatRapid(decoder=decoder, **OPTIONS, **more)

    return chats


def test_a_langchain_pipeline_moves_to_a_server_by_one_argument(chats: Any) -> None:
    grounded = {"retriever": Fixed(), "documents": {"fox": FOX, "owl": OWL}}
    there, here = (model.invoke("Where is the owl?") for model in chats(**grounded))
    assert there.content == here.content
    stats = [message.response_metadata["rapid"] for message in (there, here)]
    for name in ("method", "prompt_tokens", "draft_prompt_tokens", "drafted_tokens"):
        assert stats[0][name] == stats[1][name]
    assert stats[0]["drafted_tokens"] > 0


def test_langchain_streams_binds_and_counts_on_a_server(chats: Any) -> None:
    there, here = chats(chat_template_kwargs={"enable_thinking": False})
    texts = ["".join(chunk.content for chunk in model.stream("Hello")) for model in (there, here)]
    assert texts[0] == texts[1]

    async def streamed(model: Any) -> str:
        return "".join([chunk.content async for chunk in model.astream("Hello")])

    assert asyncio.run(streamed(there)) == texts[1]
    schema = {"title": "n", "type": "object", "properties": {"n": {"enum": [1, 2]}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    objects = [
        model.with_structured_output(schema, max_tokens=80, temperature=0.0).invoke("n?")
        for model in (there, here)
    ]
    assert objects[0] == objects[1]
    assert there.get_num_tokens("The fox") == here.get_num_tokens("The fox")


def test_a_model_on_a_server_is_copied_without_its_key(
    chats: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = chats()
    assert KEY not in repr(there) + str(there._identifying_params)
    data = pickle.dumps(there)
    assert KEY.encode() not in data
    monkeypatch.setenv("RAPID_LLM_API_KEY", KEY)
    assert pickle.loads(data).invoke("Hello").content == here.invoke("Hello").content
    with pytest.raises(ValidationError, match="dtype"):
        langchain_rapid.ChatRapid(base_url=there.base_url, dtype="float32")
    with pytest.raises(ServerError, match="API key"):
        langchain_rapid.ChatRapid(base_url=there.base_url, api_key="wrong")


def test_a_model_that_the_server_does_not_run_is_told_with_the_one_that_it_runs(
    server: Server,
) -> None:
    there = {"base_url": server.url, "api_key": KEY}
    served = f"model='other' is not served by base_url='{server.url}', only 'tiny'"
    with pytest.raises(ValidationError, match=served):
        langchain_rapid.ChatRapid(model="other", **there)
    with pytest.raises(InvalidParameterError, match=served):
        langchain_rapid.ChatRapid(**there).invoke("Hello", model="other")
    with pytest.raises(InvalidParameterError, match=served):
        llama_index_rapid.RapidLLM("other", **there)
    with pytest.raises(InvalidParameterError, match=served):
        llama_index_rapid.RapidLLM(**there).complete("Hello", model="other")


def test_an_option_of_loading_beside_base_url_is_the_servers(server: Server) -> None:
    there = {"base_url": server.url, "api_key": KEY}
    with pytest.raises(ValidationError, match="give it to rapid-llm serve"):
        langchain_rapid.ChatRapid(drafter="other", **there)
    for option in ({"drafter": "other"}, {"token": "t"}):
        with pytest.raises(InvalidParameterError, match="give it to rapid-llm serve"):
            llama_index_rapid.RapidLLM(**option, **there)


@pytest.fixture
def llms(server: Server, decoder: RapidDecoder) -> Any:
    def llms(**more: Any) -> tuple[Any, Any]:
        rapid = llama_index_rapid.RapidLLM
        there = rapid(base_url=server.url, api_key=KEY, **OPTIONS, **more)
        return there, rapid(decoder=decoder, **OPTIONS, **more)

    return llms


def test_a_llamaindex_engine_moves_to_a_server_by_one_argument(llms: Any) -> None:
    documents = [LlamaDocument(text=FOX, id_="fox"), LlamaDocument(text=OWL, id_="owl")]
    index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(8))
    answers = []
    for llm in llms():
        synthesizer = llama_index_rapid.RapidSynthesizer(llm=llm, documents=documents)
        engine = index.as_query_engine(llm=llm, response_synthesizer=synthesizer)
        answers.append(engine.query("Where is the owl?"))
    there, here = answers
    assert there.response == here.response
    assert there.metadata["rapid"]["drafted_tokens"] == here.metadata["rapid"]["drafted_tokens"] > 0


def test_llamaindex_completes_chats_and_streams_on_a_server(llms: Any) -> None:
    there, here = llms()
    assert there.metadata == here.metadata
    assert there.complete("Hello").text == here.complete("Hello").text
    messages = [ChatMessage(role="user", content="Hello")]
    assert there.chat(messages).message.content == here.chat(messages).message.content
    parts = [part.delta for part in there.stream_complete("Hello", draft_prompt="Hi")]
    assert "".join(parts) == here.complete("Hello", draft_prompt="Hi").text

    async def completed() -> str:
        return (await there.acomplete("Hello")).text

    assert asyncio.run(completed()) == here.complete("Hello").text


def test_a_llamaindex_llm_on_a_server_is_copied_without_its_key(llms: Any) -> None:
    there, _ = llms()
    assert KEY.encode() not in pickle.dumps(there)
    assert KEY not in repr(there) + there.to_json()
    with pytest.raises(InvalidParameterError, match="dtype"):
        llama_index_rapid.RapidLLM(base_url=there.base_url, api_key=KEY, dtype="float32")
