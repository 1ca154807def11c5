"""RapidEmbeddings: rapid-llm's embedding models for LangChain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from rapid_llm.aio import in_thread
from rapid_llm.context.embedder_loading import default_embedder
from rapid_llm.context.embedding import EMBEDDING_BATCH
from rapid_llm.context.lazy import LazyEmbedder


class RapidEmbeddings(BaseModel, Embeddings):
    """An embedding model of rapid-llm, loaded at its first use.

    Vectors have unit length. Copies share the loaded model; a pickle loads it anew.

    Args:
        model_name: name that :func:`rapid_llm.context.load_embedder` takes: ``all-minilm-l6-v2``
            (packaged), a hub id or a folder. By default the packaged one, or BGE-M3 where it is not
            installed.
        batch_size: number of texts that the model reads at a time.
        device: device of the model; None takes the first accelerator, or the CPU.

    Raises:
        ModelError: at the first use, the model cannot be found or loaded.
        MissingDependencyError: at the first use, a package that it needs is not installed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_name: str = Field(default_factory=default_embedder)
    batch_size: int = Field(default=EMBEDDING_BATCH, ge=1)
    device: str | None = None

    _embedder: LazyEmbedder = PrivateAttr()

    def __init__(self, model_name: str | Path | None = None, **fields: Any) -> None:
        if model_name is not None:
            fields["model_name"] = str(model_name)
        super().__init__(**fields)
        self._embedder = LazyEmbedder(self.model_name, self.device)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of documents' texts."""
        return self._current().embed_documents(texts, self.batch_size)

    def embed_query(self, text: str) -> list[float]:
        """Vector of a question, with the model's prompt for questions."""
        return self._current().embed_query(text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """:meth:`embed_documents` for asyncio, in a thread of its own."""
        return await in_thread(lambda: self.embed_documents(texts))

    async def aembed_query(self, text: str) -> list[float]:
        """:meth:`embed_query` for asyncio, in a thread of its own."""
        return await in_thread(lambda: self.embed_query(text))

    def _current(self) -> LazyEmbedder:
        """The embedder named by the fields, which copies may have changed."""
        self._embedder = self._embedder.named(self.model_name, self.device)
        return self._embedder
