"""Whole generations on a GPU: greedy answers, seeds, reuse, drafters, devices, host waits."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator

import pytest
import torch
from conftest import installed, tiny_tokenizer
from gpu_models import DEVICE, GRAPHS, PASSES, cuda_only, exact_products, model_on_device, on_gpu
from grammar_models import byte_tokenizer
from transformers import PreTrainedModel

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import Delta, RapidDecoder
from rapid_llm.engine.cuda.graphs import GraphCapture
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError

pytestmark = on_gpu

PROMPT = random.Random(1).choices(range(3, 64), k=60)
RETRIEVED = PROMPT[20:40]
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
both = pytest.mark.parametrize("graphs", GRAPHS)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_products():
        yield


def make_decoder(model: PreTrainedModel, *drafter: PreTrainedModel, **options) -> RapidDecoder:
    return RapidDecoder(model, tiny_tokenizer(), *drafter, **options)


def answer(
    decoder: RapidDecoder,
    prompt: list[int] = PROMPT,
    retrieved: list[int] | None = RETRIEVED,
    new: int = 24,
    speculation: SpeculationConfig | None = None,
    **sampling,
) -> list[int]:
    result = decoder.generate(
        prompt,
        retrieved,
        sampling=SamplingParams(max_new_tokens=new, ignore_eos=True, **sampling),
        speculation=speculation,
    )
    return result.token_ids


def own_answer(model: PreTrainedModel, new: int = 24) -> list[int]:
    ids = torch.tensor([PROMPT], device=DEVICE)
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
    )
    return said[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(("architecture", "graphs"), PASSES)
def test_a_greedy_exact_answer_is_what_generate_says(architecture, graphs):
    model = model_on_device(architecture, eos_token_id=None)
    other = model_on_device(seed=1, eos_token_id=None)
    expected = own_answer(model, 12)
    for drafter, gamma in (((), "auto"), ((other,), 4)):
        decoder = make_decoder(model, *drafter, cuda_graphs=graphs)
        exact = SpeculationConfig(mode="exact", gamma=gamma)
        assert answer(decoder, new=12, speculation=exact) == expected
    assert answer(decoder, new=12, retrieved=None) == expected


@both
@pytest.mark.parametrize("gamma", [1, 2, 5, 10, 16])
def test_any_draft_length_answers_the_same(gamma, graphs):
    model = model_on_device(eos_token_id=None)
    near = model_on_device(eos_token_id=None)
    with torch.no_grad():  # one that is often, not always, of the same mind
        for weight in near.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight)
    decoder = make_decoder(model, near, cuda_graphs=graphs)
    for lookup in (True, False):
        exact = SpeculationConfig(mode="exact", gamma=gamma, lookup=lookup)
        assert answer(decoder, speculation=exact) == own_answer(model)


@both
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_a_seed_repeats_its_answer(mode, graphs):
    model, other = (model_on_device("llama", torch.bfloat16, seed) for seed in (0, 1))
    config = SpeculationConfig(mode=mode, gamma=4)
    said = []
    for _ in range(2):
        decoder = make_decoder(model, other, cuda_graphs=graphs)
        said.append([answer(decoder, speculation=config, seed=s, **SAMPLED) for s in range(3)])
        decoder.clear_cache()
    assert said[0] == said[1]
    assert len(set(map(tuple, said[0]))) == 3


@both
def test_the_next_question_is_answered_as_if_nothing_was_read_before(graphs):
    model, other = (
        model_on_device("llama", seed=seed, max_position_embeddings=4096) for seed in (0, 1)
    )
    kept = make_decoder(model, other, cuda_graphs=graphs)
    config = SpeculationConfig(gamma=4)
    document = random.Random(2).choices(range(3, 64), k=2200)
    for question in range(4):
        prompt = document + random.Random(question).choices(range(3, 64), k=10 + 60 * question)
        fresh = make_decoder(model, other, cuda_graphs=graphs, kv_cache_bytes=0)
        for sampling in ({}, SAMPLED):
            expected = answer(fresh, prompt, speculation=config, **sampling)
            assert answer(kept, prompt, speculation=config, **sampling) == expected
    result = kept.generate(prompt, sampling=SamplingParams(max_new_tokens=1))
    assert result.stats.cached_tokens == len(prompt) - 1  # asked before: all but the last


@both
def test_a_closed_stream_leaves_a_decoder_that_goes_on(graphs):
    model = model_on_device(eos_token_id=None)
    decoder = make_decoder(model, cuda_graphs=graphs)
    for stop in range(3):
        stream = decoder.stream(
            PROMPT,
            RETRIEVED,
            sampling=SamplingParams(max_new_tokens=24, ignore_eos=True),
            speculation=SpeculationConfig(mode="exact", gamma=3),
        )
        for _ in range(stop):
            next(stream)
        stream.close()
        assert answer(decoder, retrieved=None) == own_answer(model)


@cuda_only
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path):
    absent = f"cuda:{torch.cuda.device_count()}"
    for options in ({"device": absent}, {"drafter": tmp_path, "drafter_device": absent}):
        with pytest.raises(InvalidParameterError, match=f"{absent}.*cannot be used"):
            RapidDecoder.from_pretrained(tmp_path, **options)


@cuda_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_drafter_on_another_gpu_changes_no_exact_answer():
    model = model_on_device(eos_token_id=None)
    drafter = model_on_device(seed=1, eos_token_id=None).to("cuda:1")
    exact = SpeculationConfig(mode="exact", gamma=4)
    assert answer(make_decoder(model, drafter), speculation=exact) == own_answer(model)


@cuda_only
def test_a_drafter_on_the_cpu_changes_no_exact_answer():
    model = model_on_device(eos_token_id=None)
    drafter = model_on_device(seed=1, eos_token_id=None).to("cpu")
    decoder = make_decoder(model, drafter)
    exact = SpeculationConfig(mode="exact", gamma=4)
    assert answer(decoder, speculation=exact) == own_answer(model)
    sampled = [answer(decoder, speculation=SpeculationConfig(gamma=4), **SAMPLED) for _ in "ab"]
    assert sampled[0] == sampled[1]


@cuda_only
def test_int8_weights_are_refused_with_what_to_do_instead():
    model = model_on_device("llama", torch.bfloat16, eos_token_id=None)
    with pytest.raises(InvalidParameterError, match="'int8' does not serve on cuda"):
        make_decoder(model, drafter_quantization="int8")


@cuda_only
@both
@pytest.mark.parametrize("own", [True, False], ids=["self-speculation", "another drafter"])
def test_an_int4_drafter_drafts(own, graphs):
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "eos_token_id": None}
    model, other = (
        model_on_device("llama", torch.bfloat16, seed, initializer_range=0.1, **shape)
        for seed in (0, 1)
    )
    drafter = () if own else (other,)
    decoder = make_decoder(model, *drafter, drafter_quantization="int4", cuda_graphs=graphs)
    result = decoder.generate(
        PROMPT,
        PROMPT if own else RETRIEVED,
        sampling=SamplingParams(max_new_tokens=60, ignore_eos=True, temperature=1.0),
        speculation=SpeculationConfig(mode="exact", gamma=4, lookup=False),
    )
    stats = result.stats
    assert len(result.token_ids) == 60
    assert stats.drafted_tokens > 0
    assert decoder.memory.drafter_weights > 0
    if own:  # it reads the same prompt with nearly the same weights
        assert stats.acceptance_rate > 0.6


ROUNDS = 10


def waits_and_replays(stream: Iterator[Delta], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Host synchronisations, and graphs launched, in ``ROUNDS`` rounds of an answer."""
    for _ in range(5):  # whatever is made once
        next(stream)
    replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal replays
        replays += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(ROUNDS):
                next(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.close()  # type: ignore[attr-defined]
    return sum("called a synchronizing" in str(w.message) for w in caught), replays


@cuda_only
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}],
    ids=["greedy", "sampled", "top-k and top-p"],
)
@pytest.mark.parametrize(
    ("speculation", "launches"),
    [
        (SpeculationConfig(gamma=4, lookup=False), 4 + 1),
        (SpeculationConfig(gamma=4, lookup=False, dynamic_eta=True), 4 + 1),
        # The distribution after the draft is a draft step too, but one that draws nothing.
        (SpeculationConfig(gamma=4, lookup=False, mode="augmented"), 4 + 1 + 1),
        (None, 1),
    ],
    ids=["paper", "dynamic", "augmented", "plain"],
)
def test_a_round_waits_once_and_launches_the_target_once(
    sampling, speculation, launches, monkeypatch
):
    """The host learns what was accepted, and no more; a draft step is a launch of its own."""
    model, other = (model_on_device("llama", torch.bfloat16, seed) for seed in (0, 1))
    stream = make_decoder(model, other).stream(
        PROMPT,
        None if speculation is None else RETRIEVED,
        sampling=SamplingParams(max_new_tokens=200, ignore_eos=True, **sampling),
        speculation=speculation,
    )
    waits, replays = waits_and_replays(stream, monkeypatch)
    assert waits <= ROUNDS, f"{waits / ROUNDS:.1f} a round"
    assert replays == launches * ROUNDS


