"""Flat options, as the frameworks pass them."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, transformers_greedy

from rapid_llm import RapidDecoder
from rapid_llm.config import SamplingParams, SpeculationConfig, from_options
from rapid_llm.errors import InvalidParameterError


def test_options_are_sorted_into_the_two():
    sampling, speculation = from_options(
        {"max_tokens": 9, "temperature": 0.5, "gamma": 3, "mode": "exact", "top_p": None}
    )
    assert sampling == SamplingParams(max_new_tokens=9, temperature=0.5)
    assert speculation == SpeculationConfig(gamma=3, mode="exact")
    assert from_options({}) == (SamplingParams(), SpeculationConfig())
    assert from_options({"seed": None})[0].seed is None
    assert from_options({"stop": "end"})[0].stop == ("end",)


def test_unknown_and_bad_options():
    with pytest.raises(InvalidParameterError, match=r"'gama'.*gamma.*max_tokens"):
        from_options({"gama": 3})
    with pytest.raises(InvalidParameterError, match="eta=-1"):
        from_options({"eta": -1})


@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", torch.tensor(0.5), 0.5),
        ("temperature", 1, 1.0),
        ("temperature", Fraction(1, 2), 0.5),
        ("top_p", Decimal("0.5"), 0.5),
        ("top_p", np.float16(0.5), 0.5),
        ("top_k", np.int64(7), 7),
        ("top_k", torch.tensor(7), 7),
        ("max_new_tokens", np.uint8(9), 9),
        ("max_new_tokens", torch.tensor(9), 9),
        ("repetition_penalty", np.array(1.5), 1.5),
        ("seed", np.int32(3), 3),
        ("eta", np.float64(2.0), 2.0),
        ("alpha", torch.tensor(0.25), 0.25),
        ("gamma", np.int16(4), 4),
        ("min_confidence", np.float32(0.5), 0.5),
    ],
)
def test_scalars_of_numpy_and_torch_are_numbers(name: str, value: Any, number: Any) -> None:
    kind = SamplingParams if hasattr(SamplingParams, name) else SpeculationConfig
    kept = getattr(kind(**{name: value}), name)
    assert kept == number
    assert type(kept) is type(number)


NO_NUMBERS = [
    True, np.True_, torch.tensor(True), "1", b"1", [1], np.array([1]), torch.tensor([1]), 1j,
    float("nan"), float("inf"), -float("inf"), np.float32("nan"), torch.tensor(float("inf")),
    object,
]  # fmt: skip


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("temperature", "top_p", "top_k", "max_new_tokens", "repetition_penalty", "seed"),
        *("eta", "alpha", "gamma", "min_confidence"),
    ],
)
def test_what_is_no_finite_number_is_refused(name: str, value: Any) -> None:
    kind = SamplingParams if hasattr(SamplingParams, name) else SpeculationConfig
    with pytest.raises(InvalidParameterError, match=rf"{name}=.* must be "):
        kind(**{name: value})


def test_a_number_that_no_float_holds_is_refused() -> None:
    for name in ("temperature", "top_p", "repetition_penalty", "seed"):
        with pytest.raises(InvalidParameterError, match=name):
            SamplingParams(**{name: 10**400})


@pytest.mark.parametrize("value", [0.5, np.float32(2.0), torch.tensor(2.0)])
def test_a_fraction_is_no_count(value: Any) -> None:
    for name in ("top_k", "max_new_tokens", "seed"):
        with pytest.raises(InvalidParameterError, match=name):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("stop", [5, [3], [""], [b"x"], [None], True])
def test_stop_strings_are_strings(stop: Any) -> None:
    with pytest.raises(InvalidParameterError, match="stop="):
        SamplingParams(stop=stop)


# --- extreme settings --------------------------------------------------------------------------

PROMPT = list(range(3, 33))
EXTREME: list[dict[str, Any]] = [
    *({"temperature": t} for t in (1e-4, 1e-6, 1e-20, 1e-38, 1e-45, 5e-324, 1e30, 1e300)),
    *({"temperature": 1.0, "top_p": p} for p in (1e-7, 1e-45, 5e-324)),
    *({"repetition_penalty": r} for r in (5e-324, 1e-45, 1e-30, 1e30, 1e300)),
    *({"repetition_penalty": r, "temperature": t} for r in (1e-300, 1e300) for t in (1e-5, 1e300)),
    {"top_k": 10**30, "temperature": 1.0},
]


def test_no_temperature_is_too_high_for_suppressed_tokens() -> None:
    model = tiny_model(eos_token_id=None)
    model.generation_config.suppress_tokens = [5]
    decoder = RapidDecoder(model, tiny_tokenizer())
    hot = [
        decoder.generate(PROMPT, sampling=SamplingParams(t, max_new_tokens=8, seed=1)).token_ids
        for t in (1e30, 1e39, 1e300)
    ]
    assert len(set(hot[0])) > 1
    assert hot[0] == hot[1] == hot[2]


@pytest.mark.parametrize("settings", EXTREME, ids=str)
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_extreme_settings_give_numbers(settings: dict[str, Any], mode: Any) -> None:
    decoder = RapidDecoder(tiny_model(eos_token_id=None), tiny_tokenizer())
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True, **settings)
    for eta, alpha in ((10.0, 0.1), (1e30, 5e-324), (5e-324, 1.0)):
        speculation = SpeculationConfig(mode=mode, gamma=3, eta=eta, alpha=alpha)
        result = decoder.generate(PROMPT, PROMPT[4:], sampling=sampling, speculation=speculation)
        assert len(result.token_ids) == 8


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": t} for t in (1e-4, 1e-6, 1e-20, 1e-38, 1e-45, 5e-324)),
        *({"temperature": 1.0, "top_p": p} for p in (1e-7, 1e-45, 5e-324)),
    ],
    ids=str,
)
def test_settings_next_to_greedy_are_greedy(settings: dict[str, Any]) -> None:
    model = tiny_model(eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer())
    want = transformers_greedy(model, PROMPT, 20)
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True, **settings)
    for draft in (None, PROMPT[4:]):
        speculation = SpeculationConfig(mode="exact", gamma=3)
        result = decoder.generate(PROMPT, draft, sampling=sampling, speculation=speculation)
        assert result.token_ids == want


def test_an_eta_beyond_float32_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match=r"eta=1e\+39.*1e\+30"):
        SpeculationConfig(eta=1e39)
