"""Decoders loaded by name, copied and pickled, and the memory that they tell."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from decoding import DRAFT_PROMPT, GREEDY, TARGET_PROMPT

from rapid_llm.config import SamplingParams
from rapid_llm.decoder import Memory, RapidDecoder
from rapid_llm.engine import supported
from rapid_llm.engine.quantized import quantized_nbytes
from rapid_llm.errors import InvalidParameterError, MissingDependencyError, ModelError
from rapid_llm.models import LoadedModel

HUB = {"token": "t", "revision": "v1", "cache_dir": "/c", "trust_remote_code": True}


def test_an_old_name_of_an_argument_names_the_new_one():
    with pytest.raises(InvalidParameterError, match="'target' is now 'model'"):
        RapidDecoder(target=tiny_model(), tokenizer=tiny_tokenizer())


def test_an_option_that_the_model_does_not_have_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no_such_option"):
        RapidDecoder.from_pretrained(tmp_path, device="cpu", no_such_option=3)


def test_hub_options_reach_a_drafter_loaded_by_name(monkeypatch):
    calls = {}

    def load(source, *, dtype, device, **options):
        calls[source] = options
        return LoadedModel(tiny_model(), tiny_tokenizer(), str(source))

    monkeypatch.setattr("rapid_llm.decoder.load_model", load)
    monkeypatch.setattr("rapid_llm.preflight.require_model", lambda *_, **__: None)
    RapidDecoder.from_pretrained("org/target", "org/drafter", subfolder="big", **HUB)
    assert calls == {"org/target": HUB | {"subfolder": "big"}, "org/drafter": HUB}
    own = {"revision": "v2", "gguf_file": "x.gguf"}
    RapidDecoder.from_pretrained("org/target", "org/drafter", drafter_options=own, **HUB)
    assert calls == {"org/target": HUB, "org/drafter": HUB | own}
    decoder = RapidDecoder.from_pretrained("org/target", "org/target", drafter_options=own)
    assert calls["org/target"] == own  # another revision of it is another model
    assert decoder.drafter is not decoder.target
    with pytest.raises(InvalidParameterError, match=r"drafter_options=.*name one"):
        RapidDecoder.from_pretrained("org/target", drafter_options=own)


def test_unknown_models_are_named():
    with pytest.raises(ModelError, match=r"no-such/model.*smollm2-135m"):
        RapidDecoder.from_pretrained("no-such/model")
    with pytest.raises(ModelError, match=r"missing\.gguf.*no such file"):
        RapidDecoder.from_pretrained("/nowhere/missing.gguf")
    with pytest.raises(InvalidParameterError, match="'float3'"):
        RapidDecoder.from_pretrained("smollm2-135m", dtype="float3")
    with pytest.raises(InvalidParameterError, match="'tpu9'"):
        RapidDecoder.from_pretrained("smollm2-135m", device="tpu9")


def test_a_local_folder_loads_and_drafts_for_itself(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "model"
    alone = RapidDecoder.from_pretrained(folder, device="cpu")
    assert alone.drafter is alone.target  # shared weights
    assert RapidDecoder.from_pretrained(folder, folder, device="cpu").drafter.model is not None
    pair = RapidDecoder.from_pretrained(folder, tiny_model(seed=4), device="cpu", dtype="float32")
    assert pair.drafter is not pair.target
    expected = RapidDecoder(model, tokenizer).generate(TARGET_PROMPT, sampling=GREEDY).token_ids
    assert alone.generate(TARGET_PROMPT, sampling=GREEDY).token_ids == expected
    half = RapidDecoder.from_pretrained(folder, device="cpu", dtype="bfloat16")
    assert next(half.target.model.parameters()).dtype == torch.bfloat16


def test_a_model_in_use_is_not_loaded_twice(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    first = RapidDecoder.from_pretrained(tmp_path, device="cpu")
    second = RapidDecoder.from_pretrained(tmp_path, device="cpu")
    assert second.target.model is first.target.model
    other = RapidDecoder.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
    assert other.target.model is not first.target.model
    freed = weakref.ref(first.target.model)
    del first, second
    gc.collect()
    assert freed() is None


def test_what_is_not_on_this_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidParameterError, match=r"'cuda:7'.*'cpu'"):
        RapidDecoder.from_pretrained("smollm2-135m", device="cuda:7")
    with pytest.raises(InvalidParameterError, match=r"drafter_device='meta'.*name one"):
        RapidDecoder.from_pretrained("smollm2-135m", device="cpu", drafter_device="meta")
    monkeypatch.setattr(supported, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"flash-attn.*'sdpa'"):
        RapidDecoder(tiny_model(), tiny_tokenizer(), attn_implementation="flash_attention_2")

    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="could not be loaded"):
        RapidDecoder.from_pretrained(tmp_path, device="cpu")


def test_a_decoder_tells_its_memory(monkeypatch):
    monkeypatch.setattr(
        "rapid_llm.engine.device.Device.prefill_chunk", 3
    )  # of short prompts none were kept
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), drafter_quantization="int8")
    weights = sum(p.nbytes for p in decoder.target.model.parameters())
    assert decoder.memory == Memory(weights, 0, 0)  # asking quantizes nothing
    decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY)
    # 2 layers, keys and values, 2 KV heads of 8 float32: two prompts and what may follow them.
    kept = 2 * 2 * 2 * 8 * 4 * (len(TARGET_PROMPT) + len(DRAFT_PROMPT) + 2 * 40)
    int8 = quantized_nbytes(decoder.draft_runner.model)
    assert decoder.memory == Memory(weights, int8, kept)
    assert 0 < int8 < weights / 3
    decoder.clear_cache()
    assert decoder.memory.kept_kv == 0

    other = tiny_model("qwen3", seed=1)
    pair = RapidDecoder(tiny_model(), tiny_tokenizer(), other)
    assert pair.memory.drafter_weights == sum(p.nbytes for p in other.parameters())


def test_a_copy_of_a_decoder_is_the_decoder() -> None:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    assert copy.deepcopy(decoder) is copy.copy(decoder) is decoder


@pytest.mark.parametrize("asked", [False, True])
def test_a_pickled_decoder_answers_as_the_first(asked: bool) -> None:
    decoder = RapidDecoder(
        tiny_model(), tiny_tokenizer(), tiny_model(seed=1), drafter_quantization="int8"
    )
    sampling = SamplingParams(max_new_tokens=8)
    if asked:
        decoder.generate(TARGET_PROMPT, [5, 6], sampling=sampling)
    opened = pickle.loads(pickle.dumps(decoder))
    expected = decoder.generate(TARGET_PROMPT, [5, 6], sampling=sampling)
    assert opened.generate(TARGET_PROMPT, [5, 6], sampling=sampling).token_ids == expected.token_ids


def test_a_pickled_decoder_has_the_tokenizer_that_it_was_made_with() -> None:
    tokenizer = tiny_tokenizer()
    decoder = RapidDecoder(tiny_model(), tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    opened = pickle.loads(pickle.dumps(decoder))
    assert opened.tokenizer.chat_template == decoder.tokenizer.chat_template is None


def test_a_decoder_that_was_loaded_by_name_is_pickled_as_the_name(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    decoder = RapidDecoder.from_pretrained(tmp_path, dtype="float32")
    pickled = pickle.dumps(decoder)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).target.model is decoder.target.model  # weights are shared


def test_what_a_caller_does_to_the_tokenizer_is_not_the_decoders() -> None:
    tokenizer = tiny_tokenizer()
    decoder = RapidDecoder(tiny_model(), tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    result = decoder.generate("w5 w6 w7 w8 w9", sampling=SamplingParams(max_new_tokens=1))
    assert result.stats.prompt_tokens >= 5
