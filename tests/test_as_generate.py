"""The model's own settings count: exact greedy decoding is ``generate(do_sample=False)``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import counting_model, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from rapid_llm import RapidDecoder, SamplingParams, SpeculationConfig
from rapid_llm.errors import InvalidParameterError

PROMPT = [*range(3, 33), 5, 6, 7, 5, 6]
NEW = 40

SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "repetition_penalty below 1": {"repetition_penalty": 0.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.6},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": list(range(3, 40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 60))},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(3, 30)]},
    "bad words of two tokens": {"bad_words_ids": [[i, j] for i in range(3, 64) for j in (9, 44)]},
    "sequence_bias": {"sequence_bias": [[[9], 3.0], [[44, 27], -9.0], [[63], -4.0]]},
    "min_length": {"min_length": len(PROMPT) + 12},
    "min_new_tokens": {"min_new_tokens": 12},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.4)},
    "no guidance": {"guidance_scale": 1.0},
    "renormalize_logits": {"renormalize_logits": True, "remove_invalid_values": True},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 9},
    "settings for sampling": {"do_sample": True, "temperature": 7.0, "top_k": 1, "min_p": 0.9},
}
# These are about where an answer ends: here at such tokens.
ENDS = {
    "min_length": [63, 2],
    "min_new_tokens": [63, 2],
    "exponential_decay_length_penalty": [50, 2],
    "several": [63, 2],
}


def model_with(settings: dict[str, Any], eos: Any = None, seed: int = 0) -> PreTrainedModel:
    model = tiny_model(seed=seed, eos_token_id=None)
    model.generation_config.eos_token_id = eos
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def generated(model: PreTrainedModel, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_exact_greedy_is_what_generate_gives_with_the_same_generation_config(name: str) -> None:
    eos = ENDS.get(name)
    model = model_with(SETTINGS[name], eos)
    want = generated(model, PROMPT)
    if name not in ("no guidance", "renormalize_logits", "settings for sampling"):
        assert want != generated(model_with({}, eos), PROMPT)  # the setting matters here
    sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=eos is None)
    itself = RapidDecoder(model, tiny_tokenizer())
    other = RapidDecoder(model, tiny_tokenizer(), tiny_model(seed=1))
    assert itself.generate(PROMPT, sampling=sampling).token_ids == want
    for decoder in (itself, other):
        for drafting in ({"gamma": 4}, {"gamma": "auto"}, {"gamma": 3, "lookup": False}):
            speculation = SpeculationConfig(mode="exact", **drafting)
            drafted = decoder.generate(
                PROMPT, PROMPT[4:], sampling=sampling, speculation=speculation
            )
            assert drafted.token_ids == want, drafting


def test_a_forced_first_token_follows_a_prompt_of_one() -> None:
    model = model_with({"forced_bos_token_id": 37})
    want = generated(model, [9])
    assert want[0] == 37
    sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    decoder = RapidDecoder(model, tiny_tokenizer())
    for draft in (None, [9]):
        speculation = SpeculationConfig(mode="exact", gamma=3)
        result = decoder.generate([9], draft, sampling=sampling, speculation=speculation)
        assert result.token_ids == want


def test_the_callers_repetition_penalty_goes_before_the_models() -> None:
    model = model_with({"repetition_penalty": 1.3})
    decoder = RapidDecoder(model, tiny_tokenizer())

    def answer(penalty: float | None) -> list[int]:
        sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=True, repetition_penalty=penalty)
        return decoder.generate(PROMPT, sampling=sampling).token_ids

    assert answer(None) == generated(model, PROMPT)
    assert answer(1.0) == generated(model_with({}), PROMPT)
    assert answer(1.6) == generated(model_with({"repetition_penalty": 1.6}), PROMPT)


def test_the_generation_config_counts_as_it_is_now() -> None:
    model = model_with({})
    decoder = RapidDecoder(model, tiny_tokenizer())
    sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    first = decoder.generate(PROMPT, sampling=sampling).token_ids
    model.generation_config.suppress_tokens = first[:5]
    second = decoder.generate(PROMPT, sampling=sampling).token_ids
    assert second == generated(model, PROMPT) != first
    assert model.generation_config.suppress_tokens == first[:5]  # and it is left as it was
    assert model.generation_config.max_length is None


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_no_mode_says_a_suppressed_token(mode: Any) -> None:
    suppressed = list(range(3, 40))
    decoder = RapidDecoder(model_with({"suppress_tokens": suppressed}), tiny_tokenizer())
    sampling = SamplingParams(temperature=1.5, max_new_tokens=NEW, ignore_eos=True, seed=2)
    result = decoder.generate(
        PROMPT, PROMPT[4:], sampling=sampling, speculation=SpeculationConfig(mode=mode, gamma=3)
    )
    assert not {*suppressed} & {*result.token_ids}


def test_sampling_settings_of_the_model_are_not_followed() -> None:
    settings = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.01, "min_p": 0.9}
    sampling = SamplingParams(temperature=1.0, max_new_tokens=NEW, ignore_eos=True, seed=4)
    answers = [
        RapidDecoder(model_with(given), tiny_tokenizer())
        .generate(PROMPT, sampling=sampling)
        .token_ids
        for given in (settings, {})
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", 1.5),
        ("guidance_scale", 0.0),
        ("num_beams", 4),
        ("penalty_alpha", 0.6),
        ("watermarking_config", {"bias": 2.5}),
        ("token_healing", True),
        ("force_words_ids", [[5]]),
        ("dola_layers", "high"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(name: str, value: Any) -> None:
    model = model_with({name: value})
    decoder = RapidDecoder(model, tiny_tokenizer())
    with pytest.raises(InvalidParameterError, match=rf"{name}=.*model\.generation_config\.{name}"):
        decoder.stream(PROMPT)
    setattr(model.generation_config, name, None)
    assert decoder.generate(PROMPT, sampling=SamplingParams(max_new_tokens=2)).token_ids


def test_a_broken_generation_config_is_said_to_be_broken() -> None:
    decoder = RapidDecoder(model_with({"bad_words_ids": "w5"}), tiny_tokenizer())
    with pytest.raises(InvalidParameterError, match="generation_config cannot be followed"):
        decoder.generate(PROMPT)


# --- where an answer ends ----------------------------------------------------------------------


def counting(template: str | None = None, **special: Any) -> RapidDecoder:
    """A decoder that counts up from the last word of its prompt."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens(special)
    return RapidDecoder(counting_model(), tokenizer)


