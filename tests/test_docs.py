"""The commands and examples of docs/, run on the real model: those that take minutes with less time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import converters
import edgellm
from edgellm import LoadParams

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [
    (name, line.replace("work/", "").replace("my-data", "data").replace(" base ", " checkpoint "))
    for name, page in PAGES.items()
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line and not line.startswith("pip ")
]
EDGELLM = [command for _, command in SHELL if command.startswith("edgellm ")]
BENCHMARKS = [command for _, command in SHELL if command.startswith("python benchmarks/")]
PYTHON = re.findall(
    r"```python\n(.*?)```", "".join(page for name, page in PAGES.items() if name != "README.md"), re.DOTALL
)


def test_nothing_is_left_out() -> None:
    assert sorted(EDGELLM + BENCHMARKS) == sorted(command for _, command in SHELL)
    assert len(EDGELLM) == 3
    assert len(BENCHMARKS) >= 2
    assert len(PYTHON) == 1


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_know_the_options_they_are_shown_with(command: str) -> None:
    """They run for hours."""
    _, script, *arguments = command.split()
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    options = [argument for argument in arguments if argument.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}\b", done.stdout)] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """What the commands name: model.gguf, its checkpoint, and data.jsonl."""
    folder = tmp_path_factory.mktemp("docs")
    converters.to_checkpoint(model_path, folder / "checkpoint")
    converters.convert(folder / "checkpoint", folder / "model.gguf", quant="Q4_0", receipt="off")
    shutil.copy(ROOT / "examples" / "fine_tune" / "dialogues.jsonl", folder / "data.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_and_what_they_make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for command in EDGELLM:
        made = folder / command.split(" -o ")[1].split()[0]
        made.unlink(missing_ok=True)  # two pages may name the same
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", re.sub(r"--minutes \d+", "--minutes 1", command)],
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert made.stat().st_size > 10_000
    shutil.copy(folder / "model.ngram", folder / "my-data.ngram")
    with edgellm.load(folder / "model.gguf", LoadParams(n_ctx=512)) as model:
        prompt = model.chat_tokens([{"role": "user", "content": "Name three colours."}])
        for line in PYTHON[0].splitlines():
            call = line.partition("#")[0].strip()
            assert call.startswith("model.generate(prompt, draft=")
            stream = eval(call, {"model": model, "prompt": prompt})
            assert next(stream).token_ids
            stream.close()
