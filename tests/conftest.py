"""Models for the tests: tiny random ones of every architecture, and the packaged one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

# Before Triton is imported: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rapid_llm.decoder import RapidDecoder
from rapid_llm.models import LoadedModel, load_model, packaged_model

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # logits that differ, so that a wrong token shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": True,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2-sliding": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {},
    "mixtral": MOE | {"sliding_window": None},
    "olmo2": {},
    "phi3": {"original_max_position_embeddings": 512},
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "smollm3": {"no_rope_layers": [1, 0]},
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests keep GGUF files that were converted."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder in the run's own
        base = base.parent
    folder = base / "gguf"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _measured_for_this_test(
    tmp_path_factory: pytest.TempPathFactory, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes cost is measured anew, and kept out of the user's cache folder."""
    cache = tmp_path_factory.mktemp("rapid-llm-cache")
    (cache / "gguf").symlink_to(converted)
    monkeypatch.setenv("RAPID_LLM_CACHE", str(cache))


class Deprecations(logging.Handler):
    """What transformers tells of in its log alone, where our code or a test made the call."""

    BETWEEN = ("logging", "functools", "contextlib", "torch", "transformers.utils",
               "transformers.models.auto")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            frames = (frame for frame, _ in traceback.walk_stack(None))
            names = [frame.f_globals.get("__name__", "") for frame in frames]
            names = [name for name in names[1:] if not name.startswith(self.BETWEEN)]
            # transformers calls itself in ways that are deprecated; the caller of the module that
            # told is ours.
            if names[0].startswith("transformers."):
                names = [name for name in names if name != names[0]]
            if names[0].startswith(("rapid_llm", "test_")):
                self.told.append(f"{names[0]}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _nothing_deprecated_is_used() -> Iterator[None]:
    logger, deprecations = logging.getLogger("transformers"), Deprecations()
    logger.addHandler(deprecations)
    try:
        yield
    finally:
        logger.removeHandler(deprecations)
    assert deprecations.told == []


def installed(package: str) -> Any:
    """A package that not every machine has. One that is there and does not import is a failure."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
    return importlib.import_module(package)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch and the kernels divide their work among so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of 2 layers; ``changes`` go to its config."""
    settings = TINY | ARCHITECTURES[architecture] | changes
    config = CONFIG_MAPPING[architecture.split("-")[0]](**settings)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def counting_model(attention: float = 0.0) -> PreTrainedModel:
    """A tiny model that says the next word of ``w3`` to ``w63``, over and over.

    With some ``attention`` (0.1) what was said before makes it jump now and then.
    """
    model = tiny_model(eos_token_id=None)
    words = torch.arange(3, 64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= attention
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[words.roll(-1)] = model.model.embed_tokens.weight[words]
        model.lm_head.weight[:3] = 0
    return model


def tiny_tokenizer(size: int = 64) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: id 5 is the word ``w5``; 0, 1, 2 are pad, BOS and EOS."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def decoder() -> RapidDecoder:
    """A tiny model that drafts for itself."""
    return RapidDecoder(tiny_model(), tiny_tokenizer())


def transformers_greedy(
    model: PreTrainedModel, prompt: list[int], new: int, **options: Any
) -> list[int]:
    """The reference: the model's own ``generate``."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        **options,
    )
    return output[0, len(prompt) :].tolist()


@lru_cache
def smollm2() -> Any:
    """The packaged model's tokenizer."""
    path = packaged_model()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture
def begins_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets a number of requests that have to wait before a scheduler's first round."""
    from rapid_llm.batching import Scheduler

    work = Scheduler._work

    def set_number(requests: int) -> None:
        def later(scheduler: Scheduler) -> None:
            while len(scheduler._waiting) < requests:
                time.sleep(0.001)
            work(scheduler)

        monkeypatch.setattr(Scheduler, "_work", later)

    return set_number


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> type:
    """Counts captures and launches of the CUDA engine, whose path passes take on a CPU."""
    from uncaptured import take_the_place_of_captures  # needs Triton

    return take_the_place_of_captures(monkeypatch)


@pytest.fixture
def warnings_are_errors() -> Iterator[None]:
    """Every warning of rapid-llm for users is raised as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="session")
def smollm2_float32() -> LoadedModel:
    """The packaged model in float32, for exact comparisons."""
    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def dictionary() -> str:
    """The bundled document: an excerpt of The Devil's Dictionary."""
    spec = importlib.util.find_spec("rapid_llm")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).with_name("data") / "devils-dictionary.txt"
    return path.read_text(encoding="utf-8")
