"""A document is embedded once, whoever asks and whatever interrupts; search is exact."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from chromadb.config import Settings
from contexts import (  # noqa: F401  (fixtures)
    DOCUMENT,
    QUESTIONS,
    TOPICS,
    Recorder,
    Scores,
    builder_fixture,
    minilm_fixture,
    tokenizer_fixture,
)
from transformers import PreTrainedTokenizerBase

from rapid_llm.context import ContextBuilder, Embedder, Span
from rapid_llm.context.store import ChunkStore
from rapid_llm.errors import InvalidParameterError

# --- the store ----------------------------------------------------------------------------------


def line_spans(lines: Sequence[str]) -> tuple[str, list[Span]]:
    spans, start = [], 0
    for line in lines:
        spans.append(Span(start, start + len(line), 1))
        start += len(line) + 1
    return "\n".join(lines), spans


@pytest.mark.parametrize("spread", [0, 1e-3, 1])
def test_search_is_exact_even_among_near_duplicates(spread: float) -> None:
    count = 1000
    text, spans = line_spans([f"{i} line" for i in range(count)])
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal(64) + spread * rng.standard_normal((count, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    stored = ChunkStore().open({text: spans}, f"spread {spread}")
    for start in range(0, count, 100):
        stored.add(range(start, start + 100), vectors[start : start + 100])
    query = vectors[7]
    assert np.allclose(stored.cosines(query), vectors @ query, atol=1e-5)


def test_the_callers_own_chroma_is_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """Chroma allows one in-memory client setting a process; ours must not take or need it."""
    builder = ContextBuilder(tokenizer, Recorder("beside"))
    client = chromadb.EphemeralClient(Settings(chroma_query_request_timeout_seconds=59))
    before = client.count_collections()
    assert builder.build(DOCUMENT, "anything").budget
    assert ContextBuilder(tokenizer, Recorder("beside")).build(DOCUMENT, "more").budget
    assert client.count_collections() == before


def test_a_directory_that_cannot_be_opened_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "file").write_text("no database")
    with pytest.raises(InvalidParameterError, match=r"store='.*file' cannot be opened"):
        ContextBuilder(tokenizer, Recorder("x"), store=tmp_path / "file")


# --- no second embedding ------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_a_document_is_embedded_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, minilm: Embedder, persistent: bool
) -> None:
    embedder = Recorder(f"once-{persistent}", minilm)
    options: dict[str, Any] = {
        "chunk_tokens": 64,
        "store": tmp_path / "chroma" if persistent else None,
    }
    builder = ContextBuilder(tokenizer, embedder, **options)
    first = builder.build(DOCUMENT, QUESTIONS["bread"])
    assert embedder.embedded == list(TOPICS.values())
    assert builder.build([DOCUMENT, DOCUMENT], QUESTIONS["chess"]).chunks
    another = ContextBuilder(tokenizer, embedder, **options)
    assert another.build(DOCUMENT, QUESTIONS["bread"]) == first
    assert len(embedder.embedded) == len(TOPICS)

    other_chunks = options | {"chunk_tokens": 128}
    ContextBuilder(tokenizer, embedder, **other_chunks).build(DOCUMENT, QUESTIONS["bread"])
    assert len(embedder.embedded) > len(TOPICS)
    renamed = Recorder(f"once-more-{persistent}", minilm)
    ContextBuilder(tokenizer, renamed, **options).build(DOCUMENT, QUESTIONS["bread"])
    assert len(renamed.embedded) == len(TOPICS)


def test_documents_of_the_same_shape_are_kept_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["The cat sat down.", "The dog ran away."]
    builder = ContextBuilder(tokenizer, Scores("shape", dict(zip(texts, [0.5, 0.9], strict=True))))
    scores = [builder.build(text, "question").chunks[0].score for text in texts]
    assert scores == pytest.approx([0.5, 0.9])


STORE_IN_A_PROCESS = """
import sys
import numpy as np
from rapid_llm.context.chunking import Span
from rapid_llm.context.store import ChunkStore
spans = [Span(0, 3, 1), Span(4, 7, 1)]
stored = ChunkStore(sys.argv[1]).open({"one two": spans}, "process")
missing = stored.missing()
if missing:
    stored.add(missing[:1], np.eye(2, dtype=np.float32)[missing[:1]])
else:
    missing = [round(s, 4) for s in stored.cosines(np.array([0.6, 0.8], dtype=np.float32))]
print(missing)
"""


def test_processes_share_a_directory(tmp_path: Path) -> None:
    results = [
        subprocess.run(
            [sys.executable, "-c", STORE_IN_A_PROCESS, str(tmp_path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for _ in range(3)
    ]
    assert results == ["[0, 1]", "[1]", "[0.6, 0.8]"]


@pytest.mark.parametrize("persistent", [False, True])
def test_an_interrupted_document_is_completed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, persistent: bool
) -> None:
    text = "\n\n".join(f"Part {i}. {topic}" for i in range(10) for topic in TOPICS.values())
    name = f"interrupted-{persistent}"
    options: dict[str, Any] = {
        "chunk_tokens": 64,
        "threshold": -1,
        "store": tmp_path if persistent else None,
    }
    interrupted = Recorder(name, fail_at=3)
    builder = ContextBuilder(tokenizer, interrupted, **options)
    with pytest.raises(KeyboardInterrupt):
        builder.build(text, "question")
    stored = len(interrupted.embedded)
    assert 0 < stored < 80
    seen: list[tuple[int, int]] = []
    done = builder.build(text, "question", progress=lambda *numbers: seen.append(numbers))
    assert len(set(interrupted.embedded)) == len(interrupted.embedded) == 80
    assert seen[0] == (0, 80 - stored)

    fresh = ContextBuilder(tokenizer, Recorder(f"fresh-{persistent}"), **options)
    assert done == fresh.build(text, "question")


def test_threads_embed_once_and_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    embedder = Recorder("threads")
    builder = ContextBuilder(tokenizer, embedder, chunk_tokens=64, threshold=-1)
    with ThreadPoolExecutor(4) as pool:
        contexts = list(pool.map(lambda _: builder.build(DOCUMENT, "question"), range(8)))
    assert len(embedder.embedded) == len(TOPICS)
    assert contexts == contexts[:1] * 8


def test_progress(tokenizer: PreTrainedTokenizerBase) -> None:
    seen: list[tuple[int, int]] = []
    builder = ContextBuilder(tokenizer, Recorder("progress"), chunk_tokens=64)
    documents = [DOCUMENT, "\n\n".join(f"{i}. {TOPICS['clock']}" for i in range(20))]
    builder.build(documents, "question", progress=lambda *numbers: seen.append(numbers))
    done = [d for d, _ in seen]
    assert done == sorted(set(done))
    assert (seen[0], seen[-1]) == ((0, 28), (28, 28))
    assert len(seen) > 2
    seen.clear()
    builder.build(documents, "another", progress=lambda *numbers: seen.append(numbers))
    assert seen == []
