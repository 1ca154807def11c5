"""What the README shows, with the installed distributions: python tests/quickstart.py."""

from __future__ import annotations

from langchain_core.documents import Document as Page
from langchain_core.runnables import RunnableLambda
from langchain_rapid import ChatRapid
from llama_index.core import Document, VectorStoreIndex
from llama_index.llms.rapid import RapidEmbedding, RapidLLM, RapidSynthesizer

import rapid_llm
from rapid_llm import RapidDecoder, RapidPipeline, SamplingParams
from rapid_llm.cli import main

TEXT = (
    "Audit of the harbour, 2024. The second repair of the lighthouse was paid for by the "
    "insurance. The report was written by Tomas Lind. All three cranes were in service."
)
QUESTION = "Who wrote the report?"

assert "site-packages" in rapid_llm.__file__, rapid_llm.__file__

pipeline = RapidPipeline(RapidDecoder.from_pretrained(), TEXT)
answer = pipeline.ask(QUESTION, sampling=SamplingParams(max_new_tokens=16))
assert answer.text, answer
assert answer.stats.drafted_tokens, answer
print("pipeline:", answer.text)

documents = [Document(text=TEXT, id_="audit")]
index = VectorStoreIndex.from_documents(documents, embed_model=RapidEmbedding())
llm = RapidLLM(max_tokens=16)
engine = index.as_query_engine(
    llm=llm, response_synthesizer=RapidSynthesizer(llm, documents=documents)
)
response = engine.query(QUESTION)
assert response.metadata["rapid"]["document_ids"] == ["audit"], response.metadata
print("LlamaIndex:", response)

found = [Page("The report was written by Tomas Lind.", metadata={"source": "audit"})]
chat = ChatRapid(
    retriever=RunnableLambda(lambda question: found), documents={"audit": TEXT}, max_tokens=16
)
message = chat.invoke(QUESTION)
assert message.response_metadata["rapid"]["chunks"], message.response_metadata
print("LangChain:", message.content)

assert main(["plan", "--model", "llama-3.1-8b", "--context", "32768", "--device", "h100"]) == 0
