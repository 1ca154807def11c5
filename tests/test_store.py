"""The vector store: many documents, other processes, other embedders, folders that are not ours."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from inspect import getsource
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_tokenizer

from rapid_llm.context import ContextBuilder, Span, database
from rapid_llm.context.embedding import Vectors
from rapid_llm.context.store import ChunkStore, StoredChunks
from rapid_llm.errors import ForkedProcessError, InvalidParameterError, ModelError


def random_vectors(count: int, length: int = 16, seed: int = 0) -> Vectors:
    vectors = np.random.default_rng(seed).standard_normal((count, length)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def texts(count: int) -> dict[str, list[Span]]:
    return {f"text {i}": [Span(0, 4, 1), Span(5, len(f"text {i}"), 1)] for i in range(count)}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts files in /proc")


@pytest.fixture(autouse=True)
def _databases_of_this_test() -> Iterator[None]:
    yield
    for directory in [d for d in database._databases if d is not None]:
        database._databases.pop(directory).close()


@linux
def test_many_documents_take_as_many_open_files_as_few(tmp_path: Path) -> None:
    before = open_files()
    stored = ChunkStore(tmp_path).open(texts(300), "many")
    vectors = random_vectors(600)
    for start in range(0, 600, 100):
        stored.add(range(start, start + 100), vectors[start : start + 100])
    assert open_files() - before < 40
    assert np.allclose(stored.cosines(vectors[5]), vectors @ vectors[5], atol=1e-5)
    some = ChunkStore(tmp_path).open(dict(list(texts(300).items())[100:103]), "many")
    assert some.missing() == []
    assert np.allclose(some.cosines(vectors[5]), vectors[200:206] @ vectors[5], atol=1e-5)
    assert open_files() - before < 40


@linux
def test_many_folders_take_as_many_open_files_as_few(tmp_path: Path) -> None:
    stores = [ChunkStore(tmp_path / str(i)) for i in range(12)]
    before = open_files()
    vectors = random_vectors(2)
    for turn in range(2):
        for store in stores:
            stored = store.open(texts(1), "folders")
            assert stored.missing() == ([] if turn else [0, 1])
            stored.add([0, 1], vectors)
            assert stored.cosines(vectors[0]) == pytest.approx([1, vectors[0] @ vectors[1]])
    assert open_files() - before < 100


def test_texts_that_follow_one_another_are_embedded_in_full_batches(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counted:
        name = "counted"

        def embed_documents(self, texts: list[str]) -> Vectors:
            calls.append(len(texts))
            return random_vectors(len(texts))

        def embed_query(self, text: str) -> Vectors:
            return random_vectors(1)[0]

    documents = [f"w{3 + i} w{4 + i}" for i in range(40)]
    ContextBuilder(tiny_tokenizer(), Counted(), store=tmp_path).build(documents, "w5")
    assert calls == [16, 16, 8]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_new_folder_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ChunkStore(tmp_path / "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_embedders_have_vectors_of_their_own(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path)
    store.open(texts(1), "one").add([0, 1], random_vectors(2, 4))
    other = store.open(texts(1), "other")
    assert other.missing() == [0, 1]
    other.add([0, 1], random_vectors(2, 8))
    assert len(other.cosines(random_vectors(1, 8)[0])) == 2
    assert len(store.open(texts(1), "one").cosines(random_vectors(1, 4)[0])) == 2


def test_another_length_under_a_name_is_told_so(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path)
    stored = store.open(texts(2), "name")
    stored.add([0, 1, 2, 3], random_vectors(4, 4))
    message = "differ in length from those stored under its name .*give other vectors another name"
    with pytest.raises(ModelError, match=message):
        stored.cosines(random_vectors(1, 5)[0])
    with pytest.raises(ModelError, match=message):
        store.open({"new": [Span(0, 3, 1)]}, "name").add([0], random_vectors(1, 5))
    assert len(stored.cosines(random_vectors(1, 4)[0])) == 4


# --- other processes ----------------------------------------------------------------------------

WRITES = f"""
import sys
import numpy as np
from rapid_llm.context.chunking import Span
from rapid_llm.context.embedding import Vectors
from rapid_llm.context.store import ChunkStore

{getsource(random_vectors)}
{getsource(texts)}
stored = ChunkStore(sys.argv[1]).open(texts(700), sys.argv[2])
vectors = random_vectors(1400)
for start in range(0, 1400, 100):
    stored.add(range(start, start + 100), vectors[start : start + 100])
    print(start, flush=True)
