"""Snapshot of a model: everything that its results depend on, in a form that compares quickly."""

from __future__ import annotations

import copy
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter, is_
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

_SAMPLES = 256  # values read of each parameter, to find edits that its version does not count

_CALLED = ("__call__", "_wrapped_call_impl", "_call_impl", "forward")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_STANDARD = frozenset(vars(nn.Module()))
_IRRELEVANT = frozenset(
    {
        "_attn_implementation_internal",
        "_experts_implementation_internal",
        "_is_hf_initialized",
        "_name_or_path",
        "hf_device_map",
        "name_or_path",
        "transformers_version",
    }
)
"""Attributes of modules and configs that do not affect any result."""

_IGNORED = _STANDARD | _IRRELEVANT

_INSTALLED = tuple(
    f"{Path(folder)}{os.sep}"
    for folder in (
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
        torch.__path__[0],
        transformers.__path__[0],
        str(Path(__file__).parents[1]),
    )
)
"""Folders of installed code, which is assumed not to change while the process runs."""


class Snapshot:
    """A model at one moment; it keeps modules and tensors alive, so that no address is reused."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        named = list(model.named_modules())
        self.modules = [module for _, module in named]
        self.configs = list(_configs(self.modules))
        self._named: list[tuple[str, Any]] = [
            *named,
            *((f"config {i}", config) for i, config in enumerate(self.configs)),
        ]
        self._attributes = [vars(owner) for _, owner in self._named]
        self.hooks = [
            *(attributes[name] for attributes in map(vars, self.modules) for name in _HOOKS),
            nn_module._global_forward_pre_hooks,
            nn_module._global_forward_hooks,
        ]
        registries = [vars(module)[name] for module in self.modules for name in _REGISTRIES]
        data = list(_containers(self._own_values()))
        self._containers = [*self.hooks, *registries, *data]
        self._filled = [container for container in self._containers if container]
        self._filled_dicts = [each for each in self._filled if isinstance(each, dict)]

        held = [t for m in self.modules for t in m._parameters.values() if t is not None]
        held_too = [t for m in self.modules for t in m._buffers.values() if t is not None]
        # accelerate makes new placeholders of offloaded weights in each pass.
        self.parameters = [t for t in held if not t.is_meta]
        self.others = [t for t in held_too if not t.is_meta]
        self._complete = len(held) + len(held_too) == len(self.parameters) + len(self.others)
        self.others += [value for value in self._own_values() if isinstance(value, Tensor)]
        self.tensors = [*self.parameters, *self.others]
        self.places = list(map(_place, self.tensors))
        self._counted = [t for t in self.tensors if not t.is_inference()]
        self._placed = [t for t in self.tensors if is_plain_tensor(t)]

        self.functions = list(_functions(self.modules))
        self._function_owners = [owner for owner, _, _ in self.functions]
        self._function_names = [name for _, name, _ in self.functions]
        self._seen = self._tracked_values()

    def outdated(self) -> bool:
        """Whether anything has changed since; may be True without a change."""
        try:
            return self._tracked_values() != self._seen
        except Exception:  # comparing replaced tensors or arrays raises
            return True

    def _tracked_values(self) -> tuple[list[Any], ...]:
        """All tracked state, collected in as few interpreter steps as possible."""
        return (
            [*map(type, self.modules)],
            [*chain.from_iterable(map(dict.values, self._attributes))],
            [*map(len, self._containers)],
            [*chain.from_iterable(self._filled)],
            [*chain.from_iterable(map(dict.values, self._filled_dicts))],
            [*map(Tensor.data_ptr, self._placed)],
            [*map(attrgetter("_version"), self._counted)],
            [*map(getattr, self._function_owners, self._function_names)],
        )

    def same_weights(self, other: Snapshot) -> bool:
        """Whether modules, tensors with their contents, hooks and methods are the same."""
        return (
            self._same_modules(other)
            and _same(self.others, other.others)
            and self.places == other.places
        )

    def may_follow(self, before: Snapshot) -> bool:
        """Whether a forward pass in the state ``before`` can have led to this state."""
        return (
            self._same_modules(before)
            and self._parameter_places == before._parameter_places
            and self._non_numeric_settings == before._non_numeric_settings
        )

    @property
    def _parameter_places(self) -> list[tuple[Any, ...]]:
        """Places of all parameters, without the versions of those that a pass itself writes.

        During a pass PEFT parametrizes the parameters named in ``target_parameters``, and restores
        them.
        """
        wrappers: list[Any] = [m for m in self.modules if type(m).__name__ == "ParamWrapper"]
        wrapped = {id(wrapper.get_param()) for wrapper in wrappers}
        placed = zip(self.parameters, self.places, strict=False)  # places of buffers follow
        return [(at[0], *at[2:]) if id(t) in wrapped else at for t, at in placed]

    def _same_modules(self, other: Snapshot) -> bool:
        return (
            _same(self.modules, other.modules)
            and self._seen[0] == other._seen[0]
            and _same(self.parameters, other.parameters)
            and self._injected == other._injected
            and self._function_attributes == other._function_attributes
            and self.functions == other.functions
        )

    @cached_property
    def settings(self) -> list[tuple[str, str, Any]]:
        return [
            (name, attribute, frozen)
            for name, owner in self._named
            for attribute, value in vars(owner).items()
            if attribute not in _IGNORED and (frozen := _frozen(value)) is not None
        ]

    @property
    def _non_numeric_settings(self) -> list[tuple[str, str, Any]]:
        """Settings that a forward pass does not change: all but numbers."""
        return [each for each in self.settings if type(each[2]) not in (int, float)]

    def samples(self) -> list[bytes]:
        """Sampled bytes of all parameters that are contiguous plain tensors."""
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in filter(is_plain_tensor, self.parameters):
            if tensor.is_contiguous():
                step = max(1, tensor.numel() // _SAMPLES) | 1  # odd, to reach all columns
                some = tensor.detach().view(-1)[::step]
                alike.setdefault((tensor.device, tensor.dtype), []).append(some)
        with torch.inference_mode(False):
            return [
                torch.cat(some).view(torch.uint8).cpu().numpy().tobytes() for some in alike.values()
            ]

    @cached_property
    def _injected(self) -> list[Any]:
        """Hooks, and methods replaced on a module instance."""
        return [
            *chain.from_iterable(map(dict.values, self.hooks)),
            *(
                value
                for module in self.modules
                for name, value in vars(module).items()
                if callable(value) and callable(getattr(type(module), name, None))
            ),
        ]

    @cached_property
    def _function_attributes(self) -> list[Any]:
        """Functions in attributes of modules."""
        kinds = (FunctionType, MethodType, partial)
        return [value for value in self._own_values(configs=False) if isinstance(value, kinds)]

    @cached_property
    def plain(self) -> bool:
        return self.copyable and _is_as_made(self._model)

    @property
    def copyable(self) -> bool:
        whole = all(shard_of(tensor) is tensor for tensor in self.tensors)
        return not self._injected and self.portable and whole

    @cached_property
    def traceable(self) -> bool:
        written = (function for _, _, function in self.functions)
        return all(map(_is_installed, (*self._injected, *self._function_attributes, *written)))

    @cached_property
    def portable(self) -> bool:
        plain = all(is_plain_tensor(shard_of(tensor)) for tensor in self.tensors)
        return self.traceable and self._complete and plain

    def _own_values(self, configs: bool = True) -> Iterator[Any]:
        """Values of attributes that not every module has."""
        for owner in (*self.modules, *(self.configs if configs else ())):
            for name, value in vars(owner).items():
                if name not in _STANDARD:
                    yield value


def _configs(modules: Iterable[nn.Module]) -> Iterator[PretrainedConfig]:
    seen: set[int] = set()
    waiting: list[Any] = list(modules)
    for owner in waiting:
        for value in vars(owner).values():
            if isinstance(value, PretrainedConfig) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
                yield value


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """Lists, dicts and sets, and those nested in them."""
    for value in values:
        if isinstance(value, (dict, list, set)):
            yield value
            yield from _containers(value.values() if isinstance(value, dict) else value)


def _frozen(value: Any) -> Any:
    """Plain data as values that compare and print the same in all processes; None for others."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, dict):
        return sorted((str(key), _frozen(each)) for key, each in value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return list(map(_frozen, value))
    return None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Address, version and layout of a tensor."""
    where = (
        tensor.data_ptr() if is_plain_tensor(tensor) else None,
        None if tensor.is_inference() else tensor._version,
    )
    return (*where, tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is a plain strided array in memory, and no subclass."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
    )


def shard_of(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is divided among several (a DTensor); else itself."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard


def _functions(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, str, Any]]:
    """Functions that modules may run, as (class or source module, name, function)."""
    classes = dict.fromkeys([*map(type, modules), nn.Module])
    for cls in classes:
        own = [name for name, value in vars(cls).items() if isinstance(value, FunctionType)]
        names = _CALLED if cls is nn.Module else dict.fromkeys([*own, *_CALLED])
        for name in names:
            yield cls, name, getattr(cls, name)
    files = dict.fromkeys(cls.__module__ for cls in classes)
    for file in files:
        source = sys.modules.get(file)
        if source is not None and source.__name__.startswith("transformers.models."):
            for name, value in vars(source).items():
                if isinstance(value, FunctionType):
                    yield source, name, value


def _is_installed(function: Any) -> bool:
    """Whether a function, and all functions that it wraps, are from an installed package."""
    while function is not None:
        if isinstance(function, partial):
            function = function.func
        elif isinstance(function, BuiltinFunctionType):
            return True
        else:
            code = getattr(function, "__code__", None)
            file = code.co_filename if code is not None else _file_of(type(function))
            if not file.startswith(_INSTALLED):
                return False
            function = getattr(function, "__wrapped__", None)
    return True


def _file_of(cls: type) -> str:
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or ""


def _is_as_made(model: PreTrainedModel) -> bool:
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # needs no other package
    make: Callable[[PretrainedConfig], PreTrainedModel] = type(model)
    try:
        with torch.device("meta"), no_init_weights():
            made = make(config)
    except Exception:  # a class whose constructor takes more than a config
        return False
    return _outline(made) == _outline(model)


def _outline(model: nn.Module) -> dict[str, tuple[type, dict[str, torch.Size]]]:
    """Type of each module, and the shapes of its tensors."""
    kinds = {
        name: (getattr(type(module), "stands_for", type(module)), module)
        for name, module in model.named_modules(remove_duplicate=False)
    }
    return {
        name: (
            kind,
            {
                each: tensor.shape
                for each, tensor in (*module._parameters.items(), *module._buffers.items())
                if tensor is not None and each not in getattr(module, "added", ())
            },
        )
        for name, (kind, module) in kinds.items()
        if kind is not None
    }


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))
