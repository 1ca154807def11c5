"""The command ``rapid-llm eval``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.console import (
    Bars,
    Dtype,
    parse_gamma,
    show,
    status,
)
from rapid_llm.context.embedding import default_embedder
from rapid_llm.errors import DataError, InvalidParameterError

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.evaluation.methods import Sweep
    from rapid_llm.evaluation.tasks.base import Task

_SWEPT = "may be repeated; the first is the run's own, methods with another are named by it."


def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="needle, squad, nq, longbench-v2, infinitebench-qa, …; another name lists all.",
            show_default=False,
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="lc, rag, sd, rapid, streaming, triforce, rest or speculative-rag; may be "
            "repeated. [default: lc, rag, sd, rapid]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Hub id, folder, GGUF file or the packaged model.")
    ] = PACKAGED_MODEL,
    drafter: Annotated[
        str | None, typer.Option(help="The same; by default the model drafts for itself.")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            help="The target is made of the model's first so many layers, and the whole model "
            "drafts (upward speculation).",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The benchmark's file or folder; by default the hub's."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many items.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the answers here, and go on with those that are there. "
            "[default: evaluation/TASK]",
            show_default=False,
        ),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(help="Length of the documents, where the task makes them to a length."),
    ] = None,
    eta: Annotated[
        list[float] | None,
        typer.Option(help="η of rapid; may be repeated. [default: 10]", show_default=False),
    ] = None,
    gamma: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|auto",
            help=f"Tokens drafted a round; {_SWEPT} auto follows this machine's costs, so that "
            "scores may differ on another. [default: 4]",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Of rapid: paper or augmented; {_SWEPT} [default: paper]", show_default=False
        ),
    ] = None,
    retrieval_tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens retrieved for the drafter, or a 24th of the document if that is more; "
            f"{_SWEPT} [default: 4096]",
            show_default=False,
        ),
    ] = None,
    chunk_tokens: Annotated[
        list[int] | None,
        typer.Option(help=f"The longest chunk; {_SWEPT} [default: 512]", show_default=False),
    ] = None,
    retriever: Annotated[
        list[str] | None,
        typer.Option(help=f"dense, bm25 or hybrid; {_SWEPT} [default: dense]", show_default=False),
    ] = None,
    embedder: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Embedding model; {_SWEPT} [default: as for ask]",
            show_default=False,
        ),
    ] = None,
    irrelevant: Annotated[
        bool,
        typer.Option(
            "--irrelevant",
            help="Run methods that retrieve once more, with chunks of another item's document.",
        ),
    ] = False,
    dynamic_eta: Annotated[
        bool,
        typer.Option(
            "--dynamic-eta",
            help="Run rapid once more, with η following the retrieval's similarity and the "
            "position in the answer.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of whatever is drawn at random.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of both models.")] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="Of the models; by default CUDA if there is one.")
    ] = None,
    drafter_device: Annotated[
        str | None, typer.Option(help="Of the drafter; by default the model's.")
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible endpoint that rates mtbench101's answers."),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="The judge, as it is called there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a benchmark's questions by every method, and compare quality and speed.

    Answers are kept as they come: the same command goes on after an interrupt. Decoding is greedy.
    """
    if judge_url is not None and judge_model is None:
        raise InvalidParameterError(f"--judge-url {judge_url} needs --judge-model: name the judge")
    for option, value in (("--drafter", drafter), ("--drafter-device", drafter_device)):
        if layers is not None and value is not None:
            raise InvalidParameterError(
                f"--layers {layers} makes the whole model the drafter, so that {option} {value} "
                "has no place: leave one of them out"
            )

    from rapid_llm.evaluation.methods import Sweep

    lists = {
        "gamma": [parse_gamma(value) for value in gamma or ()],
        "eta": eta,
        "mode": mode,
        "context_tokens": retrieval_tokens,
        "chunk_tokens": chunk_tokens,
        "retriever": retriever,
        "embedder": embedder or [default_embedder()],
    }
    options: dict[str, Any] = {name: tuple(values) for name, values in lists.items() if values}
    sweep = Sweep(irrelevant=irrelevant, dynamic_eta=dynamic_eta, **options)
    methods = sweep.methods(method or ["lc", "rag", "sd", "rapid"])
    checksum = None if data is None else _checksum(data)

    shown = sys.stderr.isatty() and not as_json
    with status(f"loading {model}" + (f" and {drafter}" if drafter else ""), shown):
        from rapid_llm.evaluation.journal import Journal
        from rapid_llm.evaluation.judge import Judge
        from rapid_llm.evaluation.retrieval import Retrieval
        from rapid_llm.evaluation.runner import evaluate as run
        from rapid_llm.evaluation.summary import summarize
        from rapid_llm.evaluation.tables import group_tables, heading, score_table, speed_table
        from rapid_llm.evaluation.tasks import load_task

        decoder = _decoder(model, drafter, layers, dtype, device, drafter_device)
        loaded = load_task(
            task,
            data,
            tokenizer=decoder.tokenizer,
            context_tokens=context_tokens,
            limit=limit,
            seed=seed,
            judge=None if judge_model is None else Judge(judge_model, base_url=judge_url),
        )
        specs = dict.fromkeys(one.retrieval for one in methods if one.retrieval is not None)
        retrieval = Retrieval(decoder.tokenizer, specs, device)
    settings: dict[str, Any] = {
        "model": model,
        "drafter": drafter,
        "layers": layers,
        "data": data and data.name,
        "data_sha256": checksum,
        "context_tokens": context_tokens,
        "seed": seed,
        "dtype": dtype,
        "drafter_device": drafter_device,
        "judge_url": judge_url,
        "judge_model": judge_model,
    }
    folder = out or Path("evaluation") / task
    bars = Bars(shown)
    with Journal(folder, settings | _settings(decoder, loaded, sweep)) as journal:
        try:
            with bars:
                run(
                    decoder,
                    loaded,
                    methods,
                    retrieval,
                    journal,
                    seed=seed,
                    progress=lambda done, total: bars("answers", done, total),
                )
        except KeyboardInterrupt:
            show(
                f"Interrupted after {len(journal.records)} answers, which are kept in {folder}; "
                "the same command goes on with the rest.",
                stderr=True,
            )
            raise
    summary = summarize(journal.records, loaded.metrics)
    if as_json:
        print(json.dumps({"task": task, "folder": str(folder)} | summary.as_dict()), flush=True)
        return
    show(heading(task, decoder.target.name, summary))
    show(score_table(summary, loaded.metrics))
    show(speed_table(summary))
    for table in group_tables(summary, loaded.metrics):
        show(table)
    show(f"Answers are in {folder}; for plots: rapid-llm report {folder}", stderr=True)


