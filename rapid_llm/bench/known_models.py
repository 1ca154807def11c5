"""Configs of common models, so that their sizes are known without a hub.

They are in ``data/models.json``, named by their hub ids, with the sizes of the checkpoints' own
configs. ``tiny`` belongs to no checkpoint and serves the tests.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)

_DATA = json.loads((resources.files("rapid_llm") / "data" / "models.json").read_text("utf-8"))

_MODELS: dict[str, dict[str, Any]] = _DATA["models"]
"""By name: the base model's hub id, the suffix of the tuned model's, architecture, values of
:data:`SIZES`, ``max_position_embeddings``, and other values of the config."""

_HUB_IDS: dict[str, str] = {
    **_DATA["hub_ids"],  # of tuned models whose ids are not the base model's with a suffix
    **{each["hub"]: name for name, each in _MODELS.items()},
    **{each["hub"] + each["tuned"]: name for name, each in _MODELS.items()},
}

NAMES = tuple(_MODELS)
"""Names by which the models are known here."""

PAPER_PAIRS = (
    ("llama-3.1-8b", None),
    ("llama-3.1-70b", None),
    ("llama-3.1-8b", "llama-3.1-70b"),
    ("qwen2.5-7b", None),
    ("qwen2.5-72b", None),
    ("qwen2.5-7b", "qwen2.5-72b"),
)
"""Target and drafter of the paper's rows (arXiv 2502.20330, table 1); None drafts for itself."""


def known_config(source: str, positions: int | None = None) -> PretrainedConfig | None:
    """The config of a model by its name here or its hub id; None where it is not known.

    The rotary embedding is not scaled, which takes the same time.

    Args:
        source: name or hub id.
        positions: maximum length in tokens; None for the checkpoint's own.
    """
    known = _MODELS.get(source if source in _MODELS else _HUB_IDS.get(source, ""))
    if known is None:
        return None
    others = {k: v for k, v in known.items() if k not in ("hub", "tuned", "model_type", "sizes")}
    own = others.pop("positions")
    length = own if positions is None else positions
    return make_config(known["model_type"], *known["sizes"], positions=length, **others)


def make_config(model_type: str, *sizes: int, positions: int, **others: Any) -> PretrainedConfig:
    """A config without an end-of-sequence token, so that no answer ends early.

    Args:
        model_type: architecture.
        sizes: values of :data:`SIZES`.
        positions: maximum length in tokens.
        others: other values of the config.
    """
    named: dict[str, Any] = dict(zip(SIZES, sizes, strict=True))
    named["max_position_embeddings"] = positions
    named |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**named, **others)
    return config
