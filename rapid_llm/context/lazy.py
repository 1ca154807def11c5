"""An embedding model that is loaded at its first use, safe to copy, pickle and fork."""

from __future__ import annotations

from collections.abc import Sequence

from rapid_llm.context.embedder_loading import load_embedder
from rapid_llm.context.embedding import Embedder, batched
from rapid_llm.forked import Owner, ProcessLock
from rapid_llm.surrogates import without_surrogates


class LazyEmbedder:
    """Lists of numbers from an embedding model, for calls from any thread.

    Deep copies share the loaded model; a pickled one, and a forked process, load it anew.

    Args:
        name: name or folder, as :func:`load_embedder` takes it.
        device: the model's device; None takes the first accelerator, or the CPU.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self._name, self._device = name, device
        self._loaded: tuple[Owner, Embedder] | None = None
        self._lock = ProcessLock()

    def embed_documents(self, texts: Sequence[str], batch_size: int) -> list[list[float]]:
        """Vectors of unit length.

        Args:
            texts: texts to embed.
            batch_size: number of texts that the model reads at a time.

        Raises:
            ModelError: the model cannot be found or loaded, or gives invalid vectors.
            MissingDependencyError: the package that contains or runs it is not installed.
        """
        clean = [without_surrogates(text) for text in texts]
        vectors: list[list[float]] = []
        with self._lock:
            embedder = self._embedder()
            if hasattr(embedder, "batch_size"):
                embedder.batch_size = batch_size
            for batch in batched(clean, batch_size):
                vectors += embedder.embed_documents(batch).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Vector of unit length; errors as of :meth:`embed_documents`."""
        with self._lock:
            vector: list[float] = self._embedder().embed_query(without_surrogates(text)).tolist()
        return vector

    def named(self, name: str, device: str | None) -> LazyEmbedder:
        """This embedder if it has that name and device, else a new one."""
        same = (name, device) == (self._name, self._device)
        return self if same else LazyEmbedder(name, device)

    def _embedder(self) -> Embedder:
        if self._loaded is None or not self._loaded[0].here:
            self._loaded = Owner(self._name), load_embedder(self._name, self._device)
        return self._loaded[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LazyEmbedder) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash(self.__reduce__())

    def __deepcopy__(self, memo: object) -> LazyEmbedder:
        return self

    def __reduce__(self) -> tuple[type[LazyEmbedder], tuple[str, str | None]]:
        return LazyEmbedder, (self._name, self._device)