def _decoder(
    model: str,
    drafter: str | None,
    layers: int | None,
    dtype: str,
    device: str | None,
    drafter_device: str | None,
) -> RapidDecoder:
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.models import first_layers, load_model

    if layers is None:
        return RapidDecoder.from_pretrained(
            model, drafter, dtype=dtype, device=device, drafter_device=drafter_device
        )
    loaded = load_model(model, dtype=dtype, device=device)
    return RapidDecoder(
        first_layers(loaded.model, layers),
        loaded.tokenizer,
        loaded.model,
        name=f"{loaded.name}, first {layers} layers",
        drafter_name=loaded.name,
    )


def _settings(decoder: RapidDecoder, task: Task, sweep: Sweep) -> dict[str, Any]:
    """What the answers depend on beside the command line, but for --limit and the methods."""
    import torch
    import transformers

    from rapid_llm import __version__

    return {
        "task": task.name,
        "metrics": dict(task.metrics),
        # Of what the loader makes of the data, seed and lengths.
        "first_item_sha256": hashlib.sha256(repr(task.items[:1]).encode()).hexdigest(),
        "device": str(decoder.target.device),
        **{_OPTIONS.get(name, name): value for name, value in sweep.own.items()},
        "rapid_llm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


_OPTIONS = {"context_tokens": "retrieval_tokens"}
"""Where the command line's name differs: its --context-tokens are the documents'."""


def _checksum(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names; hidden ones do not count.

    Raises:
        DataError: there is nothing there, or it cannot be read.
    """
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    try:
        for one in files:
            if one.name.startswith("."):
                continue
            total.update(f"{one.relative_to(path)}\n".encode())
            with one.open("rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
    except OSError as error:
        raise DataError(f"--data {path} cannot be read ({error}): check the path") from error
    return total.hexdigest()
