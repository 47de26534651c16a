"""Compensated conversions: they lose less, go on after an interruption, and fall back where they must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import converters.compensation as compensation
from converters import convert
from converters.layerwise import Layerwise, compensate_model
from converters.quantize.compensate import unpacked
from converters.slices import stands_alone
from edgellm.errors import OutputError
from edgellm.gguf_header import read_header
from edgellm.measure.evaluate import evaluate
from edgellm.measure.texts import read_samples
from tests.converters import reference, tiny
from tests.converters.command import refused, run

TEXT = "The quick brown fox reads a book about lighthouses, and every word of it counts: {}. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model: a checkpoint; text.txt, other.txt."""
    root = tmp_path_factory.mktemp("compensation")
    tiny.make_model(root / "model", vocab_size=1000)
    rng = np.random.default_rng(0)
    for name in ("text.txt", "other.txt"):
        (root / name).write_text("".join(TEXT.format(n) for n in rng.integers(0, 10**6, 160)), encoding="utf-8")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M"])
def test_loses_less_at_the_same_bytes(quant: str, folder: Path, tmp_path: Path) -> None:
    convert(folder / "model", tmp_path / "f16.gguf", quant="F16")
    made = {
        compensate: convert(
            folder / "model", tmp_path / f"{compensate}.gguf", quant=quant, calibrate=folder / "text.txt",
            compensate=compensate,
        )
        for compensate in (True, False)
    }  # fmt: skip
    assert "15 tensors compensated on" in made[True].calibration
    assert "compensated" not in made[False].calibration
    assert made[True].types == made[False].types
    samples = read_samples(folder / "other.txt", tmp_path / "f16.gguf", n_ctx=256, n_chunks=8)
    klds = {
        c: evaluate(tmp_path / f"{c}.gguf", samples, reference=tmp_path / "f16.gguf").as_dict()["kld"]["mean"]
        for c in made
    }
    assert klds[True] < 0.8 * klds[False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["False.gguf", "True.gguf", "cache", "f16.gguf"]


@pytest.mark.slow
def test_an_interrupted_one_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"quant": "Q4_0", "calibrate": folder / "text.txt"}
    convert(folder / "model", tmp_path / "whole.gguf", **options)
    work = compensation.work_folder(tmp_path / "out.gguf")

    def stop(what: str, done: int, total: int) -> None:
        if what == "compensating" and done == 1:
            raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            convert(folder / "model", tmp_path / "out.gguf", **options, resume=resume, on_progress=stop)
        assert work.exists() == resume
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("blk.*.npy")}
    assert len(finished) == 7
    seen: dict[str, int] = {}

    def watched(job: Layerwise, *arguments: Any) -> None:
        compensate_model(job, *arguments)
        seen.update({path.name: path.stat().st_mtime_ns for path in work.glob("blk.*.npy")})

    monkeypatch.setattr(compensation, "compensate_model", watched)
    convert(folder / "model", tmp_path / "out.gguf", **options, resume=True)
    assert len(seen) == 14
    assert finished.items() <= seen.items()
    assert not work.exists()
    assert reference.tensors(tmp_path / "out.gguf") == reference.tensors(tmp_path / "whole.gguf")
    # what is left of another job is of no use
    with pytest.raises(KeyboardInterrupt):
        convert(folder / "model", tmp_path / "next.gguf", **options, resume=True, on_progress=stop)
    options["calibrate"] = folder / "other.txt"
    convert(folder / "model", tmp_path / "next.gguf", **options, resume=True)
    convert(folder / "model", tmp_path / "fresh.gguf", **options)
    assert reference.tensors(tmp_path / "next.gguf") == reference.tensors(tmp_path / "fresh.gguf")


