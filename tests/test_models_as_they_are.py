"""Models that users change before and after a decoder is built: the logits follow."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import ARCHITECTURES, installed, tiny_model, tiny_tokenizer, transformers_greedy
from model_changes import (  # noqa: F401  (a fixture of every test)
    CHANGES,
    GREEDY,
    NEW,
    PROMPT,
    WIDE,
    as_decoder,
    layer,
    lora,
    model,
    own,
    short_chunks,
)
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.llama import modeling_llama

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.model_state import ModelState
from rapid_llm.errors import ModelError


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("dtype", "when"),
    [(torch.float32, "before"), (torch.float32, "after"), (torch.bfloat16, "after")],
)
def test_logits_are_those_of_the_changed_model(change, dtype, when):
    changed = tiny_model(**WIDE if dtype == torch.bfloat16 else {}).to(dtype)
    before = own(changed)
    runner = ModelRunner(changed, "x")
    if when == "after":
        as_decoder(runner)
    torch.manual_seed(1)
    replaced = CHANGES[change](changed)
    if replaced is not None or when == "before":
        changed = changed if replaced is None else replaced
        runner = ModelRunner(changed, "x")
    ours, expected = as_decoder(runner), own(changed)
    assert expected.shape != before.shape or (expected - before).norm() > 0.02 * before.norm()
    assert ours.shape == expected.shape
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    assert (ours - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", ["forward", "apply_rotary_pos_emb"])
def test_what_is_replaced_in_the_library_counts(monkeypatch, name):
    changed = tiny_model()
    runner = ModelRunner(changed, "x")
    before = as_decoder(runner)
    if name == "forward":
        original = modeling_llama.LlamaMLP.forward
        monkeypatch.setattr(
            modeling_llama.LlamaMLP, "forward", lambda self, x: original(self, x) * 1.5
        )
    else:
        monkeypatch.setattr(modeling_llama, name, lambda query, key, *_, **__: (query, key))
    assert not runner.lean
    after = as_decoder(runner)
    assert not torch.allclose(after, before, atol=0.1)
    torch.testing.assert_close(after, own(changed), rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    assert runner.lean
    torch.testing.assert_close(as_decoder(runner), before)


def test_a_hook_on_all_modules_counts():
    changed = tiny_model()
    runner = ModelRunner(changed, "x")
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 1.2 if isinstance(module, nn.Linear) else None
    )
    try:
        torch.testing.assert_close(as_decoder(runner), own(changed), rtol=1e-4, atol=1e-4)
    finally:
        hook.remove()
    torch.testing.assert_close(as_decoder(runner), own(changed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_torchao_quantized_are_used(dtype, when):
    quantization = installed("torchao.quantization")
    changed = tiny_model(**WIDE).to(dtype)
    runner = ModelRunner(changed, "x")
    if when == "after":
        as_decoder(runner)
    quantization.quantize_(changed, quantization.Int8WeightOnlyConfig())
    if when == "before":
        runner = ModelRunner(changed, "x")
    assert not runner.lean
    expected = own(changed)
    assert (as_decoder(runner) - expected).norm() < 0.05 * expected.norm()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    result = decoder.generate(PROMPT[:40], PROMPT[4:40], sampling=GREEDY)
    assert len(result.token_ids) == NEW


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_nobody_touched_is_plain_and_stays_the_same(architecture):
    untouched = tiny_model(architecture)
    runner = ModelRunner(untouched, "x")
    number = runner.state.number
    assert runner.state.plain
    as_decoder(runner)
    own(untouched)
    assert runner.state.take_samples() == number


def test_what_a_module_keeps_of_each_pass_is_no_change():
    changed = tiny_model()

    def count(module, args, output):
        module.calls = getattr(module, "calls", 0) + 1
        module.last = output

    layer(changed).mlp.register_forward_hook(count)
    runner = ModelRunner(changed, "x")
    torch.testing.assert_close(as_decoder(runner), own(changed), rtol=1e-4, atol=1e-4)
    # 3 chunks, the draft, and 3 passes: nothing was read again. Then the model's own.
    assert layer(changed).mlp.calls == 7 + 1


def test_a_model_is_freed_with_its_decoder():
    changed = model().bfloat16()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    decoder.generate(PROMPT[:20], PROMPT[:10], sampling=GREEDY)
    freed = weakref.ref(changed)
    del changed, decoder
    gc.collect()
    assert freed() is None


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_are_refused_by_name(kind):
    tuned = get_peft_model(model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ModelError, match=r"some-model.*'default' \(P.*_TUNING\).*LoRA"):
        RapidDecoder(tuned, tiny_tokenizer(), name="some-model")
    with tuned.disable_adapter():
        decoder = RapidDecoder(tuned, tiny_tokenizer(), name="some-model")
        expected = transformers_greedy(model(), PROMPT, NEW)
        assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == expected
    with pytest.raises(ModelError, match=r"some-model.*not supported"):
        decoder.generate(PROMPT, sampling=GREEDY)
    with tuned.disable_adapter():
        assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == expected


def test_an_adapter_that_a_word_switches_on_is_refused_by_name():
    base = model()
    tuned = get_peft_model(base, lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9]))
    for adapted in (tuned, base):
        with pytest.raises(ModelError, match=r"'default' \(LORA\).*not supported"):
            RapidDecoder(adapted, tiny_tokenizer())


def test_layers_that_do_not_match_the_config_are_refused_by_name():
    cut = tiny_model()
    decoder = RapidDecoder(cut, tiny_tokenizer(), name="some-model")
    cut.model.layers = cut.model.layers[:1]
    with pytest.raises(ModelError, match=r"some-model.*\[0\].*2 layers.*num_hidden_layers"):
        decoder.generate(PROMPT, sampling=GREEDY)
    cut.config.num_hidden_layers = 1
    expected = transformers_greedy(cut, PROMPT, NEW)
    assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == expected


# --- vocabularies of two widths -------------------------------------------------------------------


@pytest.mark.parametrize(("wide", "narrow"), [(80, 64), (64, 80), (96, 72)])
@pytest.mark.parametrize("lookup", [True, False])
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_target_and_drafter_may_pad_their_vocabularies_to_any_width(wide, narrow, lookup, mode):
    tokenizer = tiny_tokenizer()
    target = tiny_model(eos_token_id=None, vocab_size=wide)
    drafter = tiny_model(eos_token_id=None, vocab_size=narrow, seed=1)
    decoder = RapidDecoder(target, tokenizer, drafter, drafter_tokenizer=tokenizer)
    config = SpeculationConfig(mode=mode, gamma=4, lookup=lookup)
    prompt = PROMPT[:30]
    result = decoder.generate(
        prompt,
        prompt[5:],
        sampling=SamplingParams(max_new_tokens=40, ignore_eos=True),
        speculation=config,
    )
    expected = transformers_greedy(target, prompt, 40)
    if wide > 64:
        assert max(expected) >= 64  # of the padding
    if mode == "exact":
        assert result.token_ids == expected
    for penalty in (1.0, 1.3):
        sampling = SamplingParams(max_new_tokens=40, ignore_eos=True, temperature=2.0, seed=1,
                                  repetition_penalty=penalty)  # fmt: skip
        sampled = decoder.generate(prompt, prompt[5:], sampling=sampling, speculation=config)
        assert max(sampled.token_ids) < wide


# --- loading ------------------------------------------------------------------------------------


@pytest.fixture
def folder_with_an_adapter(tmp_path):
    base = model()
    base.generation_config.eos_token_id = None
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    tuned = get_peft_model(type(base).from_pretrained(tmp_path / "base"), lora())
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", tuned, base


@pytest.mark.parametrize("needed", [MIN_PEFT_VERSION, "99.0"])
def test_a_folder_with_an_adapter_answers_as_the_adapted_model(
    folder_with_an_adapter, needed, monkeypatch
):
    """transformers loads it also with a PEFT that its methods for adapters refuse."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", needed)
    folder, tuned, base = folder_with_an_adapter
    expected = transformers_greedy(tuned, PROMPT, NEW)
    assert expected != transformers_greedy(base, PROMPT, NEW)
    decoder = RapidDecoder.from_pretrained(folder, dtype="float32", device="cpu")
    assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == expected


def test_a_loaded_adapter_that_a_word_switches_on_is_refused_by_name(tmp_path):
    model().save_pretrained(tmp_path / "base")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9]),
    )
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    with pytest.raises(ModelError, match=r"the adapter 'default' \(LORA\) is not supported"):
        RapidDecoder.from_pretrained(tmp_path / "tuned", dtype="float32", device="cpu")


def test_a_model_is_put_into_evaluation_mode_again():
    changed = model()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    inject_adapter_in_model(lora(lora_dropout=0.5), changed)
    changed.train()
    result = decoder.generate(PROMPT, sampling=GREEDY)
    assert not any(module.training for module in changed.modules())
    assert result.token_ids == transformers_greedy(changed, PROMPT, NEW)


def test_a_state_is_looked_at_again_only_where_something_changed(monkeypatch):
    state = ModelState(tiny_model())
    before = state.number
    monkeypatch.setattr("rapid_llm.engine.model_state.Snapshot", None)
    assert [state.look() for _ in range(3)] == [before] * 3
