"""Declare options as annotated dataclass fields, and derive parameters, help and checks from them.

The options themselves are in :mod:`rapid_llm.config`. The command line, both integrations and the
server build theirs from :func:`options_of` and do not declare any option again.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from rapid_llm.errors import InvalidParameterError
from rapid_llm.old_names import refuse_old_names

SECRET = frozenset({"token", "use_auth_token", "proxies"})
"""Arguments of ``from_pretrained`` that may hold a secret."""

_Number = TypeVar("_Number", int, float)
_Settings = TypeVar("_Settings", bound=Any)


@dataclass(frozen=True)
class Option:
    """Metadata of an option, beside the type and default of its field.

    Attributes:
        help: description, a noun phrase with its unit and the meaning of special values.
        limit: description of the allowed values, for the error "``name`` must be …"; None derives
            it from the type.
        allowed: predicate of the allowed values, for values of the right type.
        metavar: placeholder for the value in help texts.
        private: whether the option may hold a secret, and is left out of errors, traces, logs and
            saved settings.
        aliases: other accepted names.
        per_call: whether a single call may override it; other options are fixed once models are
            loaded.
        convert: validation and conversion of a value, in the place of those by type, for options
            that have several forms; it raises InvalidParameterError.
    """

    help: str
    limit: str | None = None
    allowed: Callable[[Any], bool] = lambda value: True
    metavar: str | None = None
    private: bool = False
    aliases: tuple[str, ...] = ()
    per_call: bool = True
    convert: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Declared:
    """A declared option, as the command line, the integrations and the server see it.

    Attributes:
        name: name of the field.
        type: type of the field, without the annotation.
        default: default value.
        option: other metadata of the option.
        group: dataclass that declares it.
    """

    name: str
    type: Any
    default: Any
    option: Option
    group: type

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed literal words; empty where the type has none."""
        return tuple(word for part in self._parts if get_origin(part) is Literal
                     for word in get_args(part))  # fmt: skip

    @property
    def optional(self) -> bool:
        """Whether None is an allowed value."""
        return NoneType in self._parts

    @property
    def kinds(self) -> tuple[Any, ...]:
        """Allowed types, except literal words and None."""
        return tuple(p for p in self._parts if p is not NoneType and get_origin(p) is not Literal)

    @property
    def _parts(self) -> tuple[Any, ...]:
        union = get_origin(self.type) in (Union, UnionType)
        return get_args(self.type) if union else (self.type,)

    def checked(self, value: Any) -> Any:
        """Validate a value and convert it to a plain Python value.

        Raises:
            InvalidParameterError: the value has another type, or is outside the limit.
        """
        if value is None and self.optional:
            return None
        if self.option.convert is not None:
            return self.option.convert(value)
        if isinstance(value, str) and value in self.choices:
            return value
        for kind in self.kinds:
            converted = _converters.get(get_origin(kind) or kind, lambda given: given)(value)
            if converted is not None and self.option.allowed(converted):
                return converted
        given = "…" if self.option.private else repr(value)
        raise InvalidParameterError(
            f"{self.name}={given} is not allowed: {self.name} must be {self.limit}"
        )

    @property
    def limit(self) -> str:
        """Description of the allowed values, for errors and documents."""
        if self.option.limit is not None:
            return self.option.limit
        words = [
            *(("one of " + ", ".join(self.choices),) if self.choices else ()),
            *(_names.get(get_origin(kind) or kind, str(kind)) for kind in self.kinds),
            *(("None",) if self.optional else ()),
        ]
        return " or ".join(words)


def options_of(*groups: type) -> Mapping[str, Declared]:
    """All options that dataclasses declare, by name, in the order of declaration."""
    declared: dict[str, Declared] = {}
    for group in groups:
        declared |= _declared(group)
    return declared


@cache
def _declared(group: Any) -> Mapping[str, Declared]:
    declared = {}
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            continue
        kind, option = get_args(hint)[:2]
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        declared[field.name] = Declared(field.name, kind, default, option, group)
    return declared


def check(settings: Any) -> None:
    """Validate and convert all options of a frozen dataclass; to be called in ``__post_init__``.

    Raises:
        InvalidParameterError: a value is outside its range, see :meth:`Declared.checked`.
    """
    for name, declared in options_of(type(settings)).items():
        object.__setattr__(settings, name, declared.checked(getattr(settings, name)))


def sorted_into(options: Mapping[str, Any], *groups: type) -> tuple[Any, ...]:
    """Build instances of option dataclasses from one flat mapping of options.

    Args:
        options: values by option name or alias. None leaves the default, except for options that
            allow None.
        groups: the dataclasses.

    Raises:
        InvalidParameterError: an unknown name, an option given twice, or a value outside its range.
    """
    known = options_of(*groups)
    given = by_name(options, known)
    return tuple(
        group(**{name: value for name, value in given.items() if known[name].group is group})
        for group in groups
    )


