"""GGUF files are converted once, and what was kept is used only as it was written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rapid_llm.errors import MissingDependencyError
from rapid_llm.gguf import load_gguf
from rapid_llm.models import packaged_model


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return packaged_model()
    except MissingDependencyError:
        pytest.skip("the packaged model is not installed")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the GGUF files that were converted."""
    seen: list[str] = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(*arguments: Any, **options: Any) -> Any:
        if "gguf_file" in options:
            seen.append(options["gguf_file"])
        return load(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    return seen


@pytest.fixture
def cache(tmp_path: Path, converted: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, with what other tests have converted."""
    load_gguf(path, torch.bfloat16, {}, {})
    monkeypatch.setenv("RAPID_LLM_CACHE", str(tmp_path / "own"))
    shutil.copytree(converted, tmp_path / "own" / "gguf")
    return tmp_path / "own" / "gguf"


def test_what_is_kept_is_what_transformers_makes_of_the_file(
    path: Path, cache: Path, conversions: list[str]
) -> None:
    model, tokenizer = load_gguf(path, torch.bfloat16, {}, {})
    assert conversions == []
    ours = model.state_dict()
    settings = model.generation_config.to_dict(), model.config.to_dict()
    own = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    assert ours.keys() == own.state_dict().keys()
    for name, tensor in own.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    assert settings[0] == own.generation_config.to_dict()
    for key in ("rope_parameters", "max_position_embeddings", "eos_token_id", "model_type"):
        assert settings[1].get(key) == own.config.to_dict().get(key)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Héllo <|im_end|> 你好\n\tworld 123"
    assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    assert tokenizer.get_vocab() == theirs.get_vocab()
    assert tokenizer.chat_template == theirs.chat_template
    assert tokenizer.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize("damage", ["a byte", "a file", "the checksums"])
def test_what_is_damaged_is_converted_again(
    path: Path, cache: Path, conversions: list[str], damage: str
) -> None:
    (folder,) = (each for each in cache.iterdir() if "bfloat16" in each.name)
    weights = folder / "model.safetensors"
    if damage == "a byte":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "a file":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "checksums.json").write_text("[]")
    load_gguf(path, torch.bfloat16, {}, {})
    assert conversions == [path.name]
    load_gguf(path, torch.bfloat16, {}, {})
    assert conversions == [path.name]


def test_options_of_one_load_are_not_those_of_the_next(
    path: Path, cache: Path, conversions: list[str]
) -> None:
    shutil.rmtree(cache)
    changed, _ = load_gguf(path, torch.bfloat16, {"max_position_embeddings": 128}, {})
    assert changed.config.max_position_embeddings == 128
    assert conversions == [path.name]
    model, _ = load_gguf(path, torch.bfloat16, {}, {})
    assert model.config.max_position_embeddings == 8192
    assert conversions == [path.name]


def test_a_folder_that_cannot_be_written_is_told(
    path: Path, tmp_path: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAPID_LLM_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*file.*RAPID_LLM_CACHE"):
        load_gguf(path, torch.bfloat16, {}, {})
    assert conversions == [path.name]
