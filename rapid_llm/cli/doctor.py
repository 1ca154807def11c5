"""``rapid-llm doctor``: what this machine has, what serves on it and why the rest does not."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rapid_llm.cli.app import app
from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.console import show, status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rapid_llm.doctor import DeviceReport, Report
    from rapid_llm.self_test import SelfTest


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Option(
            help="Model of the self-test: hub id, folder, GGUF file, the packaged one (a tiny "
            "random one where it is not installed), or none for the random one."
        ),
    ] = PACKAGED_MODEL,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test/--no-self-test",
            help="Decode greedily on each device, compare with transformers, and time passes.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Show versions, devices, kernels, packages and models, and make a self-test.

    Nothing is downloaded. The exit status is 1 where the self-test fails or the cache folder cannot
    be used.
    """
    with status("examining this machine", sys.stderr.isatty() and not as_json):
        from rapid_llm.doctor import examine

        report = examine(None if model == "none" else model, self_test=self_test)
    if as_json:
        print(json.dumps(report.as_dict()), flush=True)
    else:
        for line in lines(report):
            show(line)
    return 0 if report.passed else 1


def lines(report: Report) -> Iterator[str]:
    """The report in words."""
    yield "Versions"
    for name, version in report.versions.items():
        yield f"  {name:<24}{version or 'not installed'}"
    for device in report.devices:
        yield from _device(device)
    yield "Extras"
    for extra, missing in report.extras.items():
        yield f"  {extra:<24}{'lacks ' + ', '.join(missing) if missing else 'installed'}"
    if not report.extras:
        yield "  unknown: rapid-llm was not installed, it runs from its sources"
    yield "Models"
    for model in report.models:
        size = f"{_gigabytes(model.size)}; " if model.size else ""
        yield f"  {model.name:<24}{size}{model.problem or 'found'}"
    yield from _folders(report)
    for test in report.tests:
        yield from _test(test)


def _device(device: DeviceReport) -> Iterator[str]:
    yield f"Device {device.device}: {device.name}"
    if device.processors is not None:
        yield f"  {'processors':<24}{device.processors}"
    memory = "unknown" if device.memory is None else _gigabytes(device.memory)
    if device.memory is not None and device.total is not None and device.memory < device.total:
        memory += f" that this process may use, of {_gigabytes(device.total)}"
    if device.free is not None:
        memory += f", {_gigabytes(device.free)} free now"
    yield f"  {'memory':<24}{memory}"
    for name, refusal in device.kernels.items():
        yield f"  {name}: {'serve' if refusal is None else 'no: ' + refusal}"


def _folders(report: Report) -> Iterator[str]:
    yield "Folders and hub"
    free = "" if report.cache_free is None else f" ({_gigabytes(report.cache_free)} free)"
    yield f"  {'RAPID_LLM_CACHE':<24}{report.cache}{free}{_after(report.cache_problem)}"
    if report.hub:
        access = "not asked (HF_HUB_OFFLINE)" if report.hub["offline"] else "asked"
        token = "with a token" if report.hub["token"] else "without a token"
        yield f"  {'hub':<24}{access}, {token}; cache {report.hub['cache']}"


def _after(problem: str | None) -> str:
    return "" if problem is None else f": cannot be used, {problem}"


def _test(test: SelfTest) -> Iterator[str]:
    yield f"Self-test on {test.device}, {test.model}"
    if test.error is not None:
        yield f"  FAILED: {test.error}"
        return
    same = f"{test.same_tokens} of {test.tokens} tokens are those of transformers' generate"
    yield f"  {'passed' if test.passed else 'FAILED'}: {same}"
    yield f"  (greedy, exact, float32; {test.accepted} drafted tokens accepted)"
    for name, milliseconds in test.milliseconds.items():
        yield f"  {name:<24}{milliseconds:.1f} ms, bfloat16"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
