"""The same call, the same answer: whatever was asked before it, beside it, or in another process.

What is compared is every logit that tokens were chosen by, bit for bit.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conftest import threads, tiny_model, tiny_tokenizer

import rapid_llm.engine.costs as costs
import rapid_llm.speculation.drafters.compressed as compressed
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.cpu.compiled import CompiledPass
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.speculation.sampling import Sampler

CHUNK, PIECES = 40, (20, 10)  # the smaller are read by the compiled kernels, the others not
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "initializer_range": 0.1}


def text(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 64), k=length)


DOCUMENT, OTHER = text(230, seed=1), text(230, seed=2)
QUESTIONS = [text(length, seed=length) for length in (3, 9, 20, 35, 51)]
RETRIEVED = DOCUMENT[60:160]
SAMPLED = SamplingParams(temperature=1.0, top_k=20, max_new_tokens=12, seed=5, ignore_eos=True)
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    """Prompts, chunks, and what goes to a file."""
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", CHUNK)
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_pieces", PIECES)
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_SAVING", 2 * CHUNK)
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_LOADING", CHUNK)
    monkeypatch.setattr(compressed, "BUDGET", 64)


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    logits: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"<{self.tokens}>"


@pytest.fixture(autouse=True)
def seen(monkeypatch) -> dict[int, list[bytes]]:
    """The logits that each thread has chosen tokens by."""
    seen: dict[int, list[bytes]] = defaultdict(list)
    original = Sampler.scores

    def spy(sampler: Sampler, logits: torch.Tensor, drafted: torch.Tensor) -> torch.Tensor:
        seen[threading.get_ident()].append(logits.numpy().tobytes())
        return original(sampler, logits, drafted)

    monkeypatch.setattr(Sampler, "scores", spy)
    return seen


class Case(NamedTuple):
    """A way to answer; makes decoders over one model."""

    target: Any
    drafter: Any
    options: dict[str, Any]
    speculation: SpeculationConfig | None
    sampling: SamplingParams
    seen: dict[int, list[bytes]]

    def decoder(self, **options: Any) -> RapidDecoder:
        return RapidDecoder(self.target, tiny_tokenizer(), self.drafter, **(self.options | options))

    def ask(
        self,
        decoder: RapidDecoder,
        question: list[int],
        document: list[int] = DOCUMENT,
        **sampling: Any,
    ) -> Answer:
        mine = self.seen[threading.get_ident()]
        mine.clear()
        result = decoder.generate(
            [*document, *question],
            None if self.speculation is None else [*RETRIEVED, *question],
            sampling=SamplingParams(**(vars(self.sampling) | sampling)),
            speculation=self.speculation,
        )
        return Answer(tuple(result.token_ids), tuple(mine))

    def cold(self, question: list[int], document: list[int] = DOCUMENT) -> Answer:
        return self.ask(self.decoder(kv_cache_bytes=0), question, document)


MODELS: dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]] = {
    "lean, float32": lambda: (tiny_model(), None, {}),
    "lean, bfloat16": lambda: (tiny_model().bfloat16(), None, {}),
    "compiled, bfloat16": lambda: (tiny_model(**WIDE).bfloat16(), None, {}),
    "own forward, bfloat16": lambda: (tiny_model("granite", **WIDE).bfloat16(), None, {}),
    "sdpa, float32": lambda: (tiny_model(), None, {"attn_implementation": "sdpa"}),
    "sliding window, bfloat16": lambda: (
        tiny_model("mistral", sliding_window=24, **WIDE).bfloat16(),
        None,
        {},
    ),
    "another drafter": lambda: (tiny_model(**WIDE).bfloat16(), tiny_model(seed=1).bfloat16(), {}),
    "int8 drafter, float32": lambda: (tiny_model(), None, {"drafter_quantization": "int8"}),
}
SPECULATIONS = {
    "plain": None,
    "paper": SpeculationConfig(),
    "fixed": SpeculationConfig(gamma=5),
    "exact": SpeculationConfig(mode="exact"),
    "augmented": SpeculationConfig(mode="augmented"),
    "streaming": SpeculationConfig(drafting="streaming"),
    "triforce": SpeculationConfig(drafting="triforce"),
    "rest": SpeculationConfig(drafting="rest"),
}
CASES = [
    *((model, "plain", GREEDY) for model in MODELS),
    *((model, "paper", SAMPLED) for model in MODELS),
    *(("compiled, bfloat16", speculation, SAMPLED) for speculation in SPECULATIONS),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case[:2])))
def case(request, seen) -> Case:
    model, speculation, sampling = request.param
    target, drafter, options = MODELS[model]()
    return Case(target, drafter, options, SPECULATIONS[speculation], sampling, seen)


FEW = [CASES[2], CASES[10]]
few = pytest.mark.parametrize("case", FEW, indirect=True, ids=["plain", "paper"])


def closed_half_way(case: Case, decoder: RapidDecoder, question: list[int]) -> None:
    stream = decoder.stream(
        [*DOCUMENT, *question],
        [*RETRIEVED, *question],
        sampling=case.sampling,
        speculation=case.speculation,
    )
    next(stream)
    stream.close()


def failed_half_way(case: Case, decoder: RapidDecoder, question: list[int], at: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        original, calls = ModelRunner.__call__, iter(range(10_000))

        def fail(*args: Any, **options: Any) -> torch.Tensor:
            if next(calls) >= at:
                raise torch.OutOfMemoryError
            return original(*args, **options)

        patch.setattr(ModelRunner, "__call__", fail)
        with pytest.raises(torch.OutOfMemoryError):
            case.ask(decoder, question)


def test_no_history_changes_an_answer(case, tmp_path):
    first, second, third, long, longest = QUESTIONS
    expected = [case.cold(question) for question in QUESTIONS]
    decoder = case.decoder(kv_cache_dir=tmp_path / "kv")
    assert case.ask(decoder, first) == expected[0]  # cold
    assert case.ask(decoder, first) == expected[0]  # warm
    assert case.ask(decoder, second) == expected[1]  # after another question
    assert case.ask(decoder, third, max_new_tokens=200) != expected[2]  # leaves larger buffers
    assert case.ask(decoder, third) == expected[2]
    case.ask(decoder, [*first, *expected[0].tokens, *long])  # a conversation's next turn
    assert case.ask(decoder, long) == expected[3]
    case.ask(decoder, first, document=OTHER)
    assert case.ask(decoder, longest) == expected[4]
    closed_half_way(case, decoder, second)
    assert case.ask(decoder, second) == expected[1]
    for at in (2, 9):  # while a prompt is read, and after
        failed_half_way(case, decoder, first, at)
        assert case.ask(decoder, first) == expected[0]
    decoder.log_likelihood([*DOCUMENT, *third], "w5 w6 w7")
    assert case.ask(decoder, third) == expected[2]
    decoder.keep_only([*DOCUMENT, *longest])
    assert case.ask(decoder, first) == expected[0]
    decoder.clear_cache()
    assert case.ask(decoder, first) == expected[0]
    restarted = case.decoder(kv_cache_dir=tmp_path / "kv")
    assert [case.ask(restarted, question) for question in QUESTIONS] == expected
    nothing_in_memory = case.decoder(kv_cache_dir=tmp_path / "kv", kv_cache_bytes=0)
    assert [case.ask(nothing_in_memory, question) for question in QUESTIONS] == expected


@few
def test_a_conversation_answers_as_its_last_turn_alone_would(case):
    decoder, document = case.decoder(), DOCUMENT
    for question in QUESTIONS:
        answer = case.ask(decoder, question, document)
        assert answer == case.cold(question, document)
        document = [*document, *question, *answer.tokens]


@few
@pytest.mark.parametrize("budget", [None, 0])
def test_thirty_at_once_answer_as_each_alone_would(case, budget):
    jobs = [(QUESTIONS[i % 5], (DOCUMENT, OTHER)[i // 5 % 2]) for i in range(30)]
    expected = {i: case.cold(*job) for i, job in enumerate(jobs[:10])}
    decoders = [case.decoder(kv_cache_bytes=budget) for _ in range(2)]  # share a model
    answers: dict[int, Answer] = {}

    def work(i: int) -> None:
        answers[i] = case.ask(decoders[i % 2], *jobs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert answers == {i: expected[i % 10] for i in range(len(jobs))}


@few
def test_streams_side_by_side_answer_as_each_alone_would(case):
    """The second begins while the first is being said, and copies from its cache."""
    decoder = case.decoder()

    def stream(question: list[int]) -> Iterator[int]:
        for chunk in decoder.stream(
            [*DOCUMENT, *question],
            None if case.speculation is None else [*RETRIEVED, *question],
            sampling=case.sampling,
            speculation=case.speculation,
        ):
            yield from chunk.token_ids

    streams = [stream(question) for question in QUESTIONS[:3]]
    said: list[list[int]] = [[next(one)] for one in streams]
    for one, tokens in zip(streams, said, strict=True):
        tokens += one
    assert [tuple(tokens) for tokens in said] == [case.cold(q).tokens for q in QUESTIONS[:3]]


def test_no_history_changes_an_answer_without_the_compiled_kernels(monkeypatch, seen, tmp_path):
    monkeypatch.setenv("RAPID_LLM_NATIVE", "0")
    case = Case(tiny_model(**WIDE).bfloat16(), None, {}, SPECULATIONS["paper"], SAMPLED, seen)
    assert not any(isinstance(each, CompiledPass) for each in case.decoder().target.passes)
    test_no_history_changes_an_answer(case, tmp_path)


def test_the_log_likelihood_is_the_same_too():
    decoder = RapidDecoder(tiny_model(**WIDE).bfloat16(), tiny_tokenizer())
    prompt = [*DOCUMENT, *QUESTIONS[2]]
    alone = RapidDecoder(decoder.target.model, tiny_tokenizer(), kv_cache_bytes=0)
    expected = alone.log_likelihood(prompt, "w9 w4 w31")
    assert decoder.log_likelihood(prompt, "w9 w4 w31") == expected
    decoder.generate([*DOCUMENT, *QUESTIONS[1]], RETRIEVED, sampling=SAMPLED)
    assert decoder.log_likelihood(prompt, "w9 w4 w31") == expected
    assert decoder.log_likelihood(prompt, "w9 w4 w31") == expected


def test_threads_of_torch_come_and_go(seen):
    """KV read by more threads was added up in another order."""
    case = Case(tiny_model(**WIDE).bfloat16(), None, {}, None, GREEDY, seen)
    decoder = case.decoder()
    for count in (1, 2, 1):
        with threads(count):
            assert case.ask(decoder, QUESTIONS[0]) == case.cold(QUESTIONS[0])


@pytest.mark.parametrize("mode", ["paper", "augmented", "exact"])
def test_processes_that_measure_other_costs_draft_alike(monkeypatch, seen, mode):
    """The first to measure decides; a cost is never the clock's of the moment."""
    case = Case(tiny_model(), tiny_model(seed=1), {}, SpeculationConfig(mode=mode), SAMPLED, seen)
    generator = random.Random(0)

    def noise(session: Any) -> costs.PassCost:
        return costs.PassCost(generator.uniform(0.1, 10), generator.uniform(0, 1))

    monkeypatch.setattr(costs, "measure", noise)
    answers = []
    for _ in range(4):
        monkeypatch.setattr(costs, "_known", {})  # as in another process
        answers.append(case.ask(case.decoder(), QUESTIONS[0]))
    assert answers == answers[:1] * 4


