"""Models spread over devices, offloaded, or quantized, as transformers loads them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import installed, tiny_model, tiny_tokenizer, transformers_greedy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_bitsandbytes_available, is_compressed_tensors_available

from rapid_llm import EngineConfig, RapidDecoder, SamplingParams, SpeculationConfig
from rapid_llm.engine.placement import layer_devices
from rapid_llm.errors import InvalidParameterError, MissingDependencyError, ModelError
from rapid_llm.models import load_model

PROMPT = [*range(3, 40), 5, 6, 7]
DRAFT = PROMPT[8:]
GREEDY = SamplingParams(max_new_tokens=16, ignore_eos=True)
EXACT = SpeculationConfig(mode="exact", gamma=3)
OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
ON_DISK = dict.fromkeys(OFFLOADED, "disk") | {"model.rotary_emb": "cpu", "model.norm": "cpu"}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_hidden_layers=3, eos_token_id=None)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(model: Any) -> list[int]:
    return transformers_greedy(model, PROMPT, 16)


def is_offloaded(runner: Any) -> bool:
    """Whether a model's weights come from the host or from disk in each pass."""
    return any(parameter.is_meta for parameter in runner.model.parameters())


# --- device maps -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": OFFLOADED},
        {"device_map": ON_DISK},
        {"device_map": "auto"},
        {"device_map": "sequential", "max_memory": {"cpu": "1GiB"}},
    ],
    ids=str,
)
def test_a_model_with_a_device_map_answers_as_without(options, folder, expected):
    decoder = RapidDecoder.from_pretrained(folder, **options)
    for reused in (0, len(PROMPT) - 1):  # kept KV is of the same model, whose weights come and go
        result = decoder.generate(PROMPT, DRAFT, sampling=GREEDY, speculation=EXACT)
        assert result.token_ids == expected
        assert result.stats.cached_tokens == reused
    assert result.stats.drafted_tokens > 0
    assert decoder.target.lean is (not is_offloaded(decoder.target))


def test_files_for_a_model_on_disk_are_not_left_out_in_silence(folder, tmp_path):
    decoder = RapidDecoder.from_pretrained(folder, device_map=ON_DISK, kv_cache_dir=tmp_path)
    long = SamplingParams(max_new_tokens=1)
    with pytest.warns(UserWarning, match="kv_cache_dir has no effect for"):
        decoder.generate([*PROMPT] * 7, sampling=long)
    plain = RapidDecoder.from_pretrained(folder, device_map={"": "cpu"}, kv_cache_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain.generate([*PROMPT] * 7, sampling=long)


def test_a_drafter_has_a_device_map_of_its_own_or_the_targets(folder, expected):
    of_both = RapidDecoder.from_pretrained(folder, folder, drafter_device_map=OFFLOADED)
    assert is_offloaded(of_both.drafter)
    assert not is_offloaded(of_both.target)
    result = of_both.generate(PROMPT, DRAFT, sampling=GREEDY, speculation=EXACT)
    assert result.token_ids == expected
    shared = RapidDecoder.from_pretrained(folder, folder, device_map=OFFLOADED)
    assert shared.drafter is shared.target


def test_a_dispatched_model_that_was_loaded_elsewhere_serves(folder, expected):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=ON_DISK)
    assert model.get_input_embeddings().weight.is_meta
    decoder = RapidDecoder(model, tiny_tokenizer())
    assert decoder.target.device == torch.device("cpu")
    assert layer_devices(model) == [torch.device("cpu")] * 3
    result = decoder.generate(PROMPT, sampling=GREEDY)
    assert result.token_ids == expected
    assert model.get_input_embeddings().weight.is_meta  # in its place again


