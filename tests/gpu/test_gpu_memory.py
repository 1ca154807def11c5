"""Memory of a device: what is freed for whom, what is said when it is short, and no leaks."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import tiny_tokenizer
from gpu_models import DEVICE, GRAPHS, cuda_only, model_on_device, on_gpu

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.errors import RapidError

pytestmark = on_gpu

MB = 2**20
both = pytest.mark.parametrize("graphs", GRAPHS)


def held() -> tuple[int, int]:
    """Bytes of tensors now, and what is reserved for them; on a CPU all that Python can reach."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.layout == torch.strided:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()), 0


@contextmanager
def only(more: int) -> Iterator[None]:
    """This process may take so many bytes more than it has now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    reserved = torch.cuda.memory_reserved(DEVICE)
    device = torch.cuda.current_device()
    torch.cuda.set_per_process_memory_fraction((reserved + more) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def document(seed: int, tokens: int = 2500) -> list[int]:
    return random.Random(seed).choices(range(3, 64), k=tokens)


def wide_decoder(graphs: bool) -> RapidDecoder:
    """One whose KV takes 16 KiB a token."""
    model = model_on_device(
        "llama",
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        hidden_size=64,
        max_position_embeddings=200_000,
        eos_token_id=None,
    )
    return RapidDecoder(model, tiny_tokenizer(), cuda_graphs=graphs)


def begin(decoder: RapidDecoder, prompt: list[int], room: int) -> list[int]:
    """The first tokens of an answer that has room for many more."""
    stream = decoder.stream(prompt, sampling=SamplingParams(max_new_tokens=room, ignore_eos=True))
    said = [token for _ in range(4) for token in next(stream).token_ids]
    stream.close()
    return said


@cuda_only
@both
def test_kept_kv_goes_where_a_new_document_needs_the_memory(graphs):
    decoder = wide_decoder(graphs)
    room = 30_000  # with the prompt 500 MiB
    expected = begin(decoder, document(1), room)
    decoder.clear_cache()
    begin(decoder, document(0), room)
    kept = decoder.memory.kept_kv
    assert kept > 450 * MB
    with only(300 * MB):
        assert begin(decoder, document(1), room) == expected
    assert decoder.memory.kept_kv <= kept + MB


@cuda_only
@both
def test_what_cannot_fit_is_said_and_the_decoder_goes_on(graphs):
    decoder = wide_decoder(graphs)
    expected = begin(decoder, document(1), 100)
    decoder.clear_cache()
    with only(400 * MB):
        for _ in range(2):
            with pytest.raises((RapidError, torch.OutOfMemoryError), match=r"(?i)memory"):
                begin(decoder, document(0), 150_000)
            assert begin(decoder, document(1), 100) == expected
    assert begin(decoder, document(1), 100) == expected


@pytest.mark.parametrize(
    ("graphs", "generations"),
    [
        pytest.param(False, 200 if DEVICE.type == "cuda" else 1000, id="eager"),
        pytest.param(True, 800, id="captured", marks=cuda_only),
    ],
)
def test_a_thousand_generations_of_all_lengths_leave_nothing_behind(graphs, generations):
    model, other = (model_on_device("llama", seed=seed, eos_token_id=None) for seed in (0, 1))
    decoder = RapidDecoder(model, tiny_tokenizer(), other, kv_cache_bytes=0, cuda_graphs=graphs)
    lengths = random.Random(0)
    speculation = SpeculationConfig(gamma=2, lookup=False)
    marks = []
    for generation in range(generations):
        decoder.generate(
            document(generation, lengths.randrange(4, 300)),
            document(generation, lengths.randrange(4, 100)),
            sampling=SamplingParams(max_new_tokens=lengths.randrange(1, 5), ignore_eos=True),
            speculation=speculation,
        )
        if (generation + 1) % (generations // 4) == 0:
            marks.append(held())
    first, last = marks[0], marks[-1]
    assert last[0] - first[0] < (MB if DEVICE.type == "cuda" else MB // 16), marks
    assert last[1] - first[1] < 64 * MB, marks


@cuda_only
def test_a_decoder_that_is_gone_holds_nothing():
    def come_and_go() -> int:
        decoder = wide_decoder(True)
        begin(decoder, document(0), 1000)
        decoder.generate(
            document(0),
            document(1),
            sampling=SamplingParams(max_new_tokens=20, ignore_eos=True),
            speculation=SpeculationConfig(gamma=3),
        )
        del decoder
        return held()[0]

    first = come_and_go()  # what libraries keep for the device
    assert come_and_go() - first < MB
