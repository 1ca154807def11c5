"""A model behind an OpenAI-compatible endpoint that rates answers from 1 to 10."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rapid_llm.encoding import Message
from rapid_llm.errors import JudgeError, MissingDependencyError

# The single-answer prompt of MT-Bench (Zheng et al. 2023, arXiv 2306.05685), as the paper judges.
INSTRUCTION = (
    "Please act as an impartial judge and evaluate the quality of the response provided by an AI "
    "assistant to the last message of the conversation displayed below. Your evaluation should "
    "consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and level "
    "of detail of the response{}. Begin your evaluation by providing a short explanation. Be as "
    "objective as possible. After providing your explanation, you must rate the response on a "
    'scale of 1 to 10 by strictly following this format: "[[rating]]", for example: '
    '"Rating: [[5]]".'
)
_REFERENCE = ", and its agreement with the reference answer"
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")


class Judge:
    """Rates the last answer of a conversation.

    Args:
        model: as the endpoint calls it.
        base_url: of the endpoint, such as ``http://localhost:8000/v1``; None takes
            ``OPENAI_BASE_URL``, or OpenAI's own.
        api_key: None takes ``OPENAI_API_KEY``; an endpoint without keys takes any text.

    Raises:
        JudgeError: there is no key.
        MissingDependencyError: the package ``openai`` is not installed.
    """

    def __init__(
        self, model: str, *, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingDependencyError(
                "judging needs the package openai, which is not installed: "
                'install it with pip install "rapid-llm[eval]"'
            ) from error
        self.model = model
        self._failures = openai.OpenAIError
        try:
            self._client = openai.OpenAI(base_url=base_url, api_key=api_key)
        except openai.OpenAIError as error:
            raise JudgeError(
                "the judge has no key: set OPENAI_API_KEY (any text, for an endpoint without keys)"
            ) from error

    def rate(
        self, conversation: Sequence[Message], answer: str, reference: str | None = None
    ) -> float:
        """A number from 1 to 10.

        Args:
            conversation: messages with ``role`` and ``content``, up to the one that is answered.
            answer: what is rated.
            reference: a right answer to compare with, where there is one.

        Raises:
            JudgeError: the endpoint fails, or its reply holds no rating from 1 to 10.
        """
        said = "\n\n".join(f"[{m['role'].capitalize()}]\n{m['content']}" for m in conversation)
        shown = f"[The Start of the Conversation]\n{said}\n[The End of the Conversation]"
        if reference is not None:
            shown += f"\n\n[Reference Answer]\n{reference}"
        shown += f"\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
        reply = self._ask(
            [
                {"role": "system", "content": INSTRUCTION.format(_REFERENCE if reference else "")},
                {"role": "user", "content": shown},
            ]
        )
        match = _RATING.search(reply)
        if match is None or not 1 <= float(match[1]) <= 10:
            raise JudgeError(
                f"the judge {self.model!r} gave no rating from 1 to 10 such as [[5]]; its reply "
                f"ends with {reply[-80:]!r}: run again to ask once more, or take another judge"
            )
        return float(match[1])

    def _ask(self, messages: list[Any]) -> str:
        try:
            completion = self._client.chat.completions.create(
                model=self.model, messages=messages, temperature=0
            )
        except self._failures as error:
            raise JudgeError(
                f"the judge {self.model!r} at {self._client.base_url} failed ({error}): check the "
                "endpoint, the model's name and the key, then run again"
            ) from error
        # A page that is no endpoint's comes back as its text.
        if not getattr(completion, "choices", None):
            raise JudgeError(
                f"{self._client.base_url} did not reply as OpenAI's endpoint does: check the base "
                "URL (as a rule it ends in /v1)"
            )
        return completion.choices[0].message.content or ""
