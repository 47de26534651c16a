"""Killed at any moment, a conversion leaves an earlier output whole and nothing that passes for a model."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgellm.errors import ModelFileError
from edgellm.gguf_header import check_loadable, read_header
from tests.converters import reference, tiny
from tests.converters.command import refused, run, start

# `at` names a moment: "tensor N" before the N-th tensor is written, or a step of the writer before or after it runs
CHILD = """
import os, signal, sys
from converters import convert
from converters.writer import Writer
import converters.convert as steps

source, out, at, signal_name = sys.argv[1:]
def die():
    os.kill(os.getpid(), getattr(signal, signal_name))

def at_tensor(name, done, total, count=[0]):
    if at == f"tensor {count[0]}":
        die()
    count[0] += 1

def around(owner, name):
    inner = getattr(owner, name)
    def wrapped(*arguments, **named):
        ours = owner is not Writer or str(arguments[0].out) == out  # the original is written too
        if ours and at == f"before {name}": die()
        result = inner(*arguments, **named)
        if ours and at == f"after {name}": die()
        return result
    setattr(owner, name, wrapped)

sys.modules["converters.convert"].verify = sys.modules["converters.verify"].verify
for name in ("__enter__", "finish", "amend", "commit"):
    around(Writer, name)
around(sys.modules["converters.convert"], "verify")
if at == "within a tensor":
    import numpy, gguf
    write = Writer.write
    def half(self, tensor, pieces):
        if self._file.tell() > 200_000:
            data = next(iter(pieces)).tobytes()
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            die()
        write(self, tensor, pieces)
    Writer.write = half
convert(source, out, quant="Q8_0", force=True, resume=True, on_progress=at_tensor)
"""
MOMENTS = [
    "before __enter__", "after __enter__", "tensor 0", "tensor 1", "tensor 7", "within a tensor", "tensor 15",
    "tensor 20", "before finish", "after finish", "before verify", "after verify", "before amend", "before commit",
]  # fmt: skip

# from here on every byte is written and only the checks are to come
WHOLE = ("after finish", "before verify", "after verify", "before amend", "before commit")


def convert_until(source: Path, out: Path, at: str, signal_name: str = "SIGKILL") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, source, out, at, signal_name], capture_output=True, check=False, timeout=100
    )


@pytest.fixture(scope="module")
def earlier(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good output of an earlier conversion, of another recipe."""
    out = tmp_path_factory.mktemp("earlier") / "out.gguf"
    assert run("convert", tiny_llama, "-o", out, "-q", "Q4_0").code == 0
    return out.read_bytes()


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=[pytest.mark.slow] if i % 3 else []) for i, m in enumerate(MOMENTS)]
)
def test_killed(tiny_llama: Path, earlier: bytes, moment: str, tmp_path: Path) -> None:
    out, partial = tmp_path / "out.gguf", tmp_path / "out.gguf.partial"
    out.write_bytes(earlier)
    assert convert_until(tiny_llama, out, moment).returncode == -signal.SIGKILL
    assert out.read_bytes() == earlier
    names = {path.name.replace(".original", "") for path in tmp_path.iterdir()}
    assert names <= {"out.gguf", "out.gguf.partial", "out.gguf.partial.journal"}
    original = tmp_path / "out.gguf.original.partial"
    assert original.exists() == (moment == "before amend")
    if original.exists():
        assert_no_model(original, whole=True)
    if partial.exists():
        assert_no_model(partial, whole=moment in WHOLE)


def assert_no_model(partial: Path, whole: bool = False) -> None:
    """Its name says so, and unless all of it was already written, its content too."""
    for read in (read_header, check_loadable):
        with pytest.raises(ModelFileError, match="interrupted conversion"):
            read(partial)
    if not whole:
        with pytest.raises(ModelFileError, match=r"not a GGUF|cut off|can hold|no weights|no general.architecture"):
            check_loadable(partial.rename(partial.with_name("renamed.gguf")))


def test_killed_then_converted_again(tiny_llama: Path, earlier: bytes, tmp_path: Path) -> None:
    """What a kill left is refused by name, and in no way of the next conversion."""
    out, partial = tmp_path / "out.gguf", tmp_path / "out.gguf.partial"
    out.write_bytes(earlier)
    convert_until(tiny_llama, out, "tensor 9")
    assert partial.exists()
    refused(run("inspect", partial), 3, "interrupted conversion", "convert again")
    partial.rename(tmp_path / "renamed.gguf")
    refused(run("inspect", tmp_path / "renamed.gguf"), 3, "is not a GGUF file")
    convert_until(tiny_llama, out, "before commit")
    refused(run("inspect", partial), 3, "interrupted conversion")
    assert run("convert", tiny_llama, "-o", out, "-q", "Q8_0", "--force").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "renamed.gguf"]
    assert run("convert", tiny_llama, "-o", tmp_path / "fresh.gguf", "-q", "Q8_0").code == 0
    assert reference.tensors(out) == reference.tensors(tmp_path / "fresh.gguf")


def test_killed_after_the_rename(tiny_llama: Path, earlier: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(earlier)
    assert convert_until(tiny_llama, out, "after commit").returncode == -signal.SIGKILL
    assert check_loadable(out).metadata["general.file_type"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes long enough to be interrupted from outside."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    tiny.make_model(folder, vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
    return folder


def _interrupt_while_writing(child: subprocess.Popen[bytes], partial: Path, n_bytes: int, signal_number: int) -> None:
    """Send the signal once that much is written; the conversion must still be running then."""
    deadline = time.monotonic() + 100
    while child.poll() is None and time.monotonic() < deadline:
        if partial.exists() and partial.stat().st_size >= n_bytes:
            break
        time.sleep(0.002)
    assert child.poll() is None, "ended before it could be interrupted"
    child.send_signal(signal_number)


@pytest.mark.parametrize("n_bytes", [0, 2_000_000, 5_000_000])
def test_ctrl_c(larger: Path, earlier: bytes, n_bytes: int, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(earlier)
    child = start("convert", larger, "-o", out, "-q", "IQ4_NL", "--force", "--threads", "1")
    _interrupt_while_writing(child, out.with_name("out.gguf.partial"), n_bytes, signal.SIGINT)
    stdout, stderr = child.communicate(timeout=100)
    assert child.returncode == 130, stderr.decode()
    assert stdout == b""
    assert b"Traceback" not in stderr
    assert len(stderr.splitlines()) <= 1
    assert out.read_bytes() == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("n_bytes", [0, 1_000_000, 4_000_000])
def test_killed_from_outside(larger: Path, earlier: bytes, n_bytes: int, tmp_path: Path) -> None:
    out, partial = tmp_path / "out.gguf", tmp_path / "out.gguf.partial"
    out.write_bytes(earlier)
    child = start("convert", larger, "-o", out, "-q", "IQ4_NL", "--force", "--threads", "1")
    _interrupt_while_writing(child, partial, n_bytes, signal.SIGKILL)
    child.communicate(timeout=100)
    assert child.returncode == -signal.SIGKILL
    assert out.read_bytes() == earlier
    assert_no_model(partial)


def test_ctrl_c_while_the_checkpoint_is_written(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert run("convert", tiny_gguf, "--to-checkpoint", folder).code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = (
        "import os, signal, sys\n"
        "from converters import to_checkpoint\n"
        "def stop(name, done, total):\n"
        "    if done > total // 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "try: to_checkpoint(sys.argv[1], sys.argv[2], force=True, on_progress=stop)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    child = subprocess.run([sys.executable, "-c", script, tiny_gguf, folder], capture_output=True, check=False)
    assert child.returncode == 130, child.stderr.decode()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
