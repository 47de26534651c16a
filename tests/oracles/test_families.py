"""Every family: llama.cpp computes what transformers does, and the way back restores the tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from converters.architectures import ARCHITECTURES
from tests.oracles.families import cases_of, class_column, measure
from tests.oracles.family_cases import CASES, Case

_DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.what}")
def test_family_computes_the_same_and_comes_back(case: Case, tmp_path: Path) -> None:
    measured = measure(case, tmp_path)
    assert measured.deviation <= case.bound
    if case.pooling:
        assert measured.agree >= 0.9999
        assert measured.pooled >= 0.9999
    else:
        assert measured.agree == 1.0
    assert measured.missing == case.lost
    for name, difference in measured.changed.items():
        allowed = [tolerance for pattern, tolerance in case.lossy.items() if re.search(pattern, name)]
        assert allowed, f"{name} isn't restored bit for bit"
        assert difference <= max(allowed), name


def test_every_family_has_two_models() -> None:
    for arch in ARCHITECTURES:
        assert len(cases_of(arch)) >= 2, arch.hf_classes


def test_document_lists_every_family_and_model() -> None:
    rows = [line.split(" | ") for line in _DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    listed = {(row[0].removeprefix("| "), row[1]): row[2] for row in rows}
    for arch in ARCHITECTURES:
        verified = listed[arch.name, class_column(arch)]
        assert verified == "; ".join(case.what for case in cases_of(arch))
