"""Outputs that can't be written: refused with exit code 1 and one line, whatever was there before kept."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.converters import reference
from tests.converters.command import Ended, refused, run


def test_existing_file_without_force(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"earlier")
    refused(run("convert", tiny_llama, "-o", out), 1, "out.gguf exists; add --force")
    assert out.read_bytes() == b"earlier"
    assert run("convert", tiny_llama, "-o", out, "--force").code == 0
    assert reference.tensors(out)


def test_missing_folder(tiny_llama: Path, tmp_path: Path) -> None:
    refused(run("convert", tiny_llama, "-o", tmp_path / "no" / "out.gguf"), 1, "there is no folder", "make it first")
    assert list(tmp_path.iterdir()) == []


def test_path_through_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    refused(run("convert", tiny_llama, "-o", tmp_path / "file" / "out.gguf"), 1, "there is no folder")
    refused(
        run("convert", tiny_llama, "--to-checkpoint", tmp_path / "file", "--force"), 3
    )  # the source isn't a GGUF either: that is said first
    assert (tmp_path / "file").read_bytes() == b"x"


def test_output_that_is_a_folder(tiny_llama: Path, tmp_path: Path) -> None:
    refused(run("convert", tiny_llama, "-o", tmp_path, "--force"), 1, "is a folder; name the GGUF file")


def test_name_too_long(tiny_llama: Path, tmp_path: Path) -> None:
    refused(run("convert", tiny_llama, "-o", tmp_path / ("x" * 250 + ".gguf")), 1, "File name too long")
    assert list(tmp_path.iterdir()) == []


def test_folder_without_write_permission(tiny_llama: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permission bits don't bind root")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    refused(run("convert", tiny_llama, "-o", closed / "out.gguf"), 1, "no permission to write")


def test_usage_errors(tiny_llama: Path, tmp_path: Path) -> None:
    for arguments in (
        ["convert"],
        ["convert", tiny_llama, "-q", "Q9"],
        ["convert", tiny_llama, "--type", "attn"],
        ["convert", tiny_llama, "--type", "attn=Q9"],
        ["convert", tiny_llama, "--type", "attn(=Q8_0"],
        ["convert", tiny_llama, "--threads", "-1"],
        ["convert", tiny_llama, "--what"],
    ):
        ended = run(*arguments, cwd=tmp_path)
        assert ended.code == 2
        assert "Traceback" not in ended.stderr
        assert ended.stderr.strip()
    assert list(tmp_path.iterdir()) == []


def _limit_files_to_one_megabyte() -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_no_room_for_more_of_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"earlier")
    ended = run("convert", tiny_llama, "-o", out, "-q", "F32", "--force", prepare=_limit_files_to_one_megabyte)
    refused(ended, 1, "the disk is full", "make room or write elsewhere")
    assert out.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system; the test with RLIMIT_FSIZE covers a write that fails")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_too_small_from_the_start(tiny_llama: Path, small_disk: Path) -> None:
    (small_disk / "out.gguf").write_bytes(bytes(2_000_000))
    ended = run("convert", tiny_llama, "-o", small_disk / "out.gguf", "-q", "F32", "--force")
    refused(ended, 1, "bytes free, the GGUF needs about", "make room")
    assert [path.name for path in small_disk.iterdir()] == ["out.gguf"]


def test_disk_that_fills_up_in_the_middle(tiny_llama: Path, small_disk: Path) -> None:
    """There is room by the headers' account, but something else takes it while the file is written."""
    out = small_disk / "out.gguf"
    out.write_bytes(b"earlier")
    filler = (
        "from converters import convert\n"
        "import sys\n"
        "from pathlib import Path\n"
        "from edgellm.cli.console import report\n"
        "source, out = map(Path, sys.argv[1:])\n"
        "def fill(name, done, total):\n"
        "    if done > total // 2:\n"
        "        with (out.parent / 'filler').open('ab') as file:\n"
        "            try:\n"
        "                file.write(bytes(4_000_000))\n"
        "            except OSError: pass\n"
        "try: convert(source, out, quant='F32', force=True, on_progress=fill)\n"
        "except Exception as exc: sys.exit(report(exc, False))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", filler, tiny_llama, out], capture_output=True, check=False, cwd=Path.cwd()
    )
    refused(Ended(child.returncode, child.stdout.decode(), child.stderr.decode()), 1, "the disk is full")
    assert out.read_bytes() == b"earlier"
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "out.gguf"]


def test_disk_full_while_the_checkpoint_is_written(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"earlier": true}')
    ended = run("convert", tiny_gguf, "--to-checkpoint", folder, "--force", prepare=_limit_files_to_one_megabyte)
    refused(ended, 1, "cannot write", "make room or choose another folder")
    assert (folder / "config.json").read_text() == '{"earlier": true}'
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_checkpoint_folder_that_is_taken(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    refused(run("convert", tiny_gguf, "--to-checkpoint", folder), 1, "exists and isn't empty; add --force")
    assert (folder / "mine.txt").read_text() == "mine"
    refused(run("convert", tiny_gguf, "--to-checkpoint", folder / "mine.txt"), 1, "is a file; name a folder")
    refused(run("convert", tiny_gguf, "--to-checkpoint", tmp_path / "no" / "model"), 1, "cannot write in")


def test_force_never_deletes_what_is_no_checkpoint(tiny_gguf: Path, tmp_path: Path) -> None:
    """--force on a home folder, or on the folder that holds the source itself, must not empty it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    refused(run("convert", tiny_gguf, "--to-checkpoint", home, "--force"), 1, "holds no checkpoint")
    assert (home / "thesis.txt").read_text() == "years of work"
    source = home / "model.gguf"
    source.write_bytes(tiny_gguf.read_bytes())
    (home / "config.json").write_text("{}")
    refused(run("convert", source, "--to-checkpoint", home, "--force"), 1, "the GGUF itself is in")
    assert source.read_bytes() == tiny_gguf.read_bytes()
