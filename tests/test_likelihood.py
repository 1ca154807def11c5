"""How likely a model says a text is, KV kept for one prompt only, and shortened models."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from rapid_llm import (
    ContextWindowError,
    InvalidParameterError,
    ModelError,
    NumericalError,
    RapidDecoder,
    SamplingParams,
)
from rapid_llm.shared_weights import first_layers
from rapid_llm.stats import Stats

PROMPT = [3 + i * i % 61 for i in range(40)]
OTHER = [3 + i * 7 % 61 for i in range(40)]
ONE = SamplingParams(max_new_tokens=1)


def reference(model: PreTrainedModel, prompt: list[int], continuation: list[int]) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + continuation])).logits[0]
    probabilities = logits.float().log_softmax(-1)
    rows = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
    return sum(float(probabilities[r, t]) for r, t in zip(rows, continuation, strict=True))


# --- likelihood -------------------------------------------------------------------------------


@pytest.mark.parametrize("continuation", [[7], [7, 30, 5, 5, 61]])
def test_the_likelihood_is_the_model_s_own(continuation: list[int]) -> None:
    target, drafter = tiny_model(), tiny_model(seed=1)
    decoder = RapidDecoder(target, tiny_tokenizer(), drafter)
    text = " ".join(f"w{i}" for i in continuation)
    for model, drafts in ((target, False), (drafter, True)):
        expected = reference(model, PROMPT, continuation)
        fresh = decoder.log_likelihood(PROMPT, text, drafter=drafts)
        assert fresh == pytest.approx(expected, abs=1e-3)
        # Again, with the prompt's KV kept.
        assert decoder.log_likelihood(PROMPT, text, drafter=drafts) == pytest.approx(
            fresh, abs=1e-3
        )


def test_generations_after_it_are_not_disturbed() -> None:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    sampling = SamplingParams(max_new_tokens=12)
    before = decoder.generate(PROMPT, sampling=sampling).token_ids
    decoder.log_likelihood(PROMPT, "w9 w9 w9")
    assert decoder.generate(PROMPT, sampling=sampling).token_ids == before


def test_bad_continuations_are_refused() -> None:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    with pytest.raises(InvalidParameterError, match="no tokens"):
        decoder.log_likelihood(PROMPT, " ")
    with pytest.raises(ContextWindowError, match="512"):
        decoder.log_likelihood(PROMPT, "w5 " * 500)
    model = tiny_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN"):
        RapidDecoder(model, tiny_tokenizer()).log_likelihood(PROMPT, "w5")


# --- kept KV ----------------------------------------------------------------------------------


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For short prompts too KV is kept of the first passes of a prefill."""
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)


@pytest.mark.usefixtures("short_chunks")
def test_only_one_prompt_s_kv_is_kept() -> None:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())

    def reused(prompt: Sequence[int]) -> int:
        return decoder.generate(list(prompt), sampling=ONE).stats.cached_tokens

    reused(PROMPT)
    reused(OTHER)
    assert decoder.keep_only(PROMPT) == len(PROMPT) - 1
    assert reused(OTHER) == 0
    assert reused(PROMPT) == len(PROMPT) - 1


@pytest.mark.usefixtures("short_chunks")
def test_what_follows_the_prompt_is_not_kept() -> None:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    answer = decoder.generate(PROMPT, sampling=SamplingParams(max_new_tokens=20)).token_ids
    decoder.keep_only(PROMPT)
    again = decoder.generate([*PROMPT, *answer], sampling=ONE)
    assert again.stats.cached_tokens == len(PROMPT) - 10


@pytest.mark.usefixtures("short_chunks")
def test_nothing_is_kept_of_a_prompt_that_was_not_read() -> None:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    assert decoder.keep_only(PROMPT) == 0
    decoder.generate(PROMPT, sampling=ONE)
    assert decoder.keep_only([2, *PROMPT]) == 0
    assert decoder.memory.kept_kv == 0 or decoder.keep_only(PROMPT) == 0


# --- shortened models -------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2-sliding", "gemma3_text"])
def test_the_first_layers_are_a_model(architecture: str) -> None:
    model = tiny_model(architecture, **FOUR.get(architecture, {"num_hidden_layers": 4}))
    short = first_layers(model, 2)
    assert (short.config.num_hidden_layers, model.config.num_hidden_layers) == (2, 4)
    ours, theirs = dict(short.named_parameters()), dict(model.named_parameters())
    assert len(short.model.layers) == 2
    assert all(ours[name] is theirs[name] for name in ours)

    # As if the other layers added nothing.
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
                if "gemma" in architecture:
                    getattr(layer, name).weight.fill_(-1)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    prompt = PROMPT[:20]
    assert reference(short, prompt, [7, 9]) == pytest.approx(
        reference(model, prompt, [7, 9]), abs=1e-4
    )
    decoder = RapidDecoder(short, tiny_tokenizer(), model)
    assert decoder.log_likelihood(prompt, "w7 w9") == pytest.approx(
        reference(short, prompt, [7, 9]), abs=1e-3
    )


FOUR = {
    name: {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
    for name in ("qwen2-sliding", "gemma3_text")
}


def test_impossible_lengths_are_refused() -> None:
    for layers in (0, 3):
        with pytest.raises(InvalidParameterError, match=f"layers={layers}.* 2 layers"):
            first_layers(tiny_model(), layers)
    with pytest.raises(ModelError, match="Linear"):
        first_layers(torch.nn.Linear(1, 1), 1)  # type: ignore[arg-type]


# --- stats ------------------------------------------------------------------------------------


def test_stats_of_several_generations_add_up() -> None:
    parts = [
        Stats("rapid", prompt_tokens=10, drafted_tokens=4, accepted_tokens=3, decode_seconds=1.5),
        Stats("rapid", prompt_tokens=1, drafted_tokens=4, accepted_tokens=1, decode_seconds=0.5),
    ]
    parts[0].time_to_first_token, parts[1].time_to_first_token = 0.1, 0.2
    parts[1].draft_skipped = "no chunk"
    total = Stats.together(parts)
    assert (total.method, total.prompt_tokens, total.decode_seconds) == ("rapid", 11, 2.0)
    assert total.acceptance_ratio == 0.5
    assert total.time_to_first_token == 0.1
    assert total.draft_skipped == "no chunk"
    one = Stats("lc", draft_skipped="no draft")
    assert (Stats.together([one, parts[0]]).method, Stats.together([one]).method) == ("rapid", "lc")
    assert parts[0].prompt_tokens == 10
