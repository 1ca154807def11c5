"""Help for pydantic models whose fields are options: docstring and signature."""

from __future__ import annotations

import inspect
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, TypeVar, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

_Model = TypeVar("_Model", bound="BaseModel")


def with_field_help(model: type[_Model]) -> type[_Model]:
    """A pydantic model, its fields listed in its docstring, with plain types in its signature.

    Args:
        model: class to change in place.
    """
    if model.__doc__:
        model.__doc__ = _docstring(model)
    model.__signature__ = _plain_signature(model)
    return model


def _docstring(model: type[BaseModel]) -> str:
    """A class's docstring, followed by the fields that have a description."""
    described = [
        fill(
            f"{name}: {field.description}{_default(field)}",
            width=96,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
        for name, field in model.model_fields.items()
        if field.description
    ]
    return "\n".join([inspect.cleandoc(model.__doc__ or ""), "", "Attributes:", *described])


def _default(field: FieldInfo) -> str:
    if field.default is None or field.default_factory is not None or field.is_required():
        return ""
    return f" Default: {field.default!r}."


def _plain_signature(model: type[BaseModel]) -> inspect.Signature:
    """Signature of a constructor with plain types, without their validators."""
    signature = inspect.signature(model)
    plain = [
        parameter.replace(annotation=get_args(parameter.annotation)[0])
        if get_origin(parameter.annotation) is Annotated
        else parameter
        for parameter in signature.parameters.values()
    ]
    return signature.replace(parameters=plain)
