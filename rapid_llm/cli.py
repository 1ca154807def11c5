"""The command line: ``rapid-llm ask``, ``demo``, ``bench``, ``plan``, ``eval`` and ``report``.

torch and the models are imported inside the commands: help and refusals need not wait for them.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rapid_llm.bench.speed_model import ACCEPTANCE, DEVICES, named_device
from rapid_llm.config import Mode, OnEmpty, SamplingParams, SpeculationConfig
from rapid_llm.console import (
    PACKAGED_EMBEDDER,
    PACKAGED_MODEL,
    Bars,
    Dtype,
    default_embedder,
    parse_gamma,
    parse_variables,
    show,
    status,
)
from rapid_llm.errors import (
    DocumentError,
    InvalidParameterError,
    RapidError,
)
from rapid_llm.evaluation.command import evaluate, report
from rapid_llm.stats import Method, Stats

if TYPE_CHECKING:
    from rapid_llm.decoder import GenerationResult
    from rapid_llm.pipeline import Inquiry

Attention = Literal["rapid", "sdpa", "flash_attention_2", "eager"]

COMPARED: tuple[Method, ...] = ("lc", "rag", "sd", "rapid")

DEMO_DOCUMENT = "devils-dictionary.txt"
DEMO_QUESTION = "Quote the definition of PROPHECY."
DEMO_CHUNK_TOKENS = 64
DEMO_CONTEXT_TOKENS = 512

app = typer.Typer(
    help="Answers about long documents, drafted from what was retrieved (RAPID).",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# typer carries click or needs it, depending on its version; this is its base of usage errors.
_UsageError: Any = typer.BadParameter.__base__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's) and return its exit status.

    0 is success; 2 bad input and 1 a failure of the system, each with one line on stderr; 130 an
    interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer may not fit the locale
    try:
        with _quiet():
            status = app(arguments or ["--help"], prog_name="rapid-llm", standalone_mode=False)
    except RapidError as error:
        return _fail(2, str(error))
    except _UsageError as error:
        return _fail(2, _usage_message(error))
    except OSError as error:  # a full disk, for one
        return _fail(1, str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    return status if isinstance(status, int) else 0


def _fail(status: int, message: str) -> int:
    print("rapid-llm: error:", " ".join(message.split()), file=sys.stderr)
    return status


def _usage_message(error: Any) -> str:
    message: str = error.format_message().replace("Value error, ", "")
    # Where typer validates with pydantic, the message may leave out the value.
    details: Any = getattr(error.__cause__, "errors", list)()
    value = repr(details[0]["input"]) if details else ""
    return message if value in message else f"{message} (given: {value})"


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, warnings or log lines of the libraries; their errors reach the user as ours."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- ask -------------------------------------------------------------------------------------


@app.command()
def ask(
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCUMENT",
            help="Text, Markdown, HTML or PDF files, read in this order; - is standard input.",
            show_default=False,
        ),
    ],
    question: Annotated[
        str, typer.Option("--question", "-q", help="What to answer.", show_default=False)
    ],
    target: Annotated[
        str, typer.Option(help="Hub id, folder, GGUF file or the packaged model.")
    ] = PACKAGED_MODEL,
    drafter: Annotated[
        str | None, typer.Option(help="The same; by default the target drafts for itself.")
    ] = None,
    embed_model: Annotated[
        str | None,
        typer.Option(
            help=f"Embedding model; by default {PACKAGED_EMBEDDER} if it is installed, else "
            "BAAI/bge-m3."
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="rapid; sd: without knowledge transfer; lc: the target alone over the whole; "
            "rag: the drafter alone over what was retrieved."
        ),
    ] = "rapid",
    compare: Annotated[
        bool, typer.Option("--compare", help="Run all four methods and show a table.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    gamma: Annotated[
        Any, typer.Option(parser=parse_gamma, metavar="N|auto", help="Tokens drafted a round.")
    ] = SpeculationConfig.gamma,
    eta: Annotated[
        float, typer.Option(help="Strength of the knowledge transfer.")
    ] = SpeculationConfig.eta,
    alpha: Annotated[
        float, typer.Option(help="Tail protection of the transfer.")
    ] = SpeculationConfig.alpha,
    mode: Annotated[Mode, typer.Option(help="Which law the output follows.")] = "paper",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = SamplingParams.temperature,
    top_p: Annotated[float, typer.Option(help="1 keeps every token.")] = SamplingParams.top_p,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = SamplingParams.top_k,
    seed: Annotated[int, typer.Option(help="The same seed, the same answer.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(help="The longest answer, in tokens.")
    ] = SamplingParams.max_new_tokens,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends the answer; may be repeated.", show_default=False),
    ] = None,
    chat_template_kwarg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="For the chat template, in JSON (enable_thinking=false); may be repeated.",
            show_default=False,
        ),
    ] = None,
    truncate: Annotated[
        Literal["middle"] | None,
        typer.Option(
            help="What to leave out of documents too long for the target; what was retrieved stays."
        ),
    ] = None,
    on_empty: Annotated[
        OnEmpty,
        typer.Option(
            help="Where nothing was retrieved, answer nothing, or read the whole documents."
        ),
    ] = "empty",
    dtype: Annotated[Dtype, typer.Option(help="Of both models.")] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="Of the target; by default CUDA if there is one.")
    ] = None,
    drafter_device: Annotated[
        str | None, typer.Option(help="Of the drafter; by default the target's.")
    ] = None,
    attention: Annotated[Attention, typer.Option(help="Attention implementation.")] = "rapid",
    drafter_quantization: Annotated[
        Literal["auto", "int8", "int4", "none"],
        typer.Option(
            help="Draft with weights of 8 (CPU) or 4 bits (CUDA); auto: where the target drafts "
            "and it pays."
        ),
    ] = "auto",
    kv_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what the models read here, so that the next question need not wait for it.",
        ),
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=32, help="The longest chunk.")] = 512,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="The least similarity of a retrieved chunk. By default the embedding model's (0.3 "
            "for BGE-M3 and the packaged one), and the most similar chunk in any case.",
        ),
    ] = None,
    context_tokens: Annotated[
        int, typer.Option(min=32, help="Retrieve at most so much, or more by --compression.")
    ] = 4096,
    compression: Annotated[
        float, typer.Option(min=1, help="Retrieve at most 1/compression of long documents.")
    ] = 24,
    store: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep embeddings here; by default in memory."),
    ] = None,
) -> None:
    """Answer a question about documents."""
    if not question.strip():
        raise DocumentError("the question is empty; give one with --question")
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        seed=seed,
    )
    speculation = SpeculationConfig(gamma=gamma, eta=eta, alpha=alpha, mode=mode)
    variables = parse_variables(chat_template_kwarg or ())

    texts = _read(documents)
    embedder = embed_model or default_embedder()
    shown = sys.stderr.isatty() and not as_json
    with status(f"loading {target}" + (f" and {drafter}" if drafter else ""), shown):
        from rapid_llm.context import ContextBuilder
        from rapid_llm.decoder import RapidDecoder
        from rapid_llm.pipeline import Inquiry

        decoder = RapidDecoder.from_pretrained(
            target,
            drafter,
            dtype=dtype,
            device=device,
            drafter_device=drafter_device,
            attn_implementation=attention,
            drafter_quantization=None if drafter_quantization == "none" else drafter_quantization,
            kv_cache_dir=kv_cache,
            chat_template_kwargs=variables,
        )
        builder = None
        if compare or method != "lc":
            builder = ContextBuilder(
                decoder.tokenizer,
                embedder,
                chunk_tokens=chunk_tokens,
                threshold=threshold,
                min_budget_tokens=context_tokens,
                compression=compression,
                persist_directory=store,
                device=device,
            )
    bars = Bars(shown)
    inquiry = Inquiry(
        decoder,
        builder,
        list(texts.values()),
        question,
        sampling=sampling,
        speculation=speculation,
        truncate=truncate,
        on_empty=on_empty,
        progress=bars,
    )
    job = _Job(inquiry, list(texts), embedder, bars)
    if compare:
        results = job.compare()
        if as_json:
            objects = [job.as_dict(method, result) for method, result in results.items()]
            print(json.dumps({"results": objects}), flush=True)
        else:
            show(_comparison(results))
            show(_names(job.models("rapid", results["rapid"].stats)), stderr=True)
        stats = results["rapid"].stats
    elif as_json:
        result = inquiry.answer(method)
        print(json.dumps(job.as_dict(method, result)), flush=True)
        stats = result.stats
    else:
        stats = job.stream(method).stats
        if not _unread(stats):
            show(job.summary(method, stats), stderr=True)
    if _unread(stats):
        show(
            f"Nothing was retrieved ({stats.draft_skipped}), so nothing was read: lower "
            "--threshold, or have the whole documents read with --on-empty read_all.",
            stderr=True,
        )


def _read(names: Sequence[str]) -> dict[str, str]:
    """The documents' texts by name; blank ones among others are passed over, with a note."""
    from rapid_llm.context.documents import read_document

    read = {name: read_document(name, may_be_blank=len(names) > 1) for name in names}
    texts = {name: text for name, text in read.items() if text.strip()}
    if not texts:
        raise DocumentError(f"{', '.join(read)} hold no text: give a file that is not empty")
    for name in read.keys() - texts.keys():
        show(f"{name} holds no text and is passed over", stderr=True)
    return texts


