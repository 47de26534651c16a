"""The HTML page: figures of the receipt, errors of the tensors, nothing fetched from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters import convert
from converters.prepare import open_inputs, plan_of
from converters.report import tensor_errors
from edgellm.errors import OutputError
from tests.converters.command import run


class Page(HTMLParser):
    """Text, titles of cells, and every attribute that could load something."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text, self.titles, self.links, self.open = "", [], [], []  # type: ignore[var-annotated]
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page(tiny_llama: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "<b>&.gguf", tmp_path / "report.html"
    receipt = convert(tiny_llama, out, quant="Q4_0", receipt="full", report=report)
    content = report.read_text(encoding="utf-8")
    page = Page(content)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"https?:|url\(|<script", content)
    assert "<b>&.gguf" in page.text
    measured = receipt.quality["measured"]
    assert f"{measured['kld']['mean']:.4g}" in page.text
    assert f"same next word {round(100 * measured['same_top'])} times in 100" in page.text
    assert all(check in page.text for check in receipt.checks)
    assert len(page.titles) == 2 * 7
    assert receipt.quality["speeds"]["model"]["decode"] > 0
    assert f"{receipt.quality['speeds']['reference']['decode']:.0f}" in page.text


def test_errors_are_those_of_the_files(tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "f32.gguf", quant="F32")
    convert(tiny_llama, tmp_path / "out.gguf", quant="Q5_1")
    errors = tensor_errors(plan_of(open_inputs(tiny_llama), "Q5_1"), tmp_path / "out.gguf")
    exact, rounded = (dequantized(tmp_path / f"{name}.gguf") for name in ("f32", "out"))
    assert len(errors) == 2 * 7 + 2
    for error in errors:
        weights, difference = exact[error.name], exact[error.name] - rounded[error.name]
        assert error.rms == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(weights), rel=1e-4)


def dequantized(path: Path) -> dict[str, Any]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def test_without_measurement(tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "out.gguf", quant="Q4_0", receipt="fast", report=tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "nothing of the quality: as asked" in text.lower()
    assert "Error of each tensor" in text


def test_a_report_that_cannot_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write the report"):
        convert(tiny_llama, tmp_path / "out.gguf", quant="Q4_0", report=tmp_path / "no" / "report.html")
    assert not (tmp_path / "out.gguf").exists()
    ended = run("convert", tiny_llama, "-o", tmp_path / "out.gguf", "--report", tmp_path / "report.html")
    assert ended.code == 0
    assert "<!DOCTYPE html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
