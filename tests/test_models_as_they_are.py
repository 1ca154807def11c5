"""What users do to a model before and after a decoder is built around it: the logits follow."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from conftest import ARCHITECTURES, installed, tiny_model, tiny_tokenizer, transformers_greedy
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.llama import modeling_llama
from transformers.utils import check_peft_version

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.cpu.blocks import Int8Blocks
from rapid_llm.engine.cpu.int8 import Int8Linear
from rapid_llm.engine.cpu.quantizers import quantized_copy
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.model_state import ModelState
from rapid_llm.engine.prefix_cache.fingerprint import fingerprint, mixed
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError, ModelError, OutdatedKVError

IDS = torch.randint(3, 64, (60,), generator=torch.Generator().manual_seed(1))
PROMPT = torch.randint(3, 64, (200,), generator=torch.Generator().manual_seed(2)).tolist()
LONG = torch.randint(3, 64, (1500,), generator=torch.Generator().manual_seed(3)).tolist()
NEW = 12
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "initializer_range": 0.1}


def model(**changes):
    return tiny_model(eos_token_id=None, **{"max_position_embeddings": 4096} | changes)


def lora(**changes):
    usual = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    return LoraConfig(init_lora_weights=False, **usual | changes)


def two_adapters():
    """A model that answers as adapter ``a`` says, and has ``b``."""
    torch.manual_seed(3)
    tuned = get_peft_model(model(), lora(), adapter_name="a")
    tuned.add_adapter("b", lora())
    tuned.set_adapter("a")
    return tuned.eval()


def as_decoder(runner):
    """Logits from token 40 on: a prefill in chunks, a draft that is taken back, two passes."""
    session = Session(runner, runner.new_cache(len(IDS)))
    with torch.inference_mode():
        session.prefill(IDS[:40].tolist())
        session.extend((IDS[40:46] + 1) % 60)
        session.rollback(40)
        return torch.cat([session.extend(IDS[40:41]), session.extend(IDS[41:52], 11),
                          session.extend(IDS[52:])])  # fmt: skip


def own(a_model):
    with torch.inference_mode():
        return a_model.eval()(IDS[None]).logits[0, 40:].float()


CHUNK = 16


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", CHUNK)
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_pieces", (8, 4))


@pytest.fixture
def adapters_of_transformers():
    """transformers has methods for adapters, which may ask for a newer PEFT than there is."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers says: {error}")


def reusable(prompt):
    """Tokens of a prompt whose KV serves it again: all but the last."""
    return len(prompt) - 1


# --- what is done to a model --------------------------------------------------------------------


def add(config):
    def change(a_model):
        inject_adapter_in_model(config, a_model)
        with torch.no_grad():  # some adapters begin as nothing
            for name, parameter in a_model.named_parameters():
                if "default" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)

    return change


def wrapped(config):
    return lambda a_model: get_peft_model(a_model, config)


def layer(a_model):
    return a_model.model.layers[0]


PLACES = {
    "model": lambda m: m,
    "body": lambda m: m.model,
    "embedding": lambda m: m.model.embed_tokens,
    "rotary embedding": lambda m: m.model.rotary_emb,
    "layer": layer,
    "attention": lambda m: layer(m).self_attn,
    "query": lambda m: layer(m).self_attn.q_proj,
    "mlp": lambda m: layer(m).mlp,
    "activation": lambda m: layer(m).mlp.act_fn,
    "norm": lambda m: layer(m).input_layernorm,
    "head": lambda m: m.lm_head,
}


def enlarged(module, args, output):
    if isinstance(output, torch.Tensor):
        return output * 1.5 + 0.1
    if isinstance(output, tuple):
        return (output[0] * 1.5, *output[1:])
    name = "logits" if hasattr(output, "logits") else "last_hidden_state"
    setattr(output, name, getattr(output, name) * 1.5)
    return output


def hook(place):
    def change(a_model):
        PLACES[place](a_model).register_forward_hook(enlarged)

    return change


def hook_before(place):
    def larger(module, args, options):
        def each(x):
            return x * 1.5 + 0.1 if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        return tuple(map(each, args)), {name: each(x) for name, x in options.items()}

    def change(a_model):
        PLACES[place](a_model).register_forward_pre_hook(larger, with_kwargs=True)

    return change


def method_replaced(place):
    def change(a_model):
        module = PLACES[place](a_model)
        before = module.forward
        module.forward = lambda *args, **options: enlarged(module, args, before(*args, **options))

    return change


