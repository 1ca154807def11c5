"""Answers by captured rounds: seeds, grammars, NaN, and captures that fail."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from conftest import counting_model, installed, tiny_model, tiny_tokenizer
from grammar_models import byte_tokenizer
from uncaptured import ON_A_CPU, WAYS, Live, decode

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.cuda import graphs
from rapid_llm.engine.cuda.graphs import MAX_TOKENS
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.errors import InvalidParameterError, NumericalError
from rapid_llm.speculation import constraints
from rapid_llm.speculation.drafters.rag import RagDrafter

pytestmark = ON_A_CPU


@pytest.mark.parametrize(
    "config",
    [{"mode": "exact", "lookup": False}, {"mode": "augmented", "eta": 5.0}],
    ids=str,
)
def test_answers_are_those_of_the_lean_pass(live, config):
    def decode(graphs):
        decoder = RapidDecoder(model, tiny_tokenizer(), cuda_graphs=graphs)
        return decoder.generate(
            [*range(3, 12)],
            [5, 9, 4],
            sampling=SamplingParams(max_new_tokens=6, ignore_eos=True),
            speculation=SpeculationConfig(gamma=2, **config),
        )

    model = counting_model(0.1)
    plain, ours = decode(False), decode(None)
    assert ours.token_ids == plain.token_ids
    assert ours.stats.accepted_tokens == plain.stats.accepted_tokens
    assert live.made > 0


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "top_p": 0.9, "seed": 4},
        {"temperature": 1.0, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampled", "penalised"],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_seed_gives_the_answer_that_passes_without_graphs_give(live, way, sampling, gamma):
    config = WAYS[way]
    kind = {"mode": config.mode, "eta": config.eta, "dynamic_eta": config.dynamic_eta}
    model, other = counting_model(0.1), (counting_model(0.3),)
    plain, ours = (
        decode(model, graphs, gamma, sampling, other, **kind) for graphs in (False, None)
    )
    assert ours.token_ids == plain.token_ids
    assert ours.stats.accepted_tokens == plain.stats.accepted_tokens
    assert live.made > 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
def test_a_round_launches_each_draft_step_and_one_verification(live, sampling):
    model, other = counting_model(0.1), counting_model(0.3)
    sampling = sampling | {"max_new_tokens": 5}
    stats = decode(model, None, 2, sampling, (other,)).stats
    assert live.launched == stats.draft_passes + stats.rounds
    live.launched = 0
    plain = decode(model, None, 2, sampling, prompts=([*range(3, 12)], None)).stats
    assert live.launched == plain.rounds == 5


@pytest.mark.parametrize("broken", ["target", "drafter"])
def test_nan_in_a_captured_round_is_an_error(live, broken):
    models = {"target": tiny_model(), "drafter": tiny_model(seed=1)}
    with torch.no_grad():
        models[broken].lm_head.weight[7] = torch.nan
    for model, name in zip(models.values(), models, strict=True):
        model.name_or_path = f"the {name}"
    with pytest.raises(NumericalError, match=f"the {broken} produced NaN"):
        decode(models["target"], drafter=(models["drafter"],))
    assert live.launched > 0


CUDA_ERROR = RuntimeError("CUDA error: operation would make the legacy stream depend on a capture")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def fail(live, monkeypatch):
    """Lets captures fail, by their numbers: the work was begun, and its draws were made."""

    def fail(error, numbers):
        class Failing(Live):
            tried = 0
            spoilt: ClassVar = set()  # a generator that a capture left behind cannot draw

            def __call__(self, run, changes, generator):
                Failing.tried += 1
                assert generator not in Failing.spoilt
                if Failing.tried not in numbers:
                    return super().__call__(run, changes, generator)
                before = [tensor.clone() for tensor in changes]
                run()
                for tensor, value in zip(changes, before, strict=True):
                    tensor.copy_(value)
                Failing.spoilt |= {generator} - {None}
                raise error

        monkeypatch.setattr(graphs, "GraphCapture", Failing)

    return fail


@pytest.mark.parametrize("error", [CUDA_ERROR, OUT_OF_MEMORY], ids=["CUDA error", "out of memory"])
@pytest.mark.parametrize("numbers", [range(99), range(2, 99, 2)], ids=["all", "every other"])
def test_a_capture_that_fails_costs_no_answer(live, fail, caplog, error, numbers):
    models = counting_model(0.1), counting_model(0.3)
    prompts, sampling = ([*range(3, 12)], [5, 9, 4]), {"temperature": 1.0, "max_new_tokens": 5}
    plain = decode(models[0], False, 2, sampling, models[1:], prompts)
    fail(error, numbers)
    decoder = RapidDecoder(models[0], tiny_tokenizer(), models[1])
    for _ in range(2):
        result = decoder.generate(
            *prompts,
            sampling=SamplingParams(temperature=1.0, max_new_tokens=5, ignore_eos=True),
            speculation=SpeculationConfig(gamma=2, lookup=False),
            confidence=0.5,
        )
        assert result.token_ids == plain.token_ids
        assert result.stats.accepted_tokens == plain.stats.accepted_tokens
    assert (live.launched > 0) == (1 not in numbers)
    if error is CUDA_ERROR or 1 in numbers:  # memory that was short once was there the second time
        told = [record for record in caplog.records if "could not be captured" in record.message]
        assert 1 <= len(told) <= len(models)  # once for each of them


def test_memory_that_a_capture_needs_is_taken_from_kept_kv(live, fail, caplog, monkeypatch):
    monkeypatch.setattr(CPU, "prefill_chunk", MAX_TOKENS + 3)  # no captured pass
    fail(OUT_OF_MEMORY, [2])
    decoder = RapidDecoder(counting_model(), tiny_tokenizer(), kv_cache_bytes=2**20)
    one, four = (SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (1, 4))
    decoder.generate([*range(3, 44)], sampling=one)
    assert decoder.memory.kept_kv > 0
    warmer = SamplingParams(temperature=1e-4, max_new_tokens=4, ignore_eos=True)  # a new capture
    stream = decoder.stream([*range(10, 51)], sampling=warmer)
    said = next(stream).token_ids
    assert decoder.memory.kept_kv == 0
    assert [*said, *(token for chunk in stream for token in chunk.token_ids)] == [51, 52, 53, 54]
    assert decoder.generate([*range(3, 44)], sampling=four).stats.cached_tokens == 0
    assert live.made == 2
    assert not caplog.records


@pytest.mark.parametrize("error", [CUDA_ERROR, OUT_OF_MEMORY], ids=["CUDA error", "out of memory"])
def test_a_capture_that_fails_is_an_error_where_graphs_are_asked_for(live, fail, error):
    fail(error, [1, 2] if error is OUT_OF_MEMORY else [1])
    decoder = RapidDecoder(counting_model(), tiny_tokenizer(), cuda_graphs=True)
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    with pytest.raises(InvalidParameterError, match=r"cuda_graphs=True.*captured \(CUDA.*leave"):
        decoder.generate([*range(3, 14)], sampling=sampling)
    assert decoder.generate([*range(3, 14)], sampling=sampling).token_ids == [14, 15, 16, 17]
    assert live.launched == 4


def test_the_switch_is_automatic_refuses_or_is_off():
    assert ModelRunner(tiny_model(), "on a CPU")._replayed is None
    assert ModelRunner(tiny_model(), "on a CPU", cuda_graphs=False)._replayed is None
    with pytest.raises(InvalidParameterError, match=r"cuda_graphs=True.*m on cpu"):
        ModelRunner(tiny_model(), "m", cuda_graphs=True)


def test_an_embedding_that_asks_for_lengths_is_not_captured(live):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    runner = ModelRunner(tiny_model(rope_parameters=rope), "dynamic")
    assert runner.lean
    assert runner._replayed is None


GRAMMAR = "[a-c]{2,4}(name|na)[0-9]{1,3}( [a-z]+)?"


def constrained(model, other, graphs, gamma, sampling, constraint=GRAMMAR, **config):
    installed("llguidance")
    tokenizer = byte_tokenizer(["na", "nam", "name"])
    decoder = RapidDecoder(model, tokenizer, other, cuda_graphs=graphs)
    prompts = [tokenizer(text).input_ids for text in ("abc abname12 caname", "caname1 ab")]
    return decoder.generate(
        *prompts,
        sampling=SamplingParams(**{"max_new_tokens": 6, "constraint": constraint} | sampling),
        speculation=SpeculationConfig(gamma=gamma, **config),
    )


@pytest.mark.parametrize(
    ("mode", "sampling", "lookup"),
    [
        ("exact", {}, True),
        ("augmented", {"temperature": 1.0, "top_p": 0.9, "top_k": 7, "seed": 4}, False),
        ("paper", {"temperature": 1.0, "repetition_penalty": 1.3}, False),
    ],
    ids=["exact, greedy, lookup", "augmented, sampled", "paper, penalised"],
)
def test_a_constrained_answer_is_that_of_passes_without_graphs(live, mode, sampling, lookup):
    model, other = (
        tiny_model(vocab_size=280, seed=seed, eos_token_id=259, num_hidden_layers=1)
        for seed in (0, 1)
    )
    want, got = (
        constrained(model, other, graphs, 3, sampling, mode=mode, lookup=lookup)
        for graphs in (False, None)
    )
    assert got.token_ids == want.token_ids
    assert got.stats.accepted_tokens == want.stats.accepted_tokens
    assert live.launched > 0


def test_a_constrained_draft_visits_the_host_once_a_drafted_token(live, monkeypatch):
    visits: list[int] = []
    original = RagDrafter._masks

    def counting(self, drafted):
        masks = original(self, drafted)
        return lambda looped: (visits.append(len(looped)), masks(looped))[1]

    monkeypatch.setattr(RagDrafter, "_masks", counting)
    model = tiny_model(vocab_size=280, eos_token_id=259, num_hidden_layers=1)
    stats = constrained(model, None, None, 3, {}, "[a-z]+", mode="paper", lookup=False).stats
    assert stats.draft_passes > 2
    assert len(visits) == stats.draft_passes


def test_masked_and_unmasked_work_have_graphs_of_their_own(live):
    model = tiny_model(vocab_size=280, eos_token_id=None, num_hidden_layers=1)
    plain = {"max_new_tokens": 5, "ignore_eos": True}
    free = constrained(model, None, None, 3, plain, constraint=None).token_ids
    assert constrained(model, None, None, 3, plain).token_ids != free
    assert constrained(model, None, None, 3, plain, constraint=None).token_ids == free


def test_bits_of_a_mask_are_the_same_by_operators_of_any_device():
    random = torch.Generator().manual_seed(0)
    mask = torch.randint(-(2**31), 2**31, (5, 9), dtype=torch.int32, generator=random)
    for width in (288, 270, 257):
        by_table = torch.from_numpy(constraints._highest(mask.numpy(), width))
        assert torch.equal(constraints._shifted(mask, width), by_table)
