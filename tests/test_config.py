"""Flat options, as the frameworks pass them."""

from __future__ import annotations

import pytest

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
