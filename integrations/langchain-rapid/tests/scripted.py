"""A decoder that says what it is told to, by the real decoder's own machinery."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rapid_llm.config import SamplingParams
from rapid_llm.decoder import RapidDecoder
from rapid_llm.results import Delta
from rapid_llm.speculation.constraints import Constraints
from tiny import TEMPLATE, tiny_model, tiny_tokenizer

_WINDOW = 8192


class Scripted(RapidDecoder):
    """A random model that is bound to the answers of a script, whatever it is asked.

    An answer that the constraint of its call does not allow fails the test.

    Args:
        answers: the answers, in order.
        template: chat template.
    """

    def __init__(self, *answers: str, template: str = TEMPLATE) -> None:
        tokenizer = tiny_tokenizer(every_byte=True)
        tokenizer.chat_template = template
        model = tiny_model(vocab_size=len(tokenizer), window=_WINDOW)
        super().__init__(model, tokenizer, name="scripted")
        self.answers = list(answers)
        self.asked: list[Any] = []
        self._constraints = Constraints(tokenizer)

    def answer(self, prompt: str) -> str:
        """The answer to a prompt."""
        return self.answers.pop(0)

    def stream(
        self,
        target_prompt: Any,
        draft_prompt: Any = None,
        *,
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> Iterator[Delta]:
        """The next answer, through the decoder."""
        assert sampling is not None
        self.asked.append((target_prompt, draft_prompt, sampling.constraint))
        text = self.answer(self.tokenizer.decode(target_prompt))
        if sampling.constraint is not None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            end = [self.tokenizer.eos_token_id]
            matcher = self._constraints.matcher(sampling.constraint, len(self.tokenizer), end, 0)
            legal = self.tokenizer.decode(matcher.legal([], ids))
            assert legal == text, (legal, text, sampling.constraint)
            assert matcher.over(ids) or matcher.legal(ids, end), (text, sampling.constraint)
        told = replace(sampling, constraint={"choice": [text]})
        return super().stream(target_prompt, draft_prompt, sampling=told, **options)