PROCESS = """
import sys, torch
sys.path.insert(0, {tests!r})
from conftest import tiny_model, tiny_tokenizer
from rapid_llm import RapidDecoder, SamplingParams, SpeculationConfig
decoder = RapidDecoder(tiny_model().bfloat16(), tiny_tokenizer(), tiny_model(seed=1).bfloat16())
sampling = SamplingParams(temperature=1.0, max_new_tokens=100, ignore_eos=True)
for mode in ("paper", "augmented"):
    config = SpeculationConfig(mode=mode)
    result = decoder.generate({prompt}, {draft}, sampling=sampling, speculation=config)
    print(result.token_ids, result.stats.rounds, result.stats.drafted_tokens)
"""


@pytest.mark.slow
def test_four_processes_that_start_at_once_answer_alike(request):
    script = PROCESS.format(tests=str(request.path.parent), prompt=DOCUMENT, draft=RETRIEVED)
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [process.communicate()[0] for process in processes]
    assert answers[0].count("\n") == 2
    assert answers == answers[:1] * 4


# --- what happened ---------------------------------------------------------------------------


def stats_of(draft_prompt: list[int] | None, **config: Any) -> Any:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), tiny_model(seed=1))
    return decoder.generate(
        DOCUMENT, draft_prompt, sampling=GREEDY, speculation=SpeculationConfig(**config)
    ).stats


