"""The statistics against torch, scipy-free textbook formulas, and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgellm.measure.divergence import Tally, kl_divergence, log_softmax

RNG = np.random.default_rng(0)
P = RNG.normal(scale=3, size=(400, 1000)).astype(np.float32)
Q = (P + RNG.normal(scale=0.5, size=P.shape)).astype(np.float32)
TARGETS = RNG.integers(0, 1000, len(P))


def tally(p: np.ndarray | None, q: np.ndarray) -> Tally:
    log_q, at = log_softmax(q.copy()), np.arange(len(q))
    if p is None:
        return Tally([-log_q[at, TARGETS].astype(np.float64)])
    log_p = log_softmax(p.copy())
    return Tally(
        [-log_q[at, TARGETS].astype(np.float64)],
        [-log_p[at, TARGETS].astype(np.float64)],
        [kl_divergence(log_p, log_q)],
        [log_p.argmax(axis=1) == log_q.argmax(axis=1)],
    )


def test_log_softmax_and_divergence_are_torchs() -> None:
    log_p, log_q = (torch.log_softmax(torch.from_numpy(logits).double(), dim=1) for logits in (P, Q))
    assert np.allclose(log_softmax(P.copy()), log_p, atol=1e-5)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
    assert np.allclose(kl_divergence(log_softmax(P.copy()), log_softmax(Q.copy())), expected, rtol=1e-4, atol=1e-6)


def test_large_logits_stay_finite() -> None:
    rows = np.array([[1e4, 0, -1e4], [-1e30, 5, 5]], np.float32)
    assert np.allclose(np.exp(log_softmax(rows)), [[1, 0, 0], [0, 0.5, 0.5]])


def test_perplexity_is_torchs_cross_entropy() -> None:
    found = tally(None, Q).evaluation()
    losses = torch.nn.functional.cross_entropy(
        torch.from_numpy(Q).double(), torch.from_numpy(TARGETS), reduction="none"
    )
    assert (found.n_tokens, found.divergence) == (400, None)
    assert found.perplexity.value == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert found.perplexity.error == pytest.approx(float(losses.mean().exp() * losses.std() / 400**0.5), rel=1e-4)


def test_figures_of_a_comparison_and_their_errors_by_bootstrap() -> None:
    whole = tally(P, Q)
    found = whole.evaluation().divergence
    assert found is not None
    kld, same = whole.kld[0], whole.same_top[0]
    ratio = whole.surprise[0] - whole.reference_surprise[0]
    drawn = RNG.integers(0, len(kld), (2000, len(kld)))
    figures = {
        "kld_mean": (kld.mean(), kld[drawn].mean(axis=1)),
        "kld_median": (np.median(kld), np.median(kld[drawn], axis=1)),
        "kld_p95": (np.quantile(kld, 0.95), np.quantile(kld[drawn], 0.95, axis=1)),
        "same_top": (same.mean(), same[drawn].mean(axis=1)),
        "ppl_ratio": (np.exp(ratio.mean()), np.exp(ratio[drawn].mean(axis=1))),
    }
    for name, (value, resampled) in figures.items():
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(value, rel=1e-6), name
        assert estimate.error == pytest.approx(resampled.std(), rel=0.5 if "p95" in name else 0.3), name
    assert found.kld_max == kld.max()
    assert found.kld_p99.value == pytest.approx(np.quantile(kld, 0.99))


def test_a_model_against_itself() -> None:
    found = tally(P, P).evaluation().divergence
    assert found is not None
    assert (found.kld_mean.value, found.kld_max, found.same_top.value, found.ppl_ratio.value) == (0, 0, 1, 1)
