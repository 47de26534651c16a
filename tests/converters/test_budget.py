"""Budgets end to end on tiny random models: what was asked for is what the written file has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import converters.budget.look as look
import converters.budget.meet as meeting
from converters import convert, plan
from converters.budget.meet import budget_folder, held_out
from converters.compensation import work_folder
from edgellm.cli.main import run_command
from edgellm.errors import BudgetError
from edgellm.gguf_header import read_header
from edgellm.measure.evaluate import evaluate
from edgellm.measure.texts import read_samples
from tests.converters import reference, tiny
from tests.converters.test_compensation import TEXT
from tests.oracles.families import make_reference
from tests.oracles.family_cases import CASES

# untied with rows that 256 divides; tied with none; experts; blocks that differ
MODELS = ("untied", "tied", "qwen2moe-1", "gemma3-1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, text.txt and other.txt, and a cache that the tests of this file share."""
    folder = tmp_path_factory.mktemp("budget")
    tiny.make_model(folder / "untied", vocab_size=1000)
    tiny.make_model(folder / "tied", vocab_size=1000, intermediate_size=192, tie_word_embeddings=True)
    for case in CASES:
        if case.name in MODELS:
            make_reference(case, folder / case.name)
    rng = np.random.default_rng(0)
    for name in ("text.txt", "other.txt"):
        (folder / name).write_text("".join(TEXT.format(n) for n in rng.integers(0, 10**6, 64)), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))


@pytest.fixture
def budgeted(root: Path, tmp_path: Path) -> Callable[..., Any]:
    """convert(model's name, **options) → receipt."""

    def made(name: str, out: str = "out.gguf", **options: Any) -> Any:
        source = tmp_path / name if name.endswith(".gguf") else root / name
        return convert(source, tmp_path / out, **{"calibrate": root / "text.txt", "effort": 1} | options)

    return made


def smallest(budgeted: Callable[..., Any], name: str, **options: Any) -> int:
    """Bytes of the smallest file, as the error for an impossible budget has it."""
    with pytest.raises(BudgetError, match="smallest file of this model has") as error:
        budgeted(name, max_size=1000, **options)
    found = re.search(r"has ([\d,]+) bytes", str(error.value))
    assert found
    return int(found[1].replace(",", ""))


def kld(root: Path, name: str, tmp_path: Path, out: str = "out.gguf") -> float:
    """On the held-out part of the text, from an F16 file that another conversion made."""
    f16 = root / f"{name}-f16.gguf"
    if not f16.exists():
        convert(root / name, f16, quant="F16")
    _, tuning = held_out(read_samples(root / "text.txt", f16, n_ctx=512))
    return float(evaluate(tmp_path / out, tuning, reference=f16).as_dict()["kld"]["mean"])


def types_of(path: Path) -> dict[str, str]:
    return {name: info.type_name for name, info in read_header(path).tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_size(name: str, budgeted: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    least = smallest(budgeted, name)
    klds = []
    for room in (least, least + least // 8, least + least // 2):
        receipt = budgeted(name, max_size=room, force=True)
        size = (tmp_path / "out.gguf").stat().st_size
        assert 0.98 * room <= size <= room
        assert receipt.output_bytes == size == receipt.budget["n_bytes"]
        klds.append(kld(root, name, tmp_path))
        assert receipt.budget["measured"] == pytest.approx(klds[-1], rel=1e-3)
    assert klds[0] > 2 * klds[1] > 4 * klds[2]
    with pytest.raises(BudgetError, match=f"{least:,} bytes"):
        budgeted(name, max_size=least - 1, force=True)
    assert (tmp_path / "out.gguf").stat().st_size == size


@pytest.mark.parametrize("receipt", ["full", "off"])
def test_size_to_the_byte_whatever_the_receipt(receipt: str, budgeted: Callable[..., Any], tmp_path: Path) -> None:
    least = smallest(budgeted, "untied", receipt=receipt)
    made = budgeted("untied", max_size=least, receipt=receipt)
    assert (tmp_path / "out.gguf").stat().st_size == made.output_bytes == made.budget["n_bytes"] == least
    metadata = read_header(tmp_path / "out.gguf").metadata
    assert ("edgellm.receipt.json" in metadata) == (receipt == "full")


@pytest.mark.parametrize(("name", "limit"), [("untied", 0.004), ("tied", 0.002), ("qwen2moe-1", 0.02), ("gemma3-1", 0.1)])
def test_divergence(name: str, limit: float, budgeted: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    receipt = budgeted(name, max_kld=limit)
    found = kld(root, name, tmp_path)
    assert 0.4 * limit < found <= limit
    assert receipt.budget["measured"] == pytest.approx(found, rel=1e-3)
    looser = budgeted(name, "looser.gguf", max_kld=4 * limit)
    assert looser.output_bytes < receipt.output_bytes
