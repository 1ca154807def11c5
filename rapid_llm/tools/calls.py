"""Read tool calls from the text of an answer, while it arrives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from rapid_llm.tool_formats import ToolFormat

_BETWEEN = frozenset(" \t\r\n[],;`")
_SPACE = frozenset(" \t\r\n")
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        id: id of nine letters and digits, which every chat template takes.
        name: name of the tool.
        arguments: JSON text of the arguments as the model wrote it; a part of it, if the answer
            was cut.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolCallDelta:
    """An addition to a call.

    Attributes:
        index: position of the call in the answer.
        id: id of the call in its first delta, else None.
        name: name of the tool in its first delta, else None.
        arguments: text to append to the arguments.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Reads the calls in one stretch of text, one character after another.

    Each call is a JSON object with a name and arguments, or in the format ``named`` a name and an
    object. Arguments are passed on as they arrive, once the name is known. The end marker ends the
    stretch only outside of JSON strings.

    Args:
        form: format of the calls.
        index: number of calls before this text.

    Attributes:
        after: text after the stretch, including the marker of the next one; None before its end.
    """

    def __init__(self, form: ToolFormat, index: int) -> None:
        self.after: str | None = None
        self._form = form
        self._end_text = form.end or form.begin  # without an end, the next beginning ends it
        self._held = ""  # text that may be the beginning of the end
        self._index = index - 1
        self._read: Callable[[str], bool] = self._between
        self._deltas: list[ToolCallDelta] = []
        self._unread = ""  # text that belongs to no call so far
        self._token = ""  # key or value being read
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None  # arguments that came before the name
        self._begun = False  # whether any of the arguments were passed on
        self._depth = 0
        self._quoted = self._escaped = False

    @property
    def calls(self) -> int:
        """Number of calls in the answer so far."""
        return self._index + 1

    def feed(self, text: str) -> list[ToolCallDelta]:
        """Read more text and return what it adds to the calls."""
        text, self._held = self._held + text, ""
        end = self._end_text
        for position, character in enumerate(text):
            if end and character == end[0] and not self._in_string():
                if text.startswith(end, position):
                    self.after = text[position + (len(end) if self._form.end else 0) :]
                    break
                if end.startswith(text[position:]):
                    self._held = text[position:]
                    break
            self._take(character)
        deltas, self._deltas = self._deltas, []
        return _joined(deltas)

    def finish(self) -> list[ToolCallDelta]:
        """End the text, and return the deltas that were held back."""
        held, self._held = self._held, ""
        for character in held:
            self._take(character)
        deltas, self._deltas = self._deltas, []
        return _joined(deltas)

    @property
    def cut(self) -> bool:
        """Whether the last call lacks its arguments or a part of them."""
        reading = self._read == self._value and self._key in _ARGUMENTS
        return self._name is not None and (reading or not self._begun)

    @property
    def unread(self) -> str:
        """The part of the text that is no call, once the text has ended."""
        waiting = self._read == self._between or self._name is not None
        return "" if waiting and self._read != self._rest else self._unread

    def _take(self, character: str) -> None:
        self._unread += character
        while not self._read(character):
            pass

    def _in_string(self) -> bool:
        quoted = self._quoted or self._token[:1] == '"'
        return self._read == self._quoted_key or (self._read == self._value and quoted)

    # --- states: each reads a character, or returns False and leaves it to the next -------------

    def _between(self, c: str) -> bool:
        if c == "{":
            self._name = self._arguments = None
            self._begun = False
            self._read = self._member
        elif c not in _BETWEEN:
            named = self._form.shape == "named"
            self._token, self._read = "", self._word if named else self._rest
            return False
        return True

    def _word(self, c: str) -> bool:
        if c != "{":
            self._token += c
            return True
        # Between the name and the arguments may stand an id: name[CALL_ID]…[ARGS]{…}.
        self._arguments, self._begun = None, False
        self._start(self._token.partition("[")[0].strip())
        self._key, self._token, self._read = "arguments", "", self._value
        return False

    def _member(self, c: str) -> bool:
        if c == '"':
            self._token, self._read = c, self._quoted_key
        elif c == "}":
            self._end()
        elif c != "," and c not in _SPACE:
            self._break(c)
        return True

    def _quoted_key(self, c: str) -> bool:
        if self._string(c):
            self._key, self._token, self._read = _text_of(self._token), "", self._colon
        return True

    def _colon(self, c: str) -> bool:
        if c == ":":
            self._read = self._before_value
        elif c not in _SPACE:
            self._break(c)
        return True

    def _before_value(self, c: str) -> bool:
        if c in _SPACE:
            return True
        self._token, self._depth, self._quoted, self._read = "", 0, False, self._value
        return False

    def _value(self, c: str) -> bool:
        first = self._token[:1] or c
        if first == '"':
            if not self._token:
                self._token = c
            elif self._string(c):
                self._finish_value()
            return True
        if first not in "{[" and (c in ",}" or c in _SPACE):  # a number, true, false or null
            self._finish_value()
            return False
        self._token += c
        if first in "{[":
            if self._key in _ARGUMENTS and self._name is not None:
                self._begun = True
                self._deltas.append(ToolCallDelta(self._index, arguments=c))
                self._unread = ""
                self._token = first  # arguments can be long
            if self._quoted:
                self._escaped, escaped = c == "\\" and not self._escaped, self._escaped
                self._quoted = c != '"' or escaped
            elif c == '"':
                self._quoted, self._escaped = True, False
            else:
                self._depth += (c in "{[") - (c in "}]")
                if not self._depth:
                    self._finish_value()
        return True

    def _rest(self, c: str) -> bool:
        return True

    # ---------------------------------------------------------------------------------------------

    def _string(self, c: str) -> bool:
        """Add a character to a quoted text, and return whether it ends it."""
        escaped = self._escaped
        self._token += c
        self._escaped = c == "\\" and not escaped
        return c == '"' and not escaped

    def _finish_value(self) -> None:
        value, self._token = self._token, ""
        self._read = self._between if self._form.shape == "named" else self._member
        if self._key == "name" and self._name is None:
            if name := _text_of(value):
                self._start(name)
        elif self._key in _ARGUMENTS and not self._begun:
            self._arguments = _text_of(value) if value.startswith('"') else value
            self._pass_on()
        if self._form.shape == "named":
            self._unread = ""

    def _start(self, name: str) -> None:
        self._name, self._index, self._unread = name, self._index + 1, ""
        self._deltas.append(ToolCallDelta(self._index, uuid4().hex[:9], name))
        self._pass_on()

    def _pass_on(self) -> None:
        """Pass arguments on that were held back, once the name is known."""
        if self._name is not None and self._arguments is not None:
            text = "{}" if self._arguments in ("", "null") else self._arguments
            self._deltas.append(ToolCallDelta(self._index, arguments=text))
            self._begun, self._arguments = True, None

    def _end(self) -> None:
        """End a call's object."""
        if self._name is None:
            self._read = self._rest
            return
        if not self._begun:
            self._deltas.append(ToolCallDelta(self._index, arguments="{}"))
        self._name, self._unread, self._read = None, "", self._between

    def _break(self, c: str) -> None:
        """Give up at a character that no call has here."""
        if self._name is not None:
            self._unread = c
        self._read = self._rest


def _text_of(quoted: str) -> str:
    """Text of a JSON string; empty where it is none."""
    try:
        text = json.loads(quoted, strict=False)
    except ValueError:
        return ""
    return text if isinstance(text, str) else ""


def _joined(deltas: list[ToolCallDelta]) -> list[ToolCallDelta]:
    """Deltas with those of one call in a row as one."""
    joined: list[ToolCallDelta] = []
    for delta in deltas:
        if joined and joined[-1].index == delta.index:
            last = joined[-1]
            joined[-1] = ToolCallDelta(
                last.index, last.id, last.name, last.arguments + delta.arguments
            )
        else:
            joined.append(delta)
    return joined
