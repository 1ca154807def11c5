"""The compiled kernels against float32 and against PyTorch's own operators."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import threads, tiny_model, tiny_tokenizer

from rapid_llm.batching import GenerationRequest
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine import lean_pass, sdpa
from rapid_llm.engine.attention import attend
from rapid_llm.engine.cpu import blocks, kernels
from rapid_llm.engine.cpu.attention import attend_part
from rapid_llm.engine.cpu.blocks import BlockLinear, Int4Blocks, Int8Blocks
from rapid_llm.engine.cpu.compiled import MAX_JOINED_TOKENS, MAX_TOKENS, CompiledPass
from rapid_llm.engine.cpu.int8 import Int8Linear
from rapid_llm.engine.cpu.products import fast_dtype
from rapid_llm.engine.cpu.quantizers import quantized_copy
from rapid_llm.engine.joined import joined_logits
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.parts import Part
from rapid_llm.engine.session import Session
from rapid_llm.errors import ModelError

BUILDS = ["_kernels_avx512bf16", "_kernels_avx2"]
pytestmark = pytest.mark.skipif(
    kernels.kernels() is None, reason="no kernels were built, or not for this CPU"
)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4,
         "initializer_range": 0.1}  # fmt: skip
CONFIGS = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, one KV head": {"num_key_value_heads": 1},
    "llama, no groups": {"num_key_value_heads": 4},
    "llama, wide heads": {"head_dim": 64},
    "llama, yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                            "original_max_position_embeddings": 32}
    },
    "mistral, window": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def two_threads():
    """Whatever the test run is given: the kernels divide their work among threads."""
    with threads(2):
        yield


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    library = kernels.load(request.param)
    if library is None:
        pytest.skip(f"{request.param} is not there, or not for this CPU")
    monkeypatch.setattr(kernels, "kernels", lambda: library)
    return library


def bfloat16_model(name="llama", **changes):
    """In bfloat16, with norms and biases that are not 1 and 0; and the same in float32."""
    settings = SIZES | {"vocab_size": 65} | CONFIGS[name] | changes
    model = tiny_model(name.split(",")[0], **settings)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.03
    model = model.to(torch.bfloat16)
    exact = tiny_model(name.split(",")[0], **settings)
    exact.load_state_dict(model.state_dict())
    return model, exact


def compiled_pass_of(runner):
    return next((each for each in runner.passes if isinstance(each, CompiledPass)), None)


def is_compiled(runner):
    return compiled_pass_of(runner) is not None


def uncompiled(model):
    """By PyTorch's operators alone."""
    runner = ModelRunner(model, "plain")
    runner._passes = [each for each in runner._passes if not isinstance(each, CompiledPass)]
    return runner


def run(runner, ids, sizes):
    """Logits of passes of so many tokens, after a prefill of the rest."""
    session = Session(runner, runner.new_cache(len(ids) + 8))
    with torch.inference_mode():
        session.prefill(ids[: len(ids) - sum(sizes)].tolist())
        rows = [session.extend(part) for part in ids[len(ids) - sum(sizes) :].split(sizes)]
    return torch.cat(rows), session


def error(logits, expected):
    return (logits.log_softmax(-1) - expected.log_softmax(-1)).pow(2).mean().sqrt().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_is_as_near_to_float32_as_pytorch_is(build, name):
    model, exact = bfloat16_model(name)
    ids = torch.randint(3, 60, (300,), generator=torch.Generator().manual_seed(1))
    sizes = [1, 2, 5, 9, 17, MAX_TOKENS, 1]
    with torch.inference_mode():
        expected = exact(ids[None]).logits[0, -sum(sizes) :]
    plain = uncompiled(model)
    runner = ModelRunner(model, "native")
    assert is_compiled(runner)
    by_pytorch, by_kernels = run(plain, ids, sizes), run(runner, ids, sizes)
    assert error(by_kernels[0], expected) < 1.1 * error(by_pytorch[0], expected)
    assert error(by_pytorch[0], expected) < 0.1 * expected.std()
    for ours, theirs in zip(by_kernels[1].cache.layers, by_pytorch[1].cache.layers, strict=True):
        assert ours.length == theirs.length
        end = ours.length
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(one[:, :, :end], other[:, :, :end], rtol=0.05, atol=0.1)