def subclass(place):
    def change(a_model):
        module = PLACES[place](a_model)
        kind = type(module)

        def forward(self, *args, **options):
            return enlarged(self, args, kind.forward(self, *args, **options))

        module.__class__ = type(kind.__name__, (kind,), {"forward": forward})

    return change


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


class TwiceAsLinear(nn.Linear):
    """As the layers that quantization libraries put in."""

    def forward(self, x):
        return super().forward(x) * 2


class OwnParameter(nn.Parameter):
    pass


class LoudTensor(torch.Tensor):
    """A tensor that computes something of its own, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args = [a.as_subclass(torch.Tensor) if isinstance(a, LoudTensor) else a for a in args]
        output = function(*args, **kwargs or {})
        return output * 2 if function is nn.functional.linear else output


def parametrized(place):
    def change(a_model):
        parametrize.register_parametrization(PLACES[place](a_model), "weight", Twice())

    return change


def weight_norm(a_model):
    query = parametrizations.weight_norm(PLACES["query"](a_model))
    query.parametrizations.weight.original0.data *= 2


def tensor_subclass(a_model):
    query = PLACES["query"](a_model)
    weight = query.weight.detach().as_subclass(LoudTensor)
    del query._parameters["weight"]
    query.weight = weight


def parameter_subclass(a_model):
    query = PLACES["query"](a_model)
    query.weight = OwnParameter(query.weight.data * 2)


def linear_subclass(a_model):
    before = PLACES["query"](a_model)
    after = TwiceAsLinear(before.in_features, before.out_features, bias=False)
    after.weight = before.weight
    layer(a_model).self_attn.q_proj = after


def another_norm(a_model):
    size, dtype = a_model.config.hidden_size, a_model.dtype
    layer(a_model).input_layernorm = nn.LayerNorm(size, dtype=dtype)


def another_activation(a_model):
    layer(a_model).mlp.act_fn = nn.ReLU()


def head_with_bias(a_model):
    weight = a_model.lm_head.weight
    a_model.lm_head = nn.Linear(*weight.T.shape, bias=True, dtype=weight.dtype)


def wider_head(a_model):
    size = a_model.config.hidden_size
    a_model.lm_head = nn.Linear(size, 80, bias=False, dtype=a_model.dtype)


def one_layer_more(a_model):
    copied = copy.deepcopy(a_model.model.layers[-1])  # with a config of its own
    copied.self_attn.layer_idx = len(a_model.model.layers)
    a_model.model.layers.append(copied)
    a_model.config.num_hidden_layers += 1


def epsilon(a_model):
    layer(a_model).input_layernorm.variance_epsilon = 5.0


def scaling(a_model):
    layer(a_model).self_attn.scaling *= 3


def written_in_place(a_model):
    with torch.no_grad():
        PLACES["query"](a_model).weight.mul_(-2)


def written_through_data(a_model):
    PLACES["query"](a_model).weight.data.mul_(-2)


def data_exchanged(a_model):
    query = PLACES["query"](a_model)
    query.weight.data = query.weight.data * -2


def columns_first(a_model):
    for parameter in a_model.parameters():
        if parameter.ndim == 2:
            parameter.data = (parameter.data * 1.1).t().contiguous().t()


def state_loaded(assign):
    def change(a_model):
        a_model.load_state_dict(
            {name: tensor * 0.5 for name, tensor in a_model.state_dict().items()}, assign=assign
        )

    return change


def frequencies(a_model):
    a_model.model.rotary_emb.inv_freq.mul_(0.5)


def other_head_dtype(a_model):
    a_model.lm_head.to(torch.float64)
    a_model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].double() * 2,))


CHANGES = {
    "LoRA": add(lora()),
    "LoRA on every linear layer": add(lora(target_modules="all-linear", lora_alpha=4)),
    "LoRA on the head": add(lora(target_modules=["lm_head"])),
    "LoRA on the embedding": add(lora(target_modules=["embed_tokens"])),
    "LoRA with dropout": add(lora(lora_dropout=0.5)),
    "rank-stabilized LoRA": add(lora(use_rslora=True)),
    "DoRA": add(lora(use_dora=True)),
    "LoRA and a head to save": add(lora(modules_to_save=["lm_head"])),
    "LoRA and an embedding to save": add(lora(modules_to_save=["embed_tokens"])),
    "LoRA and attention to save": add(
        lora(target_modules=["up_proj"], modules_to_save=["self_attn"])
    ),
    "trained tokens": add(lora(trainable_token_indices=[5, 9, 31])),
    "IA3": add(IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])),
    "LoHa": add(LoHaConfig(r=4, target_modules=["q_proj"])),
    "PeftModel": wrapped(lora()),
    "PeftModel for causal LM": wrapped(lora(task_type="CAUSAL_LM")),
    "PeftModel, VeRA": wrapped(VeraConfig(r=4, target_modules=["q_proj"], init_weights=False)),
    "PeftModel, merged": lambda m: (p := get_peft_model(m, lora()), p.merge_adapter())[0],
    "PeftModel, merged and unloaded": lambda m: get_peft_model(m, lora()).merge_and_unload(),
    **{f"hook after the {place}": hook(place) for place in PLACES},
    **{f"hook before the {place}": hook_before(place) for place in ("layer", "mlp", "head")},
    **{f"method replaced: {place}": method_replaced(place) for place in PLACES},
    **{f"subclass: {place}": subclass(place) for place in PLACES},
    **{f"parametrized {place}": parametrized(place) for place in ("embedding", "query", "head")},
    "weight norm": weight_norm,
    "tensor subclass": tensor_subclass,
    "parameter subclass": parameter_subclass,
    "linear subclass": linear_subclass,
    "another norm": another_norm,
    "another activation": another_activation,
    "a head with a bias": head_with_bias,
    "a wider head": wider_head,
    "one layer more": one_layer_more,
    "one norm's epsilon": epsilon,
    "one attention's scaling": scaling,
    "more embeddings": lambda m: m.resize_token_embeddings(96, mean_resizing=False) and None,
    "weights written in place": written_in_place,
    "weights written through .data": written_through_data,
    "weights exchanged through .data": data_exchanged,
    "weights in columns": columns_first,
    "a state loaded": state_loaded(assign=False),
    "a state assigned": state_loaded(assign=True),
    "rotary frequencies": frequencies,
    "a head of another dtype": other_head_dtype,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("dtype", "when"),
    [(torch.float32, "before"), (torch.float32, "after"), (torch.bfloat16, "after")],
)
def test_logits_are_those_of_the_changed_model(change, dtype, when):
    changed = tiny_model(**WIDE if dtype == torch.bfloat16 else {}).to(dtype)
    before = own(changed)
    runner = ModelRunner(changed, "x")
    if when == "after":
        as_decoder(runner)
    torch.manual_seed(1)
    replaced = CHANGES[change](changed)
    if replaced is not None or when == "before":
        changed = changed if replaced is None else replaced
        runner = ModelRunner(changed, "x")
    ours, expected = as_decoder(runner), own(changed)
    assert expected.shape != before.shape or (expected - before).norm() > 0.02 * before.norm()
    assert ours.shape == expected.shape
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    assert (ours - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", ["forward", "apply_rotary_pos_emb"])
def test_what_is_replaced_in_the_library_counts(monkeypatch, name):
    changed = tiny_model()
    runner = ModelRunner(changed, "x")
    before = as_decoder(runner)
    if name == "forward":
        original = modeling_llama.LlamaMLP.forward
        monkeypatch.setattr(
            modeling_llama.LlamaMLP, "forward", lambda self, x: original(self, x) * 1.5
        )
    else:
        monkeypatch.setattr(modeling_llama, name, lambda query, key, *_, **__: (query, key))
    assert not runner.lean
    after = as_decoder(runner)
    assert not torch.allclose(after, before, atol=0.1)
    torch.testing.assert_close(after, own(changed), rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    assert runner.lean
    torch.testing.assert_close(as_decoder(runner), before)


def test_a_hook_on_all_modules_counts():
    changed = tiny_model()
    runner = ModelRunner(changed, "x")
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 1.2 if isinstance(module, nn.Linear) else None
    )
    try:
        torch.testing.assert_close(as_decoder(runner), own(changed), rtol=1e-4, atol=1e-4)
    finally:
        hook.remove()
    torch.testing.assert_close(as_decoder(runner), own(changed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_torchao_quantized_are_used(dtype, when):
    quantization = installed("torchao.quantization")
    changed = tiny_model(**WIDE).to(dtype)
    runner = ModelRunner(changed, "x")
    if when == "after":
        as_decoder(runner)
    quantization.quantize_(changed, quantization.Int8WeightOnlyConfig())
    if when == "before":
        runner = ModelRunner(changed, "x")
    assert not runner.lean
    expected = own(changed)
    assert (as_decoder(runner) - expected).norm() < 0.05 * expected.norm()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    result = decoder.generate(PROMPT[:40], PROMPT[4:40], sampling=GREEDY)
    assert len(result.token_ids) == NEW


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_nobody_touched_is_plain_and_stays_the_same(architecture):
    untouched = tiny_model(architecture)
    runner = ModelRunner(untouched, "x")
    number = runner.state.number
    assert runner.state.plain
    as_decoder(runner)
    own(untouched)
    assert runner.state.take_samples() == number


def test_what_a_module_keeps_of_each_pass_is_no_change():
    changed = tiny_model()

    def count(module, args, output):
        module.calls = getattr(module, "calls", 0) + 1
        module.last = output

    layer(changed).mlp.register_forward_hook(count)
    runner = ModelRunner(changed, "x")
    torch.testing.assert_close(as_decoder(runner), own(changed), rtol=1e-4, atol=1e-4)
    # 3 chunks, the draft, and 3 passes: nothing was read again. Then the model's own.
    assert layer(changed).mlp.calls == 7 + 1


def test_a_model_is_freed_with_its_decoder():
    changed = model().bfloat16()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    decoder.generate(PROMPT[:20], PROMPT[:10], sampling=GREEDY)
    freed = weakref.ref(changed)
    del changed, decoder
    gc.collect()
    assert freed() is None


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_are_refused_by_name(kind):
    tuned = get_peft_model(model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ModelError, match=r"some-model.*'default' \(P.*_TUNING\).*LoRA"):
        RapidDecoder(tuned, tiny_tokenizer(), name="some-model")
    with tuned.disable_adapter():
        decoder = RapidDecoder(tuned, tiny_tokenizer(), name="some-model")
        expected = transformers_greedy(model(), PROMPT, NEW)
        assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == expected
    with pytest.raises(ModelError, match=r"some-model.*not supported"):
        decoder.generate(PROMPT, sampling=GREEDY)
    with tuned.disable_adapter():
        assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == expected


def test_an_adapter_that_a_word_switches_on_is_refused_by_name():
    base = model()
    tuned = get_peft_model(base, lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9]))
    for adapted in (tuned, base):
        with pytest.raises(ModelError, match=r"'default' \(LORA\).*not supported"):
            RapidDecoder(adapted, tiny_tokenizer())


def test_layers_that_do_not_match_the_config_are_refused_by_name():
    cut = tiny_model()
    decoder = RapidDecoder(cut, tiny_tokenizer(), name="some-model")
    cut.model.layers = cut.model.layers[:1]
    with pytest.raises(ModelError, match=r"some-model.*\[0\].*2 layers.*num_hidden_layers"):
        decoder.generate(PROMPT, sampling=GREEDY)
    cut.config.num_hidden_layers = 1
    expected = transformers_greedy(cut, PROMPT, NEW)
    assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == expected


# --- kept KV ------------------------------------------------------------------------------------


def answers(decoder, changed, prompt=PROMPT):
    """Tokens that were not read again, once the answer is the model's own."""
    result = decoder.generate(prompt, sampling=GREEDY)
    assert result.token_ids == transformers_greedy(changed, prompt, NEW)
    return result.stats.cached_tokens


