"""Small models shared by the converter's tests. They are read-only: a test that spoils one copies it first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from converters import convert
from tests.converters import tiny


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama checkpoint in float32: folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.make_model(folder, vocab_size=1000)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as an F32 GGUF."""
    out = tmp_path_factory.mktemp("models") / "tiny-f32.gguf"
    convert(tiny_llama, out, quant="F32")
    return out


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Gives a copy of a folder that a test may spoil."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))

    return copy
