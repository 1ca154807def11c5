"""Every supported architecture against its own forward pass; the cache; what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    MambaConfig,
)

from rapid_llm.engine.kv_cache import cache_argument
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.engine.supported import ATTENTION, SUPPORTED
from rapid_llm.errors import ModelError

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

# What transformers is about to remove is not called.
pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")


def run_as_decoder(runner: ModelRunner, ids: torch.Tensor) -> torch.Tensor:
    """Chunked prefill, one token, a rejected draft, a verification, a chunk: logits from 40 on."""
    session = Session(runner, runner.new_cache(len(ids)))
    with torch.inference_mode():
        session.prefill(ids[:40].tolist())
        first = session.extend(ids[40:41])
        session.extend((ids[41:48] + 1) % 60)
        session.rollback(41)
        second = session.extend(ids[41:52])
        third = session.extend(ids[52:])
    return torch.cat([first, second, third])


def test_models_get_the_cache_by_the_name_that_they_have_for_it():
    def before(input_ids, past_key_values=None, **kwargs): ...

    def since(input_ids, cache=None, **kwargs): ...

    def wrapper(*args, **kwargs): ...

    model = tiny_model()
    assert cache_argument(before) == "past_key_values"
    assert cache_argument(since) == "cache"
    assert (
        cache_argument(wrapper) == cache_argument(model.generate) == cache_argument(model.forward)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("implementation", [a for a in ATTENTION if a != "flash_attention_2"])
def test_logits_equal_the_models_own_forward(architecture, implementation, monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 16)
    model = tiny_model(architecture)
    ids = torch.randint(3, 64, (60,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0, 40:]
    logits = run_as_decoder(ModelRunner(model, architecture, implementation), ids)
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_multimodal_gemma3_runs_its_text_model(monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 16)
    text = tiny_model("gemma3_text").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 64, (60,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0, 40:]
    logits = run_as_decoder(ModelRunner(model, "gemma3"), ids)
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_every_supported_type_is_compared():
    compared = {name.split("-")[0] for name in ARCHITECTURES} | {"gemma3"}
    assert compared == SUPPORTED


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64),
        MambaConfig(num_hidden_layers=1, hidden_size=16, state_size=4, vocab_size=64),
        Gemma2Config(
            num_hidden_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            head_dim=8,
            num_key_value_heads=1,
            intermediate_size=16,
            vocab_size=64,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_are_refused_by_name(config):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=f"'{config.model_type}'.*not supported.*llama"):
        ModelRunner(model, "some-model")


def test_bidirectional_gemma_is_refused():
    model = tiny_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="both directions"):
        ModelRunner(model, "some-model")


def test_the_lean_pass_is_for_plain_models_of_the_family_only():
    for architecture in ARCHITECTURES:
        family = architecture.split("-")[0] in {"llama", "mistral", "qwen2", "qwen3"}
        model = tiny_model(architecture)
        assert ModelRunner(model, "x").lean == family
        assert not ModelRunner(model, "x", "sdpa").lean
    hooked = tiny_model()
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not ModelRunner(hooked, "x").lean
    adapted = tiny_model()
    adapted.lm_head = torch.nn.Sequential(adapted.lm_head)
    adapted.model.layers[1].mlp.up_proj = type("Adapter", (torch.nn.Linear,), {})(32, 48)
    assert not ModelRunner(adapted, "x").lean
    assert not ModelRunner(tiny_model(hidden_act="gelu"), "x").lean


@pytest.mark.parametrize("changes", [
    {"attention_bias": True, "mlp_bias": True},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                         "original_max_position_embeddings": 32}},
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0,
                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32}},
    {"tie_word_embeddings": True}, {"head_dim": 16}, {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
], ids=str)  # fmt: skip
def test_the_lean_pass_follows_the_config(changes):
    model = tiny_model("llama", **changes)
    for parameter in model.parameters():  # biases and norms are 0 and 1 in a new model
        parameter.data += torch.randn_like(parameter) * 0.05
    ids = torch.randint(3, 64, (60,))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0, 40:]
    runner = ModelRunner(model, "x")
    assert runner.lean
    torch.testing.assert_close(run_as_decoder(runner, ids), expected, **TOLERANCE)


def test_unknown_attention_is_refused():
    with pytest.raises(ModelError, match=r"'fast' is unknown.*rapid, sdpa"):
        ModelRunner(tiny_model(), "some-model", "fast")


def test_the_callers_model_is_left_as_it_was():
    model = tiny_model("gemma3_text")
    before = model.config._attn_implementation
    ids = torch.randint(3, 64, (60,))
    run_as_decoder(ModelRunner(model, "x"), ids)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_failed_pass_leaves_the_cache_as_it_was(architecture, monkeypatch):
    model = tiny_model(architecture)
    runner = ModelRunner(model, "x")
    session = Session(runner, runner.new_cache(20))
    ids = torch.arange(3, 13)
    with torch.inference_mode():
        session.prefill(ids[:5].tolist())
        with monkeypatch.context() as broken:
            broken.setattr(session.cache.layers[1], "update", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session.extend(ids[5:])
        assert session.length == 5
        assert model.config._attn_implementation != "rapid"
        expected = model(ids[None]).logits[0, 5:]
        torch.testing.assert_close(session.extend(ids[5:]), expected, **TOLERANCE)


def test_cache_is_allocated_once_and_its_bytes_follow_the_formula():
    model = tiny_model("gemma3_text")  # a sliding layer keeps the whole sequence too
    runner = ModelRunner(model, "x")
    session = Session(runner, runner.new_cache(300))
    with torch.inference_mode():
        session.prefill(list(range(3, 60)))
        layer = session.cache.layers[0]
        storage = layer.keys.data_ptr()
        for step in range(50):
            keys, _ = layer.keys, session.extend(torch.tensor([step]))
            assert layer.keys is keys
        session.rollback(10)
        session.extend(torch.tensor([4, 5, 6]))
    assert layer.keys.data_ptr() == storage
    assert session.length == 13
    layers, kv_heads, dim, float32 = 2, 2, 8, 4
    assert session.cache.nbytes == layers * 2 * kv_heads * dim * 300 * float32


def test_context_window_counts_yarn():
    plain = ModelRunner(tiny_model(), "x")
    assert plain.context_window == 512
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
            "rope_theta": 10000.0}  # fmt: skip
    assert ModelRunner(tiny_model(rope_parameters=yarn), "x").context_window == 2048


def test_prefill_reports_progress_after_every_pass(monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)
    runner = ModelRunner(tiny_model(), "x")
    session = Session(runner, runner.new_cache(40))
    seen: list[tuple[int, int]] = []
    with torch.inference_mode():
        session.prefill([5] * 25, lambda *tokens: seen.append(tokens))
        assert seen == [(0, 25), (10, 25), (20, 25), (25, 25)]
        seen.clear()
        session.rollback(20)
        session.prefill([5] * 38, lambda *tokens: seen.append(tokens))  # what was read is not again
        assert seen == [(20, 38), (30, 38), (38, 38)]
        seen.clear()
        session.rollback(30)
        monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_pieces", (5, 2))
        session.prefill([5] * 38, lambda *tokens: seen.append(tokens))
        assert seen == [(30, 38), (35, 38), (37, 38), (38, 38)]
