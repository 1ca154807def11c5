"""KV belongs to the state of the model that made it: adapters, weights, code, files."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, transformers_greedy
from model_changes import (  # noqa: F401  (a fixture of every test)
    GREEDY,
    IDS,
    LONG,
    NEW,
    PLACES,
    PROMPT,
    add,
    another_norm,
    data_exchanged,
    epsilon,
    frequencies,
    hook,
    layer,
    linear_subclass,
    lora,
    method_replaced,
    model,
    own,
    parameter_subclass,
    reusable,
    scaling,
    short_chunks,
    state_loaded,
    two_adapters,
    written_in_place,
    written_through_data,
)
from peft import get_peft_model
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.fingerprint import fingerprint, mixed
from rapid_llm.errors import OutdatedKVError


@pytest.fixture
def adapters_of_transformers():
    """transformers has methods for adapters, which may ask for a newer PEFT than there is."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers says: {error}")


def answers(decoder, changed, prompt=PROMPT):
    """Tokens that were not read again, once the answer is the model's own."""
    result = decoder.generate(prompt, sampling=GREEDY)
    assert result.token_ids == transformers_greedy(changed, prompt, NEW)
    return result.stats.cached_tokens


def test_each_adapter_has_kv_of_its_own():
    tuned = two_adapters()
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    kept = reusable(PROMPT)
    assert answers(decoder, tuned) == 0
    tuned.set_adapter("b")
    assert answers(decoder, tuned) == 0
    tuned.set_adapter("a")
    assert answers(decoder, tuned) == kept
    with tuned.disable_adapter():
        assert answers(decoder, tuned) == 0
    assert answers(decoder, tuned) == kept
    tuned.merge_adapter()
    assert answers(decoder, tuned) == 0
    tuned.unmerge_adapter()
    answers(decoder, tuned)
    tuned.set_adapter("b")
    for module in tuned.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("b", 3.0)
    assert answers(decoder, tuned) == 0
    decoder.keep_only(PROMPT)
    assert answers(decoder, tuned) == kept
    tuned.delete_adapter("b")
    answers(decoder, tuned)


def test_adapters_of_transformers_own_are_told_apart(adapters_of_transformers):
    tuned = model()
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    answers(decoder, tuned)
    for name in ("a", "b"):
        tuned.add_adapter(lora(), name)
        assert answers(decoder, tuned) == 0
    for active in ("a", ["a", "b"]):
        tuned.set_adapter(active)
        answers(decoder, tuned)
    tuned.disable_adapters()
    assert answers(decoder, tuned) == 0


@pytest.mark.parametrize(
    "edit",
    [
        written_in_place,
        written_through_data,
        data_exchanged,
        lambda m: PLACES["query"](m).weight.detach().numpy().__imul__(-2),
        state_loaded(assign=False),
        state_loaded(assign=True),
        frequencies,
        epsilon,
        scaling,
        another_norm,
    ],
)
def test_kv_of_other_weights_is_not_taken(edit):
    changed = model()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    assert answers(decoder, changed) == 0
    assert answers(decoder, changed) == reusable(PROMPT)
    edit(changed)
    assert answers(decoder, changed) == 0
    assert answers(decoder, changed) == reusable(PROMPT)


def test_nothing_is_kept_of_a_model_with_somebodys_code_in_it():
    changed, factor = model(), [1.5]
    handle = layer(changed).mlp.register_forward_hook(lambda module, args, out: out * factor[0])
    decoder = RapidDecoder(changed, tiny_tokenizer())
    answers(decoder, changed)
    factor[0] = -1.0
    assert answers(decoder, changed) == 0
    assert decoder.memory.kept_kv == 0
    handle.remove()
    assert answers(decoder, changed) == 0
    assert answers(decoder, changed) == reusable(PROMPT)


