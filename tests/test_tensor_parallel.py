"""Models sharded over two processes (gloo): one process's answers, and no hang however it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ARCHITECTURES, tiny_model, tiny_tokenizer
from ranks_worker import FIRST, GREEDY, MODES, PROMPT, REQUESTS, answers, decoder_of, of_letters

from rapid_llm import RapidDecoder
from rapid_llm.engine import costs
from rapid_llm.errors import InvalidParameterError, ModelError
from rapid_llm.models import load_model

RANKS = (0, 1)
DEATHS = ("exit", "kill", "kill-in-a-pass")


def started(*command: str, **options: Any) -> list[subprocess.Popen[str]]:
    """The command in each of two processes, as ``torchrun`` would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    root = str(Path(__file__).parents[1])
    own["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in RANKS
    ]


def ended(processes: list[subprocess.Popen[str]], given: str | None = None) -> list[Any]:
    """(exit status, standard output, standard error) of each."""
    try:
        outcomes = [process.communicate(given, timeout=240) for process in processes]
        return [(p.returncode, *texts) for p, texts in zip(processes, outcomes, strict=True)]
    finally:
        for process in processes:
            process.kill()


def seen_by_ranks(part: str, folder: Path) -> list[dict[str, Any]]:
    worker = str(Path(__file__).with_name("ranks_worker.py"))
    outcomes = ended(started(worker, part, str(folder)))
    reports = [folder / f"{part}-{rank}.json" for rank in RANKS]
    left = reports if part not in DEATHS else reports[:1]
    assert all(report.exists() for report in left), [outcome[2][-2000:] for outcome in outcomes]
    return [json.loads(report.read_text()) for report in left]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each architecture."""
    folder = tmp_path_factory.mktemp("models")
    for name in ARCHITECTURES:
        path = folder / f"model-{name}"
        tiny_model(name, eos_token_id=None).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    return folder


@pytest.fixture(scope="module")
def by_ranks(folder: Path) -> list[dict[str, Any]]:
    return seen_by_ranks("architectures", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ARCHITECTURES, "pair", "mixed"])
def test_two_processes_answer_as_one_does(name, folder, by_ranks, monkeypatch):
    monkeypatch.setattr(costs, "measure", lambda session: FIRST[0])
    model = "qwen3" if name in ("pair", "mixed") else name
    drafter = folder / "model-llama" if name in ("pair", "mixed") else None
    decoder = decoder_of(folder / f"model-{model}", drafter, device="cpu")
    expected = answers(decoder)
    key = name if drafter else f"model-{name}"
    first, second = (seen.get(key, seen) for seen in by_ranks)
    for mode in MODES:
        assert first[mode] == expected[mode], mode  # tokens, drafted tokens and rounds
    assert first["seed 7"] == expected["seed 7"]
    assert first["likelihood"] == pytest.approx(expected["likelihood"], abs=1e-3)
    for mode in (*MODES, "seed 7", "seed None"):
        assert first[mode] == second[mode]
    assert first["paper"][1] > 0


@pytest.mark.slow
def test_a_rank_keeps_its_own_kv_heads_and_runs_the_models_own_pass(by_ranks):
    for seen in by_ranks:
        llama, phi = seen["model-llama"], seen["model-phi3"]
        assert not llama["lean"]
        assert seen["mixed"]["lean"]  # a drafter that is whole on each rank
        assert (llama["kv_heads"], llama["own_kv_heads"]) == (2, 1)
        assert phi["own_kv_heads"] == 2  # its plan gathers them
        assert (llama["shares"], phi["shares"]) == (2, 1)
        assert llama["held"] == [len(PROMPT) - 1] * 2  # the next call reuses the prompt


@pytest.fixture(scope="module")
def endings(folder: Path) -> list[dict[str, Any]]:
    return seen_by_ranks("endings", folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[int]:
    decoder = decoder_of(folder / "model-llama", device="cpu")
    return decoder.generate(PROMPT, sampling=GREEDY).token_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("none", "no error", "no error"),
        ("closed on all", "no error", "no error"),
        ("closed on 1", "RankError: rank 1 has closed its stream", "no error"),
        ("closed on 0", "no error", "RankError: rank 0 has closed its stream"),
        ("failed", "RankError: rank 1 has failed", "KeyError"),
        ("another prompt", "RankError: rank 1 is at another", "RankError: rank 0 is at another"),
        ("two at a time", "InvalidParameterError: a sharded model", "InvalidParameterError"),
    ],
)
def test_a_call_that_one_rank_ends_fails_on_the_others_and_the_next_works(
    case, first, second, endings, alone
):
    for seen, expected in zip(endings, (first, second), strict=True):
        outcome, after, seconds = seen[case]
        assert outcome.startswith(expected)
        assert seconds < 30
        if case != "two at a time":
            assert after == alone


@pytest.mark.slow
def test_a_rank_that_fails_in_a_pass_ends_the_others_in_time(endings):
    first, second = (seen["in a pass"] for seen in endings)
    assert first[0].startswith("RankError: a pass has failed on rank 0")
    assert second[0] == "MemoryError: no memory"
    for _, after, seconds in (first, second):
        assert "start all ranks anew" in after
        assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("how", DEATHS)
def test_a_rank_that_dies_ends_the_others(how, folder):
    (first,) = seen_by_ranks(how, folder)
    outcome, seconds = first["died"]
    assert outcome.startswith("RankError: ")
    assert outcome.endswith(": start all ranks anew")
    assert seconds < 30


@pytest.fixture(scope="module")
def unequal(folder: Path) -> list[dict[str, Any]]:
    return seen_by_ranks("unequal", folder)


ARGUMENTS = (
    *("constraint", "stop", "ignore_eos", "top_k", "repetition_penalty", "timeout"),
    *("max_new_tokens", "speculation", "confidence", "draft_prompt"),
    *("which model scores", "which model changed", "which decoder"),
)


@pytest.mark.slow
@pytest.mark.parametrize("what", ARGUMENTS)
def test_an_argument_that_differs_on_one_rank_is_an_error_on_all(what, unequal):
    for seen in unequal:
        outcome, after, seconds = seen[what]
        assert outcome.startswith("RankError: rank ")
        assert "is at another pass or call" in outcome
        assert seconds < 30
        assert after == seen["refused on all"][1]


@pytest.mark.slow
def test_a_call_that_one_rank_refuses_fails_on_the_others(unequal):
    first, second = unequal
    for what, why in (("refused on 1", "confidence=7"), ("refused score", "continuation=''")):
        assert first[what][0].startswith("RankError: rank 1 has failed")
        assert second[what][0].startswith(f"InvalidParameterError: {why}")
    for seen in unequal:
        assert seen["refused on all"][0].startswith("InvalidParameterError: confidence=7")
        assert len({str(seen[what][1]) for what in seen}) == 1  # what each can do afterwards


@pytest.mark.slow
def test_rank_0_alone_looks_at_the_clock(unequal):
    for seen in unequal:
        assert seen["late on 0"][0].startswith("GenerationTimeoutError: timeout=500")
        outcome, after, _ = seen["late on 1"]
        assert json.loads(outcome) == after[:8]


@pytest.mark.slow
def test_many_requests_get_the_answers_of_one_process(folder, alone):
    first, second = seen_by_ranks("many", folder)
    decoder = of_letters(folder / "model-llama", device="cpu")
    expected = [result.token_ids for result in decoder.generate_many(REQUESTS)]
    for seen in (first, second):
        assert seen["many"] == expected
        assert seen["after a closed stream"] == seen["after an error"] == alone
        assert seen["after a closed request"] == seen["for asyncio"] == alone
        before, _, after = seen["one fails"]
        assert before == after == expected[0]
    assert "RankError('rank 1 has" in first["one fails"][1]
    assert second["one fails"][1] == "KeyError('progress')"


@pytest.mark.slow
def test_each_rank_keeps_its_own_files_and_all_reuse_what_every_one_has(folder):
    first, second = seen_by_ranks("files", folder)
    for seen in (first, second):
        length = len(PROMPT) - 1
        assert [seen[name][1:3] for name in ("first", "second")] == [[0, 0], [length, length]]
        assert seen["without a rank's"][1:3] == [0, 0]
        assert seen["with both again"][1:3] == [length, length]
        assert seen["gathered"][1:3] == [0, 0]
        assert seen["gathered again"][1:3] == [length, length]
        assert len({str(seen[name][0]) for name in list(seen)[:4]}) == 1
        assert seen["gathered"][0] == seen["gathered again"][0]
    assert [len(first[name][3]) for name in first] == [2, 2, 2, 2, 4, 4]
    decoder = decoder_of(folder / "model-llama", device="cpu", kv_cache_dir=folder / "kept")
    assert decoder.generate(PROMPT, sampling=GREEDY).stats.cached_tokens == 0


SCRIPT = """
import sys, time
from rapid_llm import RapidDecoder, SamplingParams
from rapid_llm.tensor_parallel import ranks

