"""`--dry-run`: the whole plan from headers, nothing written, and exactly what the real thing then writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters import convert, plan
from converters.plan import BASE_MEMORY
from tests.converters import reference, tiny
from tests.converters.command import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    tiny.make_model(folder, vocab_size=1000, hidden_size=256, rope_parameters=rope)
    return folder


@pytest.mark.parametrize("quant", ["F32", "Q4_K_M", "IQ4_XS"])
def test_dry_run_equals_the_real_thing(model: Path, quant: str, tmp_path: Path) -> None:
    ended = run("convert", model, "-q", quant, "--dry-run", "--json", cwd=tmp_path)
    assert (ended.code, ended.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    planned: dict[str, Any] = json.loads(ended.stdout)
    assert run("convert", model, "-q", quant, "-o", "out.gguf", cwd=tmp_path).code == 0
    written = reference.tensors(tmp_path / "out.gguf")
    assert [row["name"] for row in planned["tensors"]] == list(written)
    for row in planned["tensors"]:
        type_name, shape, data = written[row["name"]]
        assert (row["type"], tuple(row["shape"]), row["n_bytes"]) == (type_name, shape, len(data))
    assert planned["n_bytes"] == sum(len(data) for _, _, data in written.values())
    assert planned["n_parameters"] == sum(_n(shape) for _, shape, _ in written.values())
    assert planned["bits_per_weight"] == pytest.approx(8 * planned["n_bytes"] / planned["n_parameters"])
    assert planned["quant"] == quant
    assert planned["architecture"] == "llama"
    sources = [name for row in planned["tensors"] for name in row["sources"]]
    assert [row["name"] for row in planned["tensors"] if not row["sources"]] == ["rope_freqs.weight"]  # computed
    assert "model.layers.1.mlp.down_proj.weight" in sources


def _n(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def test_dry_run_touches_no_existing_output(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"earlier")
    ended = run("convert", model, "-o", tmp_path / "out.gguf", "--dry-run", "--type", "attn_v=Q8_0")
    assert ended.code == 0
    assert (tmp_path / "out.gguf").read_bytes() == b"earlier"
    lines = ended.stdout.splitlines()
    planned = plan(model, types=(("attn_v", "Q8_0"),))
    assert len(lines) >= len(planned.tensors) + 1
    for line, tensor in zip(lines, planned.tensors, strict=False):
        assert line.split()[:2] == [tensor.name, tensor.type_name]
    assert "nothing was written" in lines[len(planned.tensors)]
    assert any("attn_v" in line and "Q8_0" in line for line in lines)


def test_dry_run_reads_headers_only(model: Path, tmp_path: Path) -> None:
    """A file whose data are a hole of zeros on disk plans like the real one."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    whole = (model / "model.safetensors").read_bytes()
    n_header = 8 + int.from_bytes(whole[:8], "little")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(whole[:n_header])
        file.truncate(len(whole))
    ours, theirs = plan(folder), plan(model)
    assert [(t.name, t.type_name, t.shape) for t in ours.tensors] == [
        (t.name, t.type_name, t.shape) for t in theirs.tensors
    ]


def test_estimated_memory(model: Path) -> None:
    """The largest tensor as stored, as float32, permuted where it is, and quantized, beside the process."""
    embedding = 1000 * 256
    assert plan(model, quant="F32").peak_memory == BASE_MEMORY + 12 * embedding
    assert plan(model, quant="Q8_0").peak_memory == BASE_MEMORY + 8 * embedding + embedding // 32 * 34


def test_receipt_as_json(model: Path, tmp_path: Path) -> None:
    ended = run("convert", model, "-q", "Q4_K_M", "-o", tmp_path / "out.gguf", "--json", "--receipt", "full")
    assert (ended.code, ended.stderr) == (0, "")
    receipt = json.loads(ended.stdout)
    written = reference.tensors(tmp_path / "out.gguf")
    by_type: dict[str, list[int]] = {}
    for type_name, _, data in written.values():
        count, total = by_type.get(type_name, [0, 0])
        by_type[type_name] = [count + 1, total + len(data)]
    assert receipt["types"] == by_type
    assert receipt["output_bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert receipt["output"] == str(tmp_path / "out.gguf")
    assert receipt["source_bytes"] == (model / "model.safetensors").stat().st_size - _header(model)
    assert receipt["quant"] == "Q4_K_M"
    assert receipt["n_fallback"] == sum(t.type_name != t.wanted_type for t in plan(model, quant="Q4_K_M").tensors)
    assert len(receipt["checks"]) == 5
    assert receipt["quality"]["level"] == "full"
    assert 0 < receipt["quality"]["measured"]["kld"]["mean"] < 1


def _header(model: Path) -> int:
    return 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")


def test_receipt_for_people_and_default_name(model: Path, tmp_path: Path) -> None:
    ended = run("convert", model, "-q", "q8_0", cwd=tmp_path)
    assert (ended.code, ended.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["model-Q8_0.gguf"]
    assert ended.stdout.startswith("model-Q8_0.gguf  ")
    for word in ("quant ", "source ", "types ", "time ", "checked "):
        assert f"  {word}" in ended.stdout


def test_progress_goes_from_nothing_to_all(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    receipt = convert(model, tmp_path / "out.gguf", quant="Q8_0", on_progress=lambda *step: seen.append(step))
    planned = plan(model, quant="Q8_0")
    assert [name for name, _, _ in seen] == [*(t.name for t in planned.tensors), ""]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[0][1:] == (0, planned.n_bytes)
    assert seen[-1][1:] == (planned.n_bytes, planned.n_bytes)
    assert sum(n for _, n in receipt.types.values()) == planned.n_bytes
