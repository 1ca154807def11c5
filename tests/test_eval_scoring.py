"""Scores of the evaluation, each worked out by hand from the benchmark's own definition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from rapid_llm.errors import JudgeError
from rapid_llm.evaluation.judge import Judge
from rapid_llm.evaluation.scoring import (
    contains,
    exact_match,
    normalise,
    rouge,
    token_f1,
)
from rapid_llm.evaluation.tasks.infinitebench import chose, first_number, values
from rapid_llm.evaluation.tasks.longbench import extract_choice


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Cat!\n", "cat"),
        ("an apple, a pear & the plum", "apple pear plum"),
        ("theatre, atlas", "theatre atlas"),  # articles are words, not beginnings
        ("It's 1,000", "its 1000"),
        ("a-n", ""),  # punctuation goes first, which leaves an article
        ("…", "…"),  # ASCII punctuation only
    ],
)
def test_normalised_as_squad_does(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_contains_looks_for_any_reference_in_the_answer() -> None:
    assert contains("It was the Red-Fox.", ["blue hen", "the redfox"]) == 1
    assert contains("red", ["red fox"]) == 0  # not the answer in the reference


def test_exact_match_is_of_the_whole_normalised_answer() -> None:
    assert exact_match("The red fox.", ["hen", "Red fox"]) == 1
    assert exact_match("The red fox ran.", ["red fox"]) == 0


def test_f1_counts_common_words_and_takes_the_best_reference() -> None:
    # {cat, sat, on, mat} and {cat, on, mat}: precision 3/4, recall 1.
    assert token_f1("The cat sat on a mat", ["cat on the mat"]) == pytest.approx(6 / 7)
    # The word "ho" is common once, not twice: precision 1/2, recall 1.
    assert token_f1("ho ho", ["nothing", "ho"]) == pytest.approx(2 / 3)
    assert token_f1("hen", ["fox"]) == 0
    assert token_f1("", ["fox"]) == 0


def test_rouge_l_counts_words_in_order_and_its_sum_each_line() -> None:
    reference, answer = "the cat sat\ndogs bark", "dogs bark loud\nthe cat"
    # Of 5 words each, one after the other, "dogs bark" (or "the cat") are in order: 2/5.
    assert rouge("rougeL", answer, [reference]) == pytest.approx(0.4)
    # Line by line, "the cat" and "dogs bark" are found: 4 of 5 and 4 of 5.
    assert rouge("rougeLsum", answer, [reference]) == pytest.approx(0.8)
    assert rouge("rougeLsum", answer, ["nothing", reference]) == pytest.approx(0.8)
    # Words are not stemmed, as in the evaluate library.
    assert rouge("rougeLsum", "cats", ["cat"]) == 0
    assert rouge("rougeLsum", "", ["cat"]) == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        ("B. The mill", True),
        ("A", False),
        ("Because of the mill", True),  # its first character decides
        ("The mill", True),  # the option itself
        ("So the answer is: B.", True),
        ("So the answer is B", True),
        ("I say, answer: The mill", True),
        ("So the answer is: C, not B", False),
        ("The correct option is B", True),
        ("the answer is", False),
        ("I think that B fits", True),
        ("I think that C or B fits", False),  # the first letter counts
        ("I do not know", False),
        ("  ", False),
    ],
)
def test_an_option_is_read_as_infinitebench_reads_it(answer: str, right: bool) -> None:
    assert chose(answer, "B", "The mill") is right


def test_numbers_and_values_are_read_as_infinitebench_reads_them() -> None:
    assert first_number("The key is 00123, or 45.") == "00123"
    assert first_number("none") is None
    assert values('{"k": "v-1"}, or v2!') == ["k", "v-1", "or", "v2"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (C).", "C"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is B", "B"),
        ("The correct answer is B. No: The correct answer is (D)", "D"),  # brackets come first
        ("The answer is (C)", None),
        ("the correct answer is (C)", None),
        ("The correct answer is (E)", None),
        ("C", None),
    ],
)
def test_a_choice_is_read_as_longbench_reads_it(answer: str, letter: str | None) -> None:
    assert extract_choice(answer) == letter


# --- the judge ---------------------------------------------------------------------------------


@contextmanager
def endpoint(reply: str, status: int = 200) -> Iterator[tuple[Judge, list[Any]]]:
    """A judge whose endpoint says ``reply``, and the requests that it gets."""
    requests: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            is_page = reply.startswith("<")
            message = {"role": "assistant", "content": reply}
            body = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
            if status != 200:
                body = {"error": {"message": reply}}
            data = (reply if is_page else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if is_page else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        yield Judge("judge-1", base_url=url, api_key="any"), requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


QUESTION = [{"role": "user", "content": "How many legs has a hen?"}]


@pytest.mark.parametrize(
    ("reply", "rating"), [("Good.\nRating: [[7]]", 7), ("[[8.5]] it is", 8.5), ("[[ 10 ]]", 10)]
)
def test_the_judge_reads_the_rating(reply: str, rating: float) -> None:
    with endpoint(reply) as (judge, requests):
        assert judge.rate(QUESTION, "Two.") == rating
    (request,) = requests
    assert request["model"] == "judge-1"
    assert request["temperature"] == 0
    shown = request["messages"][-1]["content"]
    assert "How many legs has a hen?" in shown
    assert "Two." in shown
    assert "Reference" not in shown


def test_the_judge_is_shown_the_reference_where_there_is_one() -> None:
    with endpoint("[[3]]") as (judge, requests):
        judge.rate(QUESTION, "Four.", "A hen has two.")
    instruction, shown = (message["content"] for message in requests[0]["messages"])
    assert "reference answer" in instruction
    assert "A hen has two." in shown


@pytest.mark.parametrize("reply", ["I would say seven.", "[[0]]", "[[11]]", "[7]", ""])
def test_a_reply_without_a_rating_is_an_error(reply: str) -> None:
    with (
        endpoint(reply) as (judge, _),
        pytest.raises(JudgeError, match="'judge-1' gave no rating from 1 to 10"),
    ):
        judge.rate(QUESTION, "Two.")


def test_an_endpoint_that_fails_is_an_error_with_its_reason() -> None:
    with (
        endpoint("there is no judge-1", status=404) as (judge, _),
        pytest.raises(JudgeError, match=r"127\.0\.0\.1.* failed .*there is no judge-1.*check"),
    ):
        judge.rate(QUESTION, "Two.")


def test_a_page_that_is_no_endpoint_is_an_error() -> None:
    with (
        endpoint("<html>Welcome</html>") as (judge, _),
        pytest.raises(JudgeError, match="check the base URL"),
    ):
        judge.rate(QUESTION, "Two.")


def test_a_judge_takes_its_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(JudgeError, match="set OPENAI_API_KEY"):
        Judge("judge-1")
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    Judge("judge-1")
