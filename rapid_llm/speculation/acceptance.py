"""Acceptance of drafted tokens by the target, and the token after the accepted ones.

Pure tensor functions in float32 without host synchronisation. Notation as in RAPID (arXiv
2502.20330): s are the target's processed logits (z / T), p = softmax(s), q is the drafter's
distribution.

* accepted tokens: the longest prefix of the draft that passes the test;
* recovered token: drawn from the residual after the first rejection;
* bonus token: drawn after the whole draft was accepted.

The modes differ in the residual and in the bonus distribution (m = min(q, p_hat)):

=========  ===  =======================================  =====  ===============================
mode       η    residual                                 bonus  distribution of the output
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
"""Half-life of a dynamic η, in tokens of the answer."""


def dynamic_eta(eta: float, confidence: float, first: int, q: Tensor) -> Tensor:
    """η of each drafted position: ``eta * confidence * 2 ** (-t / ETA_HALF_LIFE)``.

    The first tokens decide the content of an answer, so the retrieval can help most there.

    Args:
        eta: η at the first token, for confidence 1.
        confidence: confidence of the retrieval, in [0, 1].
        first: t of the first position: number of answer tokens before it.
        q: drafter's probabilities ``[n, vocab]``, which give n and the device.

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
        s: processed logits of the target, float32 ``[n, vocab]`` (-inf is allowed).
        q: probabilities of the drafter, float32 ``[n, vocab]``.
        eta: η, a number of at least 0 or float32 ``[n, 1]``; for the number 0, s is returned.
        alpha: tail protection α, in [0, 1].

    Returns:
        s_hat, float32 ``[n, vocab]``.
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
    """Verify a draft sampled from q; token x is accepted with probability min(1, p_hat(x)/q(x)).

    Args:
        s: processed logits of the target at all drafted positions and the one after them, float32
            ``[γ+1, vocab]``. γ may be 0: plain sampling.
        q: probabilities of the drafter, float32 ``[γ, vocab]`` or ``[γ+1, vocab]``. ``augmented``
            needs the last row for its bonus from p_hat; without it (no drafter) the bonus comes
            from p.
        draft: drafted tokens, int64 ``[γ]``; token i was drawn from ``q[i]``.
        config: η, α and the mode.
        generator: random generator on s's device; None for torch's default.
        eta: η of each position, ``[len(q), 1]``, or one number; None for the config's.

    Returns:
        Number of accepted tokens and the token after them, int64 scalars on s's device.
    """
    gamma = draft.shape[0]
    eta = config.transfer_strength if eta is None else eta
    p = s.softmax(dim=-1)
    s_hat = s.clone()
    s_hat[: q.shape[0]] = transfer(s[: q.shape[0]], q, eta, config.alpha)
    p_hat = s_hat.softmax(dim=-1)

    index = draft[:, None]
    uniform = torch.rand(gamma, dtype=s.dtype, device=s.device, generator=generator)
    # u * q < p_hat is u < p_hat / q without a division. It is strict, so that a token of
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
    """Verify a greedy draft; token x is accepted iff it is the argmax of s_hat.

    The token after the accepted ones is argmax s_hat in mode ``augmented``, and argmax s in modes
    ``exact`` and ``paper``. Arguments and results as for :func:`verify_sampled`, with s and q at
    temperature 1.
    """
    gamma = draft.shape[0]
    eta = config.transfer_strength if eta is None else eta
    s_hat = transfer(s[: q.shape[0]], q, eta, config.alpha)
    accepted = (draft == s_hat[:gamma].argmax(dim=-1)).long().cumprod(dim=0).sum()
    scores = torch.cat([s_hat, s[q.shape[0] :]]) if config.applied_mode == "augmented" else s
    return accepted, scores.index_select(0, accepted[None])[0].argmax()


def verify_guess(
    q: Tensor, guess: Tensor, generator: torch.Generator | None, *, greedy: bool
) -> tuple[Tensor, Tensor]:
    """Verify guessed tokens (a point mass each) against q, so that the output follows q exactly.

    Token i is accepted with probability q_i(x_i); after the first rejection a token is drawn from
    q_i without x_i. This is the ``exact`` mode for a drafter whose distribution is a point mass.

    Args:
        q: probabilities at all guessed positions and the one after them, float32
            ``[n+1, vocab]``.
        guess: guessed tokens, int64 ``[n]``; n may be 0.
        generator: random generator on q's device; None for torch's default.
        greedy: whether a guess is accepted iff it is the argmax of q.

    Returns:
        Number of accepted guesses and the token after them, int64 scalars.
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
    """Weights of the recovered token, or without overlap of the bonus token.

    Args:
        base: p or p_hat, depending on the mode, float32 ``[vocab]``.
        overlap: m = min(q, p_hat), the probability that a token is drafted and accepted, float32
            ``[vocab]``.

    Returns:
        ``max(base - m, 0)``, not normalised, float32 ``[vocab]``. If that is 0 everywhere, base and
        q agree and the rejection was a rounding error: base is returned.
    """
    rest = (base - overlap).clamp(min=0)
    return torch.where(rest.sum() > 0, rest, base)


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index with probability proportional to its weight.

    The index with the smallest of independent Exp(1) / weight is taken (an exponential race), which
    unlike ``torch.multinomial`` never waits for the device.

    Args:
        weights: float32 ``[vocab]``, at least 0.
        generator: random generator on their device; None for torch's default.
    """
    race = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / race).argmax()