def test_each_adapter_has_kv_of_its_own():
    tuned = two_adapters()
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    kept = reusable(PROMPT)
    assert answers(decoder, tuned) == 0
    tuned.set_adapter("b")
    assert answers(decoder, tuned) == 0
    tuned.set_adapter("a")
    assert answers(decoder, tuned) == kept
    with tuned.disable_adapter():
        assert answers(decoder, tuned) == 0
    assert answers(decoder, tuned) == kept
    tuned.merge_adapter()
    assert answers(decoder, tuned) == 0
    tuned.unmerge_adapter()
    answers(decoder, tuned)
    tuned.set_adapter("b")
    for module in tuned.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("b", 3.0)
    assert answers(decoder, tuned) == 0
    decoder.keep_only(PROMPT)
    assert answers(decoder, tuned) == kept
    tuned.delete_adapter("b")
    answers(decoder, tuned)


def test_adapters_of_transformers_own_are_told_apart(adapters_of_transformers):
    tuned = model()
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    answers(decoder, tuned)
    for name in ("a", "b"):
        tuned.add_adapter(lora(), name)
        assert answers(decoder, tuned) == 0
    for active in ("a", ["a", "b"]):
        tuned.set_adapter(active)
        answers(decoder, tuned)
    tuned.disable_adapters()
    assert answers(decoder, tuned) == 0


