"""Which drafted tokens the target keeps, and what it says after them.

Pure tensor functions, float32, no host synchronisation. Notation as in RAPID (arXiv 2502.20330):
s are the target's processed logits (z / T), p = softmax(s), q is the drafter's distribution.

* accepted tokens: the longest prefix of the draft that passes the test;
* recovered token: drawn from the residual after the first rejection;
* bonus token: drawn after the whole draft was accepted.

The modes differ in the residual and in what the bonus is drawn from (m = min(q, p_hat)):

=========  ===  =======================================  =====  ===============================
mode       η    residual                                 bonus  law of the output
=========  ===  =======================================  =====  ===============================
exact      0    norm(max(p - q, 0))                      p      p (Leviathan et al. 2023)
augmented  > 0  norm(max(p_hat - q, 0))                  p_hat  p_hat
paper      > 0  norm(max(p - p_hat, p - q, 0))           p      m + (1 - Σm) norm(max(p - m, 0))
=========  ===  =======================================  =====  ===============================

All three residuals are norm(max(base - m, 0)), with base = p_hat for ``augmented`` and p
otherwise; where there is no draft, m = 0 and the residual is the base itself: the bonus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapid_llm.config import SpeculationConfig

ETA_HALF_LIFE = 32
"""Tokens of an answer after which a dynamic η has halved."""


def dynamic_eta(eta: float, confidence: float, first: int, q: Tensor) -> Tensor:
    """η of each drafted position: ``eta * confidence * 2 ** (-t / ETA_HALF_LIFE)``.

    What an answer is about is decided by its first tokens, and it is there that the retrieval may
    know better; what follows, follows from them.

    Args:
        eta: η.
        confidence: in [0, 1], how sure it is that what was retrieved answers the question.
        first: t of the first position, the tokens of the answer before it.
        q: ``[n, vocab]``.

    Returns:
        float32 ``[n, 1]`` on q's device.
    """
    t = torch.arange(first, first + q.shape[0], dtype=torch.float32, device=q.device)
    return (eta * confidence * torch.exp2(-t / ETA_HALF_LIFE))[:, None]


def transfer(s: Tensor, q: Tensor, eta: float | Tensor, alpha: float) -> Tensor:
    """The target's logits after one step of knowledge transfer from the drafter.

    ``s_hat = s + eta * (q - p)`` where ``q >= alpha * max(q)``, and s elsewhere: the paper's
    z_hat / T with z_hat = z + eta * T * (q - p), one gradient step on T² KL(q || p). The tail
    test is on the drafter's q, as in the authors' code.

    Args:
        s: float32 ``[n, vocab]``, processed logits of the target (-inf is allowed).
        q: float32 ``[n, vocab]``, probabilities of the drafter.
        eta: η, at least 0, or float32 ``[n, 1]``; where it is the number 0, s is returned as it is.
        alpha: tail protection in [0, 1].

    Returns:
        float32 ``[n, vocab]``.
    """
    if isinstance(eta, float | int) and eta == 0:
        return s
    keep = q >= alpha * q.amax(dim=-1, keepdim=True)
    return s + eta * (q - s.softmax(dim=-1)) * keep


def verify_sampled(
    s: Tensor,
    q: Tensor,
    draft: Tensor,
    config: SpeculationConfig,
    generator: torch.Generator | None,
    eta: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Judge a draft that was drawn from q; x is accepted with probability min(1, p_hat(x)/q(x)).

    Args:
        s: float32 ``[γ+1, vocab]``, processed logits of the target at every drafted position and
            the one after them. γ may be 0: plain sampling.
        q: float32 ``[γ, vocab]`` or ``[γ+1, vocab]``. ``augmented`` needs the last row, as its
            bonus comes from p_hat; without one (no drafter) the bonus comes from p.
        draft: int64 ``[γ]``, token i drawn from ``q[i]``.
        config: η, α and the mode.
        generator: on s's device; None for torch's default.
        eta: η of each position where it is not the config's, ``[len(q), 1]``.

    Returns:
        int64 scalars on s's device: how many tokens were accepted, and the token after them.
    """
    gamma = draft.shape[0]
    eta = config.transfer_strength if eta is None else eta
    p = s.softmax(dim=-1)
    s_hat = s.clone()
    s_hat[: q.shape[0]] = transfer(s[: q.shape[0]], q, eta, config.alpha)
    p_hat = s_hat.softmax(dim=-1)

    index = draft[:, None]
    uniform = torch.rand(gamma, dtype=s.dtype, device=s.device, generator=generator)
    # u * q < p_hat is u < p_hat / q without the division; strict, so that a token of
    # probability 0 is never accepted.
    passed = uniform * q[:gamma].gather(1, index)[:, 0] < p_hat[:gamma].gather(1, index)[:, 0]
    accepted = passed.long().cumprod(dim=0).sum()

    overlap = torch.zeros_like(p)
    overlap[:gamma] = torch.minimum(q[:gamma], p_hat[:gamma])
    base = (p_hat if config.applied_mode == "augmented" else p).index_select(0, accepted[None])[0]
    weights = residual(base, overlap.index_select(0, accepted[None])[0])
    return accepted, draw(weights, generator)


