"""``rapid-llm doctor``: what it finds, and that its self-test can fail."""

from __future__ import annotations

import json

import torch

from rapid_llm import doctor, self_test
from rapid_llm.cli import main
from rapid_llm.engine.cpu import kernels
from rapid_llm.engine.cuda import refusal
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.errors import ModelError

TINY = ["doctor", "--model", "none"]


def test_json_has_devices_kernels_packages_models_and_a_passed_self_test(capsys):
    assert main([*TINY, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    assert any(name.startswith("compiled kernels") for name in report["devices"][0]["kernels"])
    assert {model["name"] for model in report["models"]} >= {"smollm2-135m", "all-minilm-l6-v2"}
    (test, *_) = report["tests"]
    assert test["same_tokens"] == test["tokens"] == 24
    assert set(test["milliseconds"]) == {"a step", "a pass of 5 tokens"}
    assert report["passed"]


def test_text_names_every_device_and_what_the_self_test_gave(capsys):
    assert main(TINY) == 0
    text = capsys.readouterr().out
    assert "Device cpu" in text
    assert "passed: 24 of 24 tokens are those of transformers' generate" in text


def test_a_model_that_computes_otherwise_fails_the_self_test(capsys, monkeypatch):
    run = ModelRunner.__call__

    def wrong(self, tokens, cache, keep_logits):
        return run(self, tokens, cache, keep_logits).roll(1, dims=-1)

    monkeypatch.setattr(ModelRunner, "__call__", wrong)
    assert main(TINY) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_self_test_that_cannot_be_made_says_why_and_the_rest_is_shown(capsys, monkeypatch):
    def missing(*_, **__):
        raise ModelError("no such model")

    monkeypatch.setattr(self_test, "load_model", missing)
    assert main(["doctor", "--model", "somewhere/else"]) == 1
    text = capsys.readouterr().out
    assert "Versions" in text
    assert "FAILED: ModelError: no such model" in text


def test_without_a_self_test_no_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "check_device", None)
    assert main(["doctor", "--no-self-test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tests"] == []


def test_what_a_container_may_use_is_told_beside_what_the_machine_has(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "host_memory", lambda: 2 * 10**9)
    monkeypatch.setattr(doctor, "physical_memory", lambda: 64 * 10**9)
    assert main(["doctor", "--no-self-test"]) == 0
    assert "2.0 GB that this process may use, of 64.0 GB" in capsys.readouterr().out


def test_a_cache_folder_that_cannot_be_used_is_a_failure(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAPID_LLM_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["doctor", "--no-self-test"]) == 1
    assert "set RAPID_LLM_CACHE" in capsys.readouterr().out


def test_packages_that_an_extra_lacks_or_has_in_another_version_are_named(monkeypatch):
    declared = [
        'present>=2; extra == "one"',
        'absent>=1; extra == "one"',
        'rapid-llm[one]; extra == "two"',
        'old>=3; extra == "three"',
        "always",
    ]
    has = {"present": "2.1", "old": "2.0"}
    monkeypatch.setattr(doctor, "requires", lambda name: declared)
    monkeypatch.setattr(doctor, "_version", has.get)
    assert doctor.missing_by_extra() == {
        "one": ["absent"],
        "two": ["absent"],
        "three": ["old>=3 (here 2.0)"],
    }


def test_models_in_the_hubs_cache_are_found_and_those_of_other_kinds_say_so(tmp_path, monkeypatch):
    for name, kind in (("ours", "llama"), ("other", "bert")):
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / "1"
        snapshot.mkdir(parents=True)
        (tmp_path / f"models--org--{name}" / "refs").mkdir()
        (tmp_path / f"models--org--{name}" / "refs" / "main").write_text("1")
        (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
    import huggingface_hub

    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path))
    found = {model.name: model.problem for model in doctor.models()}
    assert found["org/ours"] is None
    assert "'bert'" in found["org/other"]


def test_no_token_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    main(["doctor", "--no-self-test", "--json"])
    out = capsys.readouterr().out
    assert json.loads(out)["hub"]["token"] is True
    assert "secret" not in out


def test_compiled_kernels_that_are_disabled_or_missing_say_why(monkeypatch):
    monkeypatch.setenv("RAPID_LLM_NATIVE", "0")
    assert None not in kernels.refusals().values()
    monkeypatch.delenv("RAPID_LLM_NATIVE")
    monkeypatch.setattr(kernels, "_opened", lambda name: "it was not built")
    assert set(kernels.refusals().values()) == {"it was not built"}


def test_a_gpu_is_shown_with_its_free_memory_and_why_kernels_do_not_serve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 16 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (found,) = doctor.gpus()
    assert (found.name, found.free, found.total) == ("Tesla T4", 3 * 10**9, 16 * 10**9)
    assert all(reason is not None for reason in found.kernels.values())


def test_an_old_gpu_and_a_missing_triton_are_reasons(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("rapid_llm.engine.cuda.find_spec", lambda name: object())
    assert "older than Ampere (compute capability 7.5)" in (refusal(device) or "")
    monkeypatch.setattr("rapid_llm.engine.cuda.find_spec", lambda name: None)
    assert "Triton is not installed" in (refusal(device) or "")
