"""What can be known to be wrong is refused before a model is loaded."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model

from rapid_llm import RapidDecoder
from rapid_llm.config import RetrievalConfig
from rapid_llm.context.builder import require_retrieval
from rapid_llm.engine import supported
from rapid_llm.errors import InvalidParameterError, MissingDependencyError, ModelError
from rapid_llm.folders import require_folder
from rapid_llm.models import require_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a model's config, without weights: loading it would be another error."""
    folder = tmp_path / "model"
    tiny_model().config.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rapid_llm.decoder.load_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def folder_of(path: Path, config: dict[str, Any], name: str = "config.json") -> Path:
    path.mkdir()
    (path / name).write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ({"drafter": "nowhere/at-all"}, "model 'nowhere/at-all' could not be loaded"),
        ({"drafter": "nowhere.gguf"}, "there is no such file"),
        ({"drafter_device": "meta"}, "needs a drafter"),
        ({"drafter": "smollm2-135m", "drafter_device": "cuda:7"}, "device='cuda:7' cannot be used"),
        (
            {"drafter": "smollm2-135m", "drafter_device_map": {"model": "cuda:7"}},
            "device_map has 'cuda:7' for 'model'",
        ),
        ({"drafter_device_map": "everywhere", "drafter": "smollm2-135m"}, "must be one of auto"),
        ({"drafter_options": {"revision": "1"}}, "need a drafter"),
        ({"drafter_quantization": "int5"}, "drafter_quantization='int5' is not allowed"),
        (
            {"drafter": "smollm2-135m", "drafter_device": "meta", "drafter_quantization": "int8"},
            "'int8' does not serve on meta, where smollm2-135m is",
        ),
        ({"cuda_graphs": True}, "cuda_graphs=True, but passes of"),
        ({"kv_cache_dir_bytes": 5}, "limits no folder"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs holds 'messages'"),
        ({"attn_implementation": "ours"}, "attn_implementation='ours'"),
        ({"max_sequences": 0}, "max_sequences=0"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(
    model: Path, options: dict[str, Any], mention: str
) -> None:
    with pytest.raises((InvalidParameterError, ModelError), match=mention):
        RapidDecoder.from_pretrained(model, **options)


def test_attention_that_is_not_installed_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supported, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="flash-attn"):
        RapidDecoder.from_pretrained(model, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("which", ["model", "drafter"])
def test_an_architecture_that_is_not_supported_is_refused(
    model: Path, tmp_path: Path, which: str
) -> None:
    other = folder_of(tmp_path / "other", {"model_type": "t5"})
    with pytest.raises(ModelError, match=r"other: architecture 't5' is not supported.*llama"):
        RapidDecoder.from_pretrained(**{"model": model, which: other})


def test_an_adapter_whose_base_is_missing_is_refused(model: Path, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(model)}
    adapter = folder_of(tmp_path / "adapter", settings, "adapter_config.json")
    assert require_model(adapter) == "llama"
    astray = settings | {"base_model_name_or_path": str(tmp_path / "nowhere")}
    adapter = folder_of(tmp_path / "astray", astray, "adapter_config.json")
    with pytest.raises(ModelError, match=r"astray' is an adapter, and its base model .*nowhere'"):
        RapidDecoder.from_pretrained(model, adapter)


def test_a_folder_without_a_config_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty' could not be loaded.* config\.json"):
        RapidDecoder.from_pretrained(model, tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[1", encoding="utf-8")
    with pytest.raises(ModelError, match="broken' could not be loaded"):
        RapidDecoder.from_pretrained(tmp_path / "broken")


def test_the_text_model_of_a_larger_one_counts(tmp_path: Path) -> None:
    parts = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert require_model(folder_of(tmp_path / "parts", parts)) == "gemma3_text"


@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_a_folder_for_kv_that_cannot_be_one_is_refused(
    model: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InvalidParameterError, match=rf"kv_cache_dir='.*{place}'.* is no folder"):
        RapidDecoder.from_pretrained(model, kv_cache_dir=tmp_path / place)


def test_a_folder_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert require_folder("store", tmp_path / "some" / "where") == tmp_path / "some" / "where"
    assert not (tmp_path / "some").exists()  # only looked at
    monkeypatch.setenv("HOME", str(tmp_path))
    assert require_folder("store", "~/kv") == tmp_path / "kv"
    # The system's answer: the superuser may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InvalidParameterError, match=r"store='.*' cannot be used.* is not writable"):
        require_folder("store", tmp_path)  # can be neither written to nor read
    # One that is there can be read from.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert require_folder("store", tmp_path) == tmp_path
    with pytest.raises(InvalidParameterError, match=r"store='.*' cannot be used.* is not writable"):
        require_folder("store", tmp_path / "some" / "where")


def test_what_a_retriever_could_not_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="embedding model 'nowhere'"):
        require_retrieval(RetrievalConfig(embedder="nowhere"))
    with pytest.raises(ModelError, match="embedding model"):
        require_retrieval(RetrievalConfig(embedder=str(tmp_path)))  # a folder without a model
    (tmp_path / "file").touch()
    bad = RetrievalConfig(store=str(tmp_path / "file"))
    with pytest.raises(InvalidParameterError, match="cannot be opened or used"):
        require_retrieval(bad)
    require_retrieval(RetrievalConfig(retriever="bm25", embedder="nowhere", store=bad.store))
