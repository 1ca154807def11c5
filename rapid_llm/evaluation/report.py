"""``report.md`` and its plots: our figures in parts, the paper's beside them, what is missing."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rapid_llm.evaluation import paper
from rapid_llm.evaluation.markdown import NONE, number, table
from rapid_llm.evaluation.methods import BASES
from rapid_llm.evaluation.runs import Run
from rapid_llm.evaluation.sections import (
    LEAST_JUDGED,
    Section,
    context_length,
    dynamic_eta,
    eta_sweep,
    positions,
    quality_and_speed,
)
from rapid_llm.evaluation.tasks import CONTEXT_TOKENS

REPORT = "report.md"

_HOW_TO_READ = """\
In brackets: 95 % intervals, Wilson's of rates and the bootstrap's of means. *− lc* is the mean
difference to `lc`, the target alone over the whole context, on the items that both answered, in
points; where its interval holds 0, the run does not tell which is better. *tokens/s* are all tokens
÷ all seconds of decoding (reading the prompts is left out), *÷ lc* the same ÷ `lc`'s on the items
that both answered. *accepted* are accepted ÷ drafted tokens, *a* is how likely a token is accepted
if those before it were, *retrieved* how often an answer stood in what the drafter read, *fell back*
the number of items for which nothing was retrieved, so that `lc` answered.

What is headed **Paper** was published by its authors for other models, data and hardware than ours;
no figure of ours is among it."""

_REPEATED = (
    "model", "drafter", "layers", "data", "context_tokens", "gamma", "mode", "retrieval_tokens",
    "chunk_tokens", "retriever", "embedder", "seed", "dtype", "device", "drafter_device",
    "judge_url", "judge_model",
)  # fmt: skip
"""The settings that are options of ``rapid-llm eval``: a run goes on with the same ones only."""

_ANOTHER_LENGTH = "--context-tokens N --out ANOTHER"


class _Chapter(NamedTuple):
    """A part of the report.

    Attributes:
        slug: ends the names of its plots.
        note: how to read it.
        sections: by the name of their run.
        options: of ``rapid-llm eval``, that bring its data where there are none.
        published: what the paper has to set beside it.
    """

    title: str
    slug: str
    note: str
    sections: dict[str, Section | None]
    options: str
    published: str


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """Write ``report.md`` and its plots into ``out``; returns the path of the former.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    named = _named(runs)
    chapters = _chapters(named)
    out.mkdir(parents=True, exist_ok=True)
    text = ["# Evaluation", _HOW_TO_READ, "## Runs", _overview(named)]
    for title, slug, note, sections, _, published in chapters:
        text += [f"## {title}", note]
        for name, section in sections.items():
            if section is not None:
                section.figure.savefig(out / f"{name}-{slug}.png")
                text += [f"### {name}", section.text, f"![{title}: {name}]({name}-{slug}.png)"]
        if not any(sections.values()):
            text.append("Not measured: see [what is missing](#what-is-missing).")
        text.append(published)
    text += ["## What is missing", "\n".join(_missing(named, chapters)) or "Nothing."]
    report = out / REPORT
    report.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return report


def _chapters(named: dict[str, Run]) -> tuple[_Chapter, ...]:
    alike: dict[str, dict[str, Run]] = defaultdict(dict)
    for name, run in named.items():
        alike[run.title][name] = run
    return (
        _Chapter(
            "Quality and speed",
            "methods",
            "`a` and the tokens a round are of the methods that draft.",
            {name: quality_and_speed(run) for name, run in named.items()},
            "",
            f"{_paper_main()}\n\n{_paper_dialogue()}",
        ),
        _Chapter(
            "Knowledge transfer: η",
            "eta",
            "η = 0 is `sd`. *accepted* is here the mean over items of accepted ÷ drafted tokens; "
            "above, the tokens of all items are taken together.",
            {name: eta_sweep(run) for name, run in named.items()},
            "--method rapid --eta 0 --eta 5 --eta 10 --eta 20 --eta 40",
            _paper_unrelated(),
        ),
        _Chapter(
            "Context length",
            "length",
            "By what the target read, the median over items.",
            {"+".join(some): context_length([*some.values()]) for some in alike.values()},
            _ANOTHER_LENGTH,
            f"**Paper**: {paper.CONTEXT_LENGTH}.",
        ),
        _Chapter(
            "Acceptance by position in the draft",
            "positions",
            "In brackets: how often a token at this position was judged, those before it having "
            f"been accepted; fewer than {LEAST_JUDGED} times is not shown. The intervals take the "
            "tokens of one answer for independent, which they are not quite.",
            {name: positions(run) for name, run in named.items()},
            "--method rapid",
            "**Paper**: has nothing on positions.",
        ),
        _Chapter(
            "Dynamic η",
            "dynamic",
            "η that follows the retrieval's confidence and the position, beside constant η.",
            {name: dynamic_eta(run) for name, run in named.items()},
            "--method rapid --dynamic-eta",
            "**Paper**: all its figures are of a constant η.",
        ),
    )


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by their folders' names, numbered where these are the same; good for files."""
    named: dict[str, Run] = {}
    for run in runs:
        name = re.sub(r"[^\w.-]+", "-", run.folder.resolve().name)
        same = sum(known.partition("~")[0] == name for known in named)
        named[f"{name}~{same + 1}" if same else name] = run
    return named


