"""Options: declared once, as annotated fields of a dataclass, and derived from there everywhere.

The command line, both integrations and the server make their parameters, help and checks from
:func:`options_of`; nobody else declares an option of :mod:`rapid_llm.config` again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rapid_llm.errors import InvalidParameterError

_RENAMED = {
    "attention": "attn_implementation",
    "embed_model": "embedder",
    "min_budget_tokens": "retrieval_tokens",
    "persist_directory": "store",
    "target": "model",
}

_Number = TypeVar("_Number", int, float)
_Settings = TypeVar("_Settings", bound=Any)


@dataclass(frozen=True)
class Option:
    """What is declared of a field beside its type and default.

    Attributes:
        help: a noun phrase, with its unit and what special values mean.
        limit: what a value must be, for errors: "``name`` must be …". Derived from the type where
            that says all.
        allowed: whether a value of the right type is within the limit.
        metavar: what help shows in the place of a value.
        private: whether errors, traces, logs and saved settings leave it out, as it may hold a
            secret.
        aliases: other names by which it is taken.
        per_call: whether a call may override it; the others belong to loaded models.
    """

    help: str
    limit: str | None = None
    allowed: Callable[[Any], bool] = lambda value: True
    metavar: str | None = None
    private: bool = False
    aliases: tuple[str, ...] = ()
    per_call: bool = True


@dataclass(frozen=True)
class Declared:
    """An option as a surface sees it.

    Attributes:
        name: of the field.
        type: without the annotation.
        default: a value, or what a factory makes.
        option: what else was declared.
        group: the dataclass.
    """

    name: str
    type: Any
    default: Any
    option: Option
    group: type

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are allowed; empty where others are."""
        return tuple(word for part in self._parts if get_origin(part) is Literal
                     for word in get_args(part))  # fmt: skip

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return NoneType in self._parts

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types of its values, but for words and None."""
        return tuple(p for p in self._parts if p is not NoneType and get_origin(p) is not Literal)

    @property
    def _parts(self) -> tuple[Any, ...]:
        union = get_origin(self.type) in (Union, UnionType)
        return get_args(self.type) if union else (self.type,)

    def checked(self, value: Any) -> Any:
        """A value as Python's own.

        Raises:
            InvalidParameterError: it is not of the type, or outside the limit.
        """
        if value is None and self.optional:
            return None
        if isinstance(value, str) and value in self.choices:
            return value
        for kind in self.kinds:
            converted = _converters.get(get_origin(kind) or kind, lambda given: given)(value)
            if converted is not None and self.option.allowed(converted):
                return converted
        limit = self.option.limit or self._limit
        given = "…" if self.option.private else repr(value)
        raise InvalidParameterError(
            f"{self.name}={given} is not allowed: {self.name} must be {limit}"
        )

    @property
    def _limit(self) -> str:
        words = [
            *(("one of " + ", ".join(self.choices),) if self.choices else ()),
            *(_names.get(get_origin(kind) or kind, str(kind)) for kind in self.kinds),
            *(("None",) if self.optional else ()),
        ]
        return " or ".join(words)


def options_of(*groups: type) -> Mapping[str, Declared]:
    """The options of dataclasses by name, in the order in which they are declared."""
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
    """Make every option of a frozen dataclass Python's own value, or raise; see :class:`Declared`.

    To be called in ``__post_init__``.
    """
    for name, declared in options_of(type(settings)).items():
        object.__setattr__(settings, name, declared.checked(getattr(settings, name)))


def sorted_into(options: Mapping[str, Any], *groups: type) -> tuple[Any, ...]:
    """Flat options, as frameworks pass them, as instances of the dataclasses that declare them.

    Args:
        options: by the options' names or aliases. None leaves the default, but where None is a
            value and the default another one.
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
    """Options under their own names, without those that are None and cannot be.

    Raises:
        InvalidParameterError: an unknown or an old name, or an option given twice.
    """
    names = {alias: each.name for each in known.values() for alias in each.option.aliases}
    given: dict[str, Any] = {}
    for word, value in options.items():
        name = names.get(word, word)
        if _RENAMED.get(word) in known:
            raise InvalidParameterError(f"{word!r} is now {_RENAMED[word]!r}")
        if name not in known:
            raise InvalidParameterError(
                f"unknown option {word!r}; known are {', '.join(sorted({*known, *names}))}"
            )
        if value is None and not known[name].optional:
            continue
        if name in given and given[name] != value:
            raise InvalidParameterError(
                f"{name}={given[name]!r} and {word}={value!r} are one option; give one of them"
            )
        given[name] = value
    return given


def require(group: type, **values: Any) -> None:
    """Raises InvalidParameterError where a value is not one of the option of that name."""
    for name, value in values.items():
        options_of(group)[name].checked(value)


def changed(settings: _Settings, options: Mapping[str, Any]) -> _Settings:
    """A copy of a frozen dataclass with other values; names and errors as of :func:`sorted_into`.

    None is a value where the option takes it, and else leaves what there is.
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
    """The options as fields of a pydantic model, for ``pydantic.create_model``.

    Args:
        groups: dataclasses that declare options.
        leave_out: names of options that the model does not have.
        defaults: in the place of those declared, where a framework has others.
        names: what a framework calls an option; the option's own name is taken too.
    """
    from pydantic import AliasChoices, BeforeValidator, Field

    made = {}
    for option, declared in options_of(*groups).items():
        if option in leave_out:
            continue
        name = (names or {}).get(option, option)
        words = dict.fromkeys([name, option, *declared.option.aliases])
        default = (defaults or {}).get(option, declared.default)
        made[name] = (
            Annotated[declared.type, BeforeValidator(declared.checked)],
            Field(
                default=default,
                description=declared.option.help,
                exclude=declared.option.private,
                repr=not declared.option.private,
                validation_alias=AliasChoices(*words) if len(words) > 1 else None,
            ),
        )
    return made


def whole(value: Any) -> int | None:
    """The whole number that a value is, as Python's own; None for anything else, a bool too."""
    if type(value) is int:  # most are, and a prompt has many
        return value
    return None if _is_no_scalar(value) else _converted(operator.index, value)


def real(value: Any) -> float | None:
    """The finite number that a value is, as Python's own; None for anything else, a bool too."""
    number = None if _is_no_scalar(value) else _converted(float, value)
    return number if number is not None and isfinite(number) else None


def _is_no_scalar(value: Any) -> bool:
    """Whether it is no number, of Python, NumPy or torch, although it may convert to one."""
    kind = str(getattr(value, "dtype", ""))
    return isinstance(value, bool | str | bytes) or "bool" in kind or getattr(value, "ndim", 0) > 0


def _converted(convert: Callable[[Any], _Number], value: Any) -> _Number | None:
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _text(value: Any) -> str | None:
    """A string, the path of a file, or the name of torch's dtype or device."""
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, str) or hasattr(value, "__fspath__") else None


def _texts(value: Any) -> tuple[str, ...] | None:
    """Non-empty strings; one alone is a list of itself, None an empty list."""
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