def by_name(options: Mapping[str, Any], known: Mapping[str, Declared]) -> dict[str, Any]:
    """Replace aliases by option names, and drop None where an option does not allow it.

    Args:
        options: values by option name or alias.
        known: the declared options by name.

    Raises:
        InvalidParameterError: an unknown or an old name, or an option given twice.
    """
    names = {alias: each.name for each in known.values() for alias in each.option.aliases}
    given: dict[str, Any] = {}
    words: dict[str, str] = {}  # by which each was given
    for word, value in options.items():
        name = names.get(word, word)
        refuse_old_names([word], known)
        if name not in known:
            raise InvalidParameterError(
                f"unknown option {word!r}; known are {', '.join(sorted({*known, *names}))}"
            )
        if value is None and not known[name].optional:
            continue
        if name in given and given[name] != value:
            raise InvalidParameterError(
                f"{words[name]}={given[name]!r} and {word}={value!r} are one option; give one of "
                "them"
            )
        given[name], words[name] = value, word
    return given


def require(group: type, **values: Any) -> None:
    """Validate values by the options of the same names.

    Raises:
        InvalidParameterError: a value is outside its range.
    """
    for name, value in values.items():
        options_of(group)[name].checked(value)


def given(settings: _Settings | None, group: type[_Settings], name: str) -> _Settings:
    """Settings that a caller has given, or the defaults.

    Raises:
        InvalidParameterError: they are not an instance of ``group``.
    """
    if settings is None:
        return group()
    if not isinstance(settings, group):
        raise InvalidParameterError(
            f"{name} of type {type(settings).__name__} is not allowed: pass a {group.__name__}"
        )
    return settings


def changed(settings: _Settings, options: Mapping[str, Any]) -> _Settings:
    """A copy of an option dataclass with some values replaced.

    Args:
        settings: the frozen dataclass.
        options: new values by option name or alias. None keeps the current value, except for
            options that allow None.

    Raises:
        InvalidParameterError: an unknown name, an option given twice, or a value outside its range.
    """
    group = type(settings)
    given = by_name(options, options_of(group))
    return replace(settings, **given)


def pydantic_fields(
    *groups: type,
    leave_out: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Fields of a pydantic model for options, to pass to ``pydantic.create_model``.

    Args:
        groups: dataclasses that declare options.
        leave_out: names of options to leave out.
        defaults: defaults that differ from the declared ones, by option name.
        names: field names that differ from the option names, by option name; the option name
            becomes an alias.
    """
    from pydantic import AliasChoices, BeforeValidator, Field

    made = {}
    for option, declared in options_of(*groups).items():
        if option in leave_out:
            continue
        name = (names or {}).get(option, option)
        words = dict.fromkeys([name, option, *declared.option.aliases])
        default = (defaults or {}).get(option, declared.default)
        kind = declared.type if declared.option.convert is None else Any
        made[name] = (
            Annotated[kind, BeforeValidator(declared.checked)],
            Field(
                default=default,
                description=declared.option.help,
                exclude=declared.option.private,
                repr=not declared.option.private,
                validation_alias=AliasChoices(*words) if len(words) > 1 else None,
            ),
        )
    return made


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` without those that may hold a secret, at any depth.

    Those are what :data:`SECRET` names, and pydantic's ``SecretStr``.
    """
    return {
        name: without_secrets(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name not in SECRET and not hasattr(value, "get_secret_value")
    }


def json_or_text(value: str) -> Any:
    """The value that a text is in JSON; the text itself where it is not JSON."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def whole(value: Any) -> int | None:
    """Convert an integer value to a Python int; None for anything else, including a bool."""
    if type(value) is int:  # fast path: most token ids are
        return value
    return None if _is_no_scalar(value) else _converted(operator.index, value)


def real(value: Any) -> float | None:
    """Convert a finite number to a Python float; None for anything else, including a bool."""
    number = None if _is_no_scalar(value) else _converted(float, value)
    return number if number is not None and isfinite(number) else None


def _is_no_scalar(value: Any) -> bool:
    """Whether a value is not a number of Python, NumPy or torch, even if it converts to one."""
    kind = str(getattr(value, "dtype", ""))
    return isinstance(value, bool | str | bytes) or "bool" in kind or getattr(value, "ndim", 0) > 0


def _converted(convert: Callable[[Any], _Number], value: Any) -> _Number | None:
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _text(value: Any) -> str | None:
    """Convert a string, a path, or a torch dtype or device to a str; None for anything else."""
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, str) or hasattr(value, "__fspath__") else None


def _texts(value: Any) -> tuple[str, ...] | None:
    """Convert to a tuple of non-empty strings, from one string, several, or None for none."""
    values = (value,) if isinstance(value, str) else value or ()
    if not isinstance(values, Iterable):
        return None
    values = tuple(values)
    return values if all(isinstance(each, str) and each for each in values) else None


_converters: dict[Any, Callable[[Any], Any]] = {
    int: whole,
    float: real,
    bool: lambda value: value if isinstance(value, bool) else None,
    str: _text,
    Sequence: _texts,
    Mapping: lambda value: dict(value) if isinstance(value, Mapping) else None,
}
_names: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string or a path",
    Sequence: "a list of non-empty strings",
    Mapping: "a mapping from names to values",
}