@pytest.mark.parametrize(
    "edit",
    [
        written_in_place,
        written_through_data,
        data_exchanged,
        lambda m: PLACES["query"](m).weight.detach().numpy().__imul__(-2),
        state_loaded(assign=False),
        state_loaded(assign=True),
        frequencies,
        epsilon,
        scaling,
        another_norm,
    ],
)
def test_kv_of_other_weights_is_not_taken(edit):
    changed = model()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    assert answers(decoder, changed) == 0
    assert answers(decoder, changed) == reusable(PROMPT)
    edit(changed)
    assert answers(decoder, changed) == 0
    assert answers(decoder, changed) == reusable(PROMPT)


def test_nothing_is_kept_of_a_model_with_somebodys_code_in_it():
    changed, factor = model(), [1.5]
    handle = layer(changed).mlp.register_forward_hook(lambda module, args, out: out * factor[0])
    decoder = RapidDecoder(changed, tiny_tokenizer())
    answers(decoder, changed)
    factor[0] = -1.0
    assert answers(decoder, changed) == 0
    assert decoder.memory.kept_kv == 0
    handle.remove()
    assert answers(decoder, changed) == 0
    assert answers(decoder, changed) == reusable(PROMPT)


def test_nothing_is_kept_of_a_model_with_somebodys_class_in_it():
    """Its code may read what no module holds."""
    changed, factor = model(), [1.5]

    class Steered(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * factor[0]

    layer(changed).mlp = Steered(layer(changed).mlp)
    decoder = RapidDecoder(changed, tiny_tokenizer())
    answers(decoder, changed)
    factor[0] = -1.0
    assert answers(decoder, changed) == 0
    assert decoder.memory.kept_kv == 0


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_an_adapter_of_parameters_answers_and_its_kv_is_kept(architecture):
    """PEFT parametrizes them for each pass, which counts as an edit; others still do."""
    named = {"llama": "mlp.down_proj.weight", "mixtral": "mlp.experts.down_proj"}[architecture]
    base = tiny_model(architecture, max_position_embeddings=4096)
    tuned = get_peft_model(base, lora(target_modules=[], target_parameters=[named])).eval()
    assert any(type(module).__name__ == "ParamWrapper" for module in tuned.modules())
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    answers(decoder, tuned)
    for kept in (0, reusable(PROMPT)):  # the model's own passes, for the comparison, count
        assert decoder.generate(PROMPT, sampling=GREEDY).stats.cached_tokens == kept
    with torch.no_grad():
        next(p for name, p in tuned.named_parameters() if "down_proj" in name).mul_(1.5)
    assert answers(decoder, tuned) == 0


def test_a_decoder_of_the_base_follows_what_peft_does_to_it():
    base = model()
    plain, decoder = transformers_greedy(base, PROMPT, NEW), RapidDecoder(base, tiny_tokenizer())
    tuned = get_peft_model(base, lora()).eval()
    adapted = transformers_greedy(tuned, PROMPT, NEW)
    assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == adapted != plain
    assert tuned.unload() is base
    assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == plain
    assert decoder.target.lean


def test_an_adapter_chosen_during_an_answer_reads_it_all_again():
    tuned = two_adapters()
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    stream = decoder.stream(PROMPT, sampling=GREEDY)
    said = list(next(stream).token_ids)
    tuned.set_adapter("b")
    rest = [token for chunk in stream for token in chunk.token_ids]
    assert rest == transformers_greedy(tuned, PROMPT + said, NEW - len(said))
    assert answers(decoder, tuned) == reusable(PROMPT)
    tuned.set_adapter("a")
    assert answers(decoder, tuned) == 0


def test_kv_that_cannot_be_read_again_is_refused():
    changed = tiny_model()
    runner = ModelRunner(changed, "some-model")
    cache = runner.new_cache(60)
    with torch.inference_mode():
        runner(IDS[:20], cache, 1)
        written_in_place(changed)
        with pytest.raises(OutdatedKVError, match=r"some-model has changed.*20 tokens"):
            runner(IDS[20:], cache, 1)
        assert cache.length == 20


def on_disk(folder, changed):
    return RapidDecoder(changed, tiny_tokenizer(), kv_cache_bytes=0, kv_cache_dir=folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.model.embed_tokens.weight.data[40, 7:8].add_(1),
        lambda m: m.model.norm.weight.data[3:4].mul_(2),
        lambda m: m.lm_head.weight.data[LONG[3], 0:1].add_(1e-3),
        frequencies,
        scaling,
        another_norm,
        linear_subclass,
        parameter_subclass,
        hook("mlp"),
        method_replaced("mlp"),
        add(lora()),
    ],
)
def test_a_file_belongs_to_the_model_that_wrote_it(tmp_path, edit):
    answers(on_disk(tmp_path, model()), model(), LONG)
    changed = model()
    assert answers(on_disk(tmp_path, changed), changed, LONG) == reusable(LONG)
    edit(changed)
    assert answers(on_disk(tmp_path, changed), changed, LONG) == 0


