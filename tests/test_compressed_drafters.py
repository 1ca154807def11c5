"""Drafters over compressed KV of the target: streaming and triforce."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, transformers_greedy
from drafting import CPU, DRAFT_PROMPT, GREEDY, PROMPT, SAMPLED

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.kv_cache import PreallocatedLayer
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError
from rapid_llm.speculation.drafters import compressed
from rapid_llm.speculation.drafters.compressed import (
    CompressedDrafter,
    StreamingDrafter,
    TriforceDrafter,
    streaming,
    triforce,
)
from rapid_llm.speculation.sampling import Sampler

KINDS = ("rag", "streaming", "triforce", "rest")
FAMILY = ("llama", "qwen2", "qwen3", "mistral")


# --- compressed KV ---------------------------------------------------------------------------


@pytest.fixture
def small_budget(monkeypatch) -> int:
    """So that short prompts are compressed: 16 tokens, in chunks of 4."""
    monkeypatch.setattr(compressed, "BUDGET", 16)
    monkeypatch.setattr(compressed, "_CHUNK", 4)
    return 16


def random_layer(length: int, kv_heads: int = 2, dim: int = 8) -> PreallocatedLayer:
    generator = torch.Generator().manual_seed(length)
    layer = PreallocatedLayer(length + 10)
    keys = torch.randn(1, kv_heads, length, dim, generator=generator)
    layer.update(keys, keys + 1)
    return layer


def random_query(length: int, heads: int = 6, dim: int = 8) -> torch.Tensor:
    return torch.randn(heads, dim, generator=torch.Generator().manual_seed(-length))


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        (40, [0, 1, 2, 3, *range(28, 40)]),
        (17, [0, 1, 2, 3, *range(5, 17)]),
        (16, [*range(16)]),
        (3, [0, 1, 2]),
        (1, [0]),
    ],
)
def test_streaming_keeps_the_first_tokens_and_the_latest(small_budget, length, kept):
    assert streaming(random_layer(length)).tolist() == [kept, kept]


def test_streaming_keeps_the_first_tokens_of_a_budget_below_the_sinks(monkeypatch):
    monkeypatch.setattr(compressed, "BUDGET", 2)
    assert streaming(random_layer(9)).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("length", [17, 40, 43])
def test_triforce_keeps_the_chunks_whose_mean_keys_score_highest(small_budget, length):
    layer, query = random_layer(length), random_query(length)
    chosen = triforce(layer, query)
    assert chosen.shape == (2, 16)
    starts = range(length % 4, length, 4)  # chunks end with the prompt
    for head in range(2):
        scores = {}
        for start in starts:
            mean = layer.keys[0, head, start : start + 4].mean(dim=0)
            sharing = query[3 * head : 3 * head + 3]  # this KV head
            scores[start] = max(float(row @ mean) for row in sharing)
        latest = length - 4
        best = sorted(set(starts) - {latest}, key=scores.__getitem__)[-3:]
        expected = [p for start in sorted([*best, latest]) for p in range(start, start + 4)]
        assert chosen[head].tolist() == expected
    if length > 17:
        assert chosen[0].tolist() != chosen[1].tolist()  # each KV head has its own


def test_triforce_keeps_a_short_prompt_whole(small_budget):
    assert triforce(random_layer(16), random_query(16)).tolist() == [[*range(16)]] * 2


def compressed_drafter(
    runner: ModelRunner, kind: type[CompressedDrafter], prompt: Sequence[int], **config
) -> CompressedDrafter:
    target = Session(runner, runner.new_cache(len(prompt) + 60))
    drafter = kind(
        target,
        runner,
        prompt,
        Sampler(GREEDY, prompt, CPU, runner.model),
        SpeculationConfig(**config),
    )
    with torch.inference_mode():
        target.prefill(prompt[:-1])
        drafter.prefill(None)
    return drafter


def test_what_follows_a_gap_has_its_own_position(small_budget):
    """The reference: transformers with a mask that hides what was left out from the new tokens."""
    model = tiny_model()
    drafter = compressed_drafter(ModelRunner(model, "tiny"), StreamingDrafter, PROMPT, lookup=False)
    with torch.inference_mode():
        draft = drafter.draft([], 6, look_ahead=True)
        again = drafter.draft(draft.tokens.tolist()[:2], 4, look_ahead=True)  # after a rollback
    sequence = torch.tensor([*PROMPT, *draft.tokens.tolist()])
    read, n = len(PROMPT) - 1, len(sequence)  # the prompt's last token is the drafter's to read
    visible = torch.ones(n, n).tril().bool()
    visible[read:, 4 : read - 12] = False
    mask = torch.zeros(1, 1, n, n).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits = model(sequence[None], attention_mask=mask).logits[0, read:]
        unmasked = model(sequence[None]).logits[0, read:]
    torch.testing.assert_close(draft.probabilities, logits.softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.probabilities, draft.probabilities[2:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(draft.probabilities, unmasked.softmax(-1), atol=1e-2)
    assert drafter.prompt_tokens == 16


def test_the_targets_own_cache_is_not_touched(small_budget):
    runner = ModelRunner(tiny_model(), "tiny")
    drafter = compressed_drafter(runner, TriforceDrafter, PROMPT)
    before = [layer.keys.clone() for layer in drafter._target.cache.layers]
    with torch.inference_mode():
        drafter.draft([], 6, look_ahead=True)
    assert drafter._target.length == len(PROMPT) - 1
    for layer, keys in zip(drafter._target.cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : layer.length], keys[:, :, : layer.length])


# --- in a decoder ----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 4, "auto"])
@pytest.mark.parametrize("drafting", KINDS)
@pytest.mark.parametrize("architecture", FAMILY)
def test_greedy_without_transfer_is_what_transformers_generates(
    small_budget, architecture, drafting, gamma
):
    model = tiny_model(architecture, eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer())
    config = SpeculationConfig(gamma=gamma, eta=0, drafting=drafting)
    for _ in range(2):  # the second time with kept KV
        result = decoder.generate(PROMPT, DRAFT_PROMPT, sampling=GREEDY, speculation=config)
        assert result.token_ids == transformers_greedy(model, PROMPT, 40)
        drafted = result.stats.drafted_tokens > 0
        assert drafted or gamma == "auto"
        assert result.stats.method == ("sd" if drafted else "lc")


@pytest.mark.parametrize("drafting", ["streaming", "triforce"])
def test_what_keeps_everything_drafts_what_the_target_says(drafting):
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    config = SpeculationConfig(gamma=4, mode="exact", drafting=drafting)
    stats = decoder.generate(PROMPT, sampling=GREEDY, speculation=config).stats
    assert stats.acceptance_ratio == 1
    assert stats.rounds == 40 / 5
    assert stats.draft_prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("drafting", ["streaming", "triforce"])
def test_compression_costs_acceptance_and_reads_no_prompt(small_budget, drafting, monkeypatch):
    read: list[int] = []
    original = Session.reading

    def spy(session, tokens, progress=None):
        read.append(len(tokens))
        return original(session, tokens, progress)

    monkeypatch.setattr(Session, "reading", spy)
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    config = SpeculationConfig(gamma=4, mode="exact", drafting=drafting)
    first, second = (
        decoder.generate(PROMPT, None, sampling=GREEDY, speculation=config).stats for _ in range(2)
    )
    assert read == [len(PROMPT) - 1] * 2  # the target's; the draft prompt is not even looked at
    assert 0 < first.acceptance_ratio < 1
    assert first.draft_prompt_tokens == 16
    assert second.cached_tokens == len(PROMPT) - 1
    assert (second.drafted_tokens, second.accepted_tokens) == (
        first.drafted_tokens,
        first.accepted_tokens,
    )


@pytest.mark.parametrize("drafting", KINDS)
@pytest.mark.parametrize("prompt", [[5], [5, 6], [5, 6, 7]])
def test_prompts_of_a_few_tokens_are_drafted_for(drafting, prompt):
    model = tiny_model(eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer())
    config = SpeculationConfig(gamma=3, eta=0, drafting=drafting)
    result = decoder.generate(prompt, [9], sampling=GREEDY, speculation=config)
    assert result.token_ids == transformers_greedy(model, prompt, 40)


@pytest.mark.parametrize("drafting", ["streaming", "triforce"])
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_sampling_repeats_itself_in_every_mode(small_budget, drafting, mode):
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    config = SpeculationConfig(gamma=3, mode=mode, drafting=drafting)
    one, two = (
        decoder.generate(PROMPT, sampling=SAMPLED, speculation=config).token_ids for _ in range(2)
    )
    assert one == two
    assert len(one) == 40


@pytest.mark.parametrize("layer", [0, 1])
def test_memory_that_runs_out_while_triforce_chooses_costs_no_answer(
    small_budget, monkeypatch, layer
):
    config = SpeculationConfig(gamma=3, mode="exact", drafting="triforce")
    ends, attend = [], compressed.attend
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())

    def once(*arguments):
        ends.append(None)
        if len(ends) == layer + 1:
            raise torch.OutOfMemoryError
        return attend(*arguments)

    monkeypatch.setattr(compressed, "attend", once)
    result = decoder.generate(PROMPT, sampling=GREEDY, speculation=config)
    assert result.token_ids == transformers_greedy(tiny_model(eos_token_id=None), PROMPT, 40)
    assert len(ends) == layer + 1 + 2  # once more, over both layers


def test_compressed_drafts_use_the_int8_copy_of_the_target_only(small_budget):
    config = SpeculationConfig(gamma=3, mode="exact", drafting="streaming")
    reference = transformers_greedy(tiny_model(eos_token_id=None), PROMPT, 40)
    for drafter in (None, tiny_model(seed=1)):
        decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), drafter, drafter_quantization="int8")
        result = decoder.generate(PROMPT, sampling=GREEDY, speculation=config)
        assert result.token_ids == reference
        assert (decoder._quantized.nbytes > 0) == (drafter is None)


@pytest.mark.parametrize("drafting", ["streaming", "triforce"])
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("mistral-sliding", "rapid"), ("gemma3_text", "rapid"), ("granite", "rapid"),
     ("llama", "sdpa")],
)  # fmt: skip
def test_models_that_cannot_be_compressed_are_refused(drafting, architecture, attention):
    decoder = RapidDecoder(
        tiny_model(architecture), tiny_tokenizer(), name="the-target", attn_implementation=attention
    )
    config = SpeculationConfig(drafting=drafting)
    message = f"drafting='{drafting}' needs.*Llama family.*the-target.*drafting='rag' or 'rest'"
    with pytest.raises(InvalidParameterError, match=message):
        decoder.stream(PROMPT, speculation=config)
    # Where nothing drafts, there is nothing to refuse.
    sampling = SamplingParams(max_new_tokens=2)
    assert decoder.generate(None, PROMPT, sampling=sampling, speculation=config).stats.rounds == 2