decoder = RapidDecoder.from_pretrained(sys.argv[1])
sampling = SamplingParams(max_new_tokens=16, ignore_eos=True)
tokens = []
for delta in decoder.stream(list(range(3, 40)) + [5, 6, 7], sampling=sampling):
    tokens += delta.token_ids
    if ranks().rank == 0 and delta.finish_reason:
        time.sleep(4)  # the other rank has ended its script by then
if ranks().rank == 0:
    print(tokens)
"""


@pytest.mark.slow
def test_a_script_under_torchrun_may_end_sooner_on_some_ranks(folder, tmp_path, alone):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(folder / "model-llama")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == alone


@pytest.mark.slow
def test_rank_0_alone_reads_standard_input_and_prints(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder / "model-llama")
    document = tmp_path / "document.txt"
    document.write_text("w3 w4 w5 w6 w7 w8 w9")
    options = ("--model", str(folder / "model-llama"), "--method", "lc", "--max-new-tokens", "5")
    command = ("-m", "rapid_llm", "ask", str(document), "--questions", "-", *options)
    processes = started(*command, stdin=subprocess.PIPE)
    (status, out, err), (other_status, other_out, other_err) = ended(processes, "w4 w5\nw6\n")
    assert (status, other_status) == (0, 0), (err, other_err)
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["w4 w5", "w6"]
    assert all(json.loads(line)["token_ids"] for line in out.splitlines())
    assert other_out == ""
    refused = ended(started("-m", "rapid_llm", "eval", "needle"))
    assert [outcome[0] for outcome in refused] == [2, 2]
    assert "eval runs in one process" in refused[0][2]
    assert refused[1][1:] == ("", "")


@pytest.fixture
def of_many(monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process as one of ``size`` that have not met yet."""

    def pretend(size: int) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(size))

    return pretend


