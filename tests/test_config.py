"""Flat options, as the frameworks pass them."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, transformers_greedy

import rapid_llm
from rapid_llm import ContextBuilder, GenerationResult, RapidDecoder, load_model
from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError
from rapid_llm.old_names import MOVED, RENAMED
from rapid_llm.options import changed, options_of, sorted_into

BOTH = SamplingParams, SpeculationConfig
ALL = (*BOTH, EngineConfig, RetrievalConfig)


def test_options_are_sorted_into_what_declares_them() -> None:
    sampling, speculation = sorted_into(
        {"max_tokens": 9, "temperature": 0.5, "gamma": 3, "mode": "exact", "top_p": None}, *BOTH
    )
    assert sampling == SamplingParams(max_new_tokens=9, temperature=0.5)
    assert speculation == SpeculationConfig(gamma=3, mode="exact")
    assert sorted_into({}, *BOTH) == (SamplingParams(), SpeculationConfig())
    assert sorted_into({"seed": None}, *BOTH)[0].seed is None
    assert sorted_into({"stop": "end"}, *BOTH)[0].stop == ("end",)


def test_unknown_bad_and_doubled_options_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match=r"'gama'.*gamma.*max_tokens"):
        sorted_into({"gama": 3}, *BOTH)
    with pytest.raises(InvalidParameterError, match="eta=-1"):
        sorted_into({"eta": -1}, *BOTH)
    with pytest.raises(InvalidParameterError, match=r"max_new_tokens=3.*max_tokens=4.*one option"):
        sorted_into({"max_new_tokens": 3, "max_tokens": 4}, *BOTH)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_names_the_new_one(old: str, new: str) -> None:
    error = pytest.raises(InvalidParameterError, match=f"{old!r} is now {new!r}")
    with error:
        sorted_into({old: "x"}, EngineConfig, RetrievalConfig)
    takes = {
        "model": RapidDecoder.from_pretrained,
        "attn_implementation": partial(load_model, "x"),
    }.get(new, partial(ContextBuilder, None))
    with error:
        takes(**{old: "x"})


def test_old_names_of_attributes_name_the_new_ones() -> None:
    with pytest.raises(AttributeError, match=r"from_chunks is now GenerationResult\.from_deltas"):
        _ = GenerationResult.from_chunks
    with pytest.raises(AttributeError, match=r"RapidDecoder\.draft_runner"):
        _ = rapid_llm.RapidDecoder.draft_forward
    with pytest.raises(AttributeError, match=r"Session\.forward is now Session\.runner"):
        _ = Session.forward
    with pytest.raises(ImportError, match=r"rapid_llm\.Inquiry is now rapid_llm\.RapidPipeline"):
        exec("from rapid_llm import Inquiry")


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_the_import_of_a_module_by_its_old_name_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ImportError, match=f"^{re.escape(old)} is now {re.escape(new)}$"):
        import_module(old)
    import_module(new)
    with pytest.raises(ImportError, match=r"^No module named"):
        import_module(f"{old}s")


def test_other_values_leave_the_rest() -> None:
    settings = SamplingParams(temperature=0.5, seed=3)
    assert changed(settings, {"max_tokens": 9}) == SamplingParams(0.5, max_new_tokens=9, seed=3)
    assert changed(settings, {"top_k": None, "seed": None}).seed is None
    with pytest.raises(InvalidParameterError, match="unknown option 'gamma'"):
        changed(settings, {"gamma": 3})


@pytest.mark.parametrize("name", options_of(*ALL))
def test_every_option_has_help_and_a_default_within_its_range(name: str) -> None:
    declared = options_of(*ALL)[name]
    assert declared.option.help.endswith(".")
    assert declared.option.help[0].isupper() or declared.choices
    assert declared.checked(declared.default) == declared.default


@pytest.mark.parametrize(
    ("group", "options", "told"),
    [
        (SpeculationConfig, {"mode": "lossless"}, "one of exact, augmented, paper"),
        (SpeculationConfig, {"lookup": 1}, "True or False"),
        (EngineConfig, {"model": ""}, "the name or path of a model"),
        (EngineConfig, {"device": 3}, "a string or a path or None"),
        (EngineConfig, {"kv_cache_bytes": -1}, "bytes of at least 0"),
        (EngineConfig, {"drafter_quantization": "int2"}, "one of auto, int8, int4 or None"),
        (EngineConfig, {"chat_template_kwargs": [1]}, "a mapping"),
        (RetrievalConfig, {"chunk_tokens": 31}, "at least 32"),
        (RetrievalConfig, {"threshold": 1.5}, r"within \[-1, 1\]"),
        (RetrievalConfig, {"compression": 0.5}, "at least 1"),
    ],
    ids=str,
)
def test_an_error_names_option_value_and_limit(group: Any, options: Any, told: str) -> None:
    ((name, value),) = options.items()
    with pytest.raises(
        InvalidParameterError, match=f"{name}={value!r} .*{told}".replace("[1]", r"\[1\]")
    ):
        group(**options)


def test_paths_dtypes_and_devices_are_given_as_they_are() -> None:
    config = EngineConfig(model=Path("folder"), dtype=torch.float16, device=torch.device("cuda", 1))
    assert (config.model, config.dtype, config.device) == ("folder", "float16", "cuda:1")


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


@pytest.mark.parametrize("group", ["hub_options", "drafter_options"])
@pytest.mark.parametrize("name", ["drafter_options", "dtype", "device"])
def test_an_option_of_its_own_is_none_of_from_pretrained(group: str, name: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"{group} holds '{name}': give it as {name}="):
        EngineConfig(**{group: {"revision": "main", name: {}}})
