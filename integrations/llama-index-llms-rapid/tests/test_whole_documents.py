"""Which document a node is from, and that the target reads all of it."""

from __future__ import annotations

from pathlib import Path

import chromadb
import pytest
from llama_index.core import (
    Document,
    MockEmbedding,
    SimpleDirectoryReader,
    StorageContext,
    VectorStoreIndex,
)
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import (
    MarkdownNodeParser,
    SentenceSplitter,
    SentenceWindowNodeParser,
)
from llama_index.core.postprocessor import LongContextReorder, MetadataReplacementPostProcessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever, RecursiveRetriever
from llama_index.core.schema import IndexNode, MetadataMode, NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.vector_stores.chroma import ChromaVectorStore

from llama_index.llms.rapid import PipelineError, RapidLLM, RapidSynthesizer
from rapid_llm.errors import DocumentError, InvalidParameterError

QA = PromptTemplate("Text: {context_str}\nQuestion: {query_str}\nAnswer:")
EMBED = MockEmbedding(8)


@pytest.fixture
def llm(decoder):
    return RapidLLM(decoder=decoder, max_tokens=2)


def shown(*documents):
    return "\n\n".join(d.get_content(metadata_mode=MetadataMode.LLM) for d in documents)


def page(number, path="r.pdf", name="r.pdf", **metadata):
    """As a reader of PDFs gives them: an id of its own, the file in the metadata."""
    metadata = {"page_label": str(number), "file_name": name, "file_path": path} | metadata
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return Document(text=f"This is page marker {number} of {path or name}.", metadata=metadata)


def nodes_of(*documents):
    nodes = SentenceSplitter().get_nodes_from_documents(documents)
    return [NodeWithScore(node=node, score=1.0) for node in nodes]


def ask(llm, nodes, documents, **options):
    synthesizer = RapidSynthesizer(llm, documents=documents, text_qa_template=QA, **options)
    return synthesizer.synthesize("What?", nodes)


def asked(spy):
    """What the target read."""
    return spy.target().removeprefix("<s><|user>Text: ").split("\nQuestion: What?")[0]


# --- pages and sections of one file --------------------------------------------------------------


def forms(pages):
    store = SimpleDocumentStore()
    store.add_documents(pages)
    return {
        "list": pages,
        "mapping": {document.id_: document for document in pages},
        "mapping by number": dict(enumerate(pages)),
        "docstore": store,
    }


@pytest.mark.parametrize("form", ["list", "mapping", "mapping by number", "docstore"])
def test_pages_of_a_file_are_one_document_in_the_order_of_their_numbers(llm, spy, form):
    pages = [page(n) for n in (2, 10, 1, 3)]
    other = page(7, path="other.pdf", name="other.pdf")
    response = ask(llm, nodes_of(pages[0]), forms([*pages, other])[form])
    assert asked(spy) == shown(pages[2], pages[0], pages[3], pages[1])
    assert spy.draft().count("page marker") == 1
    assert response.metadata["rapid"]["document_ids"] == ["r.pdf"]


def test_a_plain_engine_reads_the_whole_file_too(decoder, spy):
    pages = [page(n) for n in (1, 2, 3)]
    llm = RapidLLM(decoder=decoder, max_tokens=2, documents=[*pages, page(1, path="o", name="o")])
    index = VectorStoreIndex.from_documents(pages[1:2], embed_model=EMBED)
    response = index.as_query_engine(llm=llm, text_qa_template=QA).query("What?")
    assert asked(spy) == shown(*pages)
    assert len(response.source_nodes) == 1


def test_sections_without_numbers_come_as_they_were_given(llm, spy):
    sections = [
        Document(text=f"Section {word}.", metadata={"file_path": Path("guide.md")})
        for word in ("zeta", "alpha", "mu")
    ]
    ask(llm, nodes_of(sections[1]), sections)
    assert asked(spy) == shown(*sections)


