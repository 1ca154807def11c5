"""Parse content, reasoning and tool calls from the text of an answer, while it arrives.

transformers' ``ResponseParser`` separates the regions, with a response template derived from the
model's :class:`~rapid_llm.tool_formats.ToolFormat`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from rapid_llm.tool_formats import Reasoning, ToolFormat
from rapid_llm.tools.calls import CallReader, ToolCallDelta


@dataclass(frozen=True)
class Parsed:
    """Additions to an answer by a piece of text.

    Attributes:
        content: text of the answer itself.
        reasoning_content: text of the model's reasoning.
        tool_calls: additions to the calls.
    """

    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __add__(self, more: Parsed) -> Parsed:
        return Parsed(
            self.content + more.content,
            self.reasoning_content + more.reasoning_content,
            self.tool_calls + more.tool_calls,
        )


def response_template(
    form: ToolFormat | None, reasoning: Reasoning | None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Response template of transformers for the answers of a model.

    Calls are a region of text, because a region of JSON fails where the JSON is cut. The region has
    no end pattern: :class:`CallReader` finds the end marker, which may also occur in JSON strings.

    Args:
        form: format of the tool calls; None where calls are not looked for.
        reasoning: markers of the reasoning; None where there is none.
        names: names of the tools. A ``bare`` call has one of them: other JSON is content.
    """
    fields: dict[str, Any] = {"content": {"content": "text"}}
    after = ""
    if reasoning is not None:
        begin, end = re.escape(reasoning.begin), re.escape(reasoning.end)
        fields["reasoning_content"] = {
            "open_pattern": rf"\s*{begin}\s*",
            "close_pattern": rf"\s*{end}",
        }
        after = rf"|(?<={end}\s*)"
    if form is not None and form.shape == "bare":
        frames = "|".join(re.escape(begin.strip()) for begin, _ in form.frames if begin)
        known = "|".join(map(re.escape, names)) or "(?!)"
        fields["tool_calls"] = {
            "open_pattern": rf'(?:\A{after})\s*(?:{frames})?\s*(?=\{{\s*"name"\s*:\s*"(?:{known})")'
        }
    elif form is not None:
        fields["tool_calls"] = {"open_pattern": rf"\s*{re.escape(form.begin)}"}
    return {"start_anchor_pattern": r"\A", "fields": fields}


class AnswerParser:
    """Parses the text of one answer.

    The pieces of each part, joined, are the same however the text is split.

    Args:
        form: format of the tool calls; None where the answer may hold none.
        reasoning: markers of the reasoning; None where the model has none.
        names: names of the tools that may be called.
        opening: text with which the prompt opened the answer.
    """

    def __init__(
        self,
        form: ToolFormat | None,
        reasoning: Reasoning | None,
        names: Sequence[str] = (),
        opening: str = "",
    ) -> None:
        self._form = form
        self._reader: CallReader | None = None
        self._calls = 0
        self._cut = False
        self._fresh = False  # whether no content came since reasoning or a call
        self._template = response_template(form, reasoning, names)
        self._parser = ResponseParser(self._template, prefix=opened_reasoning(opening, reasoning))

    @property
    def calls(self) -> int:
        """Number of calls so far."""
        return self._calls

    @property
    def cut(self) -> bool:
        """Whether the text ended before the arguments of a call did."""
        return self._cut

    def feed(self, text: str) -> Parsed:
        """Read a piece of the text and return its additions."""
        added = self._parsed(self._parser.feed(text))
        while self._reader is not None and self._reader.after is not None:
            rest, self._reader = self._reader.after, None
            self._parser = ResponseParser(self._template, prefix="")
            added += self._parsed(self._parser.feed(rest))
        return added

    def finish(self) -> Parsed:
        """End the text and return the rest: a partial marker, or an incomplete call.

        A call that was cut after its name stays a call, with the arguments so far.
        """
        _, events = self._parser.finalize()
        return self._parsed(events)

    def _parsed(self, events: Sequence[dict[str, Any]]) -> Parsed:
        content, reasoning, calls = [], [], []
        for event in events:
            region, kind = event["field"], event["type"]
            if region != "tool_calls":
                if kind == "region_chunk" and region == "content":
                    # White space around calls and after reasoning belongs to neither.
                    text = event["text"].lstrip() if self._fresh else event["text"]
                    self._fresh = self._fresh and not text
                    content.append(text)
                elif kind == "region_chunk":
                    reasoning.append(event["text"])
                elif kind == "region_close" and region != "content":
                    self._fresh = True
                continue
            assert self._form is not None
            if kind == "region_open":
                self._reader = CallReader(self._form, self._calls)
            assert self._reader is not None
            if kind == "region_chunk":
                calls += self._reader.feed(event["text"])
            elif kind == "region_close":  # the whole text ends
                calls += self._reader.finish()
            if kind == "region_close" or self._reader.after is not None:
                content.append(self._unread(self._reader))
                self._calls, self._fresh = self._reader.calls, True
                self._cut |= self._reader.cut
        return Parsed("".join(content), "".join(reasoning), tuple(calls))

    def _unread(self, reader: CallReader) -> str:
        """Text of a region that is no call; with its markers if the region holds no call at all."""
        unread = reader.unread
        if not unread or reader.calls > self._calls:
            return unread
        assert self._form is not None
        return f"{self._form.begin}{unread}{'' if reader.after is None else self._form.end}"


def opened_reasoning(opening: str, reasoning: Reasoning | None) -> str:
    """Part of a prompt's opening from unclosed reasoning on; ``""`` if there is none."""
    if reasoning is None:
        return ""
    _, begin, thoughts = opening.rpartition(reasoning.begin)
    return begin + thoughts if begin and reasoning.end not in thoughts else ""
