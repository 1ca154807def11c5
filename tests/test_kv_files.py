"""Files of kept KV: what is written, found again, damaged, of others, or not to be had."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import xxhash
from conftest import ARCHITECTURES, threads, tiny_model
from kept_prompts import (
    AMPLE,
    BYTES_PER_TOKEN,
    CHUNK,
    DOCUMENT,
    LONG,
    OTHER,
    ask,
    make_forward,
    passes_of,
    read,
    text,
)
from kv_folders import (  # noqa: F401  (fixtures)
    files_of,
    later,
    litter_of,
    runner_fixture,
    saved_fixture,
    short_chunks,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rapid_llm.engine.cpu.int8 import Int8Linear
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache import file_format
from rapid_llm.engine.prefix_cache.files import KVFiles
from rapid_llm.engine.prefix_cache.fingerprint import bytes_of, fingerprint
from rapid_llm.engine.prefix_cache.folder import Folder
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def test_another_process_reads_only_the_new_question(saved):
    cache, runner = later(saved), make_forward()
    assert ask(cache, runner, [*LONG, 6, 7, 8]) == len(LONG)
    assert ask(cache, runner, [*LONG[:700], *OTHER]) == 700
    assert files_of(saved.parent) == [saved]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_holds_every_architecture(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_SAVING", 40)
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_LOADING", 20)
    for reused in (0, len(DOCUMENT)):
        runner = ModelRunner(tiny_model(architecture), "tiny")
        assert ask(PrefixCache(AMPLE, tmp_path), runner, [*DOCUMENT, 5 + bool(reused), 5]) == reused


def test_bfloat16_comes_back_as_it_was(tmp_path):
    model = tiny_model(max_position_embeddings=4096).to(torch.bfloat16)
    caches = []
    for _ in range(2):
        runner = ModelRunner(model, "tiny")
        with PrefixCache(AMPLE, tmp_path).lease(runner, LONG, len(LONG)) as lease:
            read(runner, LONG, lease)
        caches.append(lease.cache)
    assert lease.reused == len(LONG) - 1
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(a.keys[:, :, : lease.reused], b.keys[:, :, : lease.reused])
        assert torch.equal(a.values[:, :, : lease.reused], b.values[:, :, : lease.reused])


def test_only_whole_long_prompts_that_no_file_covers_are_written(runner, saved):
    def files() -> int:
        return len(files_of(saved.parent))

    assert ask(later(saved), runner, text(1000, seed=30)) == 0
    assert files() == 1
    assert ask(later(saved), runner, [*LONG, *text(150, seed=31)]) == len(LONG)
    assert files() == 1
    half = text(2500, seed=32)
    with later(saved).lease(runner, half, 2500) as lease:
        read(runner, half, lease, until=2000)
    assert files() == 1
    assert ask(later(saved), runner, [*LONG[:700], *text(1100, seed=33)]) == 700
    assert files() == 2


def test_a_longer_conversation_takes_the_place_of_its_beginning_only(runner, saved):
    turn = [*LONG, *text(1100, seed=33), 5]
    assert ask(later(saved), runner, turn) == len(LONG)
    (longer,) = files_of(saved.parent)
    assert longer != saved
    assert ask(later(saved), runner, [*LONG, 7, 8]) == len(LONG)
    # Another branch leaves the first one there, which has more than the two share.
    other = [*turn[:1600], *text(1100, seed=34), 5]
    assert ask(later(saved), runner, other) == 1600
    assert len(files_of(saved.parent)) == 2
    assert ask(later(saved), runner, turn) == len(turn) - 1


def test_two_readers_of_one_document_write_it_once(runner, tmp_path):
    cache = PrefixCache(AMPLE, tmp_path)
    with (
        cache.lease(runner, [*LONG, 5, 6], 1502) as one,
        cache.lease(runner, [*LONG, 6, 7], 1502) as b,
    ):
        read(runner, [*LONG, 5, 6], one)
        read(runner, [*LONG, 6, 7], b)
    assert len(files_of(tmp_path)) == 1


@pytest.mark.parametrize("more", [[], LONG[::-1]], ids=["the file's prompt", "a longer prompt"])
def test_memory_wins_over_a_file_that_has_little_more(runner, saved, monkeypatch, more):
    cache = later(saved)
    assert ask(cache, runner, LONG[:1300]) == 1290
    monkeypatch.setattr(KVFiles, "load", None)
    assert ask(cache, runner, [*LONG, *more]) == 1290


def test_a_file_wins_over_memory_that_has_much_less(runner, saved):
    cache = PrefixCache(AMPLE, saved.parent)
    with cache.lease(runner, LONG[:200], 200) as lease:
        read(runner, LONG[:200], lease)
    assert lease.reused == 0  # too short to be worth loading
    assert ask(cache, runner, LONG) == len(LONG) - CHUNK
    assert cache.nbytes == len(LONG) * BYTES_PER_TOKEN  # and replaces it there


def damage(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"garbage" * 1000),
        lambda path: damage(path, path.stat().st_size // 2),
        lambda path: damage(path, path.stat().st_size - 1),
    ],
    ids=["truncated", "empty", "garbage", "flipped inside", "flipped at the end"],
)
def test_a_damaged_file_is_named_ignored_and_replaced(runner, saved, harm):
    harm(saved)
    with pytest.warns(UserWarning, match=rf"{saved.name} is damaged.*delete it"):
        assert ask(later(saved), runner, [*LONG, 5, 6]) == 0
    assert ask(later(saved), runner, [*LONG, 5, 6]) == len(LONG) + 1
    assert files_of(saved.parent) == [saved]


def test_a_flipped_byte_anywhere_never_changes_an_answer(runner, tmp_path, monkeypatch):
    """``ask`` compares the logits; whether a file is used or warned about may differ."""
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_SAVING", 40)
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_LOADING", 20)
    prompt = [*DOCUMENT, 5]
    ask(PrefixCache(AMPLE, tmp_path), runner, prompt)
    (path,) = files_of(tmp_path)
    before = path.read_bytes()
    for at in [*range(0, 700, 23), *range(700, len(before), 499)]:
        damage(path, at)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ask(PrefixCache(AMPLE, tmp_path), runner, prompt)
        path.write_bytes(before)


@pytest.mark.parametrize("change", ["shape", "dtype", "layers", "tokens"])
def test_a_file_that_contradicts_the_model_is_refused(runner, saved, change):
    """Even with a right checksum: no file of ours looks so."""
    tensors = load_file(saved)
    with safe_open(saved, "pt") as file:
        metadata = dict(file.metadata())
    if change == "shape":
        tensors["keys.1"] = tensors["keys.1"].transpose(2, 3).contiguous()
    elif change == "dtype":
        tensors["keys.1"] = tensors["keys.1"].bfloat16()
    elif change == "layers":
        tensors["keys.2"] = tensors["keys.1"].clone()
    else:
        tensors["tokens"] = tensors["tokens"].long()
    order = ["tokens", "keys.0", "values.0", "keys.1", "values.1"]
    checksum = xxhash.xxh3_128()
    for name in order:
        checksum.update(bytes_of(tensors[name]))
    save_file(tensors, saved, metadata | {"xxh3_128": checksum.hexdigest()})
    with pytest.warns(UserWarning, match="is damaged"):
        assert ask(later(saved), runner, [*LONG, 5, 6]) == 0


def test_files_of_other_models_dtypes_and_formats_are_passed_over(runner, saved, monkeypatch):
    finetuned = make_forward()
    with torch.no_grad():
        finetuned.model.model.layers[1].mlp.up_proj.weight += 0.01
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    others = [
        make_forward(seed=1),
        finetuned,
        make_forward(rope_parameters=rope),
        ModelRunner(make_forward().model.to(torch.bfloat16), "tiny"),
    ]
    for other in others:
        with later(saved).lease(other, [*LONG, 6, 7], 1502) as lease:
            assert lease.reused == 0
    # Even under our file's name.
    theirs = fingerprint(others[0].model)
    assert theirs is not None
    renamed = saved.rename(saved.with_name(theirs[:16] + saved.name[16:]))
    with later(saved).lease(others[0], [*LONG, 6, 7], 1502) as lease:
        assert lease.reused == 0
    renamed.rename(saved)
    monkeypatch.setattr(file_format, "FORMAT", "rapid-llm-kv/0")
    with later(saved).lease(runner, [*LONG, 6, 7], 1502) as lease:
        assert lease.reused == 0


def test_a_file_of_passes_that_round_otherwise_is_passed_over(runner, saved):
    with (
        threads(torch.get_num_threads() + 1),
        later(saved).lease(runner, [*LONG, 6, 7], 1502) as lease,
    ):
        assert lease.reused == 0
    assert ask(later(saved), runner, [*LONG, 6, 7]) == len(LONG)


def test_int8_layers_over_the_same_weights_are_another_model(runner):
    model = runner.model.to(torch.bfloat16)
    before, mlp = fingerprint(model), model.model.layers[1].mlp
    mlp.up_proj = Int8Linear(mlp.up_proj)
    assert fingerprint(model) != before


def test_weights_that_are_elsewhere_have_no_files_and_a_warning_says_so(saved):
    with torch.device("meta"):
        runner = make_forward()
    assert fingerprint(runner.model) is None
    chain, files = passes_of(runner, [*LONG, 5]), KVFiles(saved.parent)
    with pytest.warns(
        UserWarning, match=r"kv_cache_dir has no effect for tiny.*leave kv_cache_dir"
    ):
        assert files.find(runner, chain, runner.origin(1502)) == (None, 0)
    assert files.find(runner, chain, runner.origin(1502)) == (None, 0)  # once


@pytest.mark.parametrize(
    "what", ["os.replace", "rapid_llm.engine.prefix_cache.file_format.save_file"]
)
def test_a_failure_to_write_is_a_warning_and_leaves_no_litter(runner, tmp_path, monkeypatch, what):
    def full(*_):
        raise OSError(28, "No space left on device")

    cache = PrefixCache(AMPLE, tmp_path)
    with monkeypatch.context() as context:
        context.setattr(what, full)
        with pytest.warns(UserWarning, match=rf"{tmp_path}.*No space left.*free some space"):
            assert ask(cache, runner, LONG) == 0
    assert litter_of(tmp_path) == files_of(tmp_path) == []
    assert ask(cache, runner, LONG) == len(LONG) - 1


def test_a_folder_that_is_read_only_is_read_from(runner, saved, monkeypatch):
    # The system's answer: the superuser may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr(Folder, "write", lambda *_: pytest.fail("written to"))
    with pytest.warns(UserWarning, match=f"kv_cache_dir='{saved.parent}' is read-only: kept KV"):
        cache = later(saved)
    assert ask(cache, runner, [*LONG, 9]) == len(LONG)
    assert ask(cache, runner, text(1500, seed=4)) == 0  # one warning is enough
    assert files_of(saved.parent) == [saved]


def test_a_directory_that_cannot_be_one_is_a_warning(runner, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be written"):
        assert ask(PrefixCache(AMPLE, tmp_path / "file"), runner, LONG) == 0


def test_warnings_as_errors_still_give_the_cache_back(runner, tmp_path):
    (tmp_path / "file").write_text("")
    cache = PrefixCache(AMPLE, tmp_path / "file")
    with pytest.raises(UserWarning, match="could not be written"):
        ask(cache, runner, LONG)
    assert cache.nbytes == len(LONG) * BYTES_PER_TOKEN


def test_a_file_deleted_meanwhile_is_read_anew(runner, saved):
    cache = later(saved)
    assert cache._files is not None
    chain = passes_of(runner, [*LONG, 5])
    assert cache._files.find(runner, chain, runner.origin(1502)) == (saved, len(LONG))
    saved.unlink()
    assert ask(cache, runner, LONG) == 0


def test_headers_are_read_once(runner, saved, monkeypatch):
    cache = later(saved)
    ask(cache, runner, LONG)
    monkeypatch.setattr(file_format, "read_header", None)
    cache.clear()
    assert ask(cache, runner, LONG) == len(LONG) - CHUNK