def test_later_layers_see_what_the_earlier_ones_became(folder: Path, tmp_path: Path) -> None:
    """Both ways through the model agree: block by block on hidden states, and the whole of it from the tokens on."""
    convert(folder / "model", tmp_path / "f16.gguf", quant="F16")
    header = read_header(tmp_path / "f16.gguf")
    tokens = [[int(t) for t in np.random.default_rng(k).integers(6, 1000, 128)] for k in range(4)]
    planned = {t.name: t for t in compensation_targets(folder / "model")}
    results = []
    for from_start in (False, True):
        work = tmp_path / str(from_start)
        work.mkdir()
        assert stands_alone(header, tokens[0], work)
        job = Layerwise(header, planned, lambda tensor: tensor.sources[0].read(), work, from_start=from_start)
        job.n_together = 2 if from_start else 1
        compensate_model(job, tokens)
        names = [name for name in planned if not name.endswith(("attn_q.weight", "attn_k.weight"))]
        results.append(
            [unpacked("Q8_0", np.load(job.packed_path(name)), planned[name].shape[-1]) for name in sorted(names)]
        )
    for alone, whole in zip(*results, strict=True):
        assert np.isclose(alone, whole, atol=1e-6).mean() > 0.9


def compensation_targets(model: Path) -> list[Any]:
    from converters import plan

    return [
        tensor
        for tensor in plan(model, quant="Q8_0").tensors
        if tensor.name.startswith("blk.") and "norm" not in tensor.name
    ]


def test_experts_without_tokens_are_rounded_as_ever(folder: Path, tmp_path: Path) -> None:
    from tests.oracles.families import make_reference
    from tests.oracles.family_cases import CASES

    make_reference(next(case for case in CASES if case.name == "qwen2moe-1"), tmp_path / "model")
    (tmp_path / "short.txt").write_text("A few words, and a few more. " * 8, encoding="utf-8")
    options: dict[str, Any] = {"quant": "Q4_0", "calibrate": tmp_path / "short.txt"}
    receipt = convert(tmp_path / "model", tmp_path / "out.gguf", **options)
    assert any("experts saw too few tokens" in note for note in receipt.notes)
    convert(tmp_path / "model", tmp_path / "plain.gguf", **options, compensate=False)
    ours, plain = (reference.tensors(tmp_path / f"{name}.gguf") for name in ("out", "plain"))
    assert ours["blk.0.attn_q.weight"] != plain["blk.0.attn_q.weight"]
    same = [
        np.array_equal(a, b)
        for name in ours
        if "exps" in name
        for a, b in zip(*(expert_bytes(found[name], 6) for found in (ours, plain)), strict=True)
    ]
    assert any(same)


def expert_bytes(tensor: tuple[Any, ...], n_experts: int) -> list[Any]:
    data = np.frombuffer(tensor[2], np.uint8)
    return list(data.reshape(n_experts, -1))


def test_what_it_refuses_and_leaves_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match="give one"):
        convert(folder / "model", out, compensate=True)
    with pytest.raises(ValueError, match="effort is 9"):
        convert(folder / "model", out, calibrate=folder / "text.txt", effort=9)
    receipt = convert(folder / "model", out, quant="F16", calibrate=folder / "text.txt")
    assert "compensated" not in receipt.calibration
    ended = run("convert", folder / "model", "-o", tmp_path / "x.gguf", "--compensate")
    assert (ended.code, "--calibrate" in ended.stderr or "(calibrate)" in ended.stderr) == (2, True)
    work = compensation.work_folder(tmp_path / "y.gguf")
    work.write_text("in the way")
    ended = run("convert", folder / "model", "-o", tmp_path / "y.gguf", "--calibrate", folder / "text.txt")
    refused(ended, OutputError.exit_code, "make room")
    assert not (tmp_path / "y.gguf").exists()


def test_a_family_whose_blocks_differ(tmp_path: Path) -> None:
    """Gemma 3's blocks have other positions by their number: the whole model is run, and still everything is done."""
    from tests.oracles.families import make_reference
    from tests.oracles.family_cases import CASES

    make_reference(next(case for case in CASES if case.name == "gemma3-1"), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "f16.gguf", quant="F16")
    assert not stands_alone(read_header(tmp_path / "f16.gguf"), list(range(6, 134)), tmp_path)
    (tmp_path / "text.txt").write_text("Some words to read, and some more. " * 60, encoding="utf-8")
    receipt = convert(tmp_path / "model", tmp_path / "out.gguf", quant="Q4_0", calibrate=tmp_path / "text.txt")
    assert "50 tensors compensated" in receipt.calibration