# --- demo ------------------------------------------------------------------------------------


@app.command()
def demo() -> None:
    """Answer a question about a bundled document with the packaged models, by every method."""
    text = _demo_text()
    shown = sys.stderr.isatty()
    with status("loading the packaged models", shown):
        from rapid_llm.context import ContextBuilder
        from rapid_llm.decoder import RapidDecoder
        from rapid_llm.pipeline import Inquiry

        decoder = RapidDecoder.from_pretrained(PACKAGED_MODEL, dtype="bfloat16")
        builder = ContextBuilder(
            decoder.tokenizer,
            PACKAGED_EMBEDDER,
            chunk_tokens=DEMO_CHUNK_TOKENS,
            min_budget_tokens=DEMO_CONTEXT_TOKENS,
        )
    bars = Bars(shown)
    sampling = SamplingParams(max_new_tokens=64)
    inquiry = Inquiry(decoder, builder, [text], DEMO_QUESTION, sampling=sampling, progress=bars)
    job = _Job(inquiry, [DEMO_DOCUMENT], PACKAGED_EMBEDDER, bars)

    tokens = len(decoder.tokenizer(text)["input_ids"])
    show(f"Document: an excerpt of The Devil's Dictionary (A. Bierce, 1911), {tokens:,} tokens")
    show(f"Model:    {PACKAGED_MODEL} (bfloat16, {decoder.target.device}), drafting for itself")
    show(f"Question: {DEMO_QUESTION}\n")
    with bars:
        context = inquiry.context
    show(
        f"{PACKAGED_EMBEDDER} retrieved {context.tokens} tokens for the drafter, in chunks of at "
        f"most {DEMO_CHUNK_TOKENS} and {DEMO_CONTEXT_TOKENS} in all\n(the defaults, 512 and "
        "4,096, are made for longer documents than this one). Similarity and first character:"
    )
    for chunk in context.chunks:
        passage = shorten(chunk.text, 58, placeholder=" …")
        show(f"  {chunk.score:.2f} at {chunk.start:6,}  {passage}")
    show("\nAnswer by RAPID, drafted from these and verified over the whole document:")
    rapid = job.stream("rapid")
    show(job.summary("rapid", rapid.stats))
    show("\nAll four methods on the same input:")
    show(_comparison(job.compare(rapid=rapid)))
    show("(sd answers as lc does; in bfloat16, rounding can part them.)")