def test_a_file_belongs_to_the_adapter_that_wrote_it(tmp_path):
    tuned = two_adapters()
    answers(on_disk(tmp_path, tuned), tuned, LONG)
    later = two_adapters()
    decoder = on_disk(tmp_path, later)
    assert answers(decoder, later, LONG) == reusable(LONG)
    later.set_adapter("b")
    assert answers(decoder, later, LONG) == 0
    later.set_adapter("a")
    assert answers(decoder, later, LONG) == reusable(LONG)
    later.merge_adapter()
    assert answers(decoder, later, LONG) == 0


@pytest.mark.parametrize("samples", [0, 256])
def test_an_edit_that_nobody_counted_is_seen_before_a_file_is_written_or_read(
    tmp_path, monkeypatch, samples
):
    def edit(a_model):
        a_model.model.embed_tokens.weight.data[LONG[0], 1:2].add_(9.0)

    if not samples:
        monkeypatch.setattr("rapid_llm.engine.model_state.Snapshot.samples", lambda self: [])
    changed = model()
    decoder = on_disk(tmp_path, changed)
    answers(decoder, changed, [5] * 1300)  # its name is known from now on
    edit(changed)
    answers(decoder, changed, LONG)
    untouched = model()
    decoder = on_disk(tmp_path, untouched)
    assert answers(decoder, untouched, LONG) == 0
    assert answers(decoder, untouched, LONG) == reusable(LONG)
    edit(untouched)
    answers(decoder, untouched, LONG)


