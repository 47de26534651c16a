"""Perplexity and Kullback-Leibler divergence from log-probabilities, with their standard errors.

The quantities are those of llama.cpp's llama-perplexity: natural logarithms, means over scored tokens, errors as if
tokens were independent of one another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, sqrt
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.float32]  # (n_positions, n_vocab)


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distribution Q is from the reference's P, over the same tokens.

    kld_*: D(P‖Q) per token in nats: mean, median and percentiles. same_top: share of tokens where both find the same
    token likeliest. ppl_ratio: perplexity of Q over that of P.
    """

    kld_mean: Estimate
    kld_median: Estimate
    kld_p95: Estimate
    kld_p99: Estimate
    kld_max: float
    same_top: Estimate
    ppl_ratio: Estimate
    reference_perplexity: Estimate


@dataclass(frozen=True)
class Evaluation:
    """What was measured over n_tokens scored tokens; divergence only against a reference."""

    n_tokens: int
    perplexity: Estimate
    divergence: Divergence | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data: perplexity, kld.{mean, median, p95, p99, max}, same_top, ppl_ratio; errors under `errors`."""
        found: dict[str, Any] = {"n_tokens": self.n_tokens, "perplexity": self.perplexity.value}
        errors: dict[str, Any] = {"perplexity": self.perplexity.error}
        if (d := self.divergence) is not None:
            kld = {"mean": d.kld_mean, "median": d.kld_median, "p95": d.kld_p95, "p99": d.kld_p99}
            found["kld"] = {**{name: estimate.value for name, estimate in kld.items()}, "max": d.kld_max}
            errors["kld"] = {name: estimate.error for name, estimate in kld.items()}
            for name in ("same_top", "ppl_ratio", "reference_perplexity"):
                estimate = getattr(d, name)
                found[name], errors[name] = estimate.value, estimate.error
        return {**found, "errors": errors}


@dataclass
class Tally:
    """Of every scored token, in order: surprise (-log Q), and against a reference its own, D(P‖Q), same top token."""

    surprise: list[NDArray[np.float64]] = field(default_factory=list)
    reference_surprise: list[NDArray[np.float64]] = field(default_factory=list)
    kld: list[NDArray[np.float64]] = field(default_factory=list)
    same_top: list[NDArray[np.bool_]] = field(default_factory=list)

    def evaluation(self) -> Evaluation:
        surprise = np.concatenate(self.surprise)
        divergence = None
        if self.kld:
            divergence = _divergence(
                surprise,
                np.concatenate(self.reference_surprise),
                np.concatenate(self.kld),
                np.concatenate(self.same_top),
            )
        return Evaluation(len(surprise), _perplexity(surprise), divergence)


def log_softmax(logits: Rows) -> Rows:
    """Log-probabilities, in place of the logits."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def kl_divergence(log_p: Rows, log_q: Rows) -> NDArray[np.float64]:
    """D(P‖Q) of each row, in nats."""
    divergence: Rows = np.einsum("ij,ij->i", np.exp(log_p), log_p - log_q)
    return divergence.astype(np.float64)


def _perplexity(surprise: NDArray[np.float64]) -> Estimate:
    """exp of the mean surprise; its error by propagation."""
    mean = _mean(surprise)
    return Estimate(exp(mean.value), exp(mean.value) * mean.error)


def _divergence(
    surprise: NDArray[np.float64],
    reference: NDArray[np.float64],
    kld: NDArray[np.float64],
    same: NDArray[np.bool_],
) -> Divergence:
    log_ratio = _mean(surprise - reference)  # the two are correlated: the error is that of their difference
    return Divergence(
        kld_mean=_mean(kld),
        kld_median=_quantile(kld, 0.5),
        kld_p95=_quantile(kld, 0.95),
        kld_p99=_quantile(kld, 0.99),
        kld_max=float(kld.max()),
        same_top=_mean(same.astype(np.float64)),
        ppl_ratio=Estimate(exp(log_ratio.value), exp(log_ratio.value) * log_ratio.error),
        reference_perplexity=_perplexity(reference),
    )


def _mean(values: NDArray[np.float64]) -> Estimate:
    error = float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), error)


def _quantile(values: NDArray[np.float64], q: float) -> Estimate:
    """The q-quantile. Its error: half the distance of the order statistics one binomial deviation to either side."""
    deviation = sqrt(q * (1 - q) / len(values))
    low, high = np.quantile(values, [max(0.0, q - deviation), min(1.0, q + deviation)])
    return Estimate(float(np.quantile(values, q)), float(high - low) / 2)