def _demo_text() -> str:
    return (resources.files("rapid_llm") / "data" / DEMO_DOCUMENT).read_text(encoding="utf-8")


# --- bench -----------------------------------------------------------------------------------


@app.command()
def bench(
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of the prompt; may be repeated. [default: 1700, 7500]"),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="quoting or free; may be repeated. [default: both]", show_default=False),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Only the method of this name, or all whose names contain it; may be repeated.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens decoded in a run. [default: 64]")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Counted runs of each. [default: 3]")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of this shape (llama-3.1-8b, qwen2.5-7b, …, tiny) in the place of "
            "the packaged models, and no text: what the engine does on this device."
        ),
    ] = None,
    acceptance: Annotated[
        list[float] | None,
        typer.Option(
            help="With --shape: how likely a drafted token is accepted, by the throw of a coin; "
            "may be repeated. [default: 0.8, 0.9, 0.95]"
        ),
    ] = None,
    seconds: Annotated[
        int | None,
        typer.Option(min=1, help="With --shape: stop measuring after so long. [default: 180]"),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the model.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write that object to this file as well; with --shape to this folder, beside what "
            "is printed.",
            metavar="PATH",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the speeds as bars.", metavar="PNG")
    ] = None,
) -> None:
    """Time every method beside transformers' own decoding, on the packaged models.

    Contexts longer than the model's window are read with a YaRN-scaled rotary embedding, which is
    good for measuring speed and for nothing else.
    """
    shown = sys.stderr.isatty() and not as_json
    if shape is not None:
        _refuse("--shape reads no text", task=task, method=method, new_tokens=new_tokens,
                repeats=repeats)  # fmt: skip
        from rapid_llm.bench.shape_command import bench_shape

        failed = bench_shape(
            shape,
            context or [32_768],
            acceptance or [0.8, 0.9, 0.95],
            dtype=dtype,
            seconds=seconds or 180,
            as_json=as_json,
            save=save,
            plot=plot,
            shown=shown,
        )
        raise typer.Exit(failed)
    _refuse("without --shape nothing is simulated", acceptance=acceptance, seconds=seconds)
    contexts, new_tokens, repeats = context or [1700, 7500], new_tokens or 64, repeats or 3
    with status(f"loading {PACKAGED_MODEL}", shown):
        from rapid_llm.bench import report as reporting
        from rapid_llm.bench.measure import measure
        from rapid_llm.bench.methods import our_methods, peer_methods
        from rapid_llm.bench.workload import QUESTIONS, make_builder, make_workload, stretched
        from rapid_llm.decoder import RapidDecoder
        from rapid_llm.models import load_model

        loaded = load_model(PACKAGED_MODEL, dtype=dtype)
        model = stretched(loaded.model, max(contexts) + new_tokens)
        decoder = RapidDecoder(model, loaded.tokenizer, name=loaded.name)
        builder = make_builder(loaded.tokenizer, PACKAGED_EMBEDDER, max(contexts))
        works = [
            make_workload(one, tokens, _demo_text(), loaded.tokenizer, builder)
            for tokens in contexts
            for one in (task or QUESTIONS)
        ]
        ours, peers = our_methods(decoder), peer_methods(decoder)
        every = ours | peers
        chosen = {
            name
            for part in method or [""]
            for name in ([part] if part in every else every)
            if part in name
        }
        if not chosen:
            raise InvalidParameterError(
                f"method={method!r} names no method; choose from {', '.join(every)}"
            )
    bars = Bars(shown)
    with bars:
        report = measure(
            decoder,
            {name: run for name, run in ours.items() if name in chosen},
            works,
            peers={name: run for name, run in peers.items() if name in chosen},
            new_tokens=new_tokens,
            repeats=repeats,
            progress=lambda done, total: bars("runs measured", done, total),
        )
    as_object = json.dumps(report.as_dict())
    if save is not None:
        save.write_text(as_object + "\n", encoding="utf-8")
    if plot is not None:
        reporting.plot(report, plot)
    if as_json:
        print(as_object, flush=True)
        return
    show(reporting.heading(report))
    for cell in report.cells:
        show(reporting.cell_table(cell))
    for line in reporting.engine_lines(report):
        show(line)


