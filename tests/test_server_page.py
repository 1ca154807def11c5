"""The page at /, in a real browser."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import installed
from serving import Server, served, tiny_decoder

from rapid_llm.batching import scheduler
from rapid_llm.batching.rounds import run_round

OWL = "The owl sleeps in the tree. " * 12
KEY = "the key"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(tiny_decoder()) as server:
        yield server


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = installed("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "owl.txt"
    path.write_text(OWL + "<b id=evil>x</b>")
    return path


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    reply = httpx.get(server.url)
    assert reply.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in reply.headers["content-security-policy"]
    assert "http://" not in reply.text
    assert "https://" not in reply.text


def test_a_question_on_a_document_is_answered_in_colours(
    server: Server, browser: Any, document: Path
) -> None:
    page = browser.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#model:text-is('tiny')")
    page.set_input_files("#file", str(document))
    page.wait_for_selector("#files:has-text('owl.txt')")
    page.fill("#question", "Where does the owl sleep? <b id=evil>x</b>")
    page.fill("#length", "24")
    page.click("#ask")
    page.wait_for_selector("#speeds tbody tr:nth-child(2)", timeout=60_000)
    tokens = page.query_selector_all("#answer span")
    assert len(tokens) == 24
    origins = {token.get_attribute("class") for token in tokens}
    assert "target" in origins
    assert origins <= {"lookup", "draft", "target"}
    assert page.inner_text("#chunks blockquote").startswith("The owl sleeps")
    assert "plain decoding" in page.inner_text("#speeds")
    assert page.query_selector("#evil") is None
    assert failures == []
    assert page.inner_text("#error") == ""


def test_a_question_waits_for_the_documents_that_were_chosen(
    server: Server, browser: Any, document: Path
) -> None:
    page, held = browser.new_page(), list[Any]()
    page.route("**/v1/files", lambda route: held.append(route))
    page.goto(server.url)
    page.set_input_files("#file", str(document))
    page.wait_for_selector("#ask:disabled")
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    page.wait_for_selector("#ask:enabled")
    assert "owl.txt" in page.inner_text("#files")


def test_what_goes_wrong_is_told_as_text(browser: Any, tmp_path: Path) -> None:
    long, evil = tmp_path / "long.txt", tmp_path / "<b id=evil>.png"
    long.write_text("x" * 20_000)
    evil.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    with served(tiny_decoder(), max_body_bytes=10_000) as server:
        page = browser.new_page()
        page.goto(server.url)

        def told(words: str) -> None:
            page.wait_for_selector(f"#error:has-text('{words}')", timeout=60_000)
            page.wait_for_selector("#ask:enabled")
            assert page.query_selector("#evil") is None

        page.set_input_files("#file", str(long))
        told("--max-body-bytes, 10,000")
        page.set_input_files("#file", str(evil))
        told("<b id=evil>.png")
        page.fill("#question", "Where does the owl sleep?")
        page.fill("#length", "0")
        page.click("#ask")
        told("max_tokens=0")
        page.fill("#length", "5")
        answers = "**/v1/chat/completions"
        page.route(answers, lambda route: route.fulfill(
            content_type="text/event-stream", body='data: {"rapid": {"tokens": []}}\n\n'
        ))  # fmt: skip
        page.click("#ask")
        told("the server closed the connection within the answer")
        page.unroute(answers)
        page.route(answers, lambda route: route.abort())
        page.click("#ask")
        told("fetch")
        page.unroute(answers)
        page.click("#ask")
        page.wait_for_selector("#speeds tbody tr", timeout=60_000)
        assert page.inner_text("#error") == ""


def test_a_stopped_answer_stops_the_server(
    server: Server, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_round(running: Any) -> None:  # so that the answer is under way at the click
        time.sleep(0.05)
        run_round(running)

    monkeypatch.setattr(scheduler, "run_round", slow_round)
    page = browser.new_page()
    page.goto(server.url)
    page.fill("#question", "Where does the owl sleep?")
    page.fill("#length", "1500")
    page.click("#ask")
    page.wait_for_selector("#answer span", timeout=60_000)
    page.click("#stop")
    page.wait_for_selector("#ask:enabled", timeout=60_000)
    for _ in range(100):
        if server.service.admission.active == 0:
            break
        page.wait_for_timeout(50)
    assert server.service.admission.active == 0


def test_a_key_is_asked_for(browser: Any) -> None:
    with served(tiny_decoder(), api_key=KEY) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#key", timeout=60_000)
        page.fill("#key", KEY)
        page.dispatch_event("#key", "change")
        page.wait_for_selector("#model:text-is('tiny')")