def test_every_byte_counts_on_a_device_as_well():
    tensor = torch.randn(3, 1001).bfloat16()
    before = mixed(tensor)
    assert torch.equal(mixed(tensor.clone()), before)
    assert not torch.equal(mixed(tensor.flip(1)), before)
    values = tensor.view(-1).view(torch.uint8)
    for place in (0, 1, 2000, len(values) - 1):
        values[place] ^= 1
        assert not torch.equal(mixed(tensor), before)
        values[place] ^= 1


def test_a_fingerprint_is_of_what_is_computed(tmp_path):
    first = model()
    first.save_pretrained(tmp_path)
    loaded = [type(first).from_pretrained(tmp_path) for _ in range(2)]
    assert fingerprint(loaded[0]) == fingerprint(loaded[1]) is not None
    own(loaded[0])  # using it changes nothing
    assert fingerprint(loaded[0]) == fingerprint(loaded[1])


# --- rotary embeddings that depend on the length --------------------------------------------------

SWITCH = 256


def switching(architecture="phi3", rope_type="longrope"):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 8.0}
    if rope_type == "longrope":
        rope |= {"original_max_position_embeddings": SWITCH, "short_factor": [1.0] * 4,
                 "long_factor": [1.0, 2.0, 4.0, 8.0]}  # fmt: skip
    return tiny_model(architecture, eos_token_id=None, max_position_embeddings=2048,
                      original_max_position_embeddings=SWITCH, rope_parameters=rope)  # fmt: skip