"""


def writer(folder: Path, embedder: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITES, str(folder), embedder],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_another_process_writes_is_read_while_it_writes(tmp_path: Path) -> None:
    """1,400 vectors, as Chroma moves them to other files with every 1,000."""
    vectors = random_vectors(1400)
    stored = ChunkStore(tmp_path).open(texts(700), "shared")
    with writer(tmp_path, "shared") as other:
        assert other.stdout is not None
        for line in other.stdout:
            written = 1400 - len(stored.missing())
            assert int(line) + 100 <= written
            part = dict(list(texts(700).items())[: written // 2])
            cosines = ChunkStore(tmp_path).open(part, "shared").cosines(vectors[3])
            assert np.allclose(cosines, vectors[: len(cosines)] @ vectors[3], atol=1e-5)
    assert other.returncode == 0
    assert np.allclose(stored.cosines(vectors[3]), vectors @ vectors[3], atol=1e-5)


@pytest.mark.parametrize("embedders", [("a", "b"), ("a", "a")])
def test_two_processes_write_side_by_side(tmp_path: Path, embedders: tuple[str, str]) -> None:
    with writer(tmp_path, embedders[0]) as one, writer(tmp_path, embedders[1]) as other:
        one.communicate()
        other.communicate()
    assert (one.returncode, other.returncode) == (0, 0)
    vectors = random_vectors(1400)
    for name in embedders:
        cosines = ChunkStore(tmp_path).open(texts(700), name).cosines(vectors[3])
        assert np.allclose(cosines, vectors @ vectors[3], atol=1e-5)


def test_a_folder_that_another_process_does_not_let_go_of_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    monkeypatch.setattr(database, "LOCK_SECONDS", 0.1)
    stored = ChunkStore(tmp_path).open(texts(1), "held")
    with filelock.FileLock(tmp_path / "rapid-llm.lock"):
        with pytest.raises(InvalidParameterError, match=r"store='.*another process"):
            stored.missing()
        with pytest.raises(InvalidParameterError, match=r"store='.*another process"):
            stored.add([0], random_vectors(1))
    assert stored.missing() == [0, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("persistent", [True, False])
def test_a_forked_process_is_told_what_to_do(tmp_path: Path, persistent: bool) -> None:
    stored = ChunkStore(tmp_path if persistent else None).open(texts(1), f"fork {persistent}")
    stored.add([0, 1], random_vectors(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        told = 0
        try:
            with pytest.raises(ForkedProcessError, match="'spawn'"):
                stored.missing()
            with pytest.raises(ForkedProcessError, match="'spawn'"):
                ChunkStore(tmp_path / "new")
            told = 2
        finally:
            os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert stored.missing() == []


# --- folders that are not as we left them ---------------------------------------------------------


def test_a_folder_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    import chromadb

    client = chromadb.PersistentClient(tmp_path)
    for i in range(3):
        client.create_collection(f"rapid-{i:032x}", metadata={"embedder": "old"})
    client.create_collection("somebody-elses")
    with pytest.warns(UserWarning, match=r"store='.*' holds 3 documents as version"):
        stored = ChunkStore(tmp_path).open(texts(1), "old")
    assert stored.missing() == [0, 1]
    stored.add([0, 1], random_vectors(2))
    assert stored.missing() == []


def test_a_damaged_folder_is_refused_and_can_be_used_once_it_is_repaired(tmp_path: Path) -> None:
    (tmp_path / "chroma.sqlite3").write_bytes(b"no database" * 1000)
    for _ in range(2):
        with pytest.raises(InvalidParameterError, match=r"store='.*cannot be opened"):
            ChunkStore(tmp_path)
    (tmp_path / "chroma.sqlite3").unlink()
    assert ChunkStore(tmp_path).open(texts(1), "repaired").missing() == [0, 1]


def test_a_folder_that_is_deleted_under_a_store_is_made_again(tmp_path: Path) -> None:
    stored = ChunkStore(tmp_path / "gone").open(texts(1), "gone")
    stored.add([0, 1], random_vectors(2))
    shutil.rmtree(tmp_path / "gone")
    assert stored.missing() == [0, 1]
    if os.name != "nt":
        assert stat.S_IMODE((tmp_path / "gone").stat().st_mode) == 0o700
    stored.add([0, 1], random_vectors(2))
    assert stored.missing() == []


def test_vectors_in_memory_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    store, vectors = ChunkStore(), random_vectors(2)
    monkeypatch.setattr(database, "MEMORY_BYTES", 3 * vectors.nbytes)

    def missing(name: str) -> bool:
        return bool(store.open({name: [Span(0, 2, 1), Span(2, 4, 1)]}, "limited").missing())

    def add(name: str) -> StoredChunks:
        stored = store.open({name: [Span(0, 2, 1), Span(2, 4, 1)]}, "limited")
        stored.add([0, 1], vectors)
        return stored

    for name in ("aaaa", "bbbb", "cccc"):
        add(name)
    assert not any(map(missing, ("bbbb", "aaaa")))  # which are searched last
    add("dddd")
    assert [missing(name) for name in ("aaaa", "bbbb", "cccc", "dddd")] == [False, False, True,
                                                                          False]  # fmt: skip
    searched = [add(name) for name in ("eeee", "ffff", "gggg", "hhhh")]  # all are needed
    for stored in searched:
        assert stored.cosines(vectors[0])[0] == pytest.approx(1)
    assert missing("aaaa")
