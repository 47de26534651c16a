"""The receipts' own forward pass against transformers, on every model of the families it knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters.forward import can_run, forward
from converters.sources import open_source
from tests.oracles.families import FIRST_TOKEN, make_reference, outputs
from tests.oracles.family_cases import CASES, Case

KNOWN = {"gemma": 2, "gemma2": 2, "gemma3": 1, "phi3": 1, "qwen2": 1, "qwen3": 1}  # GGUF name → models it must run


@pytest.mark.parametrize("name", KNOWN)
def test_forward_pass_is_transformers(name: str, tmp_path: Path) -> None:
    n_run = sum(runs(case, tmp_path / str(i)) for i, case in enumerate(CASES) if case.name.rsplit("-", 1)[0] == name)
    assert n_run >= KNOWN[name]


def runs(case: Case, folder: Path) -> bool:
    """Whether it is known; if so, it must compute the same."""
    model = make_reference(case, folder)
    source = open_source(folder)
    tokens = [int(token) for token in np.random.default_rng(0).integers(FIRST_TOKEN, 1000, 100)]
    if not can_run(source, len(tokens)):
        return False
    expected = outputs(model, tokens)
    assert np.abs(forward(source, tokens) - expected).max() < 2e-4 * expected.std(), case.what
    return True
