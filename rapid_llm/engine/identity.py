"""What a model is right now: which weights and adapter answer, and whether a pass of ours may.

A model belongs to its user, who adds adapters and hooks, replaces layers and methods, and edits
weights, before and after a decoder was built around it. So it is looked at before each pass, which
takes a tenth of a millisecond at 32 layers.
"""

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

_SAMPLES = 256  # values of each parameter that tell of edits which its version does not count

_CALLED = ("__call__", "_wrapped_call_impl", "_call_impl", "forward")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_STANDARD = frozenset(vars(nn.Module()))
_SAYS_NOTHING = frozenset(
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
"""Attributes of modules and configs on which no number depends."""

_IGNORED = _STANDARD | _SAYS_NOTHING

_INSTALLED = tuple(
    f"{Path(folder)}{os.sep}"
    for folder in (
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
        torch.__path__[0],
        transformers.__path__[0],
        str(Path(__file__).parents[1]),
    )
)
"""Folders of code that somebody has published, and that does not change under us."""


class ModelState:
    """Follows a model.

    Seen are modules and tensors that were added, replaced or moved; tensors edited in place, where
    ``Tensor._version`` counts that; attributes of modules and configs, such as the active adapter;
    hooks; methods replaced on an instance or a class. Edits through ``.data``, through NumPy or of
    what a tensor subclass wraps are not counted. :meth:`take_samples` finds those that change one
    of the 256 values that it reads of each parameter, as an edit of the whole of it does.

    Args:
        model: put into evaluation mode, and again when that was ended or modules were added.

    Attributes:
        number: of what the model was at the last look. If since then only attributes changed and
            changed back, as when adapters are switched, it is the earlier number.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._known: list[tuple[Any, int]] = []  # settings with these modules and weights
        self._samples: list[bytes] | None = None
        self._count = 0
        self._last = _Look(model.eval())
        self.number = self._number()

    def look(self) -> int:
        """The number of what the model is now."""
        if self._last.outdated():
            if any(module.training for module in self.model.modules()):
                self.model.eval()
            before, self._last = self._last, _Look(self.model)
            if not self._last.same_weights(before):
                self._known, self._samples = [], None
            self.number = self._number()
        return self.number

    def take_samples(self) -> int:
        """As :meth:`look`, with a sample of the weights: a millisecond at 32 layers."""
        self.look()
        before, self._samples = self._samples, self._last.samples()
        if before not in (None, self._samples):
            self.renew()
        return self.number

    def renew(self) -> None:
        """Give what the model is a new number: somebody knows that it changed unseen."""
        self._known = []
        self.number = self._number()

    def absorb(self) -> None:
        """To be called after a pass: what the model does to itself changes nothing.

        So do scaled rotary embeddings with their frequencies, and modules that count their calls.
        """
        if self._last.outdated():
            look = _Look(self.model)
            if look.followed_from(self._last):
                self._last = look
                self._known = [
                    (look.settings if number == self.number else settings, number)
                    for settings, number in self._known
                ]

    def _number(self) -> int:
        settings = self._last.settings
        for known, number in self._known:
            if known == settings:
                return number
        self._count += 1
        self._known.append((settings, self._count))
        return self._count

    @property
    def plain(self) -> bool:
        """Whether the model is what its class makes of its config.

        Its modules and tensors have exactly the types and shapes that they are made with. There
        are no hooks, adapters, parametrizations, or methods replaced on instances or classes. A
        pass of ours that does what the class does then gives what the model's own forward gives;
        otherwise nobody knows. A copy of :mod:`rapid_llm.engine.quantized` is what it was made
        of in this.
        """
        return self._last.plain

    @property
    def copyable(self) -> bool:
        """Whether a copy computes the same: no code is bound to this very object."""
        return self._last.copyable

    @property
    def traceable(self) -> bool:
        """Whether what is computed depends on nothing but what is seen.

        It may depend on more with hooks, replaced methods and classes of modules, unless they are
        an installed package's.
        """
        return self._last.traceable

    @property
    def portable(self) -> bool:
        """Whether tensors and attributes tell another process what is computed."""
        return self._last.portable

    @property
    def settings(self) -> list[tuple[str, str, Any]]:
        """(module, attribute, value) of the plain data that modules and configs hold."""
        return self._last.settings

    @property
    def configs(self) -> list[PretrainedConfig]:
        """Those that modules hold; a copied module has its own."""
        return self._last.configs

    @property
    def contents(self) -> tuple[Any, ...]:
        """What tells this state from others while its tensors live: compares with another's."""
        tensors = list(zip(map(id, self._last.tensors), self._last.places, strict=True))
        return tensors, self._samples, self.settings


class _Look:
    """A model at one moment. Holds its modules and tensors, or others could get their addresses."""

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

        self.parameters = [t for m in self.modules for t in m._parameters.values() if t is not None]
        self.others = [t for m in self.modules for t in m._buffers.values() if t is not None]
        self.others += [value for value in self._own_values() if isinstance(value, Tensor)]
        self.tensors = [*self.parameters, *self.others]
        self.places = list(map(_place, self.tensors))
        self._counted = [t for t in self.tensors if not t.is_inference()]
        self._placed = [t for t in self.tensors if is_plain_tensor(t)]

        self.functions = list(_functions(self.modules))
        self._function_owners = [owner for owner, _, _ in self.functions]
        self._function_names = [name for _, name, _ in self.functions]
        self._seen = self._glance()

    def outdated(self) -> bool:
        """Whether anything has changed since; sometimes True though it has not."""
        try:
            return self._glance() != self._seen
        except Exception:  # tensors and arrays do not compare: one took the place of another
            return True

    def _glance(self) -> tuple[list[Any], ...]:
        """All that is followed, in as few steps of the interpreter as can be."""
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

    def same_weights(self, other: _Look) -> bool:
        """Whether the other had these modules, tensors, hooks and methods, with these contents."""
        return (
            self._same_modules(other)
            and _same(self.others, other.others)
            and self.places == other.places
        )

    def followed_from(self, before: _Look) -> bool:
        """Whether a model that was so before a pass may have brought itself into this state."""
        return (
            self._same_modules(before)
            and self._resting == before._resting
            and self._choices == before._choices
        )

    @property
    def _resting(self) -> list[tuple[Any, ...]]:
        """The places of parameters, without the versions of those that passes write themselves.

        PEFT parametrizes what ``target_parameters`` name for the time of a pass, and puts it back.
        """
        wrappers: list[Any] = [m for m in self.modules if type(m).__name__ == "ParamWrapper"]
        wrapped = {id(wrapper.get_param()) for wrapper in wrappers}
        placed = zip(self.parameters, self.places, strict=False)  # buffers follow
        return [(at[0], *at[2:]) if id(t) in wrapped else at for t, at in placed]

    def _same_modules(self, other: _Look) -> bool:
        return (
            _same(self.modules, other.modules)
            and self._seen[0] == other._seen[0]
            and _same(self.parameters, other.parameters)
            and self._put_in == other._put_in
            and self._held == other._held
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
    def _choices(self) -> list[tuple[str, str, Any]]:
        """Settings that no pass makes: all but bare numbers."""
        return [each for each in self.settings if type(each[2]) not in (int, float)]

    def samples(self) -> list[bytes]:
        """Some of the parameters' bytes, where these are in plain tensors, one after another."""
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in filter(is_plain_tensor, self.parameters):
            if tensor.is_contiguous():
                step = max(1, tensor.numel() // _SAMPLES) | 1  # odd, or it keeps to few columns
                some = tensor.detach().view(-1)[::step]
                alike.setdefault((tensor.device, tensor.dtype), []).append(some)
        with torch.inference_mode(False):
            return [
                torch.cat(some).view(torch.uint8).cpu().numpy().tobytes() for some in alike.values()
            ]

    @cached_property
    def _put_in(self) -> list[Any]:
        """Hooks, and methods replaced on one module."""
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
    def _held(self) -> list[Any]:
        """Functions among the attributes of modules."""
        kinds = (FunctionType, MethodType, partial)
        return [value for value in self._own_values(configs=False) if isinstance(value, kinds)]

    @cached_property
    def plain(self) -> bool:
        return self.copyable and _is_as_made(self._model)

    @property
    def copyable(self) -> bool:
        return not self._put_in and self.portable

    @cached_property
    def traceable(self) -> bool:
        written = (function for _, _, function in self.functions)
        return all(map(_is_installed, (*self._put_in, *self._held, *written)))

    @cached_property
    def portable(self) -> bool:
        return self.traceable and all(map(is_plain_tensor, self.tensors))

    def _own_values(self, configs: bool = True) -> Iterator[Any]:
        """Of the attributes that not every module has."""
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
    """Lists, dicts and sets, with those inside of them."""
    for value in values:
        if isinstance(value, (dict, list, set)):
            yield value
            yield from _containers(value.values() if isinstance(value, dict) else value)


def _frozen(value: Any) -> Any:
    """Plain data as values that compare and print alike in every process; None of anything else."""
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
    """Where the numbers of a tensor are, how they lie there, and how often they were written."""
    where = (
        tensor.data_ptr() if is_plain_tensor(tensor) else None,
        None if tensor.is_inference() else tensor._version,
    )
    return (*where, tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory, and nothing else."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
    )


def _functions(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, str, Any]]:
    """(class or file, name, function): what may run where these modules do."""
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
    """Whether a function, and all that it wraps, is code of an installed package."""
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
    config._attn_implementation = "eager"  # the one that needs no package
    make: Callable[[PretrainedConfig], PreTrainedModel] = type(model)
    try:
        with torch.device("meta"), no_init_weights():
            made = make(config)
    except Exception:  # a class that is not made of a config alone
        return False
    return _outline(made) == _outline(model)


def _outline(model: nn.Module) -> dict[str, tuple[type, dict[str, torch.Size]]]:
    """The type of each module, and the shapes of its tensors."""
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
                if tensor is not None and each not in getattr(module, "made_anew", ())
            },
        )
        for name, (kind, module) in kinds.items()
        if kind is not None
    }


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))
