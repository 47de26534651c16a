"""Figures of a measured conversion, said so that anybody understands them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def quality_lines(quality: Mapping[str, Any]) -> list[str]:
    """What a receipt says about the quality, in plain words."""
    found = quality.get("measured")
    if not found:
        return [] if quality.get("level") == "off" else [f"nothing of the quality: {quality.get('reason')}"]
    where = f"{found['n_tokens']} tokens of {quality['text']}"
    if "kld" not in found:
        return [f"perplexity {found['perplexity']:.2f} over {where}; nothing is lost"]
    n_same = round(100 * found["same_top"])
    return [
        f"the quantized model picks the same next word {n_same} times in 100 ({where})",
        f"KL divergence {found['kld']['mean']:.4f} ± {found['errors']['kld']['mean']:.4f}, 99 % below "
        f"{found['kld']['p99']:.2f}; perplexity {found['perplexity']:.2f}, {found['ppl_ratio']:.3f} × the original's",
    ]


def budget_lines(budget: Mapping[str, Any] | None) -> list[str]:
    """What a receipt says about a budget: whether it was met, and where the bytes went."""
    if not budget:
        return []
    speed = f", {budget['speed']:.0f} tokens per second" if budget.get("speed") else ""
    attempts = "1 attempt" if budget["attempts"] == 1 else f"{budget['attempts']} attempts"
    return [
        f"{budget['asked']}: met with {budget['n_bytes']:,} bytes and a KL divergence of {budget['measured']:.4f} "
        f"(expected {budget['expected']:.4f}) on {budget['n_tokens']} held-out tokens{speed}, in {attempts}",
        *budget["reasons"],
    ]
