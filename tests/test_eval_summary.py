"""Records read back, intervals, what the summary makes of them, and the report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from rapid_llm import cli
from rapid_llm.cli.report import write_report
from rapid_llm.errors import DataError
from rapid_llm.evaluation.journal import RESULTS, SETTINGS, Record, read_records, read_settings
from rapid_llm.evaluation.summary import mean, rate, summarize

METRICS: dict[str, Any] = {"accuracy": "rate", "f1": "mean"}


def record(item: str, method: str = "lc", score: float = 1.0, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "task": "needle",
        "item": item,
        "method": method,
        "base": method.split()[0],
        "options": {},
        "answer": "a\u2028b",  # a line separator, but no line end
        "scores": {"accuracy": score, "f1": score / 2},
        "stats": {"completion_tokens": 10, "decode_seconds": 2.0},
    }
    return Record(**values | changes)


def line(of: Record) -> str:
    return of.model_dump_json() + "\n"


def written(folder: Path, *records: Record, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / RESULTS).write_text("".join(map(line, records)), encoding="utf-8")
    made = {"task": "needle", "metrics": METRICS} | settings
    (folder / SETTINGS).write_text(json.dumps(made), encoding="utf-8")
    return folder


# --- records --------------------------------------------------------------------------------


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    records = [
        record("1", groups={"length": "short"}, accepted_at=((3, 2), (2, 0)), retrieved=True),
        record("2", "rapid η=10", 0.0),
    ]
    assert read_records(written(tmp_path / "run", *records)) == records


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    whole, torn = line(record("1")).encode(), line(record("2", "rapid η=10")).encode()
    for cut in range(len(torn)):  # inside a character too
        (tmp_path / RESULTS).write_bytes(whole + torn[:cut])
        assert [r.item for r in read_records(tmp_path)] == ["1"]


@pytest.mark.parametrize(
    ("bad", "mention"),
    [
        ("{", "Invalid JSON"),
        ("[1]", "object"),
        (json.dumps({"task": "needle"}), "item: Field required"),
        (line(record("1")).replace('"base"', '"basis"'), "basis"),
        (line(record("1")).replace('"accepted_at":[]', '"accepted_at":[1]'), r"accepted_at\[0\]"),
        (line(record("1")).replace('"options":{}', '"options":3'), "options: .* there is 3"),
        (line(record("1")).replace('"accuracy":1.0', '"accuracy":null'), r"scores\.accuracy: "),
        ("\udcff", "Invalid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: str, mention: str) -> None:
    text = line(record("0")) + bad.strip() + "\n" + line(record("0"))
    (tmp_path / RESULTS).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        DataError, match=f"{re.escape(str(tmp_path / RESULTS))}, line 2: .*{mention}"
    ):
        read_records(tmp_path)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    for read, name in ((read_records, RESULTS), (read_settings, SETTINGS)):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            read(tmp_path)
    (tmp_path / SETTINGS).write_text("[]")
    with pytest.raises(DataError, match=r"run\.json: .*object"):
        read_settings(tmp_path)


# --- intervals ------------------------------------------------------------------------------


def test_rates_have_wilson_s_interval() -> None:
    # (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964, by hand
    assert rate([1] * 8 + [0] * 2) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-5)
    assert rate([0] * 10) == pytest.approx((0, 0, 0.277533), abs=1e-5)
    assert rate([1.0]) == pytest.approx((1, 0.206543, 1), abs=1e-5)


def test_means_have_a_bootstrap_interval_that_repeats() -> None:
    values = [0.1, 0.9, 0.4, 0.4, 0.7, 0.2, 0.6, 0.5]
    found = mean(values)
    # about mean ± 1.96·s/√n, s of the sample being 0.2605
    assert found == pytest.approx((0.475, 0.475 - 0.17, 0.475 + 0.17), abs=0.03)
    assert mean(values) == found


def test_one_value_has_no_interval_and_equal_values_have_none_of_width() -> None:
    assert mean([0.25] * 5) == (0.25, 0.25, 0.25)
    assert mean([0.5]) == (0.5, None, None)


# --- the summary ----------------------------------------------------------------------------


def test_a_method_is_compared_on_the_items_that_both_answered() -> None:
    fast = {
        "completion_tokens": 20,
        "decode_seconds": 2.0,
        "drafted_tokens": 16,
        "accepted_tokens": 12,
        "rejections": 3,
        "rounds": 5,
    }
    records = [record(str(i), score=float(i < 4)) for i in range(8)]
    records += [
        record(str(i), "rapid η=10", 1.0, stats=fast, accepted_at=at, retrieved=i == 2)
        for i, at in ((2, ((5, 4), (4, 2))), (4, ((2, 1),)))
    ]
    lc, rapid = summarize(records, METRICS)["rows"]

    assert lc == {
        "method": "lc",
        "base": "lc",
        "options": {},
        "items": 8,
        "scores": {
            "accuracy": rate([1] * 4 + [0] * 4)._asdict(),
            "f1": mean([0.5] * 4 + [0] * 4)._asdict(),
        },
        "difference": None,
        "tokens_per_second": 5,
        "speedup": None,
        "acceptance_ratio": None,
        "acceptance_rate": None,
        "tokens_per_round": None,
        "accepted_at": (),
        "retrieved": None,
        "fell_back": 0,
        "at_once": 1,
    }
    assert rapid["difference"]["value"] == 0.5  # of items 2 and 4, lc has only the first
    measured = {
        "items": 2,
        "tokens_per_second": 10,
        "speedup": 2,
        "acceptance_ratio": 0.75,
        "acceptance_rate": 0.8,
        "tokens_per_round": 4,
        "accepted_at": ((7, 5), (4, 2)),
        "retrieved": 0.5,
    }
    assert {name: rapid[name] for name in measured} == measured


def test_answers_that_were_decoded_at_once_have_no_speed() -> None:
    records = [record(str(i), at_once=3) for i in range(2)]
    records += [record("0", "rag"), record("1", "rag")]
    lc, rag = summarize(records, METRICS)["rows"]
    assert (lc["tokens_per_second"], lc["at_once"]) == (None, 3)
    assert (rag["tokens_per_second"], rag["speedup"], rag["at_once"]) == (5, None, 1)


def test_differences_are_paired() -> None:
    # Every item is 0.1 better: the spread between items is no spread of the difference.
    records = [record(str(i), score=i / 10) for i in range(5)]
    records += [record(str(i), "rag", score=i / 10 + 0.1) for i in range(5)]
    _, rag = summarize(records, METRICS)["rows"]
    assert list(rag["difference"].values()) == pytest.approx([0.1, 0.1, 0.1])


def test_groups_are_summarized_apart() -> None:
    records = [
        record(f"{length} {i}", method, score, groups={"length": length})
        for length, score in (("short", 1.0), ("long", 0.0))
        for i in range(3)
        for method in ("lc", "rag")
    ]
    groups = summarize(records, METRICS)["groups"]
    assert list(groups) == ["length"]
    assert list(groups["length"]) == ["long", "short"]
    long, short = groups["length"]["long"], groups["length"]["short"]
    assert [row["method"] for row in long] == ["lc", "rag"]
    assert [row["scores"]["accuracy"]["value"] for row in (*long, *short)] == [0, 0, 1, 1]


def test_answers_without_a_draft_are_counted() -> None:
    skipped = {"draft_skipped": "no chunk reached similarity 0.3"}
    records = [record("1", "rapid η=10", stats=skipped), record("2", "rapid η=10")]
    assert summarize(records, METRICS)["rows"][0]["fell_back"] == 1


def test_a_summary_without_the_baseline_or_records_is_json() -> None:
    found = summarize([record("1", "rag", stats={})], METRICS)
    (row,) = json.loads(json.dumps(found, allow_nan=False))["rows"]
    assert (row["difference"], row["speedup"], row["tokens_per_second"]) == (None, None, None)
    assert row["scores"]["f1"] == {"value": 0.5, "low": None, "high": None}
    assert summarize([], METRICS) == {"rows": [], "groups": {}}


def test_the_summary_needs_no_torch() -> None:
    code = "import sys, rapid_llm.evaluation.summary; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- the report -----------------------------------------------------------------------------


def cells(text: str, *method: str) -> list[list[str]]:
    """The cells of the lines that begin with a method."""
    lines = [[cell.strip() for cell in one.strip("|").split("|")] for one in text.splitlines()]
    return [one for one in lines if one[0] in method]


def test_a_report_has_scores_differences_and_speeds(tmp_path: Path) -> None:
    fast = {"completion_tokens": 10, "decode_seconds": 0.5, "drafted_tokens": 8, "rounds": 5,
            "accepted_tokens": 6, "rejections": 1}  # fmt: skip
    records = [record(str(i), score=float(i == 0)) for i in range(4)]
    records += [
        record(str(i), "rapid", float(i < 3), stats=fast, retrieved=i < 2) for i in range(4)
    ]
    written(tmp_path / "runs" / "one", *records, model="tiny")
    written(tmp_path / "runs" / "two", record("1"))
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    text = report.read_text(encoding="utf-8")

    assert report == tmp_path / "out" / "report.md"
    assert "`task=needle`, `model=tiny`" in text
    assert text.index("## one") < text.index("## two")
    lc, lc_speed = cells(text.partition("## two")[0], "lc")
    rapid, rapid_speed = cells(text.partition("## two")[0], "rapid")
    # Wilson's interval of 1 of 4 and of 3 of 4; 40 tokens in 8 s and in 2 s.
    assert lc[:3] == ["lc", "4", "25.0 (4.6, 69.9)"]
    assert lc[-1] == "–"
    assert rapid[2] == "75.0 (30.1, 95.4)"
    assert rapid[-1].startswith("+50.0 (")
    assert lc_speed == ["lc", "5.0", "–", "–", "–", "–", "–", "0"]
    assert rapid_speed == ["rapid", "20.0", "4.00", "0.75", "0.86", "2.0", "0.50", "0"]
    assert ["lc", "1", "100.0 (20.7, 100.0)", "50.0", "–"] in cells(text, "lc")  # no interval of f1
    assert re.search(r"^\| *method *\| *items *\|", text, re.MULTILINE)


def test_a_report_says_that_answers_were_decoded_at_once(tmp_path: Path) -> None:
    written(tmp_path / "one", record("1"), max_sequences=1)
    written(tmp_path / "two", record("1", at_once=3), record("2", at_once=2), max_sequences=3)
    text = write_report([tmp_path], tmp_path / "out").read_text(encoding="utf-8")
    one, two = text.partition("## two")[::2]
    assert "were decoded at once" not in one
    assert "Up to 3 answers were decoded at once" in two
    assert "`max_sequences=3`" in two
    assert cells(two, "lc")[1][1] == "–"
    missing = text.partition("## What is missing")[2]
    assert "--max-sequences 3" in missing


def test_a_report_names_what_is_missing_with_its_command(tmp_path: Path) -> None:
    records = [record(str(i)) for i in range(4)] + [record(str(i), "rag") for i in range(3)]
    settings = {"model": "tiny", "drafter": None, "context_tokens": 6000, "gamma": 4}
    folder = written(tmp_path / "a run", *records, **settings)
    text = write_report([folder], tmp_path).read_text(encoding="utf-8")
    missing = text.partition("## What is missing")[2].partition("\n## ")[0]
    same = f"--model tiny --context-tokens 6000 --gamma 4 --limit 4 --out '{folder}'`"
    assert f"- a run: `rag` answered 3 of 4 items. `rapid-llm eval needle --method rag {same}" in (
        missing
    )
    for method in ("sd", "rapid", "streaming", "triforce", "rest", "speculative-rag"):
        assert f"- a run: `{method}`. `rapid-llm eval needle --method {method} {same}" in missing
    assert "`lc`." not in missing
    assert f"rapid-llm eval needle --method rapid --irrelevant {same}" in missing
    assert f"rapid-llm eval needle --method rapid --dynamic-eta {same}" in missing


def test_the_papers_figures_stand_beside_ours_and_are_marked(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", record("1"))
    text = write_report([folder], tmp_path).read_text(encoding="utf-8")
    published = (resources.files("rapid_llm") / "data" / "report.md").read_text("utf-8")
    assert text.rstrip().endswith(published.rstrip())
    assert "arXiv 2502.20330" in published
    assert "A800" in published
    rows = cells(published, "LLaMA-3.1-8B", "LLaMA-3.1-70B", "Qwen2.5-7B", "Qwen2.5-72B")
    assert len(rows) == 16
    for row in rows:  # copied right: each average is that of its parts
        *parts, average = map(float, row[3:7])
        assert sum(parts) / 3 == pytest.approx(average, abs=0.0051), row
    averages = {tuple(row[:3]): row[6] for row in rows}
    assert averages["LLaMA-3.1-8B", "lc", "–"] == "39.33"  # as in the abstract
    assert averages["LLaMA-3.1-8B", "rapid", "LLaMA-3.1-8B"] == "42.83"


def test_folders_without_a_run_and_damaged_runs_are_named(tmp_path: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(DataError, match=match):
            write_report([folder], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "no", r"no holds no results\.jsonl.*rapid-llm eval --out")
    refused(written(tmp_path / "empty"), r"results\.jsonl holds no answer yet")
    refused(written(tmp_path / "a", record("0"), metrics={}), r"run\.json has no 'metrics'")
    scoreless = written(tmp_path / "b", record("0"), metrics={"rouge": "mean"})
    refused(scoreless, r"item '0' of method 'lc' has no score 'rouge'")
    (scoreless / SETTINGS).unlink()
    refused(scoreless, r"run\.json cannot be read")


def test_the_command_writes_a_report_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "run", record("1"))
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").exists()
    assert cli.main(["report", str(tmp_path / "out")]) == 2
    assert "holds no results.jsonl" in capsys.readouterr().err