def test_nothing_is_kept_of_a_model_with_somebodys_class_in_it():
    """Its code may read what no module holds."""
    changed, factor = model(), [1.5]

    class Steered(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * factor[0]

    layer(changed).mlp = Steered(layer(changed).mlp)
    decoder = RapidDecoder(changed, tiny_tokenizer())
    answers(decoder, changed)
    factor[0] = -1.0
    assert answers(decoder, changed) == 0
    assert decoder.memory.kept_kv == 0


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_an_adapter_of_parameters_answers_and_its_kv_is_kept(architecture):
    """PEFT parametrizes them for each pass, which counts as an edit; others still do."""
    named = {"llama": "mlp.down_proj.weight", "mixtral": "mlp.experts.down_proj"}[architecture]
    base = tiny_model(architecture, max_position_embeddings=4096)
    tuned = get_peft_model(base, lora(target_modules=[], target_parameters=[named])).eval()
    assert any(type(module).__name__ == "ParamWrapper" for module in tuned.modules())
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    answers(decoder, tuned)
    for kept in (0, reusable(PROMPT)):  # the model's own passes, for the comparison, count
        assert decoder.generate(PROMPT, sampling=GREEDY).stats.cached_tokens == kept
    with torch.no_grad():
        next(p for name, p in tuned.named_parameters() if "down_proj" in name).mul_(1.5)
    assert answers(decoder, tuned) == 0


def test_a_decoder_of_the_base_follows_what_peft_does_to_it():
    base = model()
    plain, decoder = transformers_greedy(base, PROMPT, NEW), RapidDecoder(base, tiny_tokenizer())
    tuned = get_peft_model(base, lora()).eval()
    adapted = transformers_greedy(tuned, PROMPT, NEW)
    assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == adapted != plain
    assert tuned.unload() is base
    assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == plain
    assert decoder.target.lean


def test_an_adapter_chosen_during_an_answer_reads_it_all_again():
    tuned = two_adapters()
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    stream = decoder.stream(PROMPT, sampling=GREEDY)
    said = list(next(stream).token_ids)
    tuned.set_adapter("b")
    rest = [token for chunk in stream for token in chunk.token_ids]
    assert rest == transformers_greedy(tuned, PROMPT + said, NEW - len(said))
    assert answers(decoder, tuned) == reusable(PROMPT)
    tuned.set_adapter("a")
    assert answers(decoder, tuned) == 0


def test_kv_that_cannot_be_read_again_is_refused():
    changed = tiny_model()
    runner = ModelRunner(changed, "some-model")
    cache = runner.new_cache(60)
    with torch.inference_mode():
        runner(IDS[:20], cache, 1)
        written_in_place(changed)
        with pytest.raises(OutdatedKVError, match=r"some-model has changed.*20 tokens"):
            runner(IDS[20:], cache, 1)
        assert cache.length == 20


def on_disk(folder, changed):
    return RapidDecoder(changed, tiny_tokenizer(), kv_cache_bytes=0, kv_cache_dir=folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.model.embed_tokens.weight.data[40, 7:8].add_(1),
        lambda m: m.model.norm.weight.data[3:4].mul_(2),
        lambda m: m.lm_head.weight.data[LONG[3], 0:1].add_(1e-3),
        frequencies,
        scaling,
        another_norm,
        linear_subclass,
        parameter_subclass,
        hook("mlp"),
        method_replaced("mlp"),
        add(lora()),
    ],
)
def test_a_file_belongs_to_the_model_that_wrote_it(tmp_path, edit):
    answers(on_disk(tmp_path, model()), model(), LONG)
    changed = model()
    assert answers(on_disk(tmp_path, changed), changed, LONG) == reusable(LONG)
    edit(changed)
    assert answers(on_disk(tmp_path, changed), changed, LONG) == 0


def test_a_file_belongs_to_the_adapter_that_wrote_it(tmp_path):
    tuned = two_adapters()
    answers(on_disk(tmp_path, tuned), tuned, LONG)
    later = two_adapters()
    decoder = on_disk(tmp_path, later)
    assert answers(decoder, later, LONG) == reusable(LONG)
    later.set_adapter("b")
    assert answers(decoder, later, LONG) == 0
    later.set_adapter("a")
    assert answers(decoder, later, LONG) == reusable(LONG)
    later.merge_adapter()
    assert answers(decoder, later, LONG) == 0


@pytest.mark.parametrize("samples", [0, 256])
def test_an_edit_that_nobody_counted_is_seen_before_a_file_is_written_or_read(
    tmp_path, monkeypatch, samples
):
    def edit(a_model):
        a_model.model.embed_tokens.weight.data[LONG[0], 1:2].add_(9.0)

    if not samples:
        monkeypatch.setattr("rapid_llm.engine.model_state.Snapshot.samples", lambda self: [])
    changed = model()
    decoder = on_disk(tmp_path, changed)
    answers(decoder, changed, [5] * 1300)  # its name is known from now on
    edit(changed)
    answers(decoder, changed, LONG)
    untouched = model()
    decoder = on_disk(tmp_path, untouched)
    assert answers(decoder, untouched, LONG) == 0
    assert answers(decoder, untouched, LONG) == reusable(LONG)
    edit(untouched)
    answers(decoder, untouched, LONG)


def test_every_byte_counts_on_a_device_as_well():
    tensor = torch.randn(3, 1001).bfloat16()
    before = mixed(tensor)
    assert torch.equal(mixed(tensor.clone()), before)
    assert not torch.equal(mixed(tensor.flip(1)), before)
    values = tensor.view(-1).view(torch.uint8)
    for place in (0, 1, 2000, len(values) - 1):
        values[place] ^= 1
        assert not torch.equal(mixed(tensor), before)
        values[place] ^= 1


def test_a_fingerprint_is_of_what_is_computed(tmp_path):
    first = model()
    first.save_pretrained(tmp_path)
    loaded = [type(first).from_pretrained(tmp_path) for _ in range(2)]
    assert fingerprint(loaded[0]) == fingerprint(loaded[1]) is not None
    own(loaded[0])  # using it changes nothing
    assert fingerprint(loaded[0]) == fingerprint(loaded[1])
