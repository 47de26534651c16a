"""Comparing greedy answers that different kernels gave."""

from __future__ import annotations

from collections.abc import Sequence

import edgellm


def assert_same_but_for_ties(
    model: edgellm.Model, prompt: list[int], expected: Sequence[int], found: Sequence[int]
) -> None:
    """Equal, or different for the first time between two candidates that the model holds for nearly as good: which
    kernels are used depends on the CPU and on how many tokens are evaluated together, and each rounds its own way.
    """
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if at is None:
        assert len(expected) == len(found)
    else:
        logits = model.logits([*prompt, *expected[:at]])[-1]
        assert abs(float(logits[expected[at]] - logits[found[at]])) < 0.7
