"""The report of an evaluation: its numbers, its plots, what it says is missing."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from rapid_llm import cli
from rapid_llm.errors import DocumentError, MissingDependencyError
from rapid_llm.evaluation import paper
from rapid_llm.evaluation.methods import Sweep
from rapid_llm.evaluation.records import RESULTS, SETTINGS, Record
from rapid_llm.evaluation.report import write_report
from rapid_llm.evaluation.runs import Run, read_runs
from rapid_llm.evaluation.sections import (
    context_length,
    dynamic_eta,
    eta_sweep,
    positions,
    quality_and_speed,
)

METRICS = {"accuracy": "rate"}


def answers(
    method: str,
    right: Sequence[int],
    *,
    base: str | None = None,
    options: Mapping[str, Any] | None = None,
    seconds: float = 1.0,
    drafted: int = 0,
    accepted: int = 0,
    accepted_at: tuple[tuple[int, int], ...] = (),
    prompt_tokens: int = 6000,
) -> Iterator[Record]:
    """Four answers of 10 tokens each; those of the items in ``right`` are right."""
    for item in range(4):
        yield Record(
            task="needle",
            item=str(item),
            method=method,
            base=base or method,
            options=options or {},
            answer="",
            scores={"accuracy": float(item in right)},
            groups={"depth": "front" if item < 2 else "back"},
            stats={
                "completion_tokens": 10,
                "decode_seconds": seconds,
                "rounds": 5,
                "drafted_tokens": drafted,
                "accepted_tokens": accepted,
                "rejections": 1 if drafted else 0,
                "prompt_tokens": prompt_tokens,
            },
            accepted_at=accepted_at,
        )


def swept(right: Mapping[str, Sequence[int]], **sweep: Any) -> Iterator[Record]:
    """Answers of every method of a sweep; half of the drafted tokens are accepted, or all."""
    for spec in Sweep(**sweep).methods(["sd", "rapid"]):
        accepted = 5 if spec.base == "sd" else 10
        yield from answers(
            spec.name,
            right.get(spec.name, ()),
            base=spec.base,
            options=spec.options,
            drafted=10,
            accepted=accepted,
        )


def run(*records: Iterator[Record], folder: str = "run", **settings: Any) -> Run:
    every = [record for some in records for record in some]
    return Run(Path(folder), {"task": "needle", "metrics": METRICS, **settings}, every)


def written(folder: Path, *records: Iterator[Record], **settings: Any) -> Path:
    made = run(*records, **settings)
    folder.mkdir(parents=True)
    text = "".join(record.as_line() for record in made.records)
    (folder / RESULTS).write_text(text, encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps(dict(made.settings)), encoding="utf-8")
    return folder


def cells(text: str) -> list[list[str]]:
    """The rows of the first table, header and rule left out."""
    table = text.split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in table[2:]]


def drawn(axes: Axes) -> dict[str, list[float]]:
    """The values of each line, by its label in the legend."""
    handles, labels = axes.get_legend_handles_labels()
    return {
        label: [float(y) for y in handle[0].get_ydata()]
        for handle, label in zip(handles, labels, strict=True)
        if isinstance(handle, tuple)
    }


# --- the parts -----------------------------------------------------------------------------------


def test_methods_with_intervals_differences_and_speed() -> None:
    section = quality_and_speed(
        run(
            answers("lc", [0], seconds=2.0),
            answers("rapid η=10", [0, 1, 2], base="rapid", seconds=0.5, drafted=8, accepted=6),
        )
    )
    lc, rapid = cells(section.text)
    # Wilson's interval of 1 of 4 and of 3 of 4; 40 tokens in 8 s and in 2 s.
    assert lc[:6] == ["lc", "4", "25.0 [4.6, 69.9]", "–", "5.0", "–"]
    assert rapid[:3] == ["rapid η=10", "4", "75.0 [30.1, 95.4]"]
    assert rapid[3].startswith("+50.0 [")
    # 24 of 32 drafted, and of the 24 + 4 judged; 10 tokens in 5 rounds.
    assert rapid[4:9] == ["20.0", "4.00", "75.0", "0.86", "2.0"]


def test_methods_by_group() -> None:
    section = quality_and_speed(run(answers("lc", [0]), answers("rag", [2, 3])))
    assert "| accuracy, %, by depth | back | front |" in section.text
    assert "| lc | 0.0 [0.0, 65.8], n = 2 | 50.0 [9.5, 90.5], n = 2 |" in section.text
    assert "| rag | 100.0 [34.2, 100.0], n = 2 | 0.0 [0.0, 65.8], n = 2 |" in section.text


def test_methods_are_drawn_in_order_with_intervals_and_ratios() -> None:
    figure = quality_and_speed(
        run(answers("lc", [0], seconds=2.0), answers("rag", [0, 1], seconds=1.0))
    ).figure
    quality, speed = figure.axes
    assert [label.get_text() for label in quality.get_yticklabels()] == ["lc", "rag"]
    dots = [container.lines[0].get_xdata()[0] for container in quality.containers]
    assert dots == pytest.approx([25, 50])
    bars = [container.lines[2][0].get_segments()[0][:, 0] for container in quality.containers]
    assert bars[0] == pytest.approx([4.6, 69.9], abs=0.05)
    assert [c.lines[0].get_xdata()[0] for c in speed.containers] == pytest.approx([5, 10])
    assert [text.get_text() for text in speed.texts] == ["2.00 × lc"]
    assert quality.get_xlabel() == "accuracy, %"
    assert speed.get_xlabel() == "decoding, tokens/s"


def test_without_lc_nothing_is_compared() -> None:
    section = quality_and_speed(run(answers("rag", [0])))
    (rag,) = cells(section.text)
    assert rag[3] == rag[5] == "–"
    assert not section.figure.legends


def test_eta_sweep_has_a_line_for_relevant_and_one_for_irrelevant_retrieval() -> None:
    right = {
        "sd": [0],
        "rapid η=5": [0, 1],
        "rapid η=20": [0, 1, 2],
        "sd, irrelevant": [1, 2],
        "rapid η=5, irrelevant": [1],
        "rapid η=20, irrelevant": [],
    }
    section = eta_sweep(run(answers("lc", [0]), swept(right, eta=[20, 5], irrelevant=True)))
    assert section is not None
    score, accepted = section.figure.axes
    assert drawn(score) == {
        "relevant retrieval": [25, 50, 75],
        "irrelevant retrieval": [50, 25, 0],
    }
    assert drawn(accepted) == {
        "relevant retrieval": [50, 100, 100],
        "irrelevant retrieval": [50, 100, 100],
    }
    assert [tick.get_text() for tick in accepted.get_xticklabels()] == ["0", "5", "20"]
    assert [row[:2] for row in cells(section.text)] == [
        [retrieval, eta] for retrieval in ("relevant", "irrelevant") for eta in ("0", "5", "20")
    ]
    assert cells(section.text)[0][4] == "50.0 [50.0, 50.0]"


def test_sweeps_over_other_options_are_lines_of_their_own() -> None:
    section = eta_sweep(run(swept({}, eta=[5], gamma=[4, 8])))
    assert section is not None
    assert set(drawn(section.figure.axes[0])) == {
        "relevant, gamma=4 retrieval",
        "relevant, gamma=8 retrieval",
    }


def test_a_single_eta_or_a_dynamic_one_is_no_sweep() -> None:
    rapid = answers("rapid η=10", [], base="rapid", options={"eta": 10.0})
    dynamic = answers(
        "rapid η=5, dynamic η", [], base="rapid", options={"eta": 5.0, "dynamic_eta": True}
    )
    assert eta_sweep(run(rapid, dynamic)) is None


def test_context_length_tells_where_rapid_begins_to_pay() -> None:
    def at(tokens: int, seconds: float) -> Run:
        return run(
            answers("lc", [0], prompt_tokens=tokens, seconds=1.0),
            answers("rapid η=10", [0, 1], base="rapid", prompt_tokens=tokens, seconds=seconds),
            answers(f"only at {tokens}", [], base="sd"),
        )

    section = context_length([at(4000, 0.8), at(1000, 1.6), at(2000, 0.5)])
    assert section is not None
    score, speed = section.figure.axes
    assert drawn(score) == {"lc": [25, 25, 25], "rapid η=10": [50, 50, 50]}
    assert drawn(speed) == {"rapid η=10": pytest.approx([0.625, 2, 1.25])}
    ticks = [tick.get_text() for tick in speed.get_xticklabels()]
    assert ticks == ["1,000", "2,000", "4,000"]
    assert "- `rapid η=10` is faster than `lc` from 2,000 tokens on." in section.text
    never = context_length([at(1000, 0.5), at(2000, 1.5)])
    assert never is not None
    assert "`rapid η=10` is not faster than `lc` at the longest context." in never.text
    assert context_length([at(1000, 1)]) is None


def test_acceptance_by_position() -> None:
    # Four answers each: 20 judged at the first position, 12 at the second, 4 at the third.
    at = ((5, 3), (3, 1), (1, 1))
    section = positions(
        run(
            answers("lc", []),
            answers("sd", [], accepted_at=at),
            answers("sd, irrelevant", [], options={"irrelevant": True}, accepted_at=at),
        )
    )
    assert section is not None
    assert cells(section.text) == [["sd", "60 (20)", "33 (12)"]]
    assert drawn(section.figure.axes[0]) == {"sd": pytest.approx([60, 100 / 3])}
    assert positions(run(answers("lc", []))) is None


def test_dynamic_eta_stands_beside_constant_eta() -> None:
    section = dynamic_eta(
        run(
            answers("lc", [0]),
            answers("rapid η=10", [0], base="rapid", options={"eta": 10.0}),
            answers(
                "rapid η=10, dynamic η",
                [0, 1],
                base="rapid",
                options={"eta": 10.0, "dynamic_eta": True},
            ),
        )
    )
    assert section is not None
    assert [row[:3] for row in cells(section.text)] == [
        ["rapid η=10", "constant", "25.0 [4.6, 69.9]"],
        ["rapid η=10, dynamic η", "dynamic", "50.0 [15.0, 85.0]"],
    ]
    assert dynamic_eta(run(answers("rapid η=10", [], base="rapid"))) is None


def test_an_unknown_interval_is_drawn_as_a_point() -> None:
    one = [next(answers("lc", [0]))]
    section = quality_and_speed(Run(Path("run"), {"metrics": {"accuracy": "mean"}}, one))
    assert cells(section.text)[0][2] == "100.0"
    assert section.figure.axes[0].containers[0].lines[0].get_xdata()[0] == 100


# --- the whole -----------------------------------------------------------------------------------


def test_a_report_of_several_folders(tmp_path: Path) -> None:
    dynamic = {"eta": 5.0, "dynamic_eta": True}
    written(
        tmp_path / "runs" / "needle-6k",
        answers("lc", [0]),
        swept({}, eta=[5, 20], irrelevant=True),
        answers("rapid η=5, dynamic η", [], base="rapid", options=dynamic),
        answers("rest", [], accepted_at=((4, 3), (3, 2))),
        model="tiny",
    )
    written(tmp_path / "runs" / "needle 1k", answers("lc", [0], prompt_tokens=1000), model="tiny")
    out = tmp_path / "out"
    report = write_report(read_runs([tmp_path / "runs"]), out)

    assert report == out / "report.md"
    text = report.read_text(encoding="utf-8")
    plots = sorted(path.name for path in out.glob("*.png"))
    assert plots == [
        "needle-1k+needle-6k-length.png",
        "needle-1k-methods.png",
        "needle-6k-dynamic.png",
        "needle-6k-eta.png",
        "needle-6k-methods.png",
        "needle-6k-positions.png",
    ]
    for plot in plots:
        assert f"]({plot})" in text
        assert (out / plot).read_bytes().startswith(b"\x89PNG\r\n")
        assert (out / plot).stat().st_size > 5000


def test_a_report_names_what_is_missing_with_its_command(tmp_path: Path) -> None:
    folder = written(
        tmp_path / "a run",
        answers("lc", [0]),
        (record for record in answers("rag", [0]) if record.item != "3"),
        model="tiny",
        drafter=None,
        context_tokens=6000,
        gamma=4,
    )
    text = write_report(read_runs([folder]), tmp_path).read_text(encoding="utf-8")
    missing = text.partition("## What is missing")[2]
    assert "`rag` answered 3 of 4 items" in missing
    assert "`sd`, `rapid`, `streaming`, `triforce`, `rest`, `speculative-rag`" in missing
    same = f"--model tiny --context-tokens 6000 --gamma 4 --limit 4 --out '{folder}'`"
    assert f"`rapid-llm eval needle --method rapid --irrelevant {same}" in missing
    assert f"--method rapid --eta 0 --eta 5 --eta 10 --eta 20 --eta 40 {same}" in missing
    assert f"--method rapid --dynamic-eta {same}" in missing
    longer = "--context-tokens N --out ANOTHER --model tiny --gamma 4 --limit 4`"
    assert f"Context length. `rapid-llm eval needle {longer}" in missing
    assert text.count("Not measured") == 4


def test_the_papers_figures_are_marked_as_the_papers(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", answers("lc", [0]))
    text = write_report(read_runs([folder]), tmp_path).read_text(encoding="utf-8")
    assert "arXiv 2502.20330" in text
    assert "A800" in text
    row = "| LLaMA-3.1-8B | rapid | LLaMA-3.1-8B | 34.90 | 63.32 | 30.27 | 42.83 | 34.2 | 2.10 |"
    table = text[text.index("**Paper**, Table 1") : text.index("**Paper**, Table 2")]
    assert row in table
    for title in ("Table 1", "Table 2", "Table 3"):
        assert f"**Paper**, {title}" in text


def test_the_papers_averages_are_those_of_their_parts() -> None:
    for row in paper.MAIN_RESULTS:
        parts = (row.qa + row.choice + row.summary) / 3
        assert parts == pytest.approx(row.average, abs=0.0051), row
    headline = {(row.target, row.method, row.drafter): row.average for row in paper.MAIN_RESULTS}
    assert headline["LLaMA-3.1-8B", "lc", None] == 39.33  # as in the abstract
    assert headline["LLaMA-3.1-8B", "rapid", "LLaMA-3.1-8B"] == 42.83


def test_folders_of_the_same_name_keep_their_plots_apart(tmp_path: Path) -> None:
    folders = [written(tmp_path / name / "needle", answers("lc", [0])) for name in "ab"]
    write_report(read_runs(folders), tmp_path)
    assert (tmp_path / "needle-methods.png").exists()
    assert (tmp_path / "needle~2-methods.png").exists()


# --- bad folders, the command --------------------------------------------------------------------


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"holds no results\.jsonl.*rapid-llm eval --out"):
        read_runs([tmp_path])
    with pytest.raises(DocumentError, match=r"nowhere holds no results\.jsonl"):
        read_runs([tmp_path / "nowhere"])


def test_a_run_without_answers(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"results\.jsonl holds no answer yet"):
        read_runs([written(tmp_path / "run")])


def test_damaged_files_are_named_with_line_and_field(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", answers("lc", [0]))
    lines = (folder / RESULTS).read_text(encoding="utf-8").splitlines(keepends=True)
    lines[2] = lines[2].replace('"scores"', '"score"')
    (folder / RESULTS).write_text("".join(lines), encoding="utf-8")
    with pytest.raises(DocumentError, match=r"results\.jsonl, line 3: field 'score"):
        read_runs([folder])
    (folder / SETTINGS).write_text("{", encoding="utf-8")
    with pytest.raises(DocumentError, match=r"run\.json is not JSON"):
        read_runs([folder])
    (folder / SETTINGS).unlink()
    with pytest.raises(DocumentError, match=r"run\.json cannot be read"):
        read_runs([folder])


def test_settings_without_metrics_and_records_without_a_score(tmp_path: Path) -> None:
    nameless = written(tmp_path / "nameless", answers("lc", [0]), metrics={})
    with pytest.raises(DocumentError, match=r"run\.json: field 'metrics' is \{\}"):
        read_runs([nameless])
    scoreless = written(tmp_path / "scoreless", answers("lc", [0]), metrics={"f1": "mean"})
    with pytest.raises(DocumentError, match=r"item '0' of method 'lc' has no score 'f1'"):
        read_runs([scoreless])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", answers("lc", [0]))
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        write_report(read_runs([folder]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "run", answers("lc", [0]))
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "run-methods.png").exists()
    assert cli.main(["report", str(tmp_path / "out")]) == 2
    assert "holds no results.jsonl" in capsys.readouterr().err