def test_few_tokens_never_reach_pytorch_and_many_do(build, monkeypatch):
    runner = ModelRunner(bfloat16_model()[0], "model")
    seen = []
    lean = lean_pass.lean_logits
    monkeypatch.setattr(
        lean_pass,
        "lean_logits",
        lambda m, ids, *rest: seen.append(len(ids)) or lean(m, ids, *rest),
    )
    run(runner, torch.arange(60), [1, 2, 3, 4])
    assert seen == [50]
    run(runner, torch.arange(60), [MAX_TOKENS + 1, MAX_TOKENS - 10])
    assert seen == [50, 5, MAX_TOKENS + 1]


@pytest.mark.parametrize("tokens", [70, 33, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_many_tokens_to_a_part_of_the_keys_can_be_merged(build, tokens, causal):
    """As the only other way is PyTorch's operators, which take several times as long."""
    torch.manual_seed(0)
    query = torch.randn(2, 3 * tokens, 32).bfloat16()
    key, value = (torch.randn(2, 1400, 32).bfloat16() for _ in range(2))
    mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1) if causal else None
    arguments = query, key[:, 3:1300], value[:, 3:1300]
    called = []
    serves = kernels.serves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "fast_dtype", lambda dtype: torch.float32)  # as where it is AVX2
        patch.setattr(kernels, "serves", lambda *each: called.append(serves(*each)) or called[-1])
        out, lse = attend_part(*arguments, 0.3, mask, causal)
    assert called == [True]
    exact, expected = sdpa.attend_part(*(x.float() for x in arguments), 0.3, mask, causal)
    torch.testing.assert_close(lse, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out, exact, rtol=2e-2, atol=1e-2)


def tree(runner, ids):
    """Caches of six sequences, in which some begin with what another has, and their tokens."""
    texts = [ids[:200].tolist()]
    caches = [runner.new_cache(300)]
    Session(runner, caches[0]).prefill(texts[0])
    for lender, length, tail in ((0, 200, 3), (0, 150, 60), (2, 180, 1), (0, 200, 0)):
        caches.append(caches[lender].borrow(length, 300))
        texts.append(texts[lender][:length] + ids[210 : 210 + tail].tolist())
        if tail:
            Session(runner, caches[-1]).extend(torch.tensor(texts[-1][length:]))
    texts.append([5, 7, 9])
    caches.append(runner.new_cache(20))
    Session(runner, caches[-1]).extend(torch.tensor(texts[-1]))
    return caches, texts


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("quantized", [False, True])
def test_sequences_that_share_their_beginnings_get_the_logits_of_each_alone(
    build, name, quantized, monkeypatch
):
    model, _ = bfloat16_model(name)
    if quantized:
        model = quantized_copy(model, Int8Blocks)
    runner = ModelRunner(model, "native")
    ids = torch.randint(3, 60, (300,), generator=torch.Generator().manual_seed(1))
    new = [[11], [12, 13, 14], [15, 16], [17], [18, 19, 20, 21], [22, 23]]
    with torch.inference_mode():
        caches, texts = tree(runner, ids)
        expected = []
        for text, own in zip(texts, new, strict=True):
            cache = runner.new_cache(300)
            Session(runner, cache).extend(torch.tensor(text))
            expected.append(Session(runner, cache).extend(torch.tensor(own)))
        monkeypatch.setattr("rapid_llm.engine.lean_pass.joined_logits", None)
        for keep in (1, None):
            parts = [
                Part(torch.tensor(own), cache, keep or len(own))
                for own, cache in zip(new, caches, strict=True)
            ]
            for logits, exact in zip(runner.joined(parts), expected, strict=True):
                exact = exact[-(keep or len(exact)) :]
                torch.testing.assert_close(logits, exact, rtol=0.03, atol=0.06)
            for cache, text in zip(caches, texts, strict=True):
                assert cache.length == len(text) + len(new[caches.index(cache)])
                cache.rollback(len(text))