def test_the_method_is_what_happened(monkeypatch):
    def cost(seconds: float) -> Callable[[Any], costs.PassCost]:
        return lambda session: costs.PassCost(seconds, 0.01)

    monkeypatch.setattr("rapid_llm.generation.pass_cost", cost(1.0))
    monkeypatch.setattr("rapid_llm.speculation.drafters.rag.pass_cost", cost(100.0))
    drafted = stats_of(RETRIEVED, gamma=3)
    assert (drafted.method, drafted.draft_skipped) == ("rapid", None)
    exact = stats_of(RETRIEVED, gamma=3, mode="exact")
    assert (exact.method, exact.draft_skipped) == ("sd", None)
    dear = stats_of(RETRIEVED, mode="exact", lookup=False)
    assert (dear.method, dear.drafted_tokens) == ("lc", 0)
    assert "promised to save time" in dear.draft_skipped
    alone = stats_of(None)
    assert (alone.method, alone.draft_skipped) == ("lc", "no draft prompt was given")
    assert stats_of(None, drafting="streaming").method == "rapid"
    assert dear.as_dict()["draft_skipped"] == dear.draft_skipped


def test_the_drafter_alone_skipped_nothing():
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    stats = decoder.generate(None, RETRIEVED, sampling=GREEDY).stats
    assert (stats.method, stats.draft_skipped) == ("rag", None)


