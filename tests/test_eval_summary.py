"""Records read back, intervals, and what the summary makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from rapid_llm.errors import DocumentError
from rapid_llm.evaluation import intervals
from rapid_llm.evaluation.records import RESULTS, SETTINGS, Record, read_records, read_settings
from rapid_llm.evaluation.summary import summarize

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


# --- records --------------------------------------------------------------------------------


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [
        record("1", groups={"length": "short"}, accepted_at=((3, 2), (2, 0)), retrieved=True),
        record("2", "rapid η=10", 0.0),
    ]
    (tmp_path / RESULTS).write_text("".join(r.as_line() for r in written), encoding="utf-8")
    assert read_records(tmp_path) == written


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    whole = record("1").as_line().encode()
    torn = record("2", "rapid η=10").as_line().encode()
    for cut in range(len(torn)):  # inside a character too
        (tmp_path / RESULTS).write_bytes(whole + torn[:cut])
        assert [r.item for r in read_records(tmp_path)] == ["1"]


@pytest.mark.parametrize(
    ("line", "mention"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({"task": "needle"}), "'item' is missing"),
        (record("1").as_line().replace('"base"', '"basis"'), "'basis' is unknown"),
        (record("1").as_line().replace('"accepted_at": []', '"accepted_at": [1]'), "accepted_at"),
        (record("1").as_line().replace('"options": {}', '"options": 3'), "'options'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, mention: str) -> None:
    good = record("0").as_line()
    (tmp_path / RESULTS).write_text(good + line.strip() + "\n" + good, encoding="utf-8")
    with pytest.raises(DocumentError, match=mention) as caught:
        read_records(tmp_path)
    assert f"{tmp_path / RESULTS}, line 2" in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    for read, name in ((read_records, RESULTS), (read_settings, SETTINGS)):
        with pytest.raises(DocumentError, match=name):
            read(tmp_path)
    (tmp_path / SETTINGS).write_text("[]")
    with pytest.raises(DocumentError, match="JSON object"):
        read_settings(tmp_path)
    (tmp_path / RESULTS).write_bytes(b"\xff\n")
    with pytest.raises(DocumentError, match="UTF-8"):
        read_records(tmp_path)


# --- intervals ------------------------------------------------------------------------------


def test_rates_have_wilson_s_interval() -> None:
    # (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964, by hand
    assert intervals.rate([1] * 8 + [0] * 2) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-5)
    assert intervals.rate([0] * 10) == pytest.approx((0, 0, 0.277533), abs=1e-5)
    assert intervals.rate([1.0]) == pytest.approx((1, 0.206543, 1), abs=1e-5)


def test_means_have_a_bootstrap_interval_that_repeats() -> None:
    values = [0.1, 0.9, 0.4, 0.4, 0.7, 0.2, 0.6, 0.5]
    value, low, high = intervals.mean(values)
    assert value == pytest.approx(0.475)
    # about mean ± 1.96·s/√n, s of the sample being 0.2605
    assert low == pytest.approx(0.475 - 0.17, abs=0.03)
    assert high == pytest.approx(0.475 + 0.17, abs=0.03)
    assert intervals.mean(values) == (value, low, high)


def test_degenerate_means() -> None:
    assert intervals.mean([0.25] * 5) == (0.25, 0.25, 0.25)
    value, low, high = intervals.mean([0.5])
    assert value == 0.5
    assert isnan(low)
    assert isnan(high)


def test_differences_are_paired() -> None:
    easy_to_hard = [0.9, 0.7, 0.5, 0.3, 0.1]
    better = [x + 0.1 for x in easy_to_hard]
    assert intervals.difference(better, easy_to_hard) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="zip"):
        intervals.difference([1.0], [1.0, 0.0])


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
    lc, rapid = summarize(records, METRICS).rows

    assert (lc.method, lc.items, lc.difference, lc.speedup) == ("lc", 8, None, None)
    assert lc.scores["accuracy"] == intervals.rate([1] * 4 + [0] * 4)
    assert lc.scores["f1"] == intervals.mean([0.5] * 4 + [0] * 4)
    assert lc.tokens_per_second == 5
    assert (lc.acceptance_ratio, lc.acceptance_rate, lc.tokens_per_round) == (None, None, None)
    assert (lc.accepted_at, lc.retrieved) == ((), None)

    assert rapid.items == 2
    assert rapid.difference is not None
    assert rapid.difference.value == 0.5  # of items 2 and 4, lc has only the first
    assert rapid.tokens_per_second == 10
    assert rapid.speedup == 2
    assert rapid.acceptance_ratio == 0.75
    assert rapid.acceptance_rate == 0.8
    assert rapid.tokens_per_round == 4
    assert rapid.accepted_at == ((7, 5), (4, 2))
    assert rapid.retrieved == 0.5


def test_groups_are_summarized_apart() -> None:
    records = [
        record(f"{length} {i}", method, score, groups={"length": length})
        for length, score in (("short", 1.0), ("long", 0.0))
        for i in range(3)
        for method in ("lc", "rag")
    ]
    groups = summarize(records, METRICS).groups
    assert list(groups) == ["length"]
    assert list(groups["length"]) == ["long", "short"]
    long, short = groups["length"]["long"], groups["length"]["short"]
    assert [row.method for row in long] == ["lc", "rag"]
    assert [row.scores["accuracy"].value for row in (*long, *short)] == [0, 0, 1, 1]


def test_answers_without_a_draft_are_counted() -> None:
    skipped = {"draft_skipped": "no chunk reached similarity 0.3"}
    records = [record("1", "rapid η=10", stats=skipped), record("2", "rapid η=10")]
    assert summarize(records, METRICS).rows[0].fell_back == 1


def test_a_summary_without_the_baseline_or_records() -> None:
    (row,) = summarize([record("1", "rag", stats={})], METRICS).rows
    assert (row.difference, row.speedup, row.tokens_per_second) == (None, None, None)
    empty = summarize([], METRICS)
    assert (empty.rows, empty.groups) == ((), {})


def test_a_summary_is_json(tmp_path: Path) -> None:
    found = summarize([record("1"), record("1", "rag", groups={"a": "b"})], METRICS).as_dict()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["rows"][1]["difference"] == {"value": 0.0, "low": None, "high": None}
    assert again["groups"]["a"]["b"][0]["method"] == "rag"


def test_the_summary_needs_no_torch() -> None:
    code = "import sys, rapid_llm.evaluation.summary; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
