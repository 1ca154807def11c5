"""Answers under a constraint: allowed, finished, cut, in every mode and whatever drafts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from constrained import (  # noqa: F401  (fixtures)
    EOS,
    PERSON,
    TOKENIZER,
    WIDTH,
    decoder_fixture,
    jsonschema,
    llguidance,
    model_for_text,
    prompt,
)
from grammar_models import sentencepiece_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from rapid_llm import RapidDecoder, SamplingParams, SpeculationConfig
from rapid_llm.errors import GenerationTimeoutError, NumericalError
from rapid_llm.grammars import canonical
from rapid_llm.speculation.constraints import Constraints

SPECULATIONS = {
    "exact": {"mode": "exact", "gamma": 3},
    "exact, auto": {"mode": "exact", "gamma": "auto"},
    "exact, no lookup": {"mode": "exact", "gamma": 4, "lookup": False},
    "augmented": {"mode": "augmented", "gamma": 3},
    "paper": {"mode": "paper", "gamma": 4},
    "paper, unsure": {"mode": "paper", "gamma": 4, "min_confidence": 0.2},
    "rest": {"drafting": "rest", "gamma": 5},
    "streaming": {"mode": "exact", "drafting": "streaming", "gamma": 3},
    "triforce": {"mode": "paper", "drafting": "triforce", "gamma": 3},
}

TEXTS = {
    "schema": PERSON,
    "choice": ["cook", "cooking", "name", "yes"],
    "regex": r"[0-9]{2,4}-(name|no)+",
    "gbnf": 'root ::= "<" ("cook" | "na")* ">"',
}


def valid(name: str, text: str) -> bool:
    import regex

    if name == "schema":
        jsonschema.validate(json.loads(text), PERSON)
        return True
    if name == "choice":
        return text in TEXTS["choice"]
    pattern = TEXTS["regex"] if name == "regex" else "<(cook|na)*>"
    return regex.fullmatch(pattern, text) is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("way", SPECULATIONS)
def test_every_finished_answer_is_allowed_whatever_drafts(decoder, way, temperature) -> None:
    finished, seeds = 0, range(2 if temperature else 1)
    for name, constraint in TEXTS.items():
        for seed in seeds:
            sampling = SamplingParams(
                temperature=temperature, seed=seed, max_new_tokens=60, constraint=constraint
            )
            speculation = SpeculationConfig(**SPECULATIONS[way])
            deltas = list(
                decoder.stream(prompt(), prompt()[5:], sampling=sampling, speculation=speculation)
            )
            if deltas[-1].finish_reason == "stop":
                finished += 1
                assert valid(name, "".join(delta.text for delta in deltas))
    assert finished >= 2 * len(seeds)


class FreshMask(LogitsProcessor):
    """The grammar library alone: a matcher that reads the whole answer at every step."""

    def __init__(self, constraint: Any, prompt_tokens: int) -> None:
        from rapid_llm.grammars import llguidance_grammar

        backend = TOKENIZER.backend_tokenizer.to_str()
        self.tokenizer = llguidance.LLTokenizer(backend, n_vocab=WIDTH, eos_token=EOS)
        self.grammar = llguidance_grammar(json.dumps(canonical(constraint)))
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import llguidance.numpy as bitmasks

        fresh = llguidance.LLMatcher(self.tokenizer, self.grammar)
        for token in input_ids[0, self.prompt_tokens :].tolist():
            assert fresh.consume_token(token)
        bits = bitmasks.allocate_token_bitmask(1, WIDTH)
        bitmasks.fill_next_token_bitmask(fresh, bits, 0)
        flags = np.unpackbits(bits.view(np.uint8), bitorder="little")[:WIDTH]
        return scores.masked_fill(~torch.from_numpy(flags.astype(bool)), float("-inf"))


def generated(model: Any, ids: list[int], constraint: Any, new: int) -> list[int]:
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        do_sample=False,
        max_new_tokens=new,
        logits_processor=LogitsProcessorList([FreshMask(constraint, len(ids))]),
        pad_token_id=EOS,
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in TEXTS),
        ("schema", {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3}),
        ("regex", {"repetition_penalty": 0.6, "min_new_tokens": 9}),
        ("gbnf", {"suppress_tokens": [TOKENIZER.convert_tokens_to_ids("cook")]}),
    ],
    ids=str,
)
def test_exact_greedy_is_what_generate_gives_with_the_same_mask(name, settings) -> None:
    model = model_for_text(seed=5)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    decoders = RapidDecoder(model, TOKENIZER), RapidDecoder(model, TOKENIZER, model_for_text(6))
    for ids in (prompt(), prompt("name name name cook")):
        want = generated(model, ids, TEXTS[name], 40)
        sampling = SamplingParams(max_new_tokens=40, constraint=TEXTS[name])
        plain = decoders[0].generate(ids, sampling=sampling)
        results = [plain] + [
            each.generate(
                ids, ids[3:], sampling=sampling, speculation=SpeculationConfig(**SPECULATIONS[way])
            )
            for each in decoders
            for way in ("exact", "exact, auto", "exact, no lookup", "rest")
        ]
        for result in results:
            # Where nothing else may follow the answer ends without a token that says so.
            said = result.token_ids
            assert said + [EOS] * (len(want) - len(said)) == want
            assert len(want) - len(said) <= (result.finish_reason == "stop")


def test_an_answer_that_is_cut_says_so_and_one_that_just_fits_is_finished(decoder) -> None:
    def answer(constraint: Any, tokens: int) -> Any:
        sampling = SamplingParams(max_new_tokens=tokens, constraint=constraint)
        return decoder.generate(prompt(), prompt(), sampling=sampling)

    assert answer(PERSON, 5).finish_reason == "length"
    assert answer(["yes"], 3).finish_reason == "stop"
    assert answer(["yes"], 3).text == "yes"
    assert answer(["yes"], 2).finish_reason == "length"


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_answer_that_can_only_be_empty_is(decoder, ignore_eos) -> None:
    sampling = SamplingParams(constraint={"regex": ""}, ignore_eos=ignore_eos)
    result = decoder.generate(prompt(), prompt(), sampling=sampling)
    assert (result.text, result.token_ids, result.finish_reason) == ("", [], "stop")


def test_ignoring_the_end_the_grammar_alone_ends_an_answer(decoder) -> None:
    sampling = SamplingParams(constraint="[0-9]{0,7}", ignore_eos=True, max_new_tokens=30)
    result = decoder.generate(prompt(), prompt(), sampling=sampling)
    assert len(result.text) == 7
    assert result.finish_reason == "stop"


def test_a_stop_string_ends_an_answer_before_its_grammar_does(decoder) -> None:
    sampling = SamplingParams(constraint="[0-9]{3}name[0-9]{3}", stop=["am"], max_new_tokens=30)
    result = decoder.generate(prompt(), prompt(), sampling=sampling)
    assert result.text.endswith("n")
    assert len(result.text) == 4
    assert result.finish_reason == "stop"


def test_white_space_between_json_tokens_is_limited(decoder) -> None:
    """A model that likes nothing better than white space."""
    model = model_for_text(seed=2)
    spaces = TOKENIZER(" \n\t  ").input_ids
    with torch.no_grad():
        model.lm_head.weight[spaces] = 50 * model.lm_head.weight.abs().amax()
    liking = RapidDecoder(model, TOKENIZER)
    sampling = SamplingParams(
        temperature=1.0,
        max_new_tokens=100,
        constraint={"type": "array", "items": {"type": "boolean"}},
    )
    for seed in range(5):
        text = liking.generate(
            prompt(), prompt(), sampling=SamplingParams(**{**vars(sampling), "seed": seed})
        ).text
        assert "   " * 3 not in text


def test_text_that_the_grammar_forces_costs_no_pass(decoder) -> None:
    """“name” is one token, "age" and "roles" are letters."""
    for way in ("exact", "paper", "augmented"):
        speculation = SpeculationConfig(mode=way, gamma=4, lookup=False)
        sampling = SamplingParams(max_new_tokens=70, constraint=PERSON)
        stats = decoder.generate(
            prompt(), prompt(), sampling=sampling, speculation=speculation
        ).stats
        look_ahead = stats.rounds if way == "augmented" else 0
        assert stats.draft_passes - look_ahead < stats.drafted_tokens
    plain = decoder.generate(prompt(), sampling=sampling).stats
    assert plain.rounds < plain.completion_tokens
    assert plain.drafted_tokens == 0
    assert plain.method == "lc"


SPACED = [*'▁abcdehlonrtu{}":,0123456789é', "▁a", "ab", "▁b", '{"']


@pytest.mark.parametrize(
    "pattern", [" ab?", "[éü]{3}", "(ab )+b", '\\{"a": "(日本|a)"\\}', "  a|b  b"]
)
def test_text_of_bytes_and_spaces_is_what_the_grammar_allows(pattern: str) -> None:
    import regex

    tokenizer = sentencepiece_tokenizer(SPACED)
    own = {"vocab_size": 300, "eos_token_id": tokenizer.eos_token_id}
    decoder = RapidDecoder(tiny_model(**own), tokenizer, tiny_model(seed=1, **own))
    ids, finished = tokenizer("ab ab hello").input_ids, 0
    for seed in range(6):
        sampling = SamplingParams(
            temperature=1.0, seed=seed, max_new_tokens=30, constraint={"regex": pattern}
        )
        deltas = list(decoder.stream(ids, ids, sampling=sampling))
        text = "".join(delta.text for delta in deltas)
        if deltas[-1].finish_reason == "stop":
            finished += 1
            assert regex.fullmatch(pattern, text), text
    assert finished > 0


def test_a_decoder_serves_on_after_a_timeout_and_a_closed_stream(decoder) -> None:
    sampling = SamplingParams(max_new_tokens=50, constraint=PERSON)
    want = decoder.generate(prompt(), prompt(), sampling=sampling).token_ids
    stream = decoder.stream(prompt(), prompt(), sampling=sampling)
    next(stream)
    stream.close()
    late = SamplingParams(max_new_tokens=50, constraint=PERSON, timeout=1e-9)
    with pytest.raises(GenerationTimeoutError):
        decoder.generate(prompt(), prompt(), sampling=late)
    assert decoder.generate(prompt(), prompt(), sampling=sampling).token_ids == want


@pytest.mark.parametrize("broken", ["target", "drafter"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_reported_as_such_under_a_constraint(broken: str, temperature: float) -> None:
    models = {"target": model_for_text(), "drafter": model_for_text(seed=1)}
    with torch.no_grad():
        models[broken].lm_head.weight.fill_(torch.nan)
    decoder = RapidDecoder(models["target"], TOKENIZER, models["drafter"])
    sampling = SamplingParams(temperature=temperature, constraint=PERSON)
    with pytest.raises(NumericalError, match="NaN"):
        decoder.generate(
            prompt(), prompt(), sampling=sampling, speculation=SpeculationConfig(gamma=3)
        )


def test_a_grammar_is_compiled_once_for_a_decoder(monkeypatch) -> None:
    decoder = RapidDecoder(model_for_text(), TOKENIZER)
    compiled: list[str] = []
    original = Constraints._compile
    monkeypatch.setattr(
        Constraints, "_compile", lambda self, key: compiled.append(key) or original(self, key)
    )
    for constraint in (PERSON, PERSON, "a|b", json.dumps(PERSON), ["a", "b"], "a|b"):
        sampling = SamplingParams(max_new_tokens=3, constraint=constraint)
        decoder.generate(prompt(), sampling=sampling)
    assert len(compiled) == 3
