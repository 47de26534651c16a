"""`bench` on the real model, with its peer; and the table, chart and page that are made of the figures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from edgellm.cli import main as command_line
from edgellm.cli.bench import memory_lines, named, speculation_line
from edgellm.cli.bench_page import write_page
from edgellm.errors import GenerationError, OutputError
from edgellm.measure import bench
from edgellm.measure.footprint import footprint
from edgellm.native.model import NativeModel


@pytest.fixture(scope="module")
def found(model_path: Path) -> dict[str, Any]:
    """One round of short texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PROMPTS", (16,))
        patch.setattr(bench, "DEPTHS", (16, 48))
        patch.setattr(bench, "N_WRITTEN", 6)
        return bench.bench(model_path, rounds=1, compare=True)


def test_both_are_timed_at_everything(found: dict[str, Any], model_path: Path) -> None:
    kinds = [(figure["kind"], figure["n"]) for figure in found["figures"]]
    assert kinds == [("load", 0), ("first_token", 16), ("prompt", 16), ("decode", 16), ("decode", 48)]
    for figure in found["figures"]:
        assert list(figure["values"]) == [bench.OURS, bench.THEIRS]
        for value in figure["values"].values():
            assert 0 < value["low"] <= value["median"] <= value["high"]
        ours, theirs = (value["median"] for value in figure["values"].values())
        assert figure["ratio"] == pytest.approx(ours / theirs)
    assert found["n_bytes"] == model_path.stat().st_size
    assert found["settings"]["n_ctx"] == 512 + 6 + 8
    json.dumps(found)


def test_guesses_are_right_where_a_text_is_copied(found: dict[str, Any]) -> None:
    assert found["speculation"]["off"]["median"] > 0
    assert found["speculation"]["accepted"] is None or 0 <= found["speculation"]["accepted"] <= 1
    assert "times as fast" in speculation_line(found["speculation"])
    assert "too short" in speculation_line(None)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_is_that_of_a_process_with_the_model(found: dict[str, Any], model_path: Path) -> None:
    for memory in found["memory"].values():
        assert model_path.stat().st_size < memory["rss"] <= memory["peak"] * 1.01
        assert memory["file"] + memory["anonymous"] <= memory["rss"]
        assert 0 < memory["pss"] <= memory["rss"]
    assert found["memory"][bench.OURS]["rss"] < found["memory"][bench.THEIRS]["rss"]
    assert len(memory_lines(found["memory"])) == 2


def test_the_page_needs_nothing_from_elsewhere(found: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    write_page(page, {**found, "model": "<b>&.gguf"})
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;.gguf" in text
    assert "<b>" not in text
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    for figure in found["figures"]:
        assert named(figure) in text
    assert text.count("<rect") == 2 * 3  # reading once, writing twice, by both
    with pytest.raises(OutputError, match="cannot write the page"):
        write_page(tmp_path, found)


def test_the_command_prints_a_table_and_bars(
    found: dict[str, Any],
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def measured(path: Path, params: Any, **options: Any) -> dict[str, Any]:
        asked.append((path, params, options["rounds"], options["compare"]))
        return found

    monkeypatch.setattr(bench, "bench", measured)
    page = tmp_path / "page.html"
    arguments = ["bench", str(model_path), "--compare", "--untuned", "--threads", "1", "--html", str(page)]
    assert command_line.run_command(arguments) == 0
    path, params, rounds, compare = asked[0]
    assert (path, params.tuned, params.n_threads, rounds, compare) == (model_path, False, 1, 5, True)
    out = capsys.readouterr().out
    for words in (
        "write after 48",
        "read 16",
        "first token of 16",
        "ratio",
        "memory of edgellm",
        "copying a text",
        "█",
    ):
        assert words in out
    assert page.exists()
    assert command_line.run_command(["bench", str(model_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert command_line.run_command(["bench", str(model_path), "--html", str(tmp_path / "no" / "x.html")]) == 1
    assert len(asked) == 2  # refused before anything was measured
    assert "cannot write" in capsys.readouterr().err


def test_a_peer_that_cannot_load_is_one_error(tmp_path: Path, model_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model_path.read_bytes()[:5000])
    with pytest.raises(GenerationError, match=r"broken\.gguf"):
        footprint(broken, bench.LoadParams(n_ctx=64), peer=True)


def test_the_log_is_ours_again_after_the_peer(found: dict[str, Any], model_path: Path, capfd: Any) -> None:
    NativeModel(model_path, load_mode="mmap").close()
    assert capfd.readouterr().err == ""
