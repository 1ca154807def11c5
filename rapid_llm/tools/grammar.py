"""The grammar of an answer: free text, calls of tools, JSON of a schema, after any reasoning."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from rapid_llm.grammars import inline_json
from rapid_llm.tool_formats import Reasoning, ToolFormat
from rapid_llm.tools.definitions import ChatOptions, Tool, closed
from rapid_llm.tools.parsing import opened_reasoning

_META = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")
_SPACE = r"[ \t\r\n]"


def answer_constraint(
    options: ChatOptions,
    form: ToolFormat,
    reasoning: Reasoning | None,
    opening: str,
    special: Callable[[str], int | None],
) -> dict[str, Any] | None:
    """Constraint on an answer, in a form that ``SamplingParams`` takes; None for free text.

    A call that the model begins names one of the tools, with arguments of its schema. Reasoning is
    never constrained.

    Args:
        options: tools and response format.
        form: format of the model's tool calls.
        reasoning: markers of the model's reasoning; None if it has none.
        opening: text with which the prompt opens the answer.
        special: function from a text to the id of the special token of that text, or None.
    """
    if not options.checked_tools:
        if options.schema is None:
            return None
        if reasoning is None:
            return {"json": dict(options.schema)}
    return {"grammar": _Grammar(options, form, reasoning, opening, special).text()}


class _Grammar:
    """Writes a grammar in llguidance's dialect of Lark.

    Terminals are W, bounded white space, and texts; rules marked ``lazy`` end as soon as they can.
    The lexer takes the longest terminal, so each alternative to free text is one terminal, which
    free text excludes.
    """

    def __init__(
        self,
        options: ChatOptions,
        form: ToolFormat,
        reasoning: Reasoning | None,
        opening: str,
        special: Callable[[str], int | None],
    ) -> None:
        self.options, self.form, self.reasoning = options, form, reasoning
        self.opening, self.special = opening, special
        self.rules: dict[str, str] = {"W": f"/{_SPACE}{{0,8}}/"}

    def text(self) -> str:
        self.rules["body"] = " | ".join(self._bodies())
        start = "body"
        if self.reasoning is not None:
            begin, end = self.reasoning.begin, self.reasoning.end
            thoughts = f"{self._until('thoughts', end)} W"
            if opened_reasoning(self.opening, self.reasoning):
                start = f"{thoughts} body"
            elif end not in self.opening:
                start = f"body | {self._thinking(begin)} {thoughts} body"
        lines = ["%llguidance {}", f"start: {start}"]
        return "\n".join([*lines, *(f"{name}: {rule}" for name, rule in self.rules.items()), ""])

    def _bodies(self) -> Iterable[str]:
        tools = self.options.callable_tools
        if not self.options.must_call:
            if self.options.schema is not None:
                self.rules["schema"] = inline_json(self.options.schema)
                yield "W schema"
            else:
                yield self._free_text()
        if not tools:
            return
        self._define_calls(tools)
        free = not self.options.must_call and self.options.schema is None
        if self.form.shape == "bare":
            yield from self._framed(tools, free=free)
        elif free:
            yield f"{self._until('text', self.form.begin)} calls"
        else:
            yield f"W {self._literal(self.form.begin)} calls"

    def _framed(self, tools: tuple[Tool, ...], *, free: bool) -> Iterable[str]:
        """Bodies for calls that are the whole answer, as alternatives to free text if ``free``."""
        for number, (begin, end) in enumerate(self.form.frames):
            tail = f" W {self._literal(end.strip())}" if end else ""
            if not free:
                head = f"W {self._literal(begin.strip())} " if begin else ""
                yield f"{head}calls{tail}"
                continue
            special = self.special(begin) is not None
            for index, tool in enumerate(tools):
                text = "" if special else _escaped(begin.strip())
                name = f"HEAD_{number}_{index}"
                self.rules[name] = f"/{_SPACE}*{text}{self._head([tool.name])}/"
                self.rules[f"{name.lower()}[lazy]"] = name
                token = f"{self._literal(begin)} " if special else ""
                yield f"{token}{name.lower()} rest_{index}{tail}"

    # --- calls ---------------------------------------------------------------------------------

    def _define_calls(self, tools: tuple[Tool, ...]) -> None:
        """Define the rule ``calls``: the text after the marker that begins a call."""
        form = self.form
        for number, tool in enumerate(tools):
            self.rules[f"arguments_{number}"] = inline_json(closed(tool.parameters))
            self.rules[f"call_{number}"] = self._call(number, tool.name)
        self.rules["call"] = " | ".join(f"call_{number}" for number in range(len(tools)))
        several = form.several and self.options.parallel_tool_calls
        begin = self._literal(form.begin)
        end = f"W {self._literal(form.end)}" if form.end else ""
        if form.shape == "list":
            more = '(W "," W call)*' if several else ""
            listed = f"call {more}" if self.options.must_call else f"(call {more})?"
            self.rules["calls"] = f'W "[" W {listed} W "]" {end}'
        else:
            self.rules["one"] = f"W call {end}"
            self.rules["calls"] = f"one (W {begin} one)*" if several and form.begin else "one"

    def _call(self, number: int, name: str) -> str:
        if self.form.shape == "named":
            return (
                f"{self._literal(name)} {self._literal(self.form.separator)} W arguments_{number}"
            )
        key = _text(json.dumps(self.form.arguments))
        identity = 'W "," W "\\"id\\"" W ":" W /"[A-Za-z0-9]{1,40}"/'
        tail = f"({identity})? " if self.form.begin == "[TOOL_CALLS]" else ""
        self.rules[f"rest_{number}"] = f'W "," W {key} W ":" W arguments_{number} {tail}W "}}"'
        return f'"{{" W "\\"name\\"" W ":" W {_text(json.dumps(name))} rest_{number}'

    # --- text ----------------------------------------------------------------------------------

    def _free_text(self) -> str:
        """Name of a terminal for text in which neither a call nor reasoning begins."""
        self.rules["TEXT"] = f"/(?s:.*)/{self._without(self._beginnings())}"
        return "TEXT"

    def _beginnings(self) -> list[str]:
        """Regular expressions of texts in which the parser finds the beginning of a call."""
        if self.form.shape != "bare":
            return [f"(?s:.*){_escaped(self.form.begin)}(?s:.*)"]
        none = self.options.tool_choice == "none"
        tools = self.options.checked_tools if none else self.options.callable_tools
        frames = "|".join(_escaped(begin.strip()) for begin, _ in self.form.frames if begin)
        return [f"{_SPACE}*({frames})?{self._head([tool.name for tool in tools])}(?s:.*)"]

    def _head(self, names: Iterable[str]) -> str:
        """Regular expression of the beginning of a bare call, up to the end of its name."""
        known = "|".join(map(_escaped, names))
        parts = ("", "\\{", '"name"', ":", f'"({known})"')
        return f"{_SPACE}*".join(parts)

    def _thinking(self, begin: str) -> str:
        """Expression for the beginning of reasoning at the start of an answer."""
        if self.special(begin) is not None:
            return self._literal(begin)
        self.rules["THINKING"] = f"/{_SPACE}{{0,8}}{_escaped(begin)}/"
        return "THINKING"

    def _without(self, beginnings: Iterable[str]) -> str:
        if self.reasoning is not None:
            beginnings = [*beginnings, f"(?s:.*){_escaped(self.reasoning.begin)}(?s:.*)"]
        return "".join(f" & ~/{beginning}/" for beginning in beginnings)

    def _until(self, name: Literal["text", "thoughts"], end: str) -> str:
        """Expression for any text up to and including an end marker or special token."""
        if self.special(end) is not None:
            if name == "text":
                return f"{self._free_text()} {self._literal(end)}"
            # The parser reads text alone, so the token must not be spelled out either.
            self.rules["THOUGHTS"] = f"/(?s:.*)/ & ~/(?s:.*){_escaped(end)}(?s:.*)/"
            return f"THOUGHTS {self._literal(end)}"
        terminal = f"{name.upper()}_UNTIL"
        excluded = self._without([]) if name == "text" else ""
        self.rules[terminal] = f"/(?s:.*){_escaped(end)}/{excluded}"
        self.rules[f"{terminal.lower()}[lazy]"] = terminal
        return terminal.lower()

    def _literal(self, text: str) -> str:
        """Expression for a text, by its special token if it is one."""
        token = self.special(text) if text else None
        return _text(text) if token is None else f"<[{token}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A text in a regular expression between slashes."""
    return _META.sub(lambda found: "\\" + found[0], text)