WORDS = byte_tokenizer(["th", "the", "in", "ing"])
CONSTRAINED = {"vocab_size": 320, "eos_token_id": WORDS.eos_token_id}


def constrained(
    constraint: str, graphs: bool | None, new: int, **sampling: float
) -> Iterator[Delta]:
    model, other = (model_on_device(seed=seed, **CONSTRAINED) for seed in (0, 1))
    ids = WORDS("the thing in the thin inn").input_ids
    return RapidDecoder(model, WORDS, other, cuda_graphs=graphs).stream(
        ids,
        ids[4:],
        sampling=SamplingParams(max_new_tokens=new, constraint=constraint, **sampling),
        speculation=SpeculationConfig(gamma=4, lookup=False, mode="paper"),
    )


@cuda_only
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 9}], ids=str)
def test_a_constrained_answer_in_graphs_is_the_one_without(sampling):
    """Masks are copied to the device for each step of a draft, and once for a verification."""
    installed("llguidance")
    grammar = "[a-z]{3,9}(the|[0-9]+)thing( in)?"
    eager, captured = (
        [
            token
            for delta in constrained(grammar, graphs, 30, **sampling)
            for token in delta.token_ids
        ]
        for graphs in (False, True)
    )
    assert captured == eager


@cuda_only
def test_a_constrained_round_waits_once_for_each_drafted_token_and_its_verdict(monkeypatch):
    installed("llguidance")
    waits, replays = waits_and_replays(constrained("[a-z]+", True, 200), monkeypatch)
    assert waits <= (4 + 1) * ROUNDS, f"{waits / ROUNDS:.1f} a round"
    assert replays == (4 + 1) * ROUNDS


