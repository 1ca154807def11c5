"""LLM as a judge: ratings of answers from 1 to 10 by a model behind an OpenAI-compatible API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rapid_llm.encoding import Message
from rapid_llm.errors import JudgeError
from rapid_llm.folders import packaged_text

# The single-answer prompt of MT-Bench (Zheng et al. 2023, arXiv 2306.05685), as the paper judges.
INSTRUCTION = packaged_text("judge.txt").strip()


class Judge:
    """Rates the last answer of a conversation.

    Args:
        model: name of the model at the endpoint.
        base_url: URL of the endpoint; None takes ``OPENAI_BASE_URL``, or OpenAI's.
        api_key: key; None takes ``OPENAI_API_KEY``. Endpoints without keys take any text.
    """

    def __init__(self, model: str, base_url: str | None = None, api_key: str | None = None) -> None:
        import openai  # takes a second

        self._model, self._failures = model, openai.OpenAIError
        try:
            self._client = openai.OpenAI(base_url=base_url, api_key=api_key)
        except openai.OpenAIError as error:
            raise JudgeError(
                "the judge has no key: set OPENAI_API_KEY (any text, for an endpoint without keys)"
            ) from error

    def rate(
        self, conversation: Sequence[Message], answer: str, reference: str | None = None
    ) -> float:
        """Rating from 1 to 10 of an answer to the last message of a conversation.

        Args:
            conversation: chat messages.
            answer: answer to rate.
            reference: correct answer to compare with; None if unknown.

        Raises:
            JudgeError: the endpoint fails, or its reply holds no rating from 1 to 10.
        """
        said = "\n\n".join(f"[{m['role'].capitalize()}]\n{m['content']}" for m in conversation)
        shown = f"[The Start of the Conversation]\n{said}\n[The End of the Conversation]"
        judged = INSTRUCTION.format("")
        if reference is not None:
            shown += f"\n\n[Reference Answer]\n{reference}"
            judged = INSTRUCTION.format(", and its agreement with the reference answer")
        shown += f"\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
        messages: Any = [{"role": "system", "content": judged}, {"role": "user", "content": shown}]
        create = self._client.chat.completions.create
        try:
            completion = create(model=self._model, messages=messages, temperature=0)
        except self._failures as error:
            raise JudgeError(
                f"the judge {self._model!r} at {self._client.base_url} failed ({error}): check the "
                "endpoint, the model's name and the key, then run again"
            ) from error
        # A URL that is no such endpoint may return text.
        if not getattr(completion, "choices", None):
            raise JudgeError(
                f"{self._client.base_url} did not reply as OpenAI's endpoint does: check the base "
                "URL (as a rule it ends in /v1)"
            )
        reply = completion.choices[0].message.content or ""
        match = re.search(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", reply)
        if match is None or not 1 <= float(match[1]) <= 10:
            raise JudgeError(
                f"the judge {self._model!r} gave no rating from 1 to 10 such as [[5]]; its reply "
                f"ends with {reply[-80:]!r}: run again to ask once more, or take another judge"
            )
        return float(match[1])
