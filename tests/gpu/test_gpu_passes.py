"""Forward passes over the KV cache against the model's own forward, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_models import (
    CAPTURED,
    DEVICE,
    GRAPHS,
    HEADS,
    PASSES,
    assert_as_good,
    cuda_only,
    exact_products,
    model_on_device,
    on_gpu,
    with_heads,
)
from transformers import PreTrainedModel

from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session

pytestmark = on_gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = (1, 2, 5, 16)
PROMPT = 40
IDS = torch.randint(3, 64, (130,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_products():
        yield


@torch.inference_mode()
def as_decoded(runner: ModelRunner, ids: torch.Tensor, prompt: int = PROMPT) -> torch.Tensor:
    """Logits from the prompt on: passes of all sizes, rejected drafts, a long pass at the end."""
    session = Session(runner, runner.new_cache(len(ids)))
    session.prefill(ids[:prompt].tolist())
    ids = ids.to(DEVICE)
    rows = []
    for n in (*SIZES, *reversed(SIZES)):
        at = session.length
        session.extend((ids[at : at + 7] + 1) % 60)  # a draft, of which nothing is kept
        session.rollback(at)
        rows.append(session.extend(ids[at : at + n]))
        assert session.length == at + n
    at = session.length
    rows.append(session.extend(ids[at:-1]))
    rows.append(session.extend(ids[-1:]))
    return torch.cat(rows)


def check(model: PreTrainedModel, ids: torch.Tensor, prompt: int, graphs: bool) -> None:
    runner = ModelRunner(model, "m", cuda_graphs=graphs)
    assert_as_good(as_decoded(runner, ids, prompt), model, ids, slice(prompt, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("architecture", "graphs"), PASSES)
def test_every_architecture_reads_as_its_own_forward_does(architecture, dtype, graphs):
    check(model_on_device(architecture, DTYPES[dtype]), IDS, PROMPT, graphs)


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS)
def test_every_head_size_and_group_is_as_good_as_transformers(heads, dtype, graphs):
    check(with_heads(heads, DTYPES[dtype]), IDS, PROMPT, graphs)


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("window", [64, 100, 2000])
def test_sliding_windows_over_many_blocks_of_keys_are_followed(window, graphs):
    ids = torch.randint(3, 64, (1400,), generator=torch.Generator().manual_seed(2))
    check(with_heads("128, group 7", torch.bfloat16, sliding_window=window), ids, 1290, graphs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [511, 1024, 4099])
def test_long_prompts_are_read_in_chunks(length, dtype):
    ids = torch.randint(3, 64, (length + 90,), generator=torch.Generator().manual_seed(3))
    check(with_heads("128, group 8", DTYPES[dtype]), ids, length, False)


@cuda_only
@pytest.mark.parametrize("heads", ["64, group 1", "128, group 8", "256, group 2"])
def test_prompts_of_several_chunks_are_as_good_as_transformers(heads):
    """13,000 tokens: a chunk of any size up to 4,096 has whole chunks before it."""
    ids = torch.randint(3, 64, (13_000 + 90,), generator=torch.Generator().manual_seed(4))
    check(with_heads(heads, torch.bfloat16), ids, 13_000, False)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17])
@torch.inference_mode()
def test_a_pass_of_few_tokens_is_as_good_as_transformers_at_any_length(n):
    """Lengths around the borders of blocks, one cache for all: nothing of a longer past is seen."""
    model = with_heads("64, group 1", torch.float32)
    runner = ModelRunner(model, "m", cuda_graphs=CAPTURED)
    ids = torch.randint(3, 64, (300,), generator=torch.Generator().manual_seed(n))
    session = Session(runner, runner.new_cache(300))
    session.prefill(ids[:280].tolist())
    for length in (256, 255, 129, 128, 127, 65, 64, 63, 1):
        session.rollback(length)
        logits = session.extend(ids[length : length + n].to(DEVICE))
        assert_as_good(logits, model, ids[: length + n], slice(length, None))


@torch.inference_mode()
def test_logits_are_the_callers_to_keep():
    """A captured pass writes into the same memory again and again."""
    model = model_on_device()
    runner = ModelRunner(model, "m", cuda_graphs=CAPTURED)
    session = Session(runner, runner.new_cache(60))
    session.prefill(IDS[:20].tolist())
    first = session.extend(IDS[20:21])
    before = first.clone()
    session.extend(IDS[21:22])
    assert torch.equal(first, before)


@torch.inference_mode()
def test_two_caches_of_one_model_do_not_meet():
    model = model_on_device()
    runner = ModelRunner(model, "m", cuda_graphs=CAPTURED)
    one, other = (Session(runner, runner.new_cache(size)) for size in (60, 90))
    one.prefill(IDS[:20].tolist())
    other.prefill(IDS[50:80].tolist())
    ours, theirs = [], []
    for step in range(5):
        ours.append(one.extend(IDS[20 + step : 21 + step]))
        theirs.append(other.extend(IDS[80 + step : 81 + step]))
    assert_as_good(torch.cat(ours), model, IDS[:25], slice(20, None))
    assert_as_good(torch.cat(theirs), model, IDS[50:85], slice(30, None))


@torch.inference_mode()
def test_a_cache_that_grows_goes_on():
    model = model_on_device()
    runner = ModelRunner(model, "m", cuda_graphs=CAPTURED)
    session = Session(runner, runner.new_cache(24))
    session.prefill(IDS[:20].tolist())
    session.extend(IDS[20:21])
    session.cache.grow(100)
    rows = [session.extend(IDS[at : at + 1]) for at in range(21, 40)]
    assert_as_good(torch.cat(rows), model, IDS[:40], slice(21, None))
