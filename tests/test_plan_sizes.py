"""Sizes of models: counted parameters, bytes of KV and of quantized weights."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from plans import LLAMA_1B, LLAMA_8B, size

from rapid_llm.engine.cpu.blocks import Int4Blocks, Int8Blocks
from rapid_llm.engine.cpu.quantizers import quantized_copy
from rapid_llm.engine.cuda import int4
from rapid_llm.engine.kv_cache import KVCache, cache_argument
from rapid_llm.engine.quantized import quantized_nbytes
from rapid_llm.shapes import Precision, read_size, size_of


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_are_those_of_the_real_model(architecture: str, tied: bool) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied)
    found = size_of(model.config, "tiny")

    assert found.parameters == model.num_parameters()
    assert found.lookup == (0 if tied else model.get_input_embeddings().weight.numel())
    assert found.head == 64 * 32
    assert found.weight_bytes == model.to(torch.bfloat16).get_memory_footprint() - sum(
        buffer.nbytes for buffer in model.buffers()
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kv_bytes_are_those_of_the_cache(architecture: str) -> None:
    model = tiny_model(architecture).to(torch.bfloat16)
    cache = KVCache(model.config.num_hidden_layers, 10)
    model(torch.tensor([[3, 4, 5]]), **{cache_argument(model.forward): cache})
    assert cache.nbytes == 10 * size_of(model.config, "tiny").kv_bytes_per_token


def test_sizes_of_models_count_their_parameters() -> None:
    assert size_of(LLAMA_8B, "8B").parameters == 8_030_261_248
    assert size_of(LLAMA_1B, "1B").parameters == 1_235_814_400
    assert read_size("smollm2-135m").parameters == 134_515_008
    assert read_size("smollm2-135m").context_window == 8192


@pytest.mark.parametrize("precision", ["int8", "int4", "int4g64"])
def test_quantized_bytes_are_those_of_the_engine(precision: Precision) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "head_dim": 16}
    model = tiny_model(**sizes).to(torch.bfloat16)
    if precision == "int4":
        for parameter in model.model.layers.parameters():
            sixteen = torch.arange(parameter.numel()).view(parameter.shape) % 16
            parameter.data = sixteen.to(torch.bfloat16)
    if precision == "int4g64":
        embedding = model.get_input_embeddings().weight
        matrices = [p for p in model.parameters() if p.dim() > 1 and p is not embedding]
        parts = [part for matrix in matrices for part in int4.quantize(matrix)]
        kept = sum(part.nbytes // (2 if part.dtype == torch.uint8 else 1) for part in parts)
    else:
        kept = quantized_nbytes(
            quantized_copy(model, Int4Blocks if precision == "int4" else Int8Blocks)
        )
    assert size_of(model.config, "t").quantized_bytes(precision) == kept


def test_a_step_reads_no_embedding_and_about_half_or_a_third_of_the_matrices() -> None:
    found = size()
    assert found.bytes_read(1, "bf16") == 2 * (found.parameters - found.lookup)
    assert found.bytes_read(1, "int8") == pytest.approx(found.matrices * 17 / 16, rel=0.001)
    layers = found.matrices - found.head
    read = layers * 5 / 8 + found.head * 17 / 16
    assert found.bytes_read(1, "int4") == pytest.approx(read, rel=0.001)
    assert found.bytes_read(11, "int8") == found.bytes_read(1, "int8")


def test_a_mixture_reads_the_experts_that_its_tokens_choose() -> None:
    found = size_of(tiny_model("mixtral").config, "mixture")  # 2 of 4 experts a token
    dense = found.parameters - found.lookup - found.experts

    assert found.experts == 2 * 4 * (3 * 32 * 48)
    assert found.active_parameters == found.matrices + found.experts / 2
    assert found.bytes_read(1, "bf16") == 2 * (dense + found.experts / 2)
    assert found.bytes_read(2, "bf16") == 2 * (dense + found.experts * 3 / 4)
    assert found.bytes_read(99, "bf16") == pytest.approx(2 * (dense + found.experts))