def test_too_many_tokens_of_several_sequences_go_to_pytorch(build):
    runner = ModelRunner(bfloat16_model()[0], "model")
    compiled = compiled_pass_of(runner)
    caches, _ = tree(runner, torch.randint(3, 60, (300,)))
    for cache in caches:
        cache.allocate()
    ids = torch.full((MAX_JOINED_TOKENS // 6,), 5)
    parts = [Part(ids, cache, 1) for cache in caches[:5]]
    assert compiled.joins(parts)
    rest = torch.full((MAX_JOINED_TOKENS - 5 * len(ids) + 1,), 5)
    caches[5].grow(len(rest) + 3)
    assert compiled.joins([*parts, Part(rest[1:], caches[5], 1)])
    assert not compiled.joins([*parts, Part(rest, caches[5], 1)])


def test_requests_beside_one_another_are_answered_by_the_kernels_drafts_included(
    build, monkeypatch, begins_with
):
    begins_with(4)
    decoder = RapidDecoder(
        bfloat16_model()[0], tiny_tokenizer(), drafter_quantization="int8", kv_cache_dir=None
    )
    compiled, rest = Counter(), []
    joined = CompiledPass.joined

    def by_kernels(self, parts):
        compiled[self is compiled_pass_of(decoder.draft_runner), len(parts)] += 1
        return joined(self, parts)

    def by_pytorch(model, parts):
        rest.append(len(parts))
        return joined_logits(model, parts)

    monkeypatch.setattr(CompiledPass, "joined", by_kernels)
    monkeypatch.setattr(lean_pass, "joined_logits", by_pytorch)
    document = (torch.arange(200) % 60 + 3).tolist()
    requests = [
        GenerationRequest(
            [*document, 5 + i],
            [*document[:40], 5 + i],
            sampling=SamplingParams(max_new_tokens=20, ignore_eos=True),
            speculation=SpeculationConfig(gamma=3),
        )
        for i in range(4)
    ]
    results = decoder.generate_many(requests)
    assert [result.stats.completion_tokens for result in results] == [20] * 4
    assert compiled[True, 4] > 3
    assert compiled[False, 4] > 3
    assert not rest


def test_kernels_of_another_version_are_not_called(monkeypatch):
    monkeypatch.setattr(kernels, "_INTERFACE", 1)
    kernels._opened.cache_clear()
    try:
        for reason in kernels.refusals().values():
            assert reason == "its build is of another version: install again, which compiles it"
        assert not is_compiled(ModelRunner(bfloat16_model()[0], "model"))
    finally:
        kernels._opened.cache_clear()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads_says_the_same(build, count):
    runner = ModelRunner(bfloat16_model()[0], "model")
    ids = torch.randint(3, 60, (150,), generator=torch.Generator().manual_seed(2))
    expected, _ = run(runner, ids, [1, 6])
    with threads(count):
        logits, _ = run(runner, ids, [1, 6])
    assert error(logits, expected) < 0.02 * expected.std()


def test_whichever_thread_takes_a_part_of_the_keys_the_logits_are_the_same(build):
    model, exact = bfloat16_model(max_position_embeddings=4096)
    ids = torch.randint(3, 60, (2500,), generator=torch.Generator().manual_seed(3))
    runner = ModelRunner(model, "model")
    logits, session = run(runner, ids, [5])
    with torch.inference_mode():
        for _ in range(10):
            session.rollback(len(ids) - 5)
            assert torch.equal(session.extend(ids[-5:]), logits)
        expected = exact(ids[None]).logits[0, -5:]
    assert error(logits, expected) < 0.05 * expected.std()


def four_bits(model):
    """The model with weights that a Q4_1 file could have, but for the head."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                groups = module.weight.data.float().unflatten(1, (-1, 32))
                low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
                step = (high - low) / 15
                module.weight.data = (
                    (low + step * ((groups - low) / step).round()).flatten(1).bfloat16()
                )
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen2"])
def test_a_quantized_copy_multiplies_with_its_blocks(build, monkeypatch, name, bits):
    monkeypatch.setattr(blocks, "MAX_QUANTIZED_ROWS", MAX_TOKENS)  # for PyTorch to do the same
    model = bfloat16_model(name, intermediate_size=224)[0]
    quantized = (
        quantized_copy(four_bits(model), Int4Blocks)
        if bits == 4
        else quantized_copy(model, Int8Blocks)
    )
    layers = [m for m in quantized.modules() if isinstance(m, BlockLinear)]
    assert [layer.bits for layer in layers] == [bits] * 7 * len(quantized.model.layers) + [8]
    ids = torch.randint(3, 60, (80,), generator=torch.Generator().manual_seed(3))
    plain = uncompiled(quantized)
    runner, own = ModelRunner(quantized, "quantized"), ModelRunner(model, "model")
    assert is_compiled(runner)
    for sizes in ([1, 2, 8], [3, 4], [5, 6], [MAX_TOKENS]):
        logits, expected = run(runner, ids, sizes)[0], run(plain, ids, sizes)[0]
        assert error(logits, expected) < 0.03 * expected.std()
        assert error(logits, run(own, ids, sizes)[0]) < 0.05 * expected.std()
        for layer in layers:
            layer.blocks[..., 64:] ^= 255  # it is these that are read
        assert error(run(runner, ids, sizes)[0], expected) > 0.3 * expected.std()
        for layer in layers:
            layer.blocks[..., 64:] ^= 255


def test_what_is_done_to_the_weights_is_followed(build):
    model, _ = bfloat16_model()
    runner = ModelRunner(model, "model")
    ids = torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(4))
    first, _ = run(runner, ids, [2])
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # in place
    second, _ = run(runner, ids, [2])
    torch.testing.assert_close(second, first * 0.5)
    model.lm_head.weight.data = model.lm_head.weight.data * 2  # elsewhere in memory
    third, _ = run(runner, ids, [2])
    torch.testing.assert_close(third, first)
    head = torch.nn.Linear(64, 65, bias=False, dtype=torch.bfloat16)
    model.lm_head = head
    fourth, _ = run(runner, ids, [2])
    assert is_compiled(runner)
    assert not torch.allclose(fourth, first, atol=0.1)
    model.float()
    fifth, _ = run(runner, ids, [2])
    assert not is_compiled(runner)
    torch.testing.assert_close(fifth, fourth, rtol=0.05, atol=0.1)


def test_what_the_kernels_do_not_take_runs_without_them(build):
    for changes in ({"head_dim": 16}, {"intermediate_size": 72}):
        model, exact = bfloat16_model(**changes)
        runner = ModelRunner(model, "model")
        assert not is_compiled(runner)
        ids = torch.arange(3, 50)
        with torch.inference_mode():
            expected = exact(ids[None]).logits[0, -3:]
        assert error(run(runner, ids, [3])[0], expected) < 0.2
    assert not is_compiled(ModelRunner(bfloat16_model()[1], "float32"))
    assert not is_compiled(
        ModelRunner(quantized_copy(bfloat16_model()[0], Int8Linear), "PyTorch's int8")
    )


def odd_rotary(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:8]


def odd_epsilon(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 0.1


def odd_scaling(model):
    model.model.layers[1].self_attn.scaling *= 2


def odd_strides(model):
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()


@pytest.mark.parametrize("change", [odd_epsilon, odd_scaling, odd_strides])
def test_what_the_tables_cannot_say_runs_without_them(build, change):
    model, exact = bfloat16_model()
    runner = ModelRunner(model, "model")
    assert is_compiled(runner)
    for each in (model, exact):
        change(each)
    assert not is_compiled(runner)
    ids = torch.arange(3, 50)
    with torch.inference_mode():
        expected = exact(ids[None]).logits[0, -3:]
    assert error(run(runner, ids, [3])[0], expected) < 0.2


def test_a_rotary_embedding_that_is_too_narrow_is_an_error(build):
    model, _ = bfloat16_model()
    odd_rotary(model)
    runner = ModelRunner(model, "model")
    with pytest.raises((ModelError, RuntimeError)):
        run(runner, torch.arange(3, 50), [3])


def test_a_cache_of_another_kind_is_not_touched_by_the_kernels(build):
    runner = ModelRunner(bfloat16_model()[0], "model")
    ids = torch.arange(3, 33)
    expected, _ = run(runner, ids, [4])
    for change in (torch.Tensor.float, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)):
        cache = runner.new_cache(64)
        with torch.inference_mode():
            runner(ids[:-4], cache, 1)
            for layer in cache.layers:
                layer.keys, layer.values = change(layer.keys), change(layer.values)
            assert is_compiled(runner)
            assert not compiled_pass_of(runner).serves(ids[-4:], cache, 4)
    cache = runner.new_cache(64)
    with torch.inference_mode():
        runner(ids[:-4], cache, 1)
        assert compiled_pass_of(runner).serves(ids[-4:], cache, 4)
        assert not compiled_pass_of(runner).serves(ids[-4:].int(), cache, 4)
        assert not compiled_pass_of(runner).serves(ids[-4:], cache, 5)
        assert not compiled_pass_of(runner).serves(ids[:0], cache, 0)
        torch.testing.assert_close(runner(ids[-4:], cache, 4), expected)


def test_a_quantized_copy_with_a_whole_layer_runs_without_the_kernels(build):
    quantized = quantized_copy(bfloat16_model(intermediate_size=80)[0], Int8Blocks)
    assert not is_compiled(ModelRunner(quantized, "quantized"))
    assert run(ModelRunner(quantized, "quantized"), torch.arange(3, 50), [3])[0].isfinite().all()


def test_attention_of_other_tensors_is_not_for_the_kernels(build):
    query, key = torch.randn(4, 64, 64).bfloat16(), torch.randn(2, 80, 64).bfloat16()
    for wrong in (
        (query[:3], key, key),  # 3 heads over 2
        (query, key.float(), key.float()),
        (query, key[..., :32].contiguous(), key[..., :32].contiguous()),
        (query, key[:, :60], key[:, :60]),  # fewer keys than queries
        (query.as_subclass(Loud), key, key),
    ):
        assert not kernels.serves(*wrong)


class Loud(torch.Tensor):
    pass


def test_an_error_is_that_of_pytorch_and_leaves_the_cache_as_it_was(build):
    runner = ModelRunner(bfloat16_model()[0], "model")
    session = Session(runner, runner.new_cache(12))
    with torch.inference_mode():
        session.prefill(list(range(3, 13)))
        for wrong in ([65], [-1], [3, 4, 5]):  # no such token, twice; no room
            with pytest.raises((IndexError, RuntimeError)):
                session.extend(torch.tensor(wrong))
            assert session.length == 10
        assert session.extend(torch.tensor([3, 4])).isfinite().all()


def test_a_nan_is_not_hidden(build):
    model, _ = bfloat16_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    assert run(ModelRunner(model, "model"), torch.arange(3, 40), [2])[0].isnan().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wrong", ["nan", "inf"])
def test_products_of_few_bits_do_not_hide_a_nan(build, wrong, bits):
    model = bfloat16_model()[0]
    quantized = (
        quantized_copy(model, Int8Blocks)
        if bits == 8
        else quantized_copy(four_bits(model), Int4Blocks)
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = float(wrong)
    runner = ModelRunner(quantized, "quantized")
    assert is_compiled(runner)
    logits, _ = run(runner, torch.tensor([7, 8, 3, 4]), [1, 1, 1])
    assert logits[0].isfinite().all()
    assert logits[1:].isnan().all()


def test_whole_numbers_keep_what_bfloat16_does_beside_an_outlier(build):
    model, _ = bfloat16_model(intermediate_size=1056, hidden_size=608)
    with torch.no_grad():  # one activation is a thousand times as large as the others
        model.model.layers[0].mlp.up_proj.weight[700] *= 1000
        model.model.layers[0].mlp.down_proj.weight[:, 700] /= 1000
    quantized = quantized_copy(model, Int8Blocks)
    ids = torch.randint(3, 60, (60,), generator=torch.Generator().manual_seed(5))
    plain = uncompiled(quantized)
    expected = run(plain, ids, [1, 3, 8])[0]
    logits = run(ModelRunner(quantized, "quantized"), ids, [1, 3, 8])[0]
    assert error(logits, expected) < 0.05 * expected.std()


def test_the_environment_can_leave_the_work_to_pytorch(monkeypatch):
    monkeypatch.setenv("RAPID_LLM_NATIVE", "0")
    assert not is_compiled(ModelRunner(bfloat16_model()[0], "model"))


@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4)], ids=str)
@pytest.mark.parametrize(("n", "length"), [(33, 33), (64, 64), (65, 500), (200, 261)])
def test_attention_of_many_queries_is_close_to_double_precision(build, n, length, heads, window):
    torch.manual_seed(0)
    heads, kv_heads = heads
    query = torch.randn(heads, n, 64).bfloat16()
    key, value = torch.randn(2, kv_heads, 600, 64).bfloat16()[:, :, :length]
    expected = attend(query.double(), key.double(), value.double(), 0.125, window)
    out = kernels.attend(query, key, value, 0.125, window)
    assert out.dtype == torch.bfloat16
    difference = (out.double() - expected).norm() / expected.norm()
    assert difference < 0.006


def test_attention_is_compiled_where_that_is_faster(monkeypatch):
    if kernels.load(BUILDS[0]) is None and fast_dtype(torch.bfloat16) == torch.bfloat16:
        pytest.skip("PyTorch multiplies bfloat16 as fast as the kernels that this CPU has")
    calls = []
    monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(args) or args[0])
    query, key = torch.randn(4, 64, 64).bfloat16(), torch.randn(2, 80, 64).bfloat16()
    attend(query, key, key, 0.125)
    assert len(calls) == 1
    attend(query.float(), key.float(), key.float(), 0.125)
    attend(query[:, :5], key, key, 0.125)
    attend(query[..., :48], key[..., :48], key[..., :48], 0.125)
    assert len(calls) == 1
