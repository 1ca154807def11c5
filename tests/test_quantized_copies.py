"""Quantized copies of models that users change."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from model_changes import (  # noqa: F401  (a fixture of every test)
    WIDE,
    as_decoder,
    hook,
    linear_subclass,
    lora,
    own,
    short_chunks,
    written_in_place,
    written_through_data,
)
from peft import get_peft_model
from torch import nn

from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.cpu.blocks import Int8Blocks
from rapid_llm.engine.cpu.int8 import Int8Linear
from rapid_llm.engine.cpu.quantizers import quantized_copy
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.errors import InvalidParameterError


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("hidden", [40, 64])
def test_a_quantized_copy_has_the_adapter_and_leaves_tiny_layers_whole(rank, hidden):
    torch.manual_seed(1)
    base = tiny_model(**WIDE | {"hidden_size": hidden, "intermediate_size": 100})
    tuned = get_peft_model(base, lora(r=rank, lora_alpha=rank)).bfloat16()
    quantized = ModelRunner(quantized_copy(tuned, Int8Linear), "quantized")
    inner = {m.weight.shape[1] for m in quantized.model.modules() if isinstance(m, Int8Linear)}
    assert inner == {size for size in (hidden, rank, 128) if size % 16 == 0}
    assert difference(as_decoder(quantized), own(tuned)) < 0.15
    with tuned.disable_adapter():
        assert difference(own(tuned), as_decoder(quantized)) > 0.15


@pytest.mark.parametrize("edit", [written_in_place, written_through_data, linear_subclass])
def test_the_quantized_copy_of_a_changed_model_is_made_again(edit):
    changed = tiny_model(**WIDE).bfloat16()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    first = decoder.draft_runner
    assert decoder.draft_runner is first is not decoder.drafter
    edit(changed)
    assert difference(as_decoder(decoder.draft_runner), own(changed)) < 0.1
    assert decoder.draft_runner is not first


def test_the_quantized_copy_follows_the_adapter():
    torch.manual_seed(3)
    tuned = get_peft_model(tiny_model(**WIDE), lora(r=16), adapter_name="a")
    tuned.add_adapter("b", lora(r=16))
    tuned.set_adapter("a")
    tuned.eval().bfloat16()
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    for name in ("a", "b", "a"):
        tuned.set_adapter(name)
        quantized = decoder.draft_runner
        assert quantized is not decoder.drafter
        assert difference(as_decoder(quantized), own(tuned)) < 0.2


def test_a_model_with_hooks_has_no_quantized_copy_and_drafts_itself():
    changed = tiny_model(**WIDE, eos_token_id=None).bfloat16()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    hook("mlp")(changed)
    assert decoder.draft_runner is decoder.drafter
    with pytest.raises(InvalidParameterError, match=r"hooks.*drafter_quantization"):
        quantized_copy(changed, Int8Linear)


@pytest.mark.parametrize("kind", [Int8Linear, Int8Blocks])
@pytest.mark.parametrize("inner", [1, 3, 8, 20, 31, 100])
def test_layers_that_a_product_would_read_beyond_are_not_quantized(kind, inner):
    odd = tiny_model(hidden_size=64, intermediate_size=inner).bfloat16()
    quantized = quantized_copy(odd, kind)
    mlp = quantized.model.layers[0].mlp
    assert (type(mlp.up_proj), type(mlp.down_proj)) == (kind, nn.Linear)
    assert difference(as_decoder(ModelRunner(quantized, "quantized")), own(odd)) < 0.2
