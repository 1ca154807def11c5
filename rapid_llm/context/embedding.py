"""The ``Embedder`` protocol, and embedders over sentence-transformers and FlagEmbedding models."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from rapid_llm.errors import ModelError

# Texts per call to a model: few enough that progress shows on a CPU.
EMBEDDING_BATCH = 16
# FlagEmbedding's class names, with which the names of stored vectors begin.
M3_KIND, BGE_KIND = "M3Embedder", "BaseEmbedder"

PAPER_THRESHOLD = 0.3
"""The paper's threshold on BGE-M3's cosine similarity; similarities of other models differ."""

Vectors = npt.NDArray[np.float32]


@runtime_checkable
class Embedder(Protocol):
    """Interface of an embedding model for the context builder.

    ``name`` is the key of stored vectors: two embedders with the same name must give the same
    vectors.

    Optional members are ``threshold``, the cosine similarity below which a text is irrelevant to
    the question, and ``max_tokens`` with a method ``count_tokens(text)``: its maximum input and the
    length of a text in its own tokens. Chunks are cut to fit.
    """

    @property
    def name(self) -> str: ...

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """Vectors of unit length, float32 ``[len(texts), d]``."""
        ...

    def embed_query(self, text: str) -> Vectors:
        """A vector of unit length, float32 ``[d]``."""
        ...


class SentenceTransformerEmbedder:
    """An ``Embedder`` over a loaded ``SentenceTransformer``, with its own query prompts.

    Args:
        model: the ``SentenceTransformer``.
        threshold: minimum similarity of relevant texts; None if unknown.
        kind: prefix of the name, if not the model's class: a class that gives the same vectors.

    Attributes:
        batch_size: texts that the model embeds in one pass.
    """

    def __init__(self, model: Any, threshold: float | None = None, kind: str | None = None) -> None:
        self._model = model
        self.batch_size = EMBEDDING_BATCH
        self.threshold = threshold
        self._tokens = _Tokens(getattr(model, "tokenizer", None), _document_prompt(model))
        self.max_tokens = self._tokens.window(model.max_seq_length)
        self.name = _identity(self, kind or type(model).__name__, model.max_seq_length)

    def count_tokens(self, text: str) -> int:
        return self._tokens.count(text)

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        vectors = self._model.encode_document(
            list(texts), batch_size=self.batch_size, show_progress_bar=False
        )
        return unit(vectors, len(texts), self._model)

    def embed_query(self, text: str) -> Vectors:
        vectors = self._model.encode_query([text], batch_size=1, show_progress_bar=False)
        return unit(vectors, 1, self._model)[0]


class FlagEmbedder:
    """An ``Embedder`` over a loaded FlagEmbedding model; BGE-M3 gives its dense vectors.

    Attributes:
        batch_size: texts that the model embeds in one pass.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.batch_size = EMBEDDING_BATCH
        is_m3 = M3_KIND in (kind.__name__ for kind in type(model).__mro__)
        self.threshold = PAPER_THRESHOLD if is_m3 else None
        self._tokens = _Tokens(getattr(model, "tokenizer", None))
        self.max_tokens = self._tokens.window(model.passage_max_length)
        self.name = _identity(self, type(model).__name__, model.passage_max_length)

    def count_tokens(self, text: str) -> int:
        return self._tokens.count(text)

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        # FlagEmbedding shows a progress bar as soon as a call holds a full batch.
        full = self.batch_size + 1
        parts = [
            self._dense(self._model.encode_corpus(list(batch), batch_size=full))
            for batch in batched(texts, self.batch_size)
        ]
        return unit(np.concatenate(parts), len(texts), self._model)

    def embed_query(self, text: str) -> Vectors:
        output = self._model.encode_queries([text], batch_size=2)
        return unit(self._dense(output), 1, self._model)[0]

    @staticmethod
    def _dense(output: Any) -> Any:
        return output["dense_vecs"] if isinstance(output, dict) else output


class _Tokens:
    """Counts a document's tokens in an embedder, including those that the embedder adds.

    Args:
        tokenizer: the embedder's tokenizer; only transformers tokenizers give a window.
        prompt: text that the embedder puts before each document.
    """

    def __init__(self, tokenizer: Any, prompt: str = "") -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt

    def window(self, max_length: Any) -> int | None:
        """Maximum input in tokens; None where there is no limit, or tokens cannot be counted."""
        from transformers import PreTrainedTokenizerBase

        limited = isinstance(max_length, int) and isinstance(
            self._tokenizer, PreTrainedTokenizerBase
        )
        return max_length if limited else None

    @cached_property
    def _own(self) -> Any:
        # A copy, because the embedder sets truncation and padding on its own from any thread.
        return copy.deepcopy(self._tokenizer)

    def count(self, text: str) -> int:
        return len(self._own(self._prompt + text, truncation=False, verbose=False)["input_ids"])


def _document_prompt(model: Any) -> str:
    """Prompt that a ``SentenceTransformer`` puts before a document."""
    names = [name for name in ("document", "passage", "corpus") if name in model.prompts]
    name = names[0] if names else model.default_prompt_name
    return "" if name is None else str(model.prompts[name] or "")


def _identity(embedder: Embedder | Any, kind: str, max_length: int) -> str:
    """Name for cache keys that depends on the weights, not on the path they were loaded from."""
    probe = embedder.embed_documents(["A probe: the same weights give it the same vector."])[0]
    coarse = np.rint(probe * 100).astype("<i2")  # nearly always the same on any device
    digest = hashlib.sha256(coarse.tobytes()).hexdigest()
    return f"{kind}-{max_length}-{digest[:16]}"


def unit(vectors: Any, count: int, model: Any) -> Vectors:
    """Scale vectors ``[count, d]`` to unit length.

    Args:
        vectors: output of the model.
        count: expected number of vectors.
        model: the model, named in errors.

    Raises:
        ModelError: the shape is wrong, or a vector is zero or not finite.
    """
    try:
        array = np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError):  # vectors of different lengths, or not numbers
        array = np.empty(0, dtype=np.float32)
    if array.ndim != 2 or len(array) != count:
        raise ModelError(
            f"embedding model {type(model).__name__} did not give {count} vectors of one length: "
            "it has to give one for each text"
        )
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise ModelError(
            f"embedding model {type(model).__name__} gave a vector that is zero or not finite: "
            "use another model or another device"
        )
    return cast(Vectors, array / norms)


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Split items into batches of ``size``; the last batch may be smaller."""
    return (items[start : start + size] for start in range(0, len(items), size))
