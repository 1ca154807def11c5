"""What users do to a model, and the model, prompts and sizes of the tests that it is done in."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from rapid_llm.config import SamplingParams
from rapid_llm.engine.session import Session

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


def reusable(prompt):
    """Tokens of a prompt whose KV serves it again: all but the last."""
    return len(prompt) - 1


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