def verify_greedy(
    s: Tensor,
    q: Tensor,
    draft: Tensor,
    config: SpeculationConfig,
    eta: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Judge a greedy draft: x is accepted iff it is the argmax of s_hat.

    After the accepted tokens ``augmented`` says argmax s_hat, ``exact`` and ``paper`` argmax s.
    Shapes and results as in :func:`verify_sampled`; s and q are taken at temperature 1.
    """
    gamma = draft.shape[0]
    eta = config.transfer_strength if eta is None else eta
    s_hat = transfer(s[: q.shape[0]], q, eta, config.alpha)
    accepted = (draft == s_hat[:gamma].argmax(dim=-1)).long().cumprod(dim=0).sum()
    says = torch.cat([s_hat, s[q.shape[0] :]]) if config.applied_mode == "augmented" else s
    return accepted, says.index_select(0, accepted[None])[0].argmax()


def verify_guess(
    q: Tensor, guess: Tensor, generator: torch.Generator | None, *, greedy: bool
) -> tuple[Tensor, Tensor]:
    """Judge tokens that were not drawn but guessed (a point mass each), so that all follow q.

    Token i is accepted with probability q_i(x_i); after the first rejection a token is drawn from
    q_i without x_i: together exactly q_i. This is the ``exact`` mode for a drafter whose
    distribution is a point mass.

    Args:
        q: float32 ``[n+1, vocab]``, at every guessed position and the one after them.
        guess: int64 ``[n]``; n may be 0.
        generator: on q's device; None for torch's default.
        greedy: a guess is accepted iff it is the argmax of q.

    Returns:
        int64 scalars: how many guesses were accepted, and the token after them.
    """
    n = guess.shape[0]
    if greedy:
        best = q.argmax(dim=-1)
        accepted = (guess == best[:n]).long().cumprod(dim=0).sum()
        return accepted, best.index_select(0, accepted[None])[0]
    uniform = torch.rand(n, dtype=q.dtype, device=q.device, generator=generator)
    passed = uniform < q[:n].gather(1, guess[:, None])[:, 0]
    accepted = passed.long().cumprod(dim=0).sum()
    overlap = torch.zeros_like(q)
    overlap[:n].scatter_(1, guess[:, None], 1.0)
    base, taken = (t.index_select(0, accepted[None])[0] for t in (q, overlap))
    return accepted, draw(residual(base, taken), generator)


def residual(base: Tensor, overlap: Tensor) -> Tensor:
    """Weights of the recovered token (or, with no overlap, of the bonus token).

    Args:
        base: float32 ``[vocab]``, p or p_hat, as the mode has it.
        overlap: float32 ``[vocab]``, m = min(q, p_hat): what acceptance gives each token.

    Returns:
        float32 ``[vocab]``, ``max(base - m, 0)``, not normalised. Where that is 0 everywhere,
        base and q agree and the rejection was rounding: the base itself.
    """
    rest = (base - overlap).clamp(min=0)
    return torch.where(rest.sum() > 0, rest, base)


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index with probability proportional to ``weights`` (float32 ``[vocab]``, >= 0).

    The index of the smallest of independent Exp(1) / weight: an exponential race, which unlike
    ``torch.multinomial`` never waits for the device.
    """
    race = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / race).argmax()
