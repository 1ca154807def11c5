"""A check of the machine: versions, devices, kernels, packages, models, and a self-test."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from packaging.requirements import Requirement

from rapid_llm import __version__
from rapid_llm.config import PACKAGED_EMBEDDER, PACKAGED_MODEL
from rapid_llm.context.embedder_loading import packaged_embedder
from rapid_llm.engine.device import device_of
from rapid_llm.engine.supported import SUPPORTED
from rapid_llm.errors import MissingDependencyError
from rapid_llm.folders import cache_folder
from rapid_llm.limits import host_memory, physical_memory, processors
from rapid_llm.models import packaged_model
from rapid_llm.self_test import SelfTest, check_device

WHEELS = ("llama-index-llms-rapid", "langchain-rapid")
LIBRARIES = ("torch", "transformers", "triton", "llama-index-core", "langchain-core")


@dataclass(frozen=True)
class DeviceReport:
    """A device, and what of it this process may use.

    Attributes:
        device: name of the device in PyTorch.
        name: name of the hardware.
        memory: bytes that the process may use; None where the system does not tell.
        total: bytes of memory that there are; None likewise.
        free: bytes that are free now; None where the system does not tell.
        processors: processors that the process may keep busy; None on a GPU.
        kernels: why kernels of this library do not serve there, by name; None where they do.
    """

    device: str
    name: str
    memory: int | None
    total: int | None
    free: int | None
    processors: int | None
    kernels: Mapping[str, str | None]


@dataclass(frozen=True)
class FoundModel:
    """A model on this machine.

    Attributes:
        name: what ``model=`` or ``embedder=`` is given.
        size: bytes of its files.
        problem: why it cannot be used; None where nothing speaks against it.
    """

    name: str
    size: int
    problem: str | None


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        versions: versions by package; None of a package that is not installed.
        devices: the host and all GPUs.
        extras: by extra, the packages that it lacks here.
        models: models found.
        cache: the folder for measured costs and converted models.
        cache_problem: why that folder cannot be used; None where it can.
        cache_free: bytes that are free there.
        hub: what is known of access to a hub, without any token.
        tests: self-tests by device; empty where none was asked for.
    """

    versions: Mapping[str, str | None]
    devices: Sequence[DeviceReport]
    extras: Mapping[str, Sequence[str]]
    models: Sequence[FoundModel]
    cache: str
    cache_problem: str | None
    cache_free: int | None
    hub: Mapping[str, Any]
    tests: Sequence[SelfTest]

    @property
    def passed(self) -> bool:
        """Whether every self-test passed, and the cache folder can be used."""
        return self.cache_problem is None and all(test.passed for test in self.tests)

    def as_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        tests = [asdict(test) | {"passed": test.passed} for test in self.tests]
        return asdict(self) | {"tests": tests, "passed": self.passed}


def examine(model: str | None = PACKAGED_MODEL, *, self_test: bool = True) -> Report:
    """Check this machine; nothing is downloaded.

    Args:
        model: model of the self-test; None is a tiny random one, which also stands for the
            packaged model where that is not installed.
        self_test: whether to make the self-test, which takes less than a minute.
    """
    found = [host(), *gpus()]
    folder, problem, free = cache_state()
    return Report(
        versions=versions(),
        devices=found,
        extras=missing_by_extra(),
        models=models(),
        cache=folder,
        cache_problem=problem,
        cache_free=free,
        hub=hub_access(),
        tests=[check_device(each.device, model) for each in found] if self_test else [],
    )


def versions() -> dict[str, str | None]:
    """Versions of Python, this library, the wheels and the libraries under them."""
    own: dict[str, str | None] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "rapid-llm": __version__,
    }
    return own | {name: _version(name) for name in (*WHEELS, *LIBRARIES)} | {"cuda": _cuda()}


