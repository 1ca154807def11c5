"""Declares one more option of speculation; imported before all that derives its options from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rapid_llm import config
from rapid_llm.options import Option


@dataclass(frozen=True)
class WithFoo(config.SpeculationConfig):
    """The options of speculation, and one more."""

    foo: Annotated[int, Option("Number of foos.", "at least 1", lambda n: n >= 1)] = 7


config.SpeculationConfig = WithFoo
