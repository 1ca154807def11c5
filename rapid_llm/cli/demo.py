"""``rapid-llm demo``: the main job on a bundled document with the packaged models."""

from __future__ import annotations

import sys
from textwrap import shorten

from rapid_llm.cli.answers import Job, comparison
from rapid_llm.cli.app import app
from rapid_llm.config import PACKAGED_EMBEDDER, PACKAGED_MODEL, SamplingParams
from rapid_llm.console import Bars, show, status
from rapid_llm.folders import packaged_text

DEMO_DOCUMENT = "devils-dictionary.txt"
DEMO_QUESTION = "Quote the definition of PROPHECY."
DEMO_CHUNK_TOKENS = 64
DEMO_RETRIEVAL_TOKENS = 512


@app.command()
def demo() -> None:
    """Answer a question about a bundled document with the packaged models, by every method."""
    text = demo_text()
    shown = sys.stderr.isatty()
    with status("loading the packaged models", shown):
        from rapid_llm.decoder import RapidDecoder
        from rapid_llm.pipeline import RapidPipeline

        decoder = RapidDecoder.from_pretrained(PACKAGED_MODEL)
        pipeline = RapidPipeline(
            decoder,
            text,
            embedder=PACKAGED_EMBEDDER,
            chunk_tokens=DEMO_CHUNK_TOKENS,
            retrieval_tokens=DEMO_RETRIEVAL_TOKENS,
            sampling=SamplingParams(max_new_tokens=64),
        )
    bars = Bars(shown)
    job = Job(pipeline, DEMO_QUESTION, [DEMO_DOCUMENT], bars)

    tokens = len(decoder.tokenizer(text)["input_ids"])
    show(f"Document: an excerpt of The Devil's Dictionary (A. Bierce, 1911), {tokens:,} tokens")
    show(f"Model:    {PACKAGED_MODEL} (bfloat16, {decoder.target.device}), drafting for itself")
    show(f"Question: {DEMO_QUESTION}\n")
    with bars:
        context = pipeline.retrieve(DEMO_QUESTION, progress=bars)
    show(
        f"{PACKAGED_EMBEDDER} retrieved {context.tokens} tokens for the drafter, in chunks of at "
        f"most {DEMO_CHUNK_TOKENS} and {DEMO_RETRIEVAL_TOKENS} in all\n(the defaults, 512 and "
        "4,096, are made for longer documents than this one). Similarity and first character:"
    )
    for chunk in context.chunks:
        passage = shorten(chunk.text, 58, placeholder=" …")
        show(f"  {chunk.score:.2f} at {chunk.start:6,}  {passage}")
    show("\nAnswer by RAPID, drafted from these and verified over the whole document:")
    rapid = job.stream("rapid")
    show(job.summary("rapid", rapid))
    show("\nAll four methods on the same input:")
    show(comparison(job.compare(rapid=rapid)))
    show("(sd answers as lc does; in bfloat16, rounding can part them.)")


def demo_text() -> str:
    """The bundled document."""
    return packaged_text(DEMO_DOCUMENT)