def whole(a_model, prompt, new):
    """By passes over the whole sequence, each without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            ids.append(int(a_model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ["phi3", "llama", "qwen3"])
@pytest.mark.parametrize("length", [SWITCH - 6, SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 90])
def test_longrope_goes_by_the_length_of_the_whole_sequence(architecture, length):
    decoder = RapidDecoder(switching(architecture), tiny_tokenizer())
    prompt = LONG[:length]
    expected = whole(switching(architecture), prompt, NEW)
    assert decoder.generate(prompt, sampling=GREEDY).token_ids == expected
    drafted = decoder.generate(
        prompt,
        prompt[20:],
        sampling=GREEDY,
        speculation=SpeculationConfig(mode="exact", gamma=4),
    )
    assert drafted.token_ids == expected


def test_no_draft_crosses_the_switch_where_a_rejection_would_read_the_document_twice(monkeypatch):
    read, extend = [], Session.extend

    def watched(self, tokens, keep=None, whole=None):
        read.append((self.length, self.length + len(tokens)))
        return extend(self, tokens, keep, whole)

    monkeypatch.setattr(Session, "extend", watched)
    prompt = LONG[: SWITCH - 3]
    config = SpeculationConfig(mode="exact", gamma=6)
    # The drafter's own sequence stays below the switch.
    RapidDecoder(switching(), tiny_tokenizer()).generate(
        prompt, prompt[40:], sampling=GREEDY, speculation=config
    )
    assert (SWITCH - 4, SWITCH) in read
    assert all(start == SWITCH - 1 for start, end in read if start < SWITCH < end)


def test_kv_of_one_side_of_the_switch_is_not_taken_on_the_other(tmp_path):
    scaled = switching()
    decoder = RapidDecoder(scaled, tiny_tokenizer(), kv_cache_dir=tmp_path)
    below, above = LONG[: SWITCH - 50], LONG[: SWITCH + 1100]
    for prompt in (below, above, below, above):
        result = decoder.generate(prompt, sampling=GREEDY)
        assert result.token_ids == whole(switching(), prompt, NEW)
    assert result.stats.cached_tokens == reusable(above)
    later = RapidDecoder(switching(), tiny_tokenizer(), kv_cache_dir=tmp_path)
    assert later.generate(below, sampling=GREEDY).stats.cached_tokens == 0
    assert later.generate(above, sampling=GREEDY).stats.cached_tokens == reusable(above)


def test_verification_across_the_switch_gives_each_row_its_own_embedding():
    scaled = switching()
    runner = ModelRunner(scaled, "x")
    session = Session(runner, runner.new_cache(400))
    ids = torch.tensor(LONG[: SWITCH + 8])
    with torch.inference_mode():
        session.prefill(ids[: SWITCH - 4].tolist())
        rows = session.extend(ids[SWITCH - 4 :], 10)
        expected = [scaled(ids[None, :end]).logits[0, -1] for end in range(SWITCH - 1, SWITCH + 9)]
        torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-4, atol=1e-4)
        session.rollback(SWITCH - 2)
        back = session.extend(ids[SWITCH - 2 : SWITCH])
    torch.testing.assert_close(back, torch.stack(expected[:2]), rtol=1e-4, atol=1e-4)


def test_dynamic_scaling_is_refused_where_each_token_changes_all():
    runner = ModelRunner(switching("llama", "dynamic"), "some-model")
    session = Session(runner, runner.new_cache(2100))
    ids = torch.randint(3, 64, (2050,))
    with torch.inference_mode():
        session.prefill(ids[:2000].tolist())
        expected = runner.model(ids[None, :2001]).logits[0, -1:]
        torch.testing.assert_close(session.extend(ids[2000:2001]), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ModelError, match=r"some-model.*dynamically.*2048 tokens.*yarn"):
            session.extend(ids[2001:])


# --- quantized copies ---------------------------------------------------------------------------


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("hidden", [40, 64])
def test_a_quantized_copy_has_the_adapter_and_leaves_tiny_layers_whole(rank, hidden):
    torch.manual_seed(1)
    base = tiny_model(**WIDE | {"hidden_size": hidden, "intermediate_size": 100})
    tuned = get_peft_model(base, lora(r=rank, lora_alpha=rank)).bfloat16()
    quantized = ModelRunner(quantized_copy(tuned, Int8Linear), "quantized")
    inner = {m.weight.shape[1] for m in quantized.model.modules() if isinstance(m, Int8Linear)}
    assert inner == {size for size in (hidden, rank, 128) if size % 16 == 0}
    assert difference(as_decoder(quantized), own(tuned)) < 0.15
    with tuned.disable_adapter():
        assert difference(own(tuned), as_decoder(quantized)) > 0.15


@pytest.mark.parametrize("edit", [written_in_place, written_through_data, linear_subclass])
def test_the_quantized_copy_of_a_changed_model_is_made_again(edit):
    changed = tiny_model(**WIDE).bfloat16()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    first = decoder.draft_runner
    assert decoder.draft_runner is first is not decoder.drafter
    edit(changed)
    assert difference(as_decoder(decoder.draft_runner), own(changed)) < 0.1
    assert decoder.draft_runner is not first


def test_the_quantized_copy_follows_the_adapter():
    torch.manual_seed(3)
    tuned = get_peft_model(tiny_model(**WIDE), lora(r=16), adapter_name="a")
    tuned.add_adapter("b", lora(r=16))
    tuned.set_adapter("a")
    tuned.eval().bfloat16()
    decoder = RapidDecoder(tuned, tiny_tokenizer())
    for name in ("a", "b", "a"):
        tuned.set_adapter(name)
        quantized = decoder.draft_runner
        assert quantized is not decoder.drafter
        assert difference(as_decoder(quantized), own(tuned)) < 0.2


def test_a_model_with_hooks_has_no_quantized_copy_and_drafts_itself():
    changed = tiny_model(**WIDE, eos_token_id=None).bfloat16()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    hook("mlp")(changed)
    assert decoder.draft_runner is decoder.drafter
    with pytest.raises(InvalidParameterError, match=r"hooks.*drafter_quantization"):
        quantized_copy(changed, Int8Linear)


@pytest.mark.parametrize("kind", [Int8Linear, Int8Blocks])
@pytest.mark.parametrize("inner", [1, 3, 8, 20, 31, 100])
def test_layers_that_a_product_would_read_beyond_are_not_quantized(kind, inner):
    odd = tiny_model(hidden_size=64, intermediate_size=inner).bfloat16()
    quantized = quantized_copy(odd, kind)
    mlp = quantized.model.layers[0].mlp
    assert (type(mlp.up_proj), type(mlp.down_proj)) == (kind, nn.Linear)
    assert difference(as_decoder(ModelRunner(quantized, "quantized")), own(odd)) < 0.2


# --- vocabularies of two widths -------------------------------------------------------------------


@pytest.mark.parametrize(("wide", "narrow"), [(80, 64), (64, 80), (96, 72)])
@pytest.mark.parametrize("lookup", [True, False])
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_target_and_drafter_may_pad_their_vocabularies_to_any_width(wide, narrow, lookup, mode):
    tokenizer = tiny_tokenizer()
    target = tiny_model(eos_token_id=None, vocab_size=wide)
    drafter = tiny_model(eos_token_id=None, vocab_size=narrow, seed=1)
    decoder = RapidDecoder(target, tokenizer, drafter, drafter_tokenizer=tokenizer)
    config = SpeculationConfig(mode=mode, gamma=4, lookup=lookup)
    prompt = PROMPT[:30]
    result = decoder.generate(
        prompt,
        prompt[5:],
        sampling=SamplingParams(max_new_tokens=40, ignore_eos=True),
        speculation=config,
    )
    expected = transformers_greedy(target, prompt, 40)
    if wide > 64:
        assert max(expected) >= 64  # of the padding
    if mode == "exact":
        assert result.token_ids == expected
    for penalty in (1.0, 1.3):
        sampling = SamplingParams(max_new_tokens=40, ignore_eos=True, temperature=2.0, seed=1,
                                  repetition_penalty=penalty)  # fmt: skip
        sampled = decoder.generate(prompt, prompt[5:], sampling=sampling, speculation=config)
        assert max(sampled.token_ids) < wide


# --- loading ------------------------------------------------------------------------------------


@pytest.fixture
def folder_with_an_adapter(tmp_path):
    base = model()
    base.generation_config.eos_token_id = None
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    tuned = get_peft_model(type(base).from_pretrained(tmp_path / "base"), lora())
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", tuned, base


@pytest.mark.parametrize("needed", [MIN_PEFT_VERSION, "99.0"])
def test_a_folder_with_an_adapter_answers_as_the_adapted_model(
    folder_with_an_adapter, needed, monkeypatch
):
    """transformers loads it also with a PEFT that its methods for adapters refuse."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", needed)
    folder, tuned, base = folder_with_an_adapter
    expected = transformers_greedy(tuned, PROMPT, NEW)
    assert expected != transformers_greedy(base, PROMPT, NEW)
    decoder = RapidDecoder.from_pretrained(folder, dtype="float32", device="cpu")
    assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == expected


def test_a_loaded_adapter_that_a_word_switches_on_is_refused_by_name(tmp_path):
    model().save_pretrained(tmp_path / "base")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9]),
    )
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    with pytest.raises(ModelError, match=r"the adapter 'default' \(LORA\) is not supported"):
        RapidDecoder.from_pretrained(tmp_path / "tuned", dtype="float32", device="cpu")


def test_a_model_is_put_into_evaluation_mode_again():
    changed = model()
    decoder = RapidDecoder(changed, tiny_tokenizer())
    inject_adapter_in_model(lora(lora_dropout=0.5), changed)
    changed.train()
    result = decoder.generate(PROMPT, sampling=GREEDY)
    assert not any(module.training for module in changed.modules())
    assert result.token_ids == transformers_greedy(changed, PROMPT, NEW)


def test_a_state_is_looked_at_again_only_where_something_changed(monkeypatch):
    state = ModelState(tiny_model())
    before = state.number
    monkeypatch.setattr("rapid_llm.engine.model_state.Snapshot", None)
    assert [state.look() for _ in range(3)] == [before] * 3