def test_an_adapter_on_an_offloaded_model_makes_its_kept_kv_invalid(folder, expected):
    peft = installed("peft")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=OFFLOADED)
    decoder = RapidDecoder(model, tiny_tokenizer())
    decoder.generate(PROMPT, sampling=GREEDY)
    config = peft.LoraConfig(target_modules=r".*layers\.1.*q_proj", init_lora_weights=False)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config)  # the layers of the model itself get the adapter
    changed = decoder.generate(PROMPT, sampling=GREEDY)
    assert changed.stats.cached_tokens == 0
    with tuned.disable_adapter():
        assert decoder.generate(PROMPT, sampling=GREEDY).token_ids == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "both"}, "device_map='both' is not allowed.*auto.*or a mapping"),
        ({"device_map": "cpu"}, "device_map='cpu' is not allowed.*device="),
        ({"device_map": {}}, "device_map={} is not allowed"),
        ({"device_map": {"model": 7, "lm_head": "cpu"}}, "7 for 'model', a device that this"),
        ({"device_map": "auto", "device": "cpu"}, "device='cpu' and device_map='auto' exclude"),
        ({"drafter_device_map": "auto"}, "drafter_device_map.*need a drafter"),
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory=.*no effect without device_map"),
    ],
    ids=str,
)
def test_device_maps_that_cannot_be_are_refused(options, message, folder):
    with pytest.raises(InvalidParameterError, match=message):
        RapidDecoder.from_pretrained(folder, **options)


def test_the_config_keeps_words_and_mappings():
    config = EngineConfig(device_map="auto", max_memory={0: "20GiB"})
    assert (config.device_map, config.max_memory) == ("auto", {0: "20GiB"})
    assert EngineConfig(device_map={"": "cpu"}).device_map == {"": "cpu"}


# --- quantized models --------------------------------------------------------------------------


def test_a_model_quantized_on_the_fly_runs_its_own_forward(folder):
    installed("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    how = TorchAoConfig(Int8WeightOnlyConfig())
    decoder = RapidDecoder.from_pretrained(folder, quantization_config=how, device="cpu")
    weight = decoder.target.model.model.layers[0].mlp.up_proj.weight
    assert "torchao" in type(weight).__module__
    assert not decoder.target.lean
    result = decoder.generate(PROMPT, DRAFT, sampling=GREEDY, speculation=EXACT)
    assert result.token_ids == transformers_greedy(decoder.target.model, PROMPT, 16)
    assert result.stats.drafted_tokens > 0


def test_a_quantized_drafter_has_options_of_its_own(folder, expected):
    installed("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    own = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    decoder = RapidDecoder.from_pretrained(folder, folder, device="cpu", drafter_options=own)
    weights = [
        type(runner.model.model.layers[0].mlp.up_proj.weight).__module__
        for runner in (decoder.target, decoder.drafter)
    ]
    assert "torchao" not in weights[0]
    assert "torchao" in weights[1]
    result = decoder.generate(PROMPT, DRAFT, sampling=GREEDY, speculation=EXACT)
    assert result.token_ids == expected


def test_a_model_is_loaded_where_it_stays_and_never_moved(folder, monkeypatch):
    moved: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args, **_: moved.append(args))
    model = load_model(folder, device="cpu", dtype="bfloat16").model
    assert moved == []
    assert next(model.parameters()).dtype == torch.bfloat16


def test_options_of_the_model_do_not_reach_the_tokenizer(folder, monkeypatch):
    given: list[dict[str, Any]] = []
    own = AutoTokenizer.from_pretrained

    def load(*args: Any, **options: Any) -> Any:
        given.append(options)
        return own(*args, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    load_model(folder, device="cpu", local_files_only=True, max_position_embeddings=256)
    assert given == [{"local_files_only": True}]


LACKING = [
    pytest.param(
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        (MissingDependencyError, "pip install -U bitsandbytes"),
        marks=pytest.mark.skipif(is_bitsandbytes_available(), reason="bitsandbytes is installed"),
    ),
    pytest.param(
        {"quant_method": "compressed-tensors"},
        (MissingDependencyError, "pip install compressed-tensors"),
        marks=pytest.mark.skipif(is_compressed_tensors_available(), reason="it is installed"),
    ),
    pytest.param(
        {"quant_method": "fp8"},
        (ModelError, "on this machine .*GPU.* load it where there is such a GPU"),
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    ),
    ({"quant_method": "modelopt"}, (ModelError, "modelopt.*another quantization_config")),
    ({"quant_method": "awq", "bits": 4}, (ModelError, "AWQ.*another quantization_config")),
]


@pytest.mark.parametrize(("how", "error"), LACKING, ids=str)
def test_what_a_format_lacks_is_said_in_one_line(how, error, folder):
    kind, message = error
    with pytest.raises(kind, match=message) as caught:
        load_model(folder, device="cpu", quantization_config=how)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_an_unknown_quantization_is_not_read_as_plain_weights(tmp_path, folder):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantization 'modelopt'.*another format"):
        load_model(tmp_path, device="cpu")
