"""What an interrupted conversion had finished: lines of JSON beside the partial file, for `--resume`.

The first line identifies the job, each further one a tensor that is whole in the partial file, with the SHA-256 of
its bytes: a power cut can lose written pages that a kill can't, so nothing is taken on trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

_READ_BYTES = 1 << 22
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def job_id(header: bytes, inputs: Sequence[Path], settings: str) -> str:
    """Identifies what is written from what: two jobs with the same id write the same bytes.

    header: the output's, so every setting that shows in it counts. inputs: the weights' files or folders; a file is
    the same while its size and time of change are.
    """
    digest = hashlib.sha256(header)
    digest.update(settings.encode())
    for path in inputs:
        for file in _weight_files(path):
            stat = file.stat()
            digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in _WEIGHT_SUFFIXES and file.is_file())


class Journal:
    """Appends one line per finished tensor."""

    def __init__(self, path: Path, job: str) -> None:
        self.path, self._job = path, job
        self._file: BinaryIO | None = None

    def start(self, finished: Sequence[tuple[str, str]]) -> None:
        """Begin the file anew, with the tensors that are already there: (name, SHA-256)."""
        self._file = self.path.open("wb", buffering=0)
        self._append({"job": self._job})
        for name, digest in finished:
            self.add(name, digest)

    def add(self, name: str, digest: str) -> None:
        self._append({"tensor": name, "sha256": digest})

    def _append(self, line: dict[str, str]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line).encode() + b"\n")

    def read(self) -> list[tuple[str, str]]:
        """(tensor, SHA-256) in the order written; none where there is no journal, or one of another job."""
        try:
            lines = [_parsed(line) for line in self.path.read_bytes().splitlines()]
        except OSError:
            return []
        if not lines or lines[0].get("job") != self._job:
            return []
        return [(line["tensor"], line["sha256"]) for line in lines[1:] if {"tensor", "sha256"} <= line.keys()]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:  # the last line, cut off by the kill
        return {}
    return value if isinstance(value, dict) else {}


def digest_of(file: BinaryIO, start: int, n_bytes: int) -> str:
    """SHA-256 of a stretch of a file, read piece by piece."""
    digest = hashlib.sha256()
    file.seek(start)
    for piece in _pieces(file, n_bytes):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO, n_bytes: int) -> Iterator[bytes]:
    while n_bytes > 0 and (piece := file.read(min(n_bytes, _READ_BYTES))):
        n_bytes -= len(piece)
        yield piece
