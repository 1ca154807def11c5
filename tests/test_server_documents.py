"""Documents, chunks and files of requests: what both models read, and what the answer tells."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pdfs import pdf
from serving import (
    RETRIEVAL,
    SAMPLING,
    SPECULATION,
    Server,
    WordEmbedder,
    events,
    refused,
    served,
    tiny_decoder,
)
from test_encoding import user

from rapid_llm import RapidDecoder, RapidPipeline
from rapid_llm.context.prompts import build_messages, with_document
from rapid_llm.stats import NOTHING_RETRIEVED

FOX = "The fox lives in the den. " * 12
OWL = "The owl sleeps in the tree. " * 12
QUESTION = "Where does the owl sleep?"
CHAT = user(QUESTION)


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def server(decoder: RapidDecoder, folder: Path) -> Iterator[Server]:
    retrieval = replace(RETRIEVAL, store=str(folder))
    with served(decoder, retrieval=retrieval, max_documents=8, max_body_bytes=200_000,
                max_files_bytes=5_000) as server:  # fmt: skip
        yield server


@pytest.fixture
def ask(server: Server) -> Any:
    def ask(**body: Any) -> httpx.Response:
        rapid = {"return_tokens": True, **body.pop("rapid", {})}
        body = {"messages": CHAT, "rapid": rapid, **body}
        return httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)

    return ask


@pytest.fixture
def upload(server: Server) -> Any:
    def upload(name: str, data: bytes, **form: Any) -> httpx.Response:
        files = {"file": (name, data)}
        return httpx.post(server.url + "/v1/files", files=files, data=form, timeout=60)

    return upload


def tokens(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [token["id"] for token in response.json()["rapid"]["tokens"]]


def pipeline(decoder: RapidDecoder, documents: Any, **options: Any) -> RapidPipeline:
    return RapidPipeline(
        decoder,
        documents,
        embedder=WordEmbedder(),
        retrieval=RETRIEVAL,
        sampling=SAMPLING,
        speculation=SPECULATION,
        **options,
    )


# --- documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rapid", "sd", "lc", "rag"])
def test_an_answer_about_documents_is_the_pipeline_s(
    ask: Any, decoder: RapidDecoder, method: Any
) -> None:
    expected = pipeline(decoder, [FOX, OWL]).ask(QUESTION, method)
    response = ask(documents=[FOX, OWL], rapid={"method": method})
    assert tokens(response) == expected.token_ids
    told = response.json()["rapid"]
    assert told["document_ids"] == ["doc_0", "doc_1"]
    assert told["stats"]["method"] == expected.stats.method
    found = () if expected.context is None else expected.context.chunks
    assert [(c["start"], c["end"], c["text"]) for c in told["chunks"]] == [
        (chunk.start, chunk.end, chunk.text) for chunk in found
    ]
    for chunk in told["chunks"]:
        assert chunk["text"] == OWL[chunk["start"] : chunk["end"]]
        assert chunk["document_id"] == "doc_1"


def test_lc_drafts_nothing_whatever_draft_is_given(ask: Any, decoder: RapidDecoder) -> None:
    expected = pipeline(decoder, [FOX, OWL]).ask(QUESTION, "lc")
    response = ask(
        documents=[FOX, OWL], rapid={"method": "lc", "draft_messages": user("The tree.")}
    )
    assert tokens(response) == expected.token_ids
    assert response.json()["rapid"]["stats"]["drafted_tokens"] == 0


@pytest.mark.parametrize(
    "document",
    [OWL, {"text": OWL}, {"text": OWL, "id": "o"}, {"data": OWL}, {"data": {"text": OWL}}],
)
def test_every_form_of_a_document_is_read_alike(ask: Any, document: Any) -> None:
    assert tokens(ask(documents=[document])) == tokens(ask(documents=[OWL]))


def test_a_title_stands_above_its_document_and_moves_no_chunk(
    ask: Any, decoder: RapidDecoder
) -> None:
    response = ask(documents=[{"text": OWL, "title": "Owls"}])
    assert tokens(response) == pipeline(decoder, f"Owls\n\n{OWL}").ask(QUESTION).token_ids
    for chunk in response.json()["rapid"]["chunks"]:
        assert OWL[chunk["start"] : chunk["end"]] in chunk["text"]
        assert chunk["text"].endswith(OWL[chunk["start"] : chunk["end"]])


def test_documents_are_read_in_the_order_of_their_ids(ask: Any) -> None:
    fox, owl = {"text": FOX, "id": "page-10"}, {"text": OWL, "id": "page-2"}
    one, other = ask(documents=[fox, owl]), ask(documents=[owl, fox])
    assert one.json()["rapid"]["document_ids"] == ["page-2", "page-10"]
    assert tokens(one) == tokens(other)
    given = ask(documents=[fox, owl], rapid={"order": "given"})
    assert given.json()["rapid"]["document_ids"] == ["page-10", "page-2"]


def test_a_conversation_keeps_the_documents_in_its_first_question(
    ask: Any, decoder: RapidDecoder
) -> None:
    history = [*user("Who sleeps?"), {"role": "assistant", "content": "The owl."}, *CHAT]
    expected = pipeline(decoder, OWL).ask(QUESTION, history=history[:-1])
    assert tokens(ask(messages=history, documents=[OWL])) == expected.token_ids
    system = [{"role": "system", "content": "Be brief."}, *history]
    lc = tokens(ask(messages=system, documents=[OWL], rapid={"method": "lc"}))
    assert lc == decoder.generate(with_document(system, OWL), sampling=SAMPLING).token_ids


def test_a_second_question_reads_only_what_is_new(ask: Any) -> None:
    long = " ".join(f"The owl has {i} feathers." for i in range(60))
    ask(documents=[long], messages=user("How many feathers?"))
    stats = ask(documents=[long], messages=user("Who has feathers?")).json()["rapid"]["stats"]
    assert stats["cached_tokens"] > 0.7 * stats["prompt_tokens"]


def test_what_does_not_fit_is_refused_or_cut(ask: Any) -> None:
    long = "The owl sleeps in the tree. " * 300
    assert refused(ask(documents=[long]))["code"] == "context_length_exceeded"
    cut = ask(documents=[long], rapid={"truncate": "middle"}).json()["rapid"]["stats"]
    assert cut["omitted_tokens"] > 0


def test_retrieval_options_of_a_request_go_before_the_server_s(ask: Any) -> None:
    few = ask(documents=[FOX, OWL], rapid={"retrieval_tokens": 32}).json()["rapid"]["chunks"]
    many = ask(documents=[FOX, OWL], rapid={"retrieval_tokens": 500}).json()["rapid"]["chunks"]
    assert len(few) < len(many)


def test_documents_of_a_completion_are_asked_for_through_the_template(
    server: Server, decoder: RapidDecoder
) -> None:
    body = {"prompt": QUESTION, "documents": [OWL], "rapid": {"return_tokens": True}}
    response = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    assert tokens(response) == pipeline(decoder, OWL).ask(QUESTION).token_ids


# --- chunks ------------------------------------------------------------------------------------


def test_chunks_of_the_caller_are_what_the_drafter_reads(ask: Any, decoder: RapidDecoder) -> None:
    chunk = "The owl sleeps in the tree."
    documents = [{"text": FOX, "id": "fox"}, {"text": OWL, "id": "owl"}]
    response = ask(documents=documents, chunks=[{"text": chunk, "document_id": "owl", "id": "7"}])
    target = build_messages(f"{FOX}\n\n{OWL}", QUESTION)
    expected = decoder.generate(
        target, build_messages(chunk, QUESTION), sampling=SAMPLING, speculation=SPECULATION
    )
    assert tokens(response) == expected.token_ids
    assert response.json()["rapid"]["chunks"] == [
        {"document_id": "owl", "id": "7", "start": 0, "end": len(chunk), "score": None,
         "text": chunk},
    ]  # fmt: skip


def test_a_chunk_of_a_single_document_needs_no_id(ask: Any) -> None:
    chunks = ask(documents=[OWL], chunks=["in the tree", "nowhere"]).json()["rapid"]["chunks"]
    assert [chunk["start"] for chunk in chunks] == [OWL.index("in the tree"), None]


def test_a_chunk_of_an_unknown_document_is_refused(ask: Any) -> None:
    error = refused(ask(documents=[FOX, OWL], chunks=[{"text": "x", "document_id": "doc_2"}]))
    assert "'doc_2'" in error["message"]
    assert "does not say" in refused(ask(documents=[FOX, OWL], chunks=["x"]))["message"]


def test_where_nothing_was_retrieved_nothing_is_read_unless_asked_for(ask: Any) -> None:
    body = ask(documents=[OWL], chunks=[]).json()
    assert body["choices"][0]["message"]["content"] == ""
    assert body["usage"]["prompt_tokens"] == 0
    assert body["rapid"]["stats"]["draft_skipped"] == NOTHING_RETRIEVED
    whole = ask(documents=[OWL], chunks=[], rapid={"on_empty": "read_all"})
    assert tokens(whole) == tokens(ask(documents=[OWL], rapid={"method": "lc"}))
    none = ask(documents=[OWL], rapid={"threshold": 0.999}).json()["rapid"]["stats"]
    assert "no chunk reached" in none["draft_skipped"]


def test_too_many_or_equal_documents_are_refused(ask: Any) -> None:
    assert "at most 8" in refused(ask(documents=["x"] * 9), 413)["message"]
    assert "at most 8" in refused(ask(documents=["x"], chunks=["x"] * 9), 413)["message"]
    twice = [{"text": "x", "id": "a"}, {"text": "y", "id": "a"}]
    assert "have the id 'a'" in refused(ask(documents=twice))["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_broken_strings_of_a_client_come_back_as_they_were(server: Server, stream: bool) -> None:
    broken = "fox \ud800"
    body = {
        "messages": CHAT,
        "documents": [{"id": broken, "text": f"The {broken} lives."}],
        "chunks": [broken],
        "stream": stream,
    }
    headers = {"content-type": "application/json"}
    url = server.url + "/v1/chat/completions"
    response = httpx.post(url, content=json.dumps(body), headers=headers, timeout=60)
    last = events(response)[-1] if stream else response.json()
    assert last["rapid"]["document_ids"] == [broken]
    assert last["rapid"]["chunks"][0]["text"] == broken
    unknown = json.dumps({"messages": CHAT, broken: 1})
    refused(httpx.post(url, content=unknown, headers=headers))


def test_questions_asked_at_once_on_an_unread_document_read_it_once(decoder: RapidDecoder) -> None:
    text = "The bat hangs in the barn. " * 40  # more than one block of kept KV
    with served(decoder) as server, ThreadPoolExecutor(4) as pool:

        def ask(question: str) -> dict[str, Any]:
            body = {
                "messages": user(question),
                "documents": [text],
                "rapid": {"method": "lc"},
                "max_tokens": 4,
            }
            url = server.url + "/v1/chat/completions"
            used: dict[str, Any] = httpx.post(url, json=body, timeout=60).json()["usage"]
            return used

        usages = list(pool.map(ask, ["Where?", "Who?", "What hangs?", "Why?"]))
    kept = sorted(each["prompt_tokens_details"]["cached_tokens"] for each in usages)
    assert kept[0] == 0
    assert all(count >= 512 for count in kept[1:])


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("owl.txt", OWL.encode()),
        ("owl.md", OWL.encode()),
        ("owl", OWL.encode("utf-16")),
        ("owl.html", f"<html><script>fox</script><p>{OWL}</p></html>".encode()),
    ],
)
def test_an_uploaded_document_is_read_as_its_text(
    ask: Any, upload: Any, server: Server, name: str, data: bytes
) -> None:
    file = upload(name, data, purpose="user_data").json()
    assert file["object"] == "file"
    assert (file["filename"], file["bytes"]) == (name, len(data))
    text = httpx.get(f"{server.url}/v1/files/{file['id']}/content").text
    assert text.strip() == OWL.strip()
    response = ask(documents=[{"file_id": file["id"]}])
    assert response.json()["rapid"]["document_ids"] == [file["id"]]
    assert tokens(response) == tokens(ask(documents=[text]))
    httpx.delete(f"{server.url}/v1/files/{file['id']}")


def test_a_pdf_is_read_as_its_text(upload: Any, server: Server) -> None:
    file = upload("owl.pdf", pdf(["The owl sleeps in the tree."])).json()
    assert "The owl sleeps" in httpx.get(f"{server.url}/v1/files/{file['id']}/content").text
    httpx.delete(f"{server.url}/v1/files/{file['id']}")


def test_files_are_listed_kept_and_deleted(upload: Any, server: Server, ask: Any) -> None:
    url = f"{server.url}/v1/files"
    ids = [upload(f"{n}.txt", OWL.encode()).json()["id"] for n in range(2)]
    listed = httpx.get(url).json()["data"]
    assert sorted(file["id"] for file in listed) == sorted(ids)
    assert httpx.get(f"{url}/{ids[0]}").json() in listed
    assert refused(httpx.get(url, params={"limit": 1}))["param"] == "limit"
    assert httpx.delete(f"{url}/{ids[0]}").json()["deleted"] is True
    for response in (httpx.get(f"{url}/{ids[0]}"), httpx.delete(f"{url}/{ids[0]}")):
        assert refused(response, 404)["code"] == "file_not_found"
    assert refused(ask(documents=[{"file_id": ids[0]}]), 404)["param"] == "file_id"
    httpx.delete(f"{url}/{ids[1]}")
    assert httpx.get(url).json()["data"] == []


@pytest.mark.parametrize("name", ["../../evil.txt", "/etc/passwd", "a\\..\\b.txt", "x" * 4000])
def test_a_client_s_name_is_no_path(upload: Any, server: Server, folder: Path, name: str) -> None:
    file = upload(name, OWL.encode()).json()
    inside = {path.name for path in (folder / "files").iterdir()}
    assert inside == {f"{file['id']}.txt", f"{file['id']}.json"}
    for path in (folder / "files").iterdir():
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(folder / "files").st_mode) == 0o700
    httpx.delete(f"{server.url}/v1/files/{file['id']}")


@pytest.mark.parametrize(
    "file_id", ["/etc/passwd", "../secrets", "file-", "file:///etc/passwd", "http://x/y", "file-*"]
)
def test_no_path_or_url_is_opened_for_a_client(ask: Any, file_id: str) -> None:
    error = refused(ask(documents=[{"file_id": file_id}]), 404)
    assert error["code"] == "file_not_found"


def test_what_holds_no_text_is_refused_without_a_path_of_the_server(
    upload: Any, folder: Path
) -> None:
    for name, data in (("empty.txt", b" "), ("none.txt", b""), ("broken.pdf", b"%PDF-1.4 x"),
                       ("image.png", b"\x89PNG\r\n\x1a\n" + bytes(99))):  # fmt: skip
        error = refused(upload(name, data))
        message = error["message"]
        assert error["param"] == "file"
        assert name in message
        assert str(folder) not in message
    assert list((folder / "files").iterdir()) == []


def test_files_have_a_limit_together(upload: Any, server: Server) -> None:
    first = upload("a.txt", b"a" * 3_000).json()["id"]
    assert refused(upload("b.txt", b"b" * 3_000), 413)["code"] == "storage_full"
    httpx.delete(f"{server.url}/v1/files/{first}")


def test_what_is_kept_beside_the_texts_counts_too(upload: Any) -> None:
    error = refused(upload("é" * 1_000 + ".txt", b"a"), 413)  # six bytes each in JSON
    assert error["code"] == "storage_full"


def test_a_purpose_that_files_are_not_read_for_is_refused(upload: Any, server: Server) -> None:
    error = refused(upload("a.txt", b"a", purpose="fine-tune"))
    assert error["param"] == "purpose"
    assert "files are read as documents, so take user_data or assistants" in error["message"]
    kept = upload("a.txt", b"a", purpose="assistants").json()
    assert kept["purpose"] == "assistants"
    httpx.delete(f"{server.url}/v1/files/{kept['id']}")


def test_a_full_disk_is_told_and_nothing_stays(
    upload: Any, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rapid_llm.server.files.os.replace", full)
    response = upload("owl.txt", OWL.encode())
    assert "No space left" in refused(response, 507)["message"]
    assert response.headers["x-should-retry"] == "false"
    assert list((folder / "files").iterdir()) == []
    monkeypatch.undo()
    kept = upload("owl.txt", b"owl").json()["id"]
    assert httpx.delete(f"{server.url}/v1/files/{kept}").json()["deleted"] is True


def test_forms_are_checked(server: Server) -> None:
    url = f"{server.url}/v1/files"
    assert refused(httpx.post(url, data={"purpose": "x"}))["param"] == "file"
    extra = httpx.post(url, files={"file": ("a.txt", b"a")}, data={"path": "/etc"})
    assert refused(extra)["code"] == "unknown_parameter"


def test_a_file_without_a_form_is_told_what_to_send_and_is_not_repeated(server: Server) -> None:
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {}):
        response = httpx.post(f"{server.url}/v1/files", content=OWL.encode(), headers=headers)
        error = refused(response)
        assert "multipart/form-data with a field file" in error["message"]
        assert error["param"] == "file"
        assert "owl" not in response.text


def test_a_file_that_is_too_long_is_told_the_option(upload: Any) -> None:
    error = refused(upload("a.txt", b"a" * 300_000), 413)
    assert "--max-body-bytes, 200,000" in error["message"]
    assert "/v1/files" not in error["message"]


def test_a_long_body_is_refused_before_it_is_read(server: Server, ask: Any) -> None:
    assert refused(ask(documents=["x" * 300_000]), 413)["code"] == "body_too_long"

    def parts() -> Iterator[bytes]:  # without a Content-Length
        for _ in range(40):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    url = server.url + "/v1/chat/completions"
    refused(httpx.post(url, content=parts(), headers=headers), 413)


def test_files_outlive_a_server_only_in_a_store(decoder: RapidDecoder, tmp_path: Path) -> None:
    for store, kept in ((None, 0), (str(tmp_path), 1)):
        retrieval = replace(RETRIEVAL, store=store)
        with served(decoder, retrieval=retrieval) as server:
            httpx.post(f"{server.url}/v1/files", files={"file": ("a.txt", b"a")})
        with served(decoder, retrieval=retrieval) as server:
            assert len(httpx.get(f"{server.url}/v1/files").json()["data"]) == kept