@cuda_only
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_a_seed_draws_alike_in_a_graph_and_outside(mode, monkeypatch):
    """The verification's draws: the same passes, with the judgement launched beside them."""
    model, other = (model_on_device(seed=seed, eos_token_id=None) for seed in (0, 1))
    config = SpeculationConfig(mode=mode, gamma=3, lookup=False, dynamic_eta=True)

    def answers() -> list[list[int]]:
        decoder = make_decoder(model, other, cuda_graphs=True)
        sampling = {"temperature": 0.8, "top_p": 0.95}
        said = [answer(decoder, speculation=config, seed=s, **sampling) for s in range(3)]
        return [*said, answer(decoder, retrieved=None, **sampling)]

    captured = answers()
    monkeypatch.setattr(Session, "verify", lambda *_: None)
    assert answers() == captured


@cuda_only
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
def test_a_capture_that_fails_costs_no_answer(sampling, monkeypatch, caplog):
    """A wait for the device breaks a capture in the middle of its draws."""
    model, other = (model_on_device(seed=seed, eos_token_id=None) for seed in (0, 1))
    config = SpeculationConfig(mode="exact", gamma=3, lookup=False)
    expected = answer(make_decoder(model, other), speculation=config, **sampling)
    record, tried = GraphCapture._record, 0

    def breaks_every_other(capture, graph, run):
        nonlocal tried
        tried += 1

        def waits() -> torch.Tensor:
            out = run()
            out.sum().item()
            return out

        return record(capture, graph, waits if tried % 2 else run)

    monkeypatch.setattr(GraphCapture, "_record", breaks_every_other)
    decoder = make_decoder(model, other)
    for _ in range(2):
        assert answer(decoder, speculation=config, **sampling) == expected
    assert tried > 1
    assert 1 <= sum("could not be captured" in each.message for each in caplog.records) <= 2