CHAT = (
    "{% for m in messages %}<s> {{ m['content'] }} w20 {% endfor %}"
    "{% if add_generation_prompt %}<s> w3 {% endif %}"
)


def test_the_template_s_end_of_turn_ends_an_answer() -> None:
    decoder = counting(CHAT, extra_special_tokens=["w20"])
    result = decoder.generate([{"role": "user", "content": "w40"}])
    assert result.finish_reason == "stop"
    assert result.token_ids == list(range(4, 21))
    assert result.text.split() == [f"w{i}" for i in range(4, 20)]


def test_an_ordinary_word_after_a_turn_ends_nothing() -> None:
    result = counting(CHAT).generate(
        [{"role": "user", "content": "w40"}], sampling=SamplingParams(max_new_tokens=30)
    )
    assert result.finish_reason == "length"


def test_the_tokenizers_eos_ends_an_answer_beside_the_models() -> None:
    decoder = counting(eos_token="w9")
    decoder.target.model.generation_config.eos_token_id = [12]
    assert decoder.generate([5]).token_ids == [6, 7, 8, 9]
    assert decoder.generate([10]).token_ids == [11, 12]


def test_ignore_eos_ignores_them_all() -> None:
    decoder = counting(CHAT, extra_special_tokens=["w20"], eos_token="w9")
    decoder.target.model.generation_config.eos_token_id = [12]
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    result = decoder.generate([{"role": "user", "content": "w40"}], sampling=sampling)
    assert result.token_ids == list(range(4, 34))


def test_no_end_comes_before_min_new_tokens() -> None:
    """The model's own cannot be said until then, another is not heard."""
    for eos, last in (("w9", 30), ("w11", 30), ("w12", 12), ("w14", 14)):
        decoder = counting(eos_token=eos)
        config = decoder.target.model.generation_config
        config.eos_token_id, config.min_new_tokens = [30], 6
        assert decoder.generate([5]).token_ids == list(range(6, last + 1))
    config.eos_token_id = [7]
    assert 7 not in decoder.generate([5]).token_ids[:6]


def test_stop_strings_of_the_model_end_an_answer() -> None:
    decoder = counting()
    decoder.target.model.generation_config.stop_strings = ["w11 w12"]
    result = decoder.generate([5], sampling=SamplingParams(stop=["w30"]))
    assert (result.finish_reason, result.text.split()) == ("stop", ["w6", "w7", "w8", "w9", "w10"])
    assert decoder.generate([20], sampling=SamplingParams(stop=["w30"])).text.split()[-1] == "w29"