def _overview(named: dict[str, Run]) -> str:
    return table(
        named.items(),
        ("run", lambda run: run[0]),
        ("of", lambda run: run[1].title),
        ("items", lambda run: str(max(row.items for row in run[1].summary.rows))),
        ("target reads, tokens (median)", lambda run: f"{run[1].prompt_tokens:,}"),
        (
            "settings",
            lambda run: ", ".join(
                f"`{name}={value}`"
                for name, value in run[1].settings.items()
                if isinstance(value, str | int | float) and not name.endswith("_sha256")
            ),
        ),
    )


# --- the paper's ---------------------------------------------------------------------------------


def _paper_main() -> str:
    return (
        f"**Paper**, Table 1 ({paper.SOURCE}; {paper.HARDWARE}; `streaming` is its MagicDec):\n\n"
        + table(
            paper.MAIN_RESULTS,
            ("target", lambda row: row.target),
            ("method", lambda row: row.method),
            ("drafter", lambda row: row.drafter or NONE),
            ("∞Bench En.QA, F1, %", lambda row: f"{row.qa:.2f}"),
            ("En.MC, accuracy, %", lambda row: f"{row.choice:.2f}"),
            ("En.Sum, ROUGE-L-Sum, %", lambda row: f"{row.summary:.2f}"),
            ("average", lambda row: f"{row.average:.2f}"),
            ("LongBench v2, CoT, accuracy, %", lambda row: number(row.longbench, 1)),
            ("÷ lc", lambda row: number(row.speedup, 2)),
        )
    )


def _paper_dialogue() -> str:
    return (
        "**Paper**, Table 2 (LLaMA-3.1-8B drafting for itself, dialogues of 122K tokens made from "
        "MT-Bench-101, judged from 1 to 10 by GPT-4-Turbo-1106):\n\n"
        + table(
            paper.DIALOGUE,
            ("method", lambda row: row.method),
            ("quality", lambda row: f"{row.quality:.2f}"),
            ("accepted, %", lambda row: number(row.acceptance, 2)),
            ("tokens/s", lambda row: f"{row.tokens_per_second:.2f}"),
        )
    )


def _paper_unrelated() -> str:
    return (
        "**Paper**, Table 3 (irrelevant retrieval; target LLaMA-3.1-8B, LongBench v2, long, CoT; "
        "accuracy in points; hardware as for Table 1):\n\n"
        + table(
            paper.UNRELATED_RETRIEVAL,
            ("η", lambda row: str(row.eta)),
            ("accuracy − lc, 8B drafter", lambda row: f"{row.change[0]:+.1f}"),
            ("70B drafter", lambda row: f"{row.change[1]:+.1f}"),
            ("÷ lc, 8B drafter", lambda row: f"{row.speedup[0]:.2f}"),
            ("70B drafter", lambda row: f"{row.speedup[1]:.2f}"),
        )
    )


# --- what is missing -----------------------------------------------------------------------------


def _missing(named: dict[str, Run], chapters: Sequence[_Chapter]) -> Iterator[str]:
    """A line each, with the command that brings it."""
    for name, run in named.items():
        rows = run.summary.rows
        most = max(row.items for row in rows)
        for row in rows:
            if row.items < most:
                command = _command(run, f"--method {row.base}")
                yield f"- {name}: `{row.method}` answered {row.items} of {most} items. {command}"
        lacking = [method for method in BASES if method not in {row.base for row in rows}]
        if lacking:
            command = _command(run, *(f"--method {method}" for method in lacking))
            yield f"- {name}: {', '.join(f'`{method}`' for method in lacking)}. {command}"
        if all(not row.options.get("irrelevant") for row in rows):
            command = _command(run, "--method rapid", "--irrelevant")
            yield f"- {name}: irrelevant retrieval. {command}"
    for chapter in chapters:
        for name, section in chapter.sections.items():
            run = named[name.partition("+")[0]]
            made_to_length = run.task in CONTEXT_TOKENS
            if section is None and (chapter.options != _ANOTHER_LENGTH or made_to_length):
                yield f"- {name}: {chapter.title}. {_command(run, chapter.options)}"


def _command(run: Run, *options: str) -> str:
    """With the run's own settings and folder, where the options do not give others."""
    own = {name: run.settings.get(name) for name in _REPEATED}
    own |= {"limit": len({record.item for record in run.records}), "out": run.folder}
    given = " ".join(options).split()
    settings = [
        f"{option} {shlex.quote(str(value))}"
        for name, value in own.items()
        if value is not None and (option := f"--{name.replace('_', '-')}") not in given
    ]
    return f"`{' '.join(['rapid-llm eval', run.task, *options, *settings])}`"
