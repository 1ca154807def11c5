"""RapidEmbedding: rapid-llm's embedding models for LlamaIndex."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

from rapid_llm.aio import in_thread
from rapid_llm.context.embedder_loading import default_embedder
from rapid_llm.context.embedding import EMBEDDING_BATCH
from rapid_llm.context.lazy import LazyEmbedder


class RapidEmbedding(BaseEmbedding):
    """An embedding model of rapid-llm, loaded at its first use.

    Vectors have unit length. Copies share the loaded model; a pickle loads it anew.

    Args:
        model_name: name that :func:`rapid_llm.context.load_embedder` takes: ``all-minilm-l6-v2``
            (packaged), a hub id or a folder. By default the packaged one, or BGE-M3 where it is not
            installed.
        embed_batch_size: number of texts that the model reads at a time.
        device: device of the model; None takes the first accelerator, or the CPU.
        fields: other fields of LlamaIndex's ``BaseEmbedding``.

    Raises:
        ModelError: at the first use, the model cannot be found or loaded.
        MissingDependencyError: at the first use, a package that it needs is not installed.
    """

    device: str | None = Field(default=None, description="Device of the model.")

    _embedder: LazyEmbedder = PrivateAttr()

    def __init__(
        self,
        model_name: str | Path | None = None,
        *,
        embed_batch_size: int = EMBEDDING_BATCH,
        device: str | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(
            model_name=default_embedder() if model_name is None else str(model_name),
            embed_batch_size=embed_batch_size,
            **{**fields, "device": device},
        )
        self._embedder = LazyEmbedder(self.model_name, device)

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex stores it."""
        return "RapidEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._current().embed_query(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._current().embed_documents(texts, self.embed_batch_size)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await in_thread(lambda: self._get_query_embedding(query))

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await in_thread(lambda: self._get_text_embedding(text))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await in_thread(lambda: self._get_text_embeddings(texts))

    def _current(self) -> LazyEmbedder:
        """The embedder named by the fields, which may have changed."""
        self._embedder = self._embedder.named(self.model_name, self.device)
        return self._embedder
