"""Formats of tool calls by model family, recognised from a model's chat template.

A format is data: the response template (:mod:`rapid_llm.tools.parsing`), the grammar
(:mod:`rapid_llm.tools.grammar`) and the text of earlier calls are derived from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["each", "list", "bare", "named"]


@dataclass(frozen=True)
class ToolFormat:
    """The text of tool calls in an answer.

    Attributes:
        name: name of the format.
        shape: ``each`` is one JSON object a call, each between ``begin`` and ``end``; ``list`` is
            one JSON list of all calls between them; ``named`` is ``begin``, the tool's name,
            ``separator`` and its arguments, for each call; ``bare`` is a JSON object that is the
            whole answer, between one of the ``frames``.
        begin: text that begins a call, or all calls.
        end: text that ends it; empty where calls last to the end of the answer.
        separator: text between a name and its arguments (``named`` only).
        frames: texts that may stand around a ``bare`` call.
        arguments: key of the arguments.
        several: whether an answer may hold several calls.
        prompt: system prompt for templates that do not show tools, with ``{tools}`` in it; None
            where the template shows them.
    """

    name: str
    shape: Shape
    begin: str = ""
    end: str = ""
    separator: str = ""
    frames: tuple[tuple[str, str], ...] = (("", ""),)
    arguments: str = "arguments"
    several: bool = True
    prompt: str | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens of a tokenizer."""
        frames = (text.strip() for frame in self.frames for text in frame)
        return tuple(filter(None, (self.begin, self.end, self.separator, *frames)))

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Text of calls as the model would have written them.

        Args:
            calls: names and arguments of the calls.
        """
        texts = [
            json.dumps(
                {"name": call["name"], self.arguments: call["arguments"]}, ensure_ascii=False
            )
            for call in calls
        ]
        if self.shape == "list":
            return f"{self.begin}[{', '.join(texts)}]{self.end}"
        if self.shape == "bare":
            return "\n".join(texts)
        return "\n".join(f"{self.begin}\n{text}\n{self.end}" for text in texts)


HERMES = ToolFormat("hermes", "each", "<tool_call>", "</tool_call>")
"""Qwen2.5, Qwen3, SmolLM3, Granite 4 and models of Nous Research."""

LLAMA = ToolFormat(
    "llama",
    "bare",
    frames=(("", ""), ("<|python_tag|>", "")),
    arguments="parameters",
    several=False,
)
"""Llama 3.1 and later: the template takes one call a message."""

MISTRAL = ToolFormat("mistral", "list", "[TOOL_CALLS]")
"""Mistral's templates up to version 7 of its tokenizer."""

MISTRAL_NAMED = ToolFormat("mistral-named", "named", "[TOOL_CALLS]", separator="[ARGS]")
"""Mistral's templates from version 11 of its tokenizer on."""

GRANITE = ToolFormat("granite", "list", "<|tool_call|>")
"""Granite 3."""

GEMMA = ToolFormat(
    "gemma",
    "bare",
    frames=(("", ""), ("```json\n", "\n```"), ("```tool_code\n", "\n```")),
    arguments="parameters",
    several=False,
    prompt=(
        "You have access to functions. If you decide to invoke any of the function(s), you MUST "
        'put it in the format of {"name": function name, "parameters": dictionary of argument '
        "name and its value}\n\nYou SHOULD NOT include any other text in the response if you call "
        "a function\n\n{tools}"
    ),
)
"""Gemma 2 and 3, whose templates show no tools. The prompt is that of Gemma's documentation
(ai.google.dev/gemma/docs/capabilities/function-calling)."""

SMOLLM2 = ToolFormat(
    "smollm2",
    "list",
    "<tool_call>",
    "</tool_call>",
    prompt=(
        "You are an expert in composing functions. You are given a question and a set of possible "
        "functions. Based on the question, you will need to make one or more function/tool calls "
        "to achieve the purpose. If none of the functions can be used, point it out and refuse to "
        "answer. If the given question lacks the parameters required by the function, also point "
        "it out.\n\nYou have access to the following tools:\n<tools>{tools}</tools>\n\nThe output "
        "MUST strictly adhere to the following format, and NO other text MUST be included. The "
        "example format is as follows. Please make sure the parameter type is correct. If no "
        "function call is needed, please make the tool calls an empty list '[]'.\n"
        '<tool_call>[\n{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": '
        '"value2"}},\n... (more tool calls as required)\n]</tool_call>'
    ),
)
"""SmolLM2, and every other model whose template shows no tools. The prompt is that of
SmolLM2's documentation (instructions_function_calling.md of SmolLM2-1.7B-Instruct)."""

KNOWN = (HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, GRANITE, GEMMA, SMOLLM2)
"""All formats."""

_CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_TOOLS = re.compile(r"(?<![\w.])(?:xml_)?tools\b")
_SHORT_IDS = re.compile(r"length\s*(?:!=|==)\s*9\b")


@dataclass(frozen=True)
class Reasoning:
    """Markers before and after the reasoning in an answer."""

    begin: str
    end: str


def format_of(template: str) -> ToolFormat | None:
    """Format of the tool calls of a chat template's model; None where it shows an unknown one.

    Args:
        template: chat template.
    """
    if "<start_of_turn>" in template:
        return GEMMA
    if variable_of(template) is None:
        return SMOLLM2
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template and "<function=" not in template:
        return HERMES
    if "<|tool_call|>" in template and "<|/tool_call|>" not in template:
        return GRANITE
    if '"parameters"' in template and ("ipython" in template or "<|python_tag|>" in template):
        return LLAMA
    return None


def variable_of(template: str) -> str | None:
    """Name of the variable in which a chat template expects tools; None if it shows none.

    SmolLM3's takes ``xml_tools`` in place of ``tools``.
    """
    code = (_STRING.sub("''", block) for block in _CODE.findall(template))
    names = {name for block in code for name in _TOOLS.findall(block)}
    return next((name for name in ("tools", "xml_tools") if name in names), None)


def reasoning_of(template: str) -> Reasoning | None:
    """Markers of the reasoning in a model's answers; None if its template has none."""
    if "[THINK]" in template:
        return Reasoning("[THINK]", "[/THINK]")
    return Reasoning("<think>", "</think>") if "think>" in template else None


def keeps_calls(template: str) -> bool:
    """Whether a chat template writes the calls of earlier answers."""
    return "tool_calls" in template


def wants_short_ids(template: str) -> bool:
    """Whether a chat template requires call ids of nine characters, as Mistral's do."""
    return _SHORT_IDS.search(template) is not None
