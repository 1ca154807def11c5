"""``rapid-llm eval``: quality and speed of every method on a benchmark."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from rapid_llm.cli.app import app
from rapid_llm.cli.options import number_or_word, with_options
from rapid_llm.cli.report import require_packages, tables, untimed
from rapid_llm.config import EngineConfig, SpeculationConfig
from rapid_llm.console import Bars, show, status
from rapid_llm.context.embedder_loading import default_embedder
from rapid_llm.errors import InvalidParameterError
from rapid_llm.options import options_of

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder

_Name = str | None
_Names = list[str] | None
_Number = int | None
_Numbers = list[int] | None
_Folder = Path | None

_SWEPT = "; may be repeated, and methods with another than the first are named by it."
_KEPT = (
    *("model", "drafter", "layers", "context_tokens", "seed", "dtype", "drafter_device"),
    *("device_map", "drafter_device_map"),
    *("attn_implementation", "drafter_quantization", "kv_cache_bytes"),
    *("max_sequences", "judge_url", "judge_model"),
)
"""Options recorded with a run because answers depend on them; swept options are recorded apart."""

_NOT_RECORDED = ("cuda_graphs", "kv_cache_host_bytes", "kv_cache_dir", "kv_cache_dir_bytes",
                 "chat_template_kwargs", "hub_options", "drafter_options",
                 "max_memory")  # fmt: skip


@app.command("eval")
@with_options(
    EngineConfig, leave_out=_NOT_RECORDED, defaults={"dtype": "bfloat16", "max_sequences": 1}
)
def evaluate(
    engine: EngineConfig,
    ctx: typer.Context,
    task: Annotated[
        str, Argument(metavar="TASK", help="needle, squad, nq, …; another name lists all.")
    ],
    method: Annotated[
        _Names,
        Option(
            help="lc, rag, sd, rapid (by default these), streaming, triforce, rest or "
            "speculative-rag; may be repeated."
        ),
    ] = None,
    layers: Annotated[
        _Number, Option(help="Number of first layers that are the target; all layers draft.")
    ] = None,
    data: Annotated[
        _Folder, Option(exists=True, help="File or folder of the benchmark; by default the hub's.")
    ] = None,
    limit: Annotated[_Number, Option(help="Number of items; by default all.")] = None,
    out: Annotated[
        _Folder, Option(help="Folder of the answers, resumed; by default evaluation/TASK.")
    ] = None,
    context_tokens: Annotated[
        _Number, Option(help="Tokens of the contexts that a task makes to a given length.")
    ] = None,
    eta: Annotated[list[float] | None, Option(help="η of rapid (10); may be repeated.")] = None,
    gamma: Annotated[
        list[Any] | None,
        Option(
            parser=number_or_word(options_of(SpeculationConfig)["gamma"].choices),
            metavar="N|auto",
            help=f"Tokens drafted per round (4); scores of auto may not reproduce{_SWEPT}",
        ),
    ] = None,
    mode: Annotated[_Names, Option(help=f"paper (default) or augmented, of rapid{_SWEPT}")] = None,
    retrieval_tokens: Annotated[
        _Numbers, Option(help=f"Tokens retrieved (4096), or a 24th of a longer document{_SWEPT}")
    ] = None,
    chunk_tokens: Annotated[_Numbers, Option(help=f"Tokens of a chunk (512){_SWEPT}")] = None,
    retriever: Annotated[_Names, Option(help=f"dense (default), bm25 or hybrid{_SWEPT}")] = None,
    embedder: Annotated[_Names, Option(help=f"Embedding model (as for ask){_SWEPT}")] = None,
    irrelevant: Annotated[
        bool, Option("--irrelevant", help="Whether to also retrieve from another item's document.")
    ] = False,
    dynamic_eta: Annotated[
        bool, Option("--dynamic-eta", help="Whether to also run rapid with a dynamic η.")
    ] = False,
    seed: Annotated[int, Option(help="Seed of all random draws.")] = 0,
    judge_url: Annotated[
        _Name, Option(help="OpenAI-compatible endpoint that rates mtbench101's answers.")
    ] = None,
    judge_model: Annotated[_Name, Option(help="Name of the judge at that endpoint.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a benchmark's questions by every method, and compare quality and speed.

    Each answer is saved at once, and the same command resumes an interrupted run. Decoding is
    greedy. With --max-sequences the questions and methods on a document are answered at once, which
    takes less time; speeds are measured one by one only, the default.
    """
    if judge_url is not None and judge_model is None:
        raise InvalidParameterError(f"--judge-url {judge_url} needs --judge-model: name the judge")
    for option, value in (
        ("--drafter", engine.drafter),
        ("--drafter-device", engine.drafter_device),
        ("--drafter-device-map", engine.drafter_device_map),
    ):
        if layers is not None and value is not None:
            raise InvalidParameterError(
                f"--layers {layers} makes the whole model the drafter, so that {option} {value} "
                "has no place: leave one of them out"
            )
    require_packages("eval")
    checksum = None if data is None else _checksum(data)
    shown = sys.stderr.isatty() and not as_json
    drafter = f" and {engine.drafter}" if engine.drafter else ""
    with status(f"loading {engine.model}{drafter}", shown):
        from rapid_llm.evaluation.methods import Sweep

        given = ctx.params | {"embedder": embedder or [default_embedder()]}
        sweep = Sweep(**{one.name: given[one.name] for one in fields(Sweep) if given[one.name]})
        methods = sweep.methods(method or ["lc", "rag", "sd", "rapid"])

        import torch
        import transformers

        from rapid_llm import RapidDecoder, __version__
        from rapid_llm.context.embedder_loading import require_embedder
        from rapid_llm.evaluation.journal import Journal
        from rapid_llm.evaluation.judge import Judge
        from rapid_llm.evaluation.retrieval import Retrieval
        from rapid_llm.evaluation.runner import Evaluation
        from rapid_llm.evaluation.summary import summarize
        from rapid_llm.evaluation.tasks import load_task
        from rapid_llm.evaluation.tasks.base import Source

        for one in methods:
            if one.retrieval is not None and one.retrieval.embedder is not None:
                require_embedder(one.retrieval.embedder)
        decoder = RapidDecoder.from_config(engine) if layers is None else _upward(engine, layers)
        judge = None if judge_model is None else Judge(judge_model, judge_url)
        source = Source(decoder.tokenizer, data, context_tokens, limit, seed, judge)
        loaded = load_task(task, source)
        specs = dict.fromkeys(one.retrieval for one in methods if one.retrieval is not None)
        retrieval = Retrieval(decoder.tokenizer, specs, engine.device)
    settings = {
        **{name: given[name] for name in _KEPT},
        "data": data and data.name,
        "data_sha256": checksum,
        "task": task,
        "metrics": loaded.metrics,
        # Checks what the loader makes of data, seed and lengths.
        "first_item_sha256": hashlib.sha256(repr(loaded.items[:1]).encode()).hexdigest(),
        "device": str(decoder.target.device),
        **sweep.own,
        "threshold": "the embedder's",
        "rapid_llm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    folder, bars = out or Path("evaluation") / task, Bars(shown)
    journal = Journal(folder, settings)
    try:
        with bars:
            evaluation = Evaluation(decoder, loaded, methods, retrieval, seed)
            evaluation.run(journal, lambda done, total: bars("answers", done, total))
    except KeyboardInterrupt:
        show(
            f"Interrupted after {len(journal.records)} answers, which are kept in {folder}; "
            "the same command resumes the run.",
            stderr=True,
        )
        raise
    summary = summarize(journal.records, loaded.metrics)
    if as_json:
        print(json.dumps({"task": task, "folder": str(folder)} | summary), flush=True)
        return
    show(f"{task}, {decoder.target.name}; scores in percent with 95 % intervals")
    for table in tables(summary["rows"]):
        show(table)
    if note := untimed(summary["rows"]):
        show(note)
    show(f"Answers are in {folder}; with what is missing: rapid-llm report {folder}", stderr=True)


def _upward(engine: EngineConfig, layers: int) -> RapidDecoder:
    """Decoder whose target is the model's first layers and whose drafter is the whole model."""
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.device_maps import placements
    from rapid_llm.models import load_model
    from rapid_llm.shared_weights import first_layers

    place, _ = placements(engine)
    loaded = load_model(engine.model, dtype=engine.dtype, **place)
    return RapidDecoder(
        first_layers(loaded.model, layers),
        loaded.tokenizer,
        loaded.model,
        name=f"{loaded.name}, first {layers} layers",
        drafter_name=loaded.name,
        attn_implementation=engine.attn_implementation,
        drafter_quantization=engine.drafter_quantization,
        kv_cache_bytes=engine.kv_cache_bytes,
        max_sequences=engine.max_sequences,
    )


def _checksum(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files, hidden ones left out."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for one in files:
        if not one.name.startswith("."):
            total.update(f"{one.relative_to(path)}\n".encode() + one.read_bytes())
    return total.hexdigest()
