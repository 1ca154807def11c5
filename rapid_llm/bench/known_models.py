"""Configs of models that people ask for, so that sizes are known without a hub.

Sizes are those of the checkpoints' own configs, which are named by their hub ids; no weights are
here. ``tiny`` is no checkpoint's, and there for the tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PretrainedConfig

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


class _Known(NamedTuple):
    """A model's config.

    Attributes:
        hub: hub id of the base model; empty for none.
        tuned: suffix of the tuned model's id.
        model_type: architecture.
        sizes: values of :data:`SIZES`.
        positions: ``max_position_embeddings``.
        others: what else the config has.
    """

    hub: str
    tuned: str
    model_type: str
    sizes: tuple[int, ...]
    positions: int
    others: dict[str, Any]


_TIED = {"tie_word_embeddings": True}
_FULL = {"sliding_window": None}
_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1}


def _gemma(layers: int, window: int) -> dict[str, Any]:
    """Every sixth layer attends to everything."""
    types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    return {"layer_types": types, "sliding_window": window}


# fmt: off
_MODELS: dict[str, _Known] = {
    "llama-3.1-8b": _Known("meta-llama/Llama-3.1-8B", "-Instruct", "llama",
                           (128256, 4096, 14336, 32, 32, 8, 128), 131072, {}),
    "llama-3.1-70b": _Known("meta-llama/Llama-3.1-70B", "-Instruct", "llama",
                            (128256, 8192, 28672, 80, 64, 8, 128), 131072, {}),
    "llama-3.3-70b": _Known("meta-llama/Llama-3.3-70B-Instruct", "", "llama",
                            (128256, 8192, 28672, 80, 64, 8, 128), 131072, {}),
    "llama-3.2-1b": _Known("meta-llama/Llama-3.2-1B", "-Instruct", "llama",
                           (128256, 2048, 8192, 16, 32, 8, 64), 131072, _TIED),
    "llama-3.2-3b": _Known("meta-llama/Llama-3.2-3B", "-Instruct", "llama",
                           (128256, 3072, 8192, 28, 24, 8, 128), 131072, _TIED),
    "qwen2.5-0.5b": _Known("Qwen/Qwen2.5-0.5B", "-Instruct", "qwen2",
                           (151936, 896, 4864, 24, 14, 2, 64), 32768, _TIED),
    "qwen2.5-1.5b": _Known("Qwen/Qwen2.5-1.5B", "-Instruct", "qwen2",
                           (151936, 1536, 8960, 28, 12, 2, 128), 32768, _TIED),
    "qwen2.5-3b": _Known("Qwen/Qwen2.5-3B", "-Instruct", "qwen2",
                         (151936, 2048, 11008, 36, 16, 2, 128), 32768, _TIED),
    "qwen2.5-7b": _Known("Qwen/Qwen2.5-7B", "-Instruct", "qwen2",
                         (152064, 3584, 18944, 28, 28, 4, 128), 32768, {}),
    "qwen2.5-14b": _Known("Qwen/Qwen2.5-14B", "-Instruct", "qwen2",
                          (152064, 5120, 13824, 48, 40, 8, 128), 32768, {}),
    "qwen2.5-32b": _Known("Qwen/Qwen2.5-32B", "-Instruct", "qwen2",
                          (152064, 5120, 27648, 64, 40, 8, 128), 32768, {}),
    "qwen2.5-72b": _Known("Qwen/Qwen2.5-72B", "-Instruct", "qwen2",
                          (152064, 8192, 29568, 80, 64, 8, 128), 32768, {}),
    "qwen3-0.6b": _Known("Qwen/Qwen3-0.6B", "-Base", "qwen3",
                         (151936, 1024, 3072, 28, 16, 8, 128), 40960, _TIED),
    "qwen3-1.7b": _Known("Qwen/Qwen3-1.7B", "-Base", "qwen3",
                         (151936, 2048, 6144, 28, 16, 8, 128), 40960, _TIED),
    "qwen3-4b": _Known("Qwen/Qwen3-4B", "-Base", "qwen3",
                       (151936, 2560, 9728, 36, 32, 8, 128), 40960, _TIED),
    "qwen3-8b": _Known("Qwen/Qwen3-8B", "-Base", "qwen3",
                       (151936, 4096, 12288, 36, 32, 8, 128), 40960, {}),
    "qwen3-14b": _Known("Qwen/Qwen3-14B", "-Base", "qwen3",
                        (151936, 5120, 17408, 40, 40, 8, 128), 40960, {}),
    "qwen3-32b": _Known("Qwen/Qwen3-32B", "", "qwen3",
                        (151936, 5120, 25600, 64, 64, 8, 128), 40960, {}),
    "qwen3-30b-a3b": _Known("Qwen/Qwen3-30B-A3B", "-Base", "qwen3_moe",
                            (151936, 2048, 6144, 48, 32, 4, 128), 40960,
                            _MOE | {"moe_intermediate_size": 768}),
    "qwen3-235b-a22b": _Known("Qwen/Qwen3-235B-A22B", "", "qwen3_moe",
                              (151936, 4096, 12288, 94, 64, 4, 128), 40960,
                              _MOE | {"moe_intermediate_size": 1536}),
    "mistral-7b": _Known("mistralai/Mistral-7B-v0.3", "", "mistral",
                         (32768, 4096, 14336, 32, 32, 8, 128), 32768, _FULL),
    "mistral-nemo-12b": _Known("mistralai/Mistral-Nemo-Base-2407", "", "mistral",
                               (131072, 5120, 14336, 40, 32, 8, 128), 131072, _FULL),
    "mistral-small-24b": _Known("mistralai/Mistral-Small-24B-Base-2501", "", "mistral",
                                (131072, 5120, 32768, 40, 32, 8, 128), 32768, _FULL),
    "gemma-3-1b": _Known("google/gemma-3-1b", "-it", "gemma3_text",
                         (262144, 1152, 6912, 26, 4, 1, 256), 32768, _gemma(26, 512)),
    "gemma-3-4b": _Known("google/gemma-3-4b", "-it", "gemma3_text",
                         (262208, 2560, 10240, 34, 8, 4, 256), 131072, _gemma(34, 1024)),
    "gemma-3-12b": _Known("google/gemma-3-12b", "-it", "gemma3_text",
                          (262208, 3840, 15360, 48, 16, 8, 256), 131072, _gemma(48, 1024)),
    "gemma-3-27b": _Known("google/gemma-3-27b", "-it", "gemma3_text",
                          (262208, 5376, 21504, 62, 32, 16, 128), 131072, _gemma(62, 1024)),
    "phi-4": _Known("microsoft/phi-4", "", "phi3",
                    (100352, 5120, 17920, 40, 40, 10, 128), 16384, _FULL),
    "smollm2-135m": _Known("HuggingFaceTB/SmolLM2-135M", "-Instruct", "llama",
                           (49152, 576, 1536, 30, 9, 3, 64), 8192, _TIED),
    "tiny": _Known("", "", "llama", (512, 64, 128, 2, 4, 2, 32), 2048, {}),
}
_HUB_IDS = {  # of tuned models whose ids are not the base model's with a suffix
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b",
    "mistralai/Mistral-Nemo-Instruct-2407": "mistral-nemo-12b",
    "mistralai/Mistral-Small-24B-Instruct-2501": "mistral-small-24b",
    "google/gemma-3-1b-pt": "gemma-3-1b",
    "google/gemma-3-4b-pt": "gemma-3-4b",
    "google/gemma-3-12b-pt": "gemma-3-12b",
    "google/gemma-3-27b-pt": "gemma-3-27b",
    **{each.hub: name for name, each in _MODELS.items()},
    **{each.hub + each.tuned: name for name, each in _MODELS.items()},
}
# fmt: on
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

    The rotary embedding is not scaled, which costs the same.

    Args:
        source: name or hub id.
        positions: maximum length in tokens; None for the checkpoint's own.
    """
    name = source if source in _MODELS else _HUB_IDS.get(source)
    if name is None:
        return None
    known = _MODELS[name]
    length = known.positions if positions is None else positions
    return make_config(known.model_type, *known.sizes, positions=length, **known.others)


def make_config(model_type: str, *sizes: int, positions: int, **others: Any) -> PretrainedConfig:
    """A config of the sizes that :data:`SIZES` names, without an end-of-sequence token: no answer
    ends before it was measured."""
    named: dict[str, Any] = dict(zip(SIZES, sizes, strict=True))
    named["max_position_embeddings"] = positions
    named |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**named, **others)
    return config
