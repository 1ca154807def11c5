"""Shorten prompts that exceed a context window: cut documents first, then drop old turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rapid_llm.errors import ContextWindowError

from langchain_rapid.encoding import Encoder, Written
from langchain_rapid.places import Place

if TYPE_CHECKING:
    from rapid_llm.context.prompts import Fitted
    from rapid_llm.context.retrieved import Passage
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.encoding import Message, Prompt

    from langchain_rapid.grounding import Source
    from langchain_rapid.options import Call


def places_of(
    sources: Sequence[Source], blocks: Sequence[str], separator: str, contents: Sequence[str]
) -> list[Place]:
    """Positions of documents in a prompt.

    If the template has changed the documents (escaped or cut them), the longest message counts as
    one document.

    Args:
        sources: the documents.
        blocks: formatted text of each document.
        separator: text between two of them.
        contents: texts of the prompt's messages, or its text.
    """
    text = separator.join(blocks)
    found: list[Place] = []
    for message, content in enumerate(contents if text else ()):
        at = content.find(text)
        while at >= 0:
            start = at
            for source, block in zip(sources, blocks, strict=True):
                document = source.document.page_content
                if (inside := block.find(document)) >= 0:
                    first = start + inside
                    found.append(
                        Place(
                            message=message,
                            start=first,
                            end=first + len(document),
                            passages=_passages(source),
                        )
                    )
                start += len(block) + len(separator)
            at = content.find(text, at + len(text))
    return found or ([_around(sources, contents)] if text else [])


def _around(sources: Sequence[Source], contents: Sequence[str]) -> Place:
    """The longest of several texts as one document, with the passages that it contains."""
    longest, _ = _longest(contents)
    content = contents[longest["message"]]
    texts = [cited.chunk.page_content for source in sources for cited in source.cited]
    longest["passages"] += [
        (at, at + len(text)) for text in texts if (at := content.find(text)) >= 0
    ]
    return longest


def _passages(source: Source) -> list[tuple[int, int] | str]:
    document = source.document.page_content
    found: list[tuple[int, int] | str] = []
    for cited in source.cited:
        text, start = cited.chunk.page_content, cited.start
        if start is not None and document.startswith(text, start):
            found.append((start, start + len(text)))
        else:
            found.append(text)
    return found


class Encoded(NamedTuple):
    """Encoded prompts, and the number of tokens of documents that were left out."""

    target: Prompt
    draft: Prompt | None
    omitted_tokens: int = 0


def encoded(target: Written, draft: Written | None, decoder: RapidDecoder, call: Call) -> Encoded:
    """Encode the prompts, and with ``truncate`` shorten them to their models' context windows.

    Raises:
        ContextWindowError: ``truncate`` is given, and the target's prompt still does not fit.
        InvalidParameterError: a prompt does not fit the chat template.
    """
    variables = {**decoder.chat_template_kwargs, **call.engine.chat_template_kwargs}
    encode = Encoder(decoder.tokenizer, variables, call.formatted)
    if call.retrieval.truncate is None:
        return Encoded(encode(target), None if draft is None else encode(draft))
    most = call.sampling.max_new_tokens
    whole = Window(decoder.target.context_window, most, encode).fit(target, call.places)
    if draft is None:
        return Encoded(whole.prompt, None, whole.omitted_tokens)
    try:
        short = Window(decoder.drafter.context_window, most, encode).fit(draft).prompt
    except ContextWindowError:
        short = encode(draft)  # the decoder leaves it out, see Stats.draft_skipped
    return Encoded(whole.prompt, short, whole.omitted_tokens)


class Window(NamedTuple):
    """Context window for a prompt and its answer.

    Attributes:
        tokens: context window in tokens.
        answer: tokens kept free for the answer, at most half of the window.
        encode: encoder of prompts.
    """

    tokens: int
    answer: int
    encode: Encoder

    def fit(self, prompt: Written, places: Sequence[Place] = ()) -> Fitted:
        """A prompt shortened to the window.

        Documents are cut around the passages retrieved from them. Without known documents, the
        longest message is cut if it is most of the prompt. Otherwise, or if that is not enough, a
        chat loses as few of its oldest turns as leave half a window for its documents.

        Args:
            prompt: text or chat messages.
            places: positions of documents in the prompt.

        Raises:
            ContextWindowError: the last turn is too long even with the shortest documents.
        """
        from rapid_llm.context.prompts import Fitted

        if not prompt:
            return Fitted(self.encode(prompt), 0)
        if isinstance(prompt, str):
            return self._cut(prompt, places or [_all_of(0, prompt)])
        longest, is_most = _longest(contents_of(prompt))
        if places or is_most:
            cuttable = places or [longest]
            try:
                return self._cut(prompt, cuttable)
            except ContextWindowError:
                shorter = self._without_oldest(prompt, cuttable)
                if len(shorter) == len(prompt):
                    raise
        else:
            shorter = self._without_oldest(prompt, ())
            if len(shorter) == len(prompt):
                return self._cut(prompt, [longest])
        return self.fit(shorter, _moved(places, prompt, shorter))

    def _without_oldest(
        self, messages: Sequence[Message], places: Sequence[Place]
    ) -> Sequence[Message]:
        """The latest turns that fit beside half a window of the documents."""
        from rapid_llm.context.truncation import CuttableDocument, share_out
        from rapid_llm.encoding import drop_oldest_turns

        encode = self.encode
        documents = [
            CuttableDocument(text, passages, encode.tokenizer)
            for text, passages in _documents_at(places, messages)
        ]
        parts = [part.text for part in share_out(documents, self.tokens // 2)]
        shown = _with_parts(messages, places, parts)
        assert not isinstance(shown, str)
        index = {id(message): i for i, message in enumerate(shown)}
        kept = drop_oldest_turns(
            shown, encode.tokenizer, self.tokens, self.answer, encode.variables
        )
        return [messages[index[id(message)]] for message in kept]

    def _cut(self, prompt: Written, places: Sequence[Place]) -> Fitted:
        from rapid_llm.context.prompts import fit_documents

        found = _documents_at(places, prompt)

        def render(parts: Sequence[str]) -> Prompt:
            return self.encode(_with_parts(prompt, places, parts))

        return fit_documents(
            [text for text, _ in found],
            render,
            self.encode.tokenizer,
            self.tokens,
            self.answer,
            "middle",
            passages=[passages for _, passages in found],
        )


def contents_of(prompt: Written) -> list[str]:
    """Texts of a prompt, one for each message."""
    return [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]


def _documents_at(places: Sequence[Place], prompt: Written) -> list[tuple[str, list[Passage]]]:
    """Documents in a prompt, each with the passages retrieved from it."""
    from rapid_llm.context.retrieved import Passage

    contents = contents_of(prompt)
    found = []
    for place in places:
        document = contents[place["message"]][place["start"] : place["end"]]
        passages = [
            Passage(known)
            if isinstance(known, str)
            else Passage(document[known[0] : known[1]], start=known[0])
            for known in place["passages"]
        ]
        found.append((document, passages))
    return found


def _with_parts(prompt: Written, places: Sequence[Place], parts: Sequence[str]) -> Written:
    """The prompt with shortened documents in the place of the whole ones."""
    contents = contents_of(prompt)
    for place, part in reversed(list(zip(places, parts, strict=True))):  # the last first
        whole = contents[place["message"]]
        contents[place["message"]] = whole[: place["start"]] + part + whole[place["end"] :]
    if isinstance(prompt, str):
        return contents[0]
    return [{**m, "content": content} for m, content in zip(prompt, contents, strict=True)]


def _all_of(message: int, content: str) -> Place:
    return Place(message=message, start=0, end=len(content), passages=[])


def _longest(contents: Sequence[str]) -> tuple[Place, bool]:
    """The longest of several texts, and whether it is more than half of them all."""
    longest = max(range(len(contents)), key=lambda i: len(contents[i]))
    is_most = 2 * len(contents[longest]) > sum(map(len, contents))
    return _all_of(longest, contents[longest]), is_most


def _moved(
    places: Sequence[Place], messages: Sequence[Message], shorter: Sequence[Message]
) -> list[Place]:
    """Positions of documents in a chat without some of its messages."""
    index = {id(message): i for i, message in enumerate(shorter)}
    moved = [(index.get(id(messages[place["message"]])), place) for place in places]
    return [Place(**{**place, "message": i}) for i, place in moved if i is not None]