def _cuda() -> str | None:
    """Version of CUDA that PyTorch was built for."""
    return torch.version.cuda


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def host() -> DeviceReport:
    """The host's memory and processors, within the limits of the process's control groups."""
    cpu = torch.device("cpu")
    return DeviceReport(
        device="cpu",
        name=device_of(cpu).rounding(cpu).partition(" | ")[0] or platform.machine(),
        memory=host_memory(),
        total=physical_memory(),
        free=None,
        processors=processors(),
        kernels=dict(device_of(cpu).kernels(cpu)),
    )


def gpus() -> list[DeviceReport]:
    """All CUDA devices."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        found.append(
            DeviceReport(
                device=str(device),
                name=torch.cuda.get_device_name(device),
                memory=total,
                total=total,
                free=free,
                processors=None,
                kernels=dict(device_of(device).kernels(device)),
            )
        )
    return found


def missing_by_extra(package: str = "rapid-llm") -> dict[str, list[str]]:
    """Packages that each extra of a distribution would still install; empty without metadata."""
    try:
        declared = [Requirement(text) for text in requires(package) or ()]
    except PackageNotFoundError:
        return {}
    extras = {_extra_of(each) for each in declared} - {None}
    return {extra: _missing(extra, declared) for extra in sorted(map(str, extras))}


def _extra_of(requirement: Requirement) -> str | None:
    words = str(requirement.marker or "").replace('"', "'").split("extra == '")
    return words[1].partition("'")[0] if len(words) > 1 else None


def _missing(extra: str, declared: Sequence[Requirement]) -> list[str]:
    """Packages of an extra, and of the extras that it names, that do not satisfy it here."""
    found: dict[str, None] = {}
    for each in declared:
        if each.marker is None or not each.marker.evaluate({"extra": extra}):
            continue
        if _extra_of(each) is None:
            continue
        if each.name == "rapid-llm":
            for other in sorted(each.extras):
                found |= dict.fromkeys(_missing(other, declared))
        elif (has := _version(each.name)) is None:
            found[each.name] = None
        elif not each.specifier.contains(has, prereleases=True):
            found[f"{each.name}{each.specifier} (here {has})"] = None
    return list(found)


def models() -> list[FoundModel]:
    """The packaged models, and those in the hub's cache."""
    found = []
    try:
        path = packaged_model()
        found.append(FoundModel(PACKAGED_MODEL, path.stat().st_size, None))
    except (MissingDependencyError, OSError) as error:
        found.append(FoundModel(PACKAGED_MODEL, 0, str(error)))
    try:
        size = sum(file.stat().st_size for file in packaged_embedder().rglob("*"))
        found.append(FoundModel(PACKAGED_EMBEDDER, size, None))
    except MissingDependencyError as error:
        found.append(FoundModel(PACKAGED_EMBEDDER, 0, str(error)))
    return found + _cached_models()


def _cached_models() -> list[FoundModel]:
    if importlib.util.find_spec("huggingface_hub") is None:
        return []
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    return [
        FoundModel(repo.repo_id, repo.size_on_disk, _problem(repo))
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    ]


def _problem(repo: Any) -> str | None:
    """Why a model of the hub's cache cannot be a target or drafter; None where it may be."""
    for revision in repo.revisions:
        path = Path(revision.snapshot_path, "config.json")
        try:
            kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            continue
        return None if kind in SUPPORTED else f"no target or drafter: architecture {kind!r}"
    return "no config.json was downloaded"


def cache_state() -> tuple[str, str | None, int | None]:
    """The cache folder, why it cannot be written to (None: it can), and bytes free there."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(b"0")
        return str(folder), None, shutil.disk_usage(folder).free
    except OSError as error:
        return str(folder), f"{error.strerror or error}: set RAPID_LLM_CACHE to another", None


def hub_access() -> dict[str, Any]:
    """Whether the hub may be asked, and whether there is a token; never the token."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return {}
    from huggingface_hub import constants, get_token

    return {
        "offline": bool(constants.HF_HUB_OFFLINE),
        "token": get_token() is not None,
        "cache": str(constants.HF_HUB_CACHE),
    }