def _refuse(why: str, **options: object) -> None:
    """Raises InvalidParameterError for the first option that was given."""
    for name, value in options.items():
        if value is not None:
            raise InvalidParameterError(
                f"--{name.replace('_', '-')}={value} has no use here, as {why}; leave it out"
            )


# --- plan ------------------------------------------------------------------------------------


@app.command()
def plan(
    context: Annotated[
        int, typer.Option(min=1, help="Tokens the target reads.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option(help="Hub id, folder, GGUF file or the packaged model.")
    ] = PACKAGED_MODEL,
    drafter: Annotated[
        str | None, typer.Option(help="The same: a smaller or larger model to draft with.")
    ] = None,
    retrieved: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens the drafter reads; by default 4,096, or 1/24 if more."),
    ] = None,
    acceptance: Annotated[
        float, typer.Option(min=0, max=1, help="Probability that a draft token is accepted.")
    ] = ACCEPTANCE,
    device: Annotated[
        str, typer.Option(help=f"{', '.join(DEVICES)}; or this, which is measured.")
    ] = "this",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict speed and memory from a model's config alone; no weights are loaded."""
    known = None if device == "this" else named_device(device)
    with status(f"sizing {model}", sys.stderr.isatty() and not as_json):
        from rapid_llm.bench import plan as planning

        made = planning.make_plan(
            model,
            context,
            retrieved=retrieved,
            drafter=drafter,
            acceptance=acceptance,
            device=known,
        )
    if as_json:
        print(json.dumps(made.as_dict()), flush=True)
        return
    show(planning.heading(made))
    for table in (planning.speed_table, planning.sensitivity_table, planning.memory_table):
        show(table(made))
    for warning in made.warnings:
        show(f"Warning: {warning}.")
    show("Assumed:")
    for assumption in made.assumptions:
        show(f"- {assumption}.")


# --- eval and report, in modules of their own ------------------------------------------------

app.command("eval")(evaluate)
app.command()(report)


# --- what is shown ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """An inquiry, with the names that the command line knows its parts by."""

    inquiry: Inquiry
    documents: Sequence[str]
    embedder: str
    bars: Bars

    def stream(self, method: Method) -> GenerationResult:
        """Print the answer as it comes."""
        from rapid_llm.decoder import GenerationResult

        with self.bars:
            stream = self.inquiry.stream(method)
            chunks = [next(stream)]  # all reading comes before it
        print(chunks[0].text, end="", flush=True)
        for chunk in stream:
            print(chunk.text, end="", flush=True)
            chunks.append(chunk)
        print(flush=True)
        return GenerationResult.from_chunks(chunks)

    def compare(self, **known: GenerationResult) -> dict[Method, GenerationResult]:
        """The answers of all methods; those that are known are not asked for again."""
        results = {}
        for method in COMPARED:
            if method in known:
                results[method] = known[method]
                continue
            with self.bars:
                results[method] = self.inquiry.answer(method)
        return results

    def models(self, method: Method, stats: Stats) -> dict[str, str | None]:
        """What each model that took part is called."""
        decoder = self.inquiry.decoder
        unread = _unread(stats)
        return {
            "target": None if stats.method == "rag" or unread else decoder.target.name,
            "drafter": None if stats.method == "lc" or unread else decoder.drafter.name,
            "embedder": None if method == "lc" else self.embedder,
        }

    def summary(self, method: Method, stats: Stats) -> str:
        """What took part, what was retrieved and left out, and how fast it was, in one line."""
        parts = [_names(self.models(method, stats)), stats.method]
        if stats.draft_skipped is not None and method != "lc":
            parts[1] += f" ({stats.draft_skipped})"
        if method != "lc":
            context = self.inquiry.context
            count = len(context.chunks)
            chunks = "1 chunk" if count == 1 else f"{count:,} chunks"
            parts.append(f"{context.tokens:,} tokens in {chunks} retrieved")
        if stats.omitted_tokens:
            parts.append(f"{stats.omitted_tokens:,} tokens of the documents left out")
        parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
        if stats.drafted_tokens:
            parts.append(f"acceptance ratio {stats.acceptance_ratio:.2f}")
            parts.append(f"{stats.tokens_per_round:.1f} tokens a round")
        return " | ".join(parts)

    def as_dict(self, method: Method, result: GenerationResult) -> dict[str, Any]:
        """What ``--json`` prints; ``start`` and ``end`` count characters of the text as read."""
        chunks = () if method == "lc" else self.inquiry.context.chunks
        return {
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "method": method,
            "stats": result.stats.as_dict(),
            "chunks": [
                {
                    "document": self.documents[chunk.document],
                    "start": chunk.start,
                    "end": chunk.end,
                    "score": chunk.score,
                }
                for chunk in chunks
            ],
            "models": self.models(method, result.stats),
            "memory": asdict(self.inquiry.decoder.memory),
        }


def _names(models: dict[str, str | None]) -> str:
    return ", ".join(f"{role} {name}" for role, name in models.items() if name is not None)


def _unread(stats: Stats) -> bool:
    """Whether neither model read anything, as nothing was retrieved."""
    return not stats.prompt_tokens and not stats.draft_prompt_tokens


def _comparison(results: dict[Method, GenerationResult]) -> Table:
    table = Table("method", "answer", box=SIMPLE_HEAD)
    for heading in ("tokens/s", "acceptance", "tokens\na round", "prefill\nseconds"):
        table.add_column(heading, justify="right")
    for method, result in results.items():
        stats = result.stats
        table.add_row(
            method,
            Text(" ".join(result.text.split())),
            f"{stats.tokens_per_second:.1f}",
            f"{stats.acceptance_ratio:.2f}" if stats.drafted_tokens else "–",
            f"{stats.tokens_per_round:.1f}",
            f"{stats.prefill_seconds:.1f}",
        )
    notes = []
    stats = results["rapid"].stats
    if stats.draft_skipped is not None and not _unread(stats):
        notes.append(f"nothing was drafted: {stats.draft_skipped}")
    if stats.omitted_tokens:
        notes.append(f"{stats.omitted_tokens:,} tokens of the documents were left out")
    if notes:
        table.caption = Text("\n".join(notes))
    return table