@pytest.mark.parametrize("labels", [("i", "ii", "1"), ("1", "2", "1")])
def test_page_labels_without_an_order_leave_the_order_of_the_pages(llm, spy, labels):
    pages = [page(n, page_label=label) for n, label in enumerate(labels)]
    ask(llm, nodes_of(pages[0]), pages)
    assert asked(spy) == shown(*pages)


def test_a_reader_that_gives_the_file_name_only(llm, spy):
    pages = [page(n, path=None) for n in (1, 2)]
    ask(llm, nodes_of(pages[0]), pages)
    assert asked(spy) == shown(*pages)
    with pytest.raises(
        InvalidParameterError, match=r"page_label='1' of file_name='r.pdf' is .*wice"
    ):
        RapidSynthesizer(llm, documents=[*pages, page(1, path=None)])


def test_blank_pages_are_passed_over(llm, spy):
    pages = [page(1), Document(text=" \n", metadata=page(2).metadata), page(3)]
    ask(llm, nodes_of(pages[0]), pages)
    assert asked(spy) == shown(pages[0], pages[2])


@pytest.mark.parametrize("key", ["volume", lambda document: document.metadata.get("volume")])
def test_a_key_of_ones_choice_says_what_is_one_document(llm, spy, key):
    pages = [page(n, path=f"scan{n}.png", volume=n // 2) for n in (2, 3, 4)]
    response = ask(llm, nodes_of(pages[1]), pages, document_key=key)
    assert asked(spy) == shown(*pages[:2])
    assert response.metadata["rapid"]["document_ids"] == ["1"]
    again = RapidLLM(decoder=llm.decoder, max_tokens=2, documents=pages, document_key=key)
    index = VectorStoreIndex.from_documents(pages[2:], embed_model=EMBED)
    index.as_query_engine(llm=again, text_qa_template=QA).query("What?")
    assert asked(spy) == shown(pages[2])


def test_every_document_may_be_one_by_itself(llm, spy):
    pages = [page(1), page(2)]
    ask(llm, nodes_of(pages[0]), pages, document_key=lambda d: d.ref_doc_id or d.node_id)
    assert asked(spy) == shown(pages[0])


def test_a_key_that_no_document_has_is_refused(llm):
    for make in (
        lambda: RapidSynthesizer(llm, documents=[page(1)], document_key="flie_path"),
        lambda: RapidLLM(decoder=llm.decoder, documents=[page(1)], document_key="flie_path"),
    ):
        with pytest.raises(InvalidParameterError, match=r"'flie_path' is in no .*'file_path'"):
            make()
    with pytest.raises(InvalidParameterError, match="document_key=5"):
        RapidSynthesizer(llm, documents=[page(1)], document_key=5)


# --- ids -----------------------------------------------------------------------------------------


def test_files_that_are_read_again_get_other_ids(llm, spy, tmp_path):
    """A persistent index on another day."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("lamp", "ferry"):
        (data / f"{name}.txt").write_text(f"The {name} is old. " * 20 + f"The {name} ends here.")
    client = chromadb.PersistentClient(str(tmp_path / "db"))
    store = ChromaVectorStore(chroma_collection=client.get_or_create_collection("reports"))
    first = SimpleDirectoryReader(str(data)).load_data()
    VectorStoreIndex.from_documents(
        first,
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=EMBED,
        transformations=[SentenceSplitter(chunk_size=120, chunk_overlap=0)],
    )
    again = SimpleDirectoryReader(str(data)).load_data()
    assert {d.id_ for d in first}.isdisjoint(d.id_ for d in again)
    index = VectorStoreIndex.from_vector_store(store, embed_model=EMBED)
    for documents in (
        again,
        {d.metadata["file_path"]: d.text for d in again},
        {Path(d.metadata["file_path"]): d for d in again},
        lambda name: {d.metadata["file_path"]: d.text for d in again}.get(name),
    ):
        synthesizer = RapidSynthesizer(llm, documents=documents, text_qa_template=QA)
        engine = index.as_query_engine(
            llm=llm, similarity_top_k=1, response_synthesizer=synthesizer
        )
        path = engine.query("What?").source_nodes[0].node.metadata["file_path"]
        assert "ends here" in asked(spy)
        assert Path(path).stem in asked(spy)


def test_a_document_whose_metadata_do_not_tell_is_found_by_its_text(llm, spy):
    first = [Document(text=f"{name} " * 20 + "and so on.") for name in ("lamp", "ferry")]
    again = [Document(text=document.text) for document in first]
    ask(llm, nodes_of(first[1]), again)
    assert asked(spy) == again[1].text


def test_a_file_of_the_same_name_is_not_taken_for_another(llm):
    """The node says of which file it is, and that one is not among the documents."""
    with pytest.raises(DocumentError, match=r"nor is file_path='x/r.pdf'.*document_key"):
        ask(llm, nodes_of(page(1, path="x/r.pdf")), [page(2, path="y/r.pdf")])


def test_two_documents_with_one_id_are_named(llm, decoder):
    twins = [Document(text="first part", id_="x"), Document(text="second part", id_="x")]
    for make in (
        lambda: RapidSynthesizer(llm, documents=twins),
        lambda: RapidLLM(decoder=decoder, documents=twins),
    ):
        with pytest.raises(InvalidParameterError, match="two Documents have the id 'x'"):
            make()
    mapping = {"5": "first", 5: "second"}
    for node in (Document(text="first"), Document(text="first", id_="5")):
        with pytest.raises(InvalidParameterError, match=r"two [Dd]ocuments have the id '5'"):
            RapidSynthesizer(llm, documents=mapping).synthesize("q", nodes_of(node))


def test_parts_of_one_file_may_share_an_id(llm, spy):
    parts = [page(1), page(2)]
    for part in parts:
        part.id_ = "r"
    ask(llm, nodes_of(parts[0]), parts)
    assert asked(spy) == shown(*parts)


def test_a_function_that_fails_is_heard(llm):
    with pytest.raises(KeyError, match="lamp"):
        ask(llm, nodes_of(LAMP), {}.__getitem__)


@pytest.mark.parametrize("key", [7, Path("reports/a.md")])
def test_numbers_and_paths_are_ids(llm, spy, key):
    document = Document(text="The first half. The second half.", id_=str(key))
    ask(llm, nodes_of(document), {key: document.text, "other": "else"})
    assert asked(spy) == document.text


@pytest.mark.parametrize("documents", [{"lamp": 5}, {"lamp": None}, lambda name: 5])
def test_a_document_that_is_no_text_is_named(decoder, llm, documents):
    with pytest.raises(DocumentError, match=r"document 'lamp' is (int|NoneType), not text"):
        ask(llm, nodes_of(LAMP), documents)
    plain = RapidLLM(decoder=decoder, documents=documents)
    engine = RetrieverQueryEngine.from_args(Fixed(nodes_of(LAMP)), llm=plain)
    with pytest.raises(PipelineError, match="not text: give its text, or a Document"):
        engine.query("What?")


def test_a_docstore_that_holds_only_chunks_of_a_document_is_refused(llm, spy):
    """The files were read again: the docstore knows other ids than the index."""
    yesterday, today = page(1), page(1)
    store = SimpleDocumentStore()
    nodes = nodes_of(yesterday)
    store.add_documents([scored.node for scored in nodes])
    with pytest.raises(DocumentError, match=r"holds chunks of document .* but not the document"):
        ask(llm, nodes, store)
    today.text_resource.text += " It has a second line."
    store.add_documents([today])
    ask(llm, nodes, store)
    assert asked(spy) == shown(today)


def test_a_document_of_another_id_in_the_place_of_one_is_found(llm, spy):
    documents = [Document(text="The lamp is old and red.", id_="a")]
    synthesizer = RapidSynthesizer(llm, documents=documents, text_qa_template=QA)
    synthesizer.synthesize("What?", nodes_of(documents[0]))
    documents[0] = Document(text=documents[0].text, id_="b")
    (scored,) = nodes_of(documents[0])
    scored.node.set_content("Summary: old.")
    synthesizer.synthesize("What?", [scored])
    assert asked(spy) == f"{documents[0].text}\n\nSummary: old."


def test_a_document_added_later_is_found(llm, spy):
    documents = [Document(text="The first document is about lamps.", id_="a")]
    synthesizer = RapidSynthesizer(llm, documents=documents, text_qa_template=QA)
    documents.append(Document(text="The second document is about ferries.", id_="b"))
    synthesizer.synthesize("What?", nodes_of(documents[1]))
    assert asked(spy) == documents[1].text


# --- nodes of no document, and text that is more than a document ---------------------------------

LAMP = Document(text="The lamp was lit in 1871.\n\nIt went out in 1968 for good.", id_="lamp")
FERRY = Document(text="The ferry is named Freya. She carries ninety passengers.", id_="ferry")


def test_a_node_of_no_document_is_read_beside_the_documents_of_others(llm, spy):
    stray = NodeWithScore(node=TextNode(text="Sub question: when?\nResponse: in 1999"))
    response = ask(llm, [*nodes_of(LAMP), stray, *nodes_of(FERRY)], [LAMP, FERRY])
    assert asked(spy) == f"{FERRY.text}\n\n{LAMP.text}\n\n{stray.node.text}"
    assert stray.node.text in spy.draft()
    assert response.metadata["rapid"]["document_ids"] == ["ferry", "lamp"]
    assert response.metadata["rapid"]["chunk_ids"][1] == stray.node.node_id
    ask(llm, [*nodes_of(LAMP), stray, *nodes_of(FERRY)], [LAMP, FERRY], order="given")
    assert asked(spy) == f"{LAMP.text}\n\n{stray.node.text}\n\n{FERRY.text}"
    for documents in ([LAMP], "some text", {"a": "b"}.get, {"a": "b"}.__getitem__):
        ask(llm, [stray], documents)
        assert asked(spy) == stray.node.text


def test_a_node_made_by_hand_is_found_by_its_text(llm, spy):
    ask(llm, [NodeWithScore(node=TextNode(text="It went out in 1968 for good."))], [FERRY, LAMP])
    assert asked(spy) == LAMP.text


def test_what_a_node_says_beyond_its_document_is_kept(llm, spy):
    (scored,) = nodes_of(LAMP)
    scored.node.set_content("Summary: a lamp of old.")
    ask(llm, [scored], [LAMP])
    assert asked(spy) == f"{LAMP.text}\n\nSummary: a lamp of old."


class Fixed(BaseRetriever):
    """Finds what it is told to."""

    def __init__(self, nodes):
        super().__init__()
        self.found = nodes

    def _retrieve(self, query_bundle):
        return self.found


def test_metadata_are_shown_as_the_pipeline_shows_them(decoder, llm, spy):
    document = Document(
        text="The lamp was lit in 1871, in autumn.\n\nIt went out in 1968 for good.",
        metadata={"author": "Vind", "secret": "no"},
        excluded_llm_metadata_keys=["secret"],
        text_template="<<{metadata_str}>>\n{content}",
        metadata_template="{key} = {value}",
    )
    ask(llm, nodes_of(document), [document])
    assert asked(spy) == f"<<author = Vind>>\n{document.text}"
    own = RapidLLM(decoder=decoder, max_tokens=2, documents=[document])
    found = nodes_of(document)
    found[0].node.set_content(document.text.split("\n")[0])
    RetrieverQueryEngine.from_args(Fixed(found), llm=own, text_qa_template=QA).query("What?")
    assert asked(spy) == f"<<author = Vind>>\n{document.text}"


# --- other parsers, postprocessors and retrievers ------------------------------------------------

WINDOWED = Document(
    text="Ida Brandt built the tower. Jonas Vind kept it. The sea broke the door in 1911. "
    "Only gulls live there now. The stairs are rusting away. This is where it ends.",
    id_="windowed",
)


@pytest.mark.parametrize("plain", [False, True])
def test_windows_of_sentences_open_their_document(decoder, llm, spy, plain):
    nodes = SentenceWindowNodeParser(window_size=1).get_nodes_from_documents([WINDOWED])
    index = VectorStoreIndex(nodes, embed_model=EMBED)
    if plain:
        llm = RapidLLM(decoder=decoder, max_tokens=2, documents=[WINDOWED, FERRY])
        swap = {"text_qa_template": QA}
    else:
        swap = {
            "response_synthesizer": RapidSynthesizer(
                llm, documents=[WINDOWED, FERRY], text_qa_template=QA
            )
        }
    engine = index.as_query_engine(
        llm=llm,
        similarity_top_k=1,
        node_postprocessors=[
            MetadataReplacementPostProcessor(target_metadata_key="window"),
            LongContextReorder(),
        ],
        **swap,
    )
    (node,) = engine.query("What?").source_nodes
    assert node.node.text != node.node.metadata["original_text"]
    assert asked(spy) == WINDOWED.text


@pytest.mark.parametrize("plain", [False, True])
def test_nodes_of_two_parsers_open_their_document(decoder, llm, spy, plain):
    document = Document(
        text="# Lamp\n\nThe lamp was lit in 1871, in autumn.\n\n## End\n\nIt went out in 1968.",
        metadata={"file_path": "lamp.md"},
    )
    pipeline = IngestionPipeline(
        transformations=[MarkdownNodeParser(), SentenceSplitter(chunk_size=64, chunk_overlap=0)]
    )
    nodes = pipeline.run(documents=[document])
    found = [NodeWithScore(node=nodes[0])]
    if plain:
        llm = RapidLLM(decoder=decoder, max_tokens=2, documents=[document, FERRY])
        engine = RetrieverQueryEngine.from_args(Fixed(found), llm=llm, text_qa_template=QA)
        engine.query("What?")
    else:
        ask(llm, found, [document, FERRY])
    assert "It went out in 1968." in asked(spy)
    assert "header_path: /" in asked(spy) or not plain
    assert FERRY.text not in asked(spy)


def test_a_recursive_retriever_gives_parents(llm, spy):
    parents = SentenceSplitter(chunk_size=32, chunk_overlap=0).get_nodes_from_documents(
        [LAMP, FERRY]
    )
    children = [IndexNode.from_text_node(parents[0], parents[0].node_id)]
    index = VectorStoreIndex(children, embed_model=EMBED)
    retriever = RecursiveRetriever(
        "vector",
        retriever_dict={"vector": index.as_retriever(similarity_top_k=1)},
        node_dict={node.node_id: node for node in parents},
    )
    synthesizer = RapidSynthesizer(llm, documents=[LAMP, FERRY], text_qa_template=QA)
    RetrieverQueryEngine.from_args(retriever, llm=llm, response_synthesizer=synthesizer).query(
        "What?"
    )
    assert asked(spy) == LAMP.text


def test_a_pdf_that_its_reader_took_for_text_is_refused_with_what_reads_it(llm, tmp_path):
    """Of ``SimpleDirectoryReader`` without the package llama-index-readers-file."""
    path = tmp_path / "report.pdf"
    path.write_bytes(b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n")
    documents = [Document(text=path.read_text(), metadata={"file_path": str(path)})]
    with pytest.raises(DocumentError, match=r"report\.pdf.* bytes of a PDF .*readers-file"):
        RapidSynthesizer(llm, documents=documents)
