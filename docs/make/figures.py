"""Draw the pictures of the documents: python docs/make/figures.py [laws] [speed] [answer].

``answer`` asks the packaged model the question of ``rapid-llm demo``; the others are computed.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[1] / "assets"
PLAIN, DRAFT, EXACT = "#8a94a0", "#e07a1f", "#2a6f97"
COLORS = {"lookup": "#2f8f5b", "draft": DRAFT, "target": EXACT}
CONTEXTS = [4096, 8192, 16384, 32768, 65536, 131072]


def laws() -> None:
    """The distributions of the three modes for one target and one drafter."""
    import torch
    from matplotlib import pyplot as plt

    from rapid_llm.config import SpeculationConfig
    from rapid_llm.speculation.acceptance import residual, transfer

    words = ["in 1906", "in 1911", "by Bierce", "in London", "later"]
    p = torch.tensor([0.36, 0.22, 0.20, 0.14, 0.08])
    q = torch.tensor([0.10, 0.72, 0.08, 0.06, 0.04])
    config = SpeculationConfig()
    s_hat = transfer(p.log()[None], q[None], 2.0, config.alpha)
    p_hat = s_hat.softmax(-1)[0]
    m = torch.minimum(q, p_hat)
    paper = m + (1 - m.sum()) * residual(p[None], m[None])[0] / residual(p[None], m[None])[0].sum()
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.5), sharey=True, layout="constrained")
    shown = [
        ("drafter: q", q, DRAFT),
        ("exact: p, the target's own", p, EXACT),
        ("augmented: p̂", p_hat, EXACT),
        ("paper", paper, EXACT),
    ]
    for axis, (title, values, color) in zip(axes, shown, strict=True):
        axis.barh(words, values, color=color)
        if color == EXACT:
            axis.plot(p, range(len(words)), "|", color="black", markersize=14)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel("probability of the next token (η = 2; the black lines are p)", fontsize=8)
    _save(figure, "laws.svg")


def speed() -> None:
    """The speed-up that ``rapid-llm plan`` predicts for Llama-3.1-8B on an H100."""
    from matplotlib import pyplot as plt

    from rapid_llm.bench.plan import make_plan
    from rapid_llm.bench.speed_model import named_device

    h100 = named_device("h100")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")

    def speedups(name: str, acceptance: float) -> list[float]:
        plans = [make_plan("llama-3.1-8b", n, acceptance=acceptance, device=h100) for n in CONTEXTS]
        return [next(r for r in p.rows if r.drafter == name).best.speedup for p in plans]

    for acceptance, style in ((0.9, "-"), (0.8, "--"), (0.7, ":")):
        for name, color in (("self, int4", EXACT), ("self, bf16", PLAIN)):
            left.plot(
                CONTEXTS, speedups(name, acceptance), style, color=color,
                label=f"{name}, a = {acceptance}",
            )  # fmt: skip
    left.set_xscale("log", base=2)
    left.set_xticks(CONTEXTS, [f"{n // 1024}K" for n in CONTEXTS])
    left.set(xlabel="context, tokens", ylabel="speed-up over plain decoding")
    rates = [i / 50 for i in range(20, 49)]
    for context, style in ((131072, "-"), (32768, "--")):
        for name, color in (("self, int4", EXACT), ("self, bf16", PLAIN)):
            made = [make_plan("llama-3.1-8b", context, acceptance=a, device=h100) for a in rates]
            rows = [next(r for r in p.rows if r.drafter == name) for p in made]
            label = f"{name}, {context // 1024}K: c = {rows[0].cost:.2f}"
            right.plot(rates, [r.best.speedup for r in rows], style, color=color, label=label)
    right.set(xlabel="acceptance rate a")
    for axis in (left, right):
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    _save(figure, "speed.svg")


def _save(figure: Any, name: str) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(ASSETS / name, metadata={"Date": None})


def answer() -> None:
    """The demo's answer: each token in the colour of its origin, and a bar a round."""
    from rapid_llm.cli.demo import (
        DEMO_CHUNK_TOKENS,
        DEMO_QUESTION,
        DEMO_RETRIEVAL_TOKENS,
        demo_text,
    )
    from rapid_llm.config import PACKAGED_EMBEDDER, SamplingParams
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.pipeline import RapidPipeline

    pipeline = RapidPipeline(
        RapidDecoder.from_pretrained(),
        demo_text(),
        embedder=PACKAGED_EMBEDDER,
        chunk_tokens=DEMO_CHUNK_TOKENS,
        retrieval_tokens=DEMO_RETRIEVAL_TOKENS,
        sampling=SamplingParams(max_new_tokens=64),
    )
    rounds = []
    ids: list[int] = []
    tokenizer = pipeline.decoder.tokenizer
    for delta in pipeline.stream(DEMO_QUESTION):
        words = []
        for token in delta.token_ids:
            start = len(tokenizer.decode(ids, skip_special_tokens=True))
            ids.append(token)
            words.append(tokenizer.decode(ids, skip_special_tokens=True)[start:])
        rounds.append(list(zip(words, delta.origins, strict=True)))
        stats = delta.stats
    (ASSETS / "answer.svg").write_text(drawn(DEMO_QUESTION, rounds, stats), encoding="utf-8")


def drawn(question: str, rounds: list[list[tuple[str, str]]], stats: Any) -> str:
    """The picture, as SVG: words in lines of a fixed-width font, and a bar under each round."""
    wide, high, per_line = 8.4, 40, 84
    parts, x, y = [], 0, 1
    for words in rounds:
        first, line = x, y
        for word, origin in words:
            shown = word.replace("\n", " ")
            if not shown:
                continue
            if x + len(shown) > per_line:
                parts.append(_bar(first, x, line, wide, high))
                x, y = 0, y + 1
                shown = shown.lstrip()
                first, line = x, y
            color = COLORS[origin]
            parts.append(
                f'<text x="{20 + x * wide:.1f}" y="{30 + y * high}" fill="{color}" '
                f'textLength="{len(shown) * wide:.1f}" xml:space="preserve">{escape(shown)}</text>'
            )
            x += len(shown)
        parts.append(_bar(first, x, line, wide, high))
    bottom = 30 + (y + 1) * high
    legend = (
        f'<text x="20" y="{bottom}" fill="{DRAFT}">■ drafted, from a '
        f"prompt of {stats.draft_prompt_tokens:,} tokens</text>"
        f'<text x="360" y="{bottom}" fill="{COLORS["lookup"]}">'
        "■ looked up, kept by the drafter</text>"
        f'<text x="20" y="{bottom + 22}" fill="{EXACT}">■ added by the target, from '
        f"a prompt of {stats.prompt_tokens:,} tokens</text>"
        f'<text x="20" y="{bottom + 48}" fill="#666">{stats.completion_tokens} tokens in '
        f"{stats.rounds} passes of the target; {stats.accepted_tokens} of {stats.drafted_tokens} "
        "drafted tokens accepted</text>"
    )
    width, height = 40 + per_line * wide, bottom + 66
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">'
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#fbfbf9"/>'
        f'<text x="20" y="34" fill="#666">{escape(question)}</text>{"".join(parts)}{legend}</svg>\n'
    )


def _bar(first: int, end: int, line: int, wide: float, high: int) -> str:
    if end <= first:
        return ""
    return (
        f'<rect x="{20 + first * wide + 1:.1f}" y="{37 + line * high}" '
        f'width="{(end - first) * wide - 2:.1f}" height="3" rx="1" fill="#c9ccd1"/>'
    )


if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ("laws", "speed", "answer"):
        {"laws": laws, "speed": speed, "answer": answer}[name]()