@pytest.mark.parametrize(
    ("name", "size", "what"),
    [
        ("llama", 4, r"2 KV heads, which 4 processes .* sizes that do: 1, 2 "),
        ("llama", 3, r"2 KV heads, 4 query heads, which 3 .* sizes that do: 1, 2 "),
        ("qwen3_moe", 8, r"2 KV heads, 4 query heads.* sizes that do: 1, 2 "),
    ],
)
def test_heads_that_do_not_divide_are_refused_by_name(name, size, what, tmp_path, of_many):
    tiny_model(name).save_pretrained(tmp_path)
    of_many(size)
    with pytest.raises(ModelError, match=what):
        load_model(tmp_path)


def test_ranks_on_one_machine_divide_its_memory_for_kept_kv(of_many, monkeypatch):
    monkeypatch.setattr("rapid_llm.decoder.host_memory", lambda: 64_000)
    monkeypatch.setattr("rapid_llm.decoder.device_memory", lambda device: 64_000)

    def budgets() -> tuple[int, int]:
        prefixes = RapidDecoder(tiny_model(), tiny_tokenizer())._prefixes
        return prefixes._device.budget, prefixes._host.budget

    assert budgets() == (16_000, 8_000)
    of_many(16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert budgets() == (2_000, 1_000)


def test_a_device_map_is_refused_in_several_processes(tmp_path, of_many):
    tiny_model().save_pretrained(tmp_path)
    of_many(2)
    with pytest.raises(InvalidParameterError, match=r"device_map='auto'.*2 processes"):
        load_model(tmp_path, device_map="auto")


def test_a_numbered_device_holds_the_whole_model_of_each_process(tmp_path, of_many):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    of_many(2)
    assert RapidDecoder.from_pretrained(tmp_path, device="cpu:0").target.ranks is None
