"""The wheel holds both packages and the model cards, and works where nothing else of the project is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("edgellm-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run_python(installed: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_holds_both_packages_the_cards_and_the_typing_markers(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    cards = sorted(path.name for path in (ROOT / "models").glob("*.toml"))
    assert sorted(Path(name).name for name in names if name.startswith("edgellm/models/")) == cards
    for name in ("edgellm/py.typed", "converters/py.typed", "edgellm/native/model.py", "converters/convert.py",
                 "edgellm/examples/reminders/adapter_model.safetensors"):  # fmt: skip
        assert name in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/")) or name.endswith(".gguf")]


def test_every_module_of_the_tree_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tree = {
        path.relative_to(ROOT).as_posix()
        for package in ("edgellm", "converters")
        for path in (ROOT / package).rglob("*.py")
    }
    assert tree - names == set()


def test_answers_with_the_default_model_from_elsewhere(installed: Path) -> None:
    code = "import sys, edgellm; print(edgellm.__file__, file=sys.stderr); from edgellm.cli.main import main; main()"
    done = run_python(installed, code, "run", "smollm2-135m-instruct", "Say hello.", "-n", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stderr
    assert json.loads(done.stdout)["text"].strip()


def test_converts_from_elsewhere(installed: Path) -> None:
    code = "import converters; print(converters.__file__, sorted(converters.__all__))"
    done = run_python(installed, code)
    assert str(installed) in done.stdout
    assert "convert" in done.stdout
