"""Log-probabilities of given tokens after a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

import torch
import torch.nn.functional as F

from rapid_llm.engine.session import Session
from rapid_llm.errors import NumericalError
from rapid_llm.generation import NAN_LOGITS


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability, and those of the most likely tokens there.

    Attributes:
        token_id: id of the token.
        logprob: logarithm of its probability, at temperature 1 and without other processors.
        top: ids and logarithms of the most likely tokens, the most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@torch.inference_mode()
def logprobs(
    session: Session, prompt: list[int], continuation: list[int], top: int
) -> list[TokenLogprob]:
    """Logarithms of the probabilities of a continuation's tokens given a prompt.

    After an error it may be called again with the same session, and goes on where it stopped.

    Args:
        session: session of the model that scores.
        prompt: token ids of the prompt, at least one.
        continuation: token ids of the continuation, at least one.
        top: number of the most likely tokens to tell at each place.

    Raises:
        NumericalError: the model produced NaN.
    """
    session.rollback(len(prompt) - 1)
    session.prefill(prompt[:-1])
    device = session.runner.device
    logits = session.extend(torch.tensor([prompt[-1], *continuation[:-1]], device=device))
    logs = F.log_softmax(logits.float(), dim=-1)
    own = logs.gather(1, torch.tensor(continuation, device=device)[:, None])[:, 0].tolist()
    if any(map(isnan, own)):
        raise NumericalError(NAN_LOGITS.format(name=session.runner.name))
    best, ids = logs.topk(top, dim=-1)
    rows = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), best.tolist(), strict=True)]
    return list(map(TokenLogprob, continuation, own, rows))
