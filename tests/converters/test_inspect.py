"""`edgellm inspect` on every kind of file, its numbers against gguf's and safetensors' own readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.converters import reference
from tests.converters.command import refused, run


def inspected(path: Path) -> dict[str, Any]:
    ended = run("inspect", path, "--json")
    assert (ended.code, ended.stderr) == (0, "")
    found: dict[str, Any] = json.loads(ended.stdout)
    assert found["path"] == str(path)
    return found


def totals(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    types = {row["type"] for row in rows}
    return {
        name: {
            "tensors": sum(row["type"] == name for row in rows),
            "n_bytes": sum(row["n_bytes"] for row in rows if row["type"] == name),
        }
        for name in types
    }


def test_gguf(tiny_gguf: Path) -> None:
    found = inspected(tiny_gguf)
    theirs = reference.tensors(tiny_gguf)
    assert found["kind"] == "GGUF model, version 3"
    assert {r["name"]: (r["type"], tuple(r["shape"]), r["n_bytes"]) for r in found["tensors"]} == {
        name: (type_name, shape, len(data)) for name, (type_name, shape, data) in theirs.items()
    }
    metadata = reference.metadata(tiny_gguf)
    assert found["metadata"].keys() == metadata.keys()
    for key, value in metadata.items():
        assert found["metadata"][key] == (pytest.approx(value) if isinstance(value, float) else value)
    assert found["types"] == totals(found["tensors"])
    assert found["n_bytes"] == sum(len(data) for _, _, data in theirs.values())
    assert found["bits_per_weight"] == 32


def test_checkpoint_folder(tiny_llama: Path) -> None:
    from safetensors import safe_open

    found = inspected(tiny_llama)
    assert found["kind"] == "checkpoint (safetensors)"
    assert found["metadata"] == json.loads((tiny_llama / "config.json").read_text())
    with safe_open(tiny_llama / "model.safetensors", "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        theirs = {name: (list(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    assert {row["name"]: (row["shape"], row["type"]) for row in found["tensors"]} == theirs
    assert found["types"] == totals(found["tensors"])


def test_safetensors_file(tiny_llama: Path) -> None:
    folder, file = inspected(tiny_llama), inspected(tiny_llama / "model.safetensors")
    assert file["kind"] == "safetensors file"
    assert file["metadata"] == {}
    assert file["tensors"] == folder["tensors"]


def test_adapter_folder_of_peft(tiny_llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    found = inspected(tmp_path / "adapter")
    assert found["kind"] == "adapter (LORA)"
    assert (found["metadata"]["r"], found["metadata"]["lora_alpha"]) == (4, 8)
    shapes = {row["name"]: row["shape"] for row in found["tensors"]}
    assert len(shapes) == 2 * 2 * 2
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == [4, 256]
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"] == [128, 4]
    assert found["n_parameters"] == 2 * (4 * 128 + 128 * 4 + 4 * 256 + 128 * 4)


def test_table_for_people(tiny_gguf: Path) -> None:
    ended = run("inspect", tiny_gguf)
    assert ended.code == 0
    assert "general.architecture" in ended.stdout
    assert "blk.0.attn_q.weight" not in ended.stdout
    with_tensors = run("inspect", tiny_gguf, "--tensors")
    assert all(name in with_tensors.stdout for name in reference.tensors(tiny_gguf))


def test_names_and_values_are_no_markup(tiny_llama: Path, tmp_path: Path) -> None:
    """Square brackets in a path or a value stand as they are."""
    folder = tmp_path / "[red]model[bold]"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).symlink_to(path)
    ended = run("inspect", folder)
    assert (ended.code, ended.stderr) == (0, "")
    assert "[red]model[bold]" in ended.stdout.replace("\n", "")


@pytest.mark.parametrize("what", ["missing", "missing.safetensors", "empty", "text", "folder"])
def test_refusals(what: str, tmp_path: Path) -> None:
    path = tmp_path / what
    if what in ("empty", "text"):
        path.write_text("" if what == "empty" else "GGUF but not really, only words")
    if what == "folder":
        path.mkdir()
    refused(run("inspect", path), 3, what)


def test_truncated_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    for n in (4, 20, 1000, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:n])
        refused(run("inspect", tmp_path / "cut.gguf"), 3, "cut.gguf", "damaged")
