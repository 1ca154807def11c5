"""RapidSynthesizer: a response synthesizer whose target reads the retrieved nodes' documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.synthesis import (
    SynthesizeEndEvent,
    SynthesizeStartEvent,
)
from llama_index.core.llms import LLM
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer, QueryTextType
from llama_index.core.schema import (
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.settings import Settings
from llama_index.core.types import RESPONSE_TEXT_TYPE

from llama_index.llms.rapid.catalog import DocumentKey
from llama_index.llms.rapid.documents import DocumentSource, Library
from llama_index.llms.rapid.grounding import Retrieved, ground_nodes
from llama_index.llms.rapid.llm import RapidLLM
from llama_index.llms.rapid.objects import atexts, require_class, texts
from llama_index.llms.rapid.templates import Context
from rapid_llm.aio import in_thread
from rapid_llm.config import OnEmpty, Order, RetrievalConfig
from rapid_llm.errors import InvalidParameterError
from rapid_llm.options import require
from rapid_llm.stats import NOTHING_RETRIEVED

dispatcher = get_dispatcher(__name__)

NOTHING_READ = {"chunk_ids": [], "document_ids": [], "draft_skipped": NOTHING_RETRIEVED}
"""``metadata["rapid"]`` of an empty response."""


class RapidSynthesizer(BaseSynthesizer):
    """Answers in one call: the drafter reads the retrieved nodes, the target their documents.

    Nodes are used after the postprocessors, repeated ones once. All documents are in one prompt, in
    the order of ``order``, which must fit into the target's context window; there are no refining
    calls. Both prompts are made from the same template.

    Pages and sections of one file are one document; :class:`Library` describes the lookup of a
    node's document. A node without a document is read as it is, after the documents, and so is a
    node with text that its document does not contain (a citation's label, a summary).

    With ``dynamic_eta``, the confidence of the retrieval comes from the nodes' scores, if all of
    them are within [-1, 1], like cosine similarities.

    If nothing was retrieved, the answer is LlamaIndex's "Empty Response", and no model runs.

    The response has ``source_nodes`` and ``metadata`` like that of other synthesizers;
    ``metadata["rapid"]`` holds ``raw["rapid"]`` of the LLM (for a streaming response, complete when
    the stream has ended).

    Args:
        llm: a RapidLLM; None takes ``Settings.llm``.
        documents: full texts: one text, a list of Documents, a mapping from document ids to texts
            or Documents, a docstore with the documents, or a function of the id. The id is a node's
            ``ref_doc_id``. A single text is the document of every node.
        document_key: metadata key, or function of a Document or node, with equal values for
            Documents that are parts of one; None joins those of one file.
        on_empty: action where nothing was retrieved: ``read_all`` has the target read all
            documents, without a draft, if they can be listed; None takes the LLM's.
        order: order of the documents: ``given`` is that of their first nodes, ``canonical`` that of
            their files and ids, with digits compared as numbers; None takes the LLM's.
        text_qa_template: template with ``context_str`` and ``query_str``; LlamaIndex's by default.
        output_cls: pydantic class of the answers, whose schema is enforced; the response is a
            ``PydanticResponse``, and with ``streaming`` a stream of the object's JSON.
        streaming: whether responses stream; ``as_query_engine`` does not pass its own ``streaming``
            on to a given synthesizer.
        callback_manager: LlamaIndex's callback manager.

    Raises:
        InvalidParameterError: ``llm`` is not a RapidLLM, ``documents`` is of another type or has an
            id twice, ``document_key`` is in no metadata, ``on_empty`` or ``order`` is unknown, or
            ``output_cls`` is no pydantic class.
        DocumentError: in a call; a document cannot be found, or is empty.
        ContextWindowError: in a call; the documents do not fit and ``llm.truncate`` is None.
    """

    _llm: RapidLLM

    def __init__(
        self,
        llm: LLM | None = None,
        *,
        documents: DocumentSource,
        document_key: DocumentKey | None = None,
        on_empty: OnEmpty | None = None,
        order: Order | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        output_cls: type[BaseModel] | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        llm = llm or Settings.llm
        if not isinstance(llm, RapidLLM):
            raise InvalidParameterError(
                f"an LLM of type {type(llm).__name__} is not allowed: RapidSynthesizer needs a "
                "RapidLLM"
            )
        super().__init__(
            llm=llm,
            callback_manager=callback_manager,
            # Unused; without them the base class would load the model for its context window.
            prompt_helper=PromptHelper(),
            chat_prompt_helper=ChatPromptHelper(),
            streaming=streaming,
        )
        self._documents = Library(documents, document_key)
        if on_empty is not None:
            require(RetrievalConfig, on_empty=on_empty)
        if order is not None:
            require(RetrievalConfig, order=order)
        self._on_empty, self._order = on_empty, order
        if output_cls is not None:
            require_class(output_cls)
        self._output_cls = output_cls
        self._text_qa_template = text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)

    @dispatcher.span
    def synthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer from the nodes and their documents; see the class."""
        with self._events(query) as (query_str, finish):
            context = Context(self._ground(nodes))
            text = self._answer(query_str, context, **response_kwargs)
            return finish(text, context, [*nodes, *(additional_source_nodes or ())])

    @dispatcher.span
    async def asynthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """:meth:`synthesize` without blocking the event loop."""
        with self._events(query) as (query_str, finish):
            context = Context(await in_thread(partial(self._ground, nodes)))
            text = await self._aanswer(query_str, context, **response_kwargs)
            return finish(text, context, [*nodes, *(additional_source_nodes or ())])

    def get_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Answer from texts without ids, with the documents that contain them.

        A single text given as ``documents`` is read in any case.
        """
        context = Context(self._ground(self._as_nodes(text_chunks)))
        return self._answer(query_str, context, **response_kwargs)

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """:meth:`get_response` without blocking the event loop."""
        context = Context(await in_thread(partial(self._ground, self._as_nodes(text_chunks))))
        return await self._aanswer(query_str, context, **response_kwargs)

    def _as_nodes(self, texts: Sequence[str]) -> list[NodeWithScore]:
        source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="")}
        relationships = {} if self._documents.only is None else source
        nodes = (TextNode(text=text, relationships=relationships) for text in texts)
        return [NodeWithScore(node=node) for node in nodes]

    def _ground(self, nodes: Sequence[NodeWithScore]) -> Retrieved:
        on_empty, order = self._on_empty or self._llm.on_empty, self._order or self._llm.order
        return ground_nodes(nodes, self._documents, on_empty, order)

    def _answer(self, query_str: str, context: Context, **kwargs: Any) -> RESPONSE_TEXT_TYPE:
        if context.retrieved.empty:
            context.report.update(NOTHING_READ)
            return self._empty_response_generator() if self._streaming else self._empty_response
        template = self._text_qa_template.partial_format(query_str=query_str)
        if self._output_cls is not None:
            if self._streaming:
                messages = self._llm._get_messages(template, context_str=context, **kwargs)
                return texts(self._llm, self._output_cls, messages)
            return self._llm.structured_predict(
                self._output_cls, template, context_str=context, **kwargs
            )
        if self._streaming:
            return self._llm.stream(template, context_str=context, **kwargs)
        return self._llm.predict(template, context_str=context, **kwargs)

    async def _aanswer(self, query_str: str, context: Context, **kwargs: Any) -> RESPONSE_TEXT_TYPE:
        if context.retrieved.empty:
            context.report.update(NOTHING_READ)
            return self._empty_response_agenerator() if self._streaming else self._empty_response
        template = self._text_qa_template.partial_format(query_str=query_str)
        if self._output_cls is not None:
            if self._streaming:
                await in_thread(lambda: self._llm.metadata)
                messages = self._llm._get_messages(template, context_str=context, **kwargs)
                return atexts(self._llm, self._output_cls, messages)
            return await self._llm.astructured_predict(
                self._output_cls, template, context_str=context, **kwargs
            )
        if self._streaming:
            return await self._llm.astream(template, context_str=context, **kwargs)
        return await self._llm.apredict(template, context_str=context, **kwargs)

    @contextmanager
    def _events(
        self, query: QueryTextType
    ) -> Iterator[
        tuple[str, Callable[[RESPONSE_TEXT_TYPE, Context, list[NodeWithScore]], RESPONSE_TYPE]]
    ]:
        """Context of one answer with the callbacks and events of a synthesizer."""
        bundle = QueryBundle(query) if isinstance(query, str) else query
        dispatcher.event(SynthesizeStartEvent(query=bundle))
        with self._callback_manager.event(
            CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: bundle.query_str}
        ) as event:

            def finish(
                text: RESPONSE_TEXT_TYPE, context: Context, source_nodes: list[NodeWithScore]
            ) -> RESPONSE_TYPE:
                response = self._prepare_response_output(text, source_nodes)
                response.metadata = {**(response.metadata or {}), "rapid": context.report}
                event.on_end(payload={EventPayload.RESPONSE: response})
                dispatcher.event(SynthesizeEndEvent(query=bundle, response=response))
                return response

            yield bundle.query_str, finish
