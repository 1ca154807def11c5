"""Description of a server's models for :class:`rapid_llm.RemoteDecoder`."""

from __future__ import annotations

import base64
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rapid_llm.speculation.sampling import generation_config

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.engine.model_runner import ModelRunner


def about(decoder: RapidDecoder) -> dict[str, Any]:
    """The tokenizer's files in base64, and names, windows and generation configs of both models.

    Args:
        decoder: the models.
    """
    with TemporaryDirectory() as folder:
        decoder.tokenizer.save_pretrained(folder)
        files = {
            path.name: base64.b64encode(path.read_bytes()).decode()
            for path in Path(folder).iterdir()
        }
    shared = decoder.drafter is decoder.target
    return {
        "files": files,
        "target": _model(decoder.target),
        "drafter": None if shared else _model(decoder.drafter),
        "chat_template_kwargs": decoder.chat_template_kwargs,
    }


def _model(runner: ModelRunner) -> dict[str, Any]:
    return {
        "name": runner.name,
        "context_window": runner.context_window,
        "generation_config": generation_config(runner.model).to_diff_dict(),
    }