def test_a_stream_tells_what_happened_so_far(monkeypatch):
    """Guesses of lookup are found late in this answer."""
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    config = SpeculationConfig(gamma=3, drafting="rest")
    prompt = [5, 9, 31, 7, 44]
    sampling = SamplingParams(max_new_tokens=200, ignore_eos=True)
    told = [
        (chunk.stats.drafted_tokens > 0, chunk.stats.method, chunk.stats.draft_skipped is None)
        for chunk in decoder.stream(prompt, sampling=sampling, speculation=config)
    ]
    assert told[0] == (False, "lc", False)
    assert told[-1] == (True, "sd", True)
    assert set(told) == {told[0], told[-1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_defaults_of_pytorch_change_nothing(seen, dtype):
    """The compiled kernels write float32 to the CPU, whatever else is made otherwise."""
    model = tiny_model(eos_token_id=None, **WIDE).to(dtype)
    configs = [SpeculationConfig(mode=mode, gamma=3) for mode in ("exact", "augmented")]

    def answers() -> list[bytes]:
        seen.clear()
        decoder = RapidDecoder(model, tiny_tokenizer())
        for sampling, config in zip((GREEDY, SAMPLED), configs, strict=True):
            decoder.generate(DOCUMENT, RETRIEVED, sampling=sampling, speculation=config)
        return seen[threading.get_ident()]

    usual = answers()
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            assert answers() == usual
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert answers() == usual


def test_autocast_changes_neither_an_answer_nor_what_is_kept(seen):
    model = tiny_model("gemma3_text", eos_token_id=None)
    lean = tiny_model(eos_token_id=None)
    for decoder in (RapidDecoder(each, tiny_tokenizer()) for each in (model, lean)):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            decoder.generate(DOCUMENT, sampling=GREEDY)
        again = decoder.generate(DOCUMENT, sampling=GREEDY)
        assert again.stats.cached_tokens > 0
        logits = seen[threading.get_ident()]
        assert logits[: len(logits) // 2] == logits[len(logits) // 2 :]
