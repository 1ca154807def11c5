"""An index about a lighthouse, the LLM that is put into it, and what each prompt must hold."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LLMMetadata
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms import CustomLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import MetadataMode

from llama_index.llms.rapid import RapidLLM, RapidSynthesizer

QUESTION = "Who kept a diary of storms at the lighthouse?"
SPLITTER = SentenceSplitter(chunk_size=64, chunk_overlap=0, paragraph_separator="\n\n")
QA = PromptTemplate("Text: {context_str}\nQuestion: {query_str}\nAnswer:")


class Recorder(CustomLLM):
    """The LLM of the pipeline before the swap: remembers the messages it is sent."""

    seen: list[Any] = Field(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata(context_window=16384, is_chat_model=True)

    def chat(self, messages, **kwargs):
        self.seen.append([{"role": m.role.value, "content": m.content} for m in messages])
        return ChatResponse(message=ChatMessage(role="assistant", content="?"))

    def complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError

    stream_complete = complete


def shown(document):
    """A document as the target reads it."""
    return document.get_content(metadata_mode=MetadataMode.LLM)


def context_of(nodes):
    return "\n\n".join(n.node.get_content(metadata_mode=MetadataMode.LLM) for n in nodes)


def by_id(documents):
    return {document.id_: document for document in documents}


def texts_behind(nodes, documents):
    """The documents of nodes, in the order of their ids."""
    names = sorted({scored.node.ref_doc_id for scored in nodes})
    return "\n\n".join(shown(by_id(documents)[name]) for name in names)


@pytest.fixture(name="llm")
def llm_fixture(decoder):
    return RapidLLM(decoder=decoder, max_tokens=8, gamma=3)


@pytest.fixture(name="index")
def index_fixture(documents, minilm):
    return VectorStoreIndex.from_documents(
        documents, embed_model=minilm, transformations=[SPLITTER]
    )


def ask(index, llm, documents, question=QUESTION, top_k=2, **options):
    swap = {"response_synthesizer": RapidSynthesizer(llm, documents=documents, **options)}
    return index.as_query_engine(llm=llm, similarity_top_k=top_k, **swap).query(question)


WHOLE = "The document begins. " + "It goes on for a while. " * 20 + "It ends here."


def whole(context):
    """The documents of an LLM: whatever was retrieved is from this one."""
    return WHOLE
