"""Safetensors files that are cut off, corrupt or hostile: refused from the header, never read past the end."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters import convert, plan
from converters.sources.safetensors_file import read_tensors
from edgellm.errors import CheckpointError
from tests.converters.command import refused, run

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_with(path: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_the_file_the_others_spoil_is_good(tmp_path: Path) -> None:
    tensors = read_tensors(file_with(tmp_path / "a.safetensors", {"w": ENTRY, "__metadata__": {"format": "pt"}}))
    assert {name: (t.shape, t.dtype, t.n_bytes) for name, t in tensors.items()} == {"w": ((2, 3), "F32", 24)}
    assert tensors["w"].read().tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("n_left", [0, 3, 8, 100, 2000, -100_000, -1])
def test_cut_off(tiny_llama: Path, tmp_path: Path, n_left: int) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:n_left])
    out = tmp_path / "out.gguf"
    out.write_bytes(b"earlier")
    with pytest.raises(CheckpointError, match="copy it again"):
        convert(folder, out, quant="Q8_0", force=True)
    assert out.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]


def test_cut_off_on_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    ended = run("convert", folder, "-o", tmp_path / "out.gguf")
    refused(ended, 3, "model.safetensors is cut off: 1,000 bytes are missing")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("header", "data", "length", "said"),
    [
        ({"w": ENTRY}, b"", 1 << 62, "no safetensors file or is cut off"),
        ({"w": ENTRY}, b"", (1 << 64) - 1, "no safetensors file or is cut off"),
        ({"w": ENTRY}, bytes(24), 10, "no valid JSON"),
        ({"w": ENTRY}, bytes(24), 0, "no valid JSON"),
        (b'{"w": ', bytes(24), None, "no valid JSON"),
        (b"\xff\xfe\x00", bytes(24), None, "no valid JSON"),
        (b"[" * 200_000, bytes(24), None, "no valid JSON"),
        ([ENTRY], bytes(24), None, "no table of tensors"),
        ({"w": 5}, bytes(24), None, "bad header entry for tensor w"),
        ({"w": ENTRY | {"data_offsets": [0]}}, bytes(24), None, "bad header entry for tensor w"),
        ({"w": ENTRY | {"data_offsets": [0, "24"]}}, bytes(24), None, "size of tensor w doesn't fit"),
        ({"w": ENTRY | {"data_offsets": [0.0, 24.0]}}, bytes(24), None, "size of tensor w doesn't fit"),
        ({"w": ENTRY | {"data_offsets": [24, 0]}}, bytes(24), None, "size of tensor w doesn't fit"),
        ({"w": ENTRY | {"data_offsets": [-24, 0]}}, bytes(24), None, "size of tensor w doesn't fit"),
        ({"w": ENTRY | {"shape": [2, -3]}}, bytes(24), None, "size of tensor w doesn't fit"),
        ({"w": ENTRY | {"shape": [1 << 40, 1 << 40]}}, bytes(24), None, "size of tensor w doesn't fit"),
        ({"w": ENTRY | {"shape": "23"}}, bytes(24), None, "tensor w"),
        ({"w": ENTRY | {"shape": [True, 6]}}, bytes(24), None, "size of tensor w doesn't fit"),
        ({"w": ENTRY | {"dtype": "F4"}}, bytes(24), None, "type F4, which isn't supported"),
        ({"w": ENTRY | {"dtype": ["F32"]}}, bytes(24), None, "tensor w"),
        ({"w": ENTRY | {"data_offsets": [8, 32]}}, bytes(32), None, "tensor w begins at 8, expected 0"),
        ({"w": ENTRY, "v": ENTRY}, bytes(24), None, "begins at 0, expected 24"),
        ({"w": ENTRY}, bytes(23), None, "cut off: 1 bytes are missing"),
        ({"w": ENTRY}, bytes(30), None, "6 bytes belong to no tensor"),
        ({"w": ENTRY | {"data_offsets": [1 << 70, (1 << 70) + 24]}}, bytes(24), None, "tensor w begins at"),
    ],
)
def test_header(tmp_path: Path, header: Any, data: bytes, length: int | None, said: str) -> None:
    path = file_with(tmp_path / "a.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_tensors(path)
    assert "a.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_damage_is_never_anything_but_an_error_of_ours(tiny_llama: Path, tmp_path: Path) -> None:
    """Every byte of the header may flip: either still a plan, or CheckpointError."""
    import random

    source = random.Random(11)
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    file = folder / "model.safetensors"
    good = file.read_bytes()
    n_header = 8 + int.from_bytes(good[:8], "little")
    refusals = 0
    for _ in range(300):
        spoiled = bytearray(good[:n_header])
        for _ in range(source.choice((1, 1, 3))):
            spoiled[source.randrange(n_header)] = source.randrange(256)
        with file.open("r+b") as handle:
            handle.write(spoiled)
        try:
            plan(folder)
        except CheckpointError:
            refusals += 1
    assert refusals > 200


def test_file_that_vanishes_in_the_middle(tiny_llama: Path, tmp_path: Path) -> None:
    """The weights are replaced by a shorter file after the plan was made."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    file = folder / "model.safetensors"

    def shorten(name: str, done: int, total: int) -> None:
        if done > total // 2 and file.exists():
            file.unlink()

    on_progress: Callable[[str, int, int], None] = shorten
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        convert(folder, tmp_path / "out.gguf", quant="Q8_0", on_progress=on_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
