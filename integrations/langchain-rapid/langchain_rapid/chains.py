"""The documents chain: its drafter reads retrieved chunks, its target the whole documents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel, BaseLLM, LanguageModelLike
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableParallel,
    RunnableSequence,
    RunnableWithFallbacks,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import DynamicRunnable
from rapid_llm.aio import in_thread
from rapid_llm.config import OnEmpty, Order, RetrievalConfig
from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.errors import InvalidParameterError
from rapid_llm.options import require

from langchain_rapid.documents import Documents, FullDocuments
from langchain_rapid.messages import text_of
from langchain_rapid.settings import RapidModel
from langchain_rapid.window import places_of

_PAGE_CONTENT = PromptTemplate.from_template("{page_content}")


def create_rapid_documents_chain(
    llm: LanguageModelLike,
    prompt: BasePromptTemplate[Any],
    *,
    documents: Documents,
    output_parser: BaseOutputParser[Any] | None = None,
    document_prompt: BasePromptTemplate[str] | None = None,
    document_separator: str = SEPARATOR,
    document_variable_name: str = "context",
    document_id_key: str | None = None,
    on_empty: OnEmpty = "empty",
    order: Order = "canonical",
) -> Runnable[dict[str, Any], Any]:
    """``create_stuff_documents_chain`` with one more argument: the full documents.

    The prompt is formatted twice: for the drafter with the retrieved chunks, without repetitions;
    for the target with the full documents that they were cut from. If nothing was retrieved, the
    context is empty and the target decodes plainly, which
    ``response_metadata["rapid"]["draft_skipped"]`` says.

    Args:
        llm: a ``ChatRapid`` or ``RapidLLM``, or one with bound arguments, tools or a schema.
        prompt: prompt template with the input variable ``document_variable_name``.
        documents: full texts: one string, a mapping from document id to text, a list of Document
            (as a loader returned them), or a function from document id to text. A text may be a
            Document too.
        output_parser: parser of the answer; None is ``StrOutputParser``, unless the LLM has a
            parser of its own, as by ``with_structured_output``. :class:`MessageOutputParser`
            returns the message, which :func:`rapid_stats` reads.
        document_prompt: template of a chunk and of a full document, with the labels of
            :func:`langchain_rapid.labels.label`; None is the text alone.
        document_separator: text between two formatted chunks or documents.
        document_variable_name: variable of the prompt for the documents, and their key in the
            input.
        document_id_key: key of a chunk's metadata that holds the document's id; None takes the
            first of ``document_id``, ``doc_id`` and ``source`` that names a document.
        on_empty: action where nothing was retrieved: ``read_all`` has the target read every
            document.
        order: order of the full documents: ``canonical`` is that of their ids, with digits compared
            as numbers, so that the same documents are the same prompt; ``given`` that of their
            first chunks.

    Returns:
        A Runnable from a dictionary with the retrieved documents under
        ``document_variable_name`` and the prompt's other variables, as ``create_retrieval_chain``
        gives it, to the output parser's result.

    Raises:
        InvalidParameterError: the prompt lacks the variable, the LLM is not of this package, or
            ``on_empty`` or ``order`` is unknown.
        DocumentError: ``documents`` cannot be used; when called: a chunk's document is unknown.
    """
    if document_variable_name not in prompt.input_variables:
        raise InvalidParameterError(
            f"the prompt has no input variable {document_variable_name!r} for the documents, only "
            f"{', '.join(prompt.input_variables) or 'none'}: add it, or pass "
            "document_variable_name="
        )
    require(RetrievalConfig, on_empty=on_empty, order=order)
    innermost = _innermost(llm)
    if isinstance(innermost, BaseLanguageModel) and not isinstance(innermost, RapidModel):
        raise InvalidParameterError(
            f"{type(innermost).__name__} cannot read a draft: pass a ChatRapid or a RapidLLM"
        )
    answer = _GroundedAnswer(
        llm,
        prompt,
        FullDocuments(documents, document_id_key),
        document_prompt or _PAGE_CONTENT,
        document_separator,
        document_variable_name,
        on_empty,
        order,
        as_text=isinstance(innermost, BaseLLM),
    )
    chain: Runnable[dict[str, Any], Any] = answer
    if output_parser is not None or not _has_parser(llm):
        chain = answer | (output_parser or StrOutputParser())
    return chain.with_config(run_name="rapid_documents_chain")


def _has_parser(llm: Any) -> bool:
    """Whether the LLM ends with a parser of its own, as by ``with_structured_output``."""
    return isinstance(llm, RunnableSequence) and (
        isinstance(llm.last, BaseOutputParser)
        or isinstance(llm.first, RunnableParallel)  # with ``include_raw``
    )


def _innermost(llm: Any) -> Any:
    """The model inside bindings, configurations, fallbacks and sequences."""
    while True:
        if isinstance(llm, RunnableBindingBase):
            llm = llm.bound
        elif isinstance(llm, RunnableWithFallbacks):
            llm = llm.runnable
        elif isinstance(llm, DynamicRunnable):
            llm = llm.default
        elif isinstance(llm, RunnableSequence):
            llm = llm.first
        else:
            return llm


class _GroundedAnswer(Runnable[dict[str, Any], Any]):
    """Runnable from retrieved chunks and a question to the LLM's answer.

    It is one step whose only run is the LLM's, because a trace would repeat the whole documents for
    each run that they pass through.
    """

    name = "grounded_answer"

    def __init__(
        self,
        llm: LanguageModelLike,
        prompt: BasePromptTemplate[Any],
        documents: FullDocuments,
        document_prompt: BasePromptTemplate[str],
        separator: str,
        variable: str,
        on_empty: OnEmpty,
        order: Order,
        *,
        as_text: bool,
    ) -> None:
        self.llm = llm
        self.prompt = prompt
        self.documents = documents
        self.document_prompt = document_prompt
        self.separator = separator
        self.variable = variable
        self.on_empty = on_empty
        self.order = order
        self.as_text = as_text

    def invoke(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        llm, prompt = self._grounded(input)
        return llm.invoke(prompt, config, **kwargs)

    async def ainvoke(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        llm, prompt = await in_thread(partial(self._grounded, input))
        return await llm.ainvoke(prompt, config, **kwargs)

    def stream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        llm, prompt = self._grounded(input)
        yield from llm.stream(prompt, config, **kwargs)

    async def astream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        llm, prompt = await in_thread(partial(self._grounded, input))
        async for chunk in llm.astream(prompt, config, **kwargs):
            yield chunk

    def _grounded(self, inputs: dict[str, Any]) -> tuple[Runnable[Any, Any], PromptValue]:
        """The LLM with the draft bound to it, and the target's prompt."""
        from langchain_rapid.grounding import find_sources

        found = find_sources(
            inputs[self.variable],
            self.documents,
            on_empty=self.on_empty,
            order=self.order,
            labels=set(self.document_prompt.input_variables) - {"page_content"},
        )
        blocks = self._formatted([source.document for source in found.full])
        target = self._filled(inputs, blocks)
        bound: dict[str, Any] = {
            "retrieved": found.retrieved,
            "confidence": found.confidence,
            "documents_at": places_of(found.full, blocks, self.separator, self._contents(target)),
        }
        if found.chunks:
            draft = self._filled(inputs, self._formatted(found.chunks))
            if self.as_text:
                bound["draft_prompt"] = draft.to_string()
            else:
                bound["draft_messages"] = draft.to_messages()
        return self.llm.bind(**bound), target

    def _formatted(self, documents: list[Document]) -> list[str]:
        return [format_document(document, self.document_prompt) for document in documents]

    def _filled(self, inputs: dict[str, Any], blocks: list[str]) -> PromptValue:
        return self.prompt.format_prompt(**{**inputs, self.variable: self.separator.join(blocks)})

    def _contents(self, prompt: PromptValue) -> list[str]:
        return [prompt.to_string()] if self.as_text else list(map(text_of, prompt.to_messages()))
