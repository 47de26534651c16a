"""Writes a GGUF that is either whole or not there.

The header goes to `OUT.partial` first, without its magic number, then the tensors one by one; `commit` adds the
magic, flushes to disk and renames. A crash, a full disk or a power cut leaves an earlier output as it was, and
what is left of the new one carries another name and no magic: nothing takes it for a model. A journal beside it says
which tensors are whole (see journal.py), for `--resume`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState
from numpy.typing import NDArray

from converters.journal import Journal, digest_of, job_id
from converters.plan import PlannedTensor
from converters.quantize.types import TYPE_IDS
from edgellm import __version__
from edgellm.errors import OutputError

_MAGIC = b"GGUF"
RESUMABLE = (KeyboardInterrupt, MemoryError, OutputError)  # another attempt may fare better


def check_output(out: Path, n_bytes: int, force: bool) -> None:
    """Refuse an output that can't be written, before any work is done."""
    with _disk_errors(out):  # a name too long, for one
        reclaimed = partial_path(out).stat().st_size if partial_path(out).is_file() else 0
    if out.is_dir():
        raise OutputError(f"{out} is a folder; name the GGUF file to write")
    if out.exists() and not force:
        raise OutputError(f"{out} exists; add --force to replace it, or name another file")
    if not out.parent.is_dir():
        raise OutputError(f"there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise OutputError(f"no permission to write in {out.parent}; choose another folder with -o")
    free = shutil.disk_usage(out.parent).free
    if free + reclaimed < n_bytes:
        raise OutputError(f"{out.parent} has {free:,} bytes free, the GGUF needs about {n_bytes:,}; make room")


class Writer:
    """A GGUF in the making; use as a context manager. Without `commit` nothing remains, except what `resume` keeps.

    inputs: the files or folders the tensors are made of; settings: what else decides on them. With `resume`, the
    tensors that an interrupted conversion of the same inputs to the same header had finished are kept: `n_kept` says
    how many of the first ones, and they aren't to be written again. What is finished then also outlives an error or
    Ctrl-C, for the next attempt.
    """

    def __init__(
        self,
        out: Path,
        arch: str,
        metadata: Mapping[str, Any],
        tensors: Sequence[PlannedTensor],
        *,
        inputs: Sequence[Path] = (),
        settings: str = "",
        resume: bool = False,
    ) -> None:
        self.out = out
        self.partial = partial_path(out)
        self.n_kept = 0
        self._arch, self._metadata = arch, dict(metadata)
        self._header = header_bytes(arch, metadata, tensors)
        self._tensors = tensors
        self._journal = Journal(journal_path(self.partial), job_id(self._header, inputs, f"{__version__} {settings}"))
        self._resume, self._committed, self._n_finished = resume, False, 0
        self._file: BinaryIO = io.BytesIO()  # until __enter__ opens the real one

    def __enter__(self) -> Writer:
        try:
            with _disk_errors(self.partial):
                finished = self._finished() if self._resume else []
                if finished:
                    self._go_on_after(finished)
                else:
                    self._start_anew()
                self._journal.start(finished)
        except BaseException as exc:
            self._leave(type(exc))
            raise
        return self

    def _start_anew(self) -> None:
        self._file = self.partial.open("w+b")
        self._file.write(bytes(len(_MAGIC)) + self._header[len(_MAGIC) :])
        self._file.flush()

    def _go_on_after(self, finished: list[tuple[str, str]]) -> None:
        last = self._tensors[len(finished) - 1]
        self._file = self.partial.open("r+b")
        # A kill just before the end leaves the magic written, and a receipt.
        self._file.write(bytes(len(_MAGIC)) + self._header[len(_MAGIC) :])
        self._file.truncate(self._starts()[last.name] + last.n_bytes)
        self._file.seek(0, os.SEEK_END)
        self.n_kept = self._n_finished = len(finished)

    def _finished(self) -> list[tuple[str, str]]:
        """The first tensors of the partial file, as far as the journal vouches for their bytes: (name, SHA-256)."""
        if not self.partial.is_file():
            return []
        starts, whole = self._starts(), []
        with self.partial.open("rb") as file:
            for tensor, (name, digest) in zip(self._tensors, self._journal.read(), strict=False):
                if name != tensor.name or digest_of(file, starts[name], tensor.n_bytes) != digest:
                    break
                whole.append((name, digest))
        return whole

    def _starts(self) -> dict[str, int]:
        """Where each tensor's bytes begin in the file."""
        position, starts = padded(len(self._header)), {}
        for tensor in self._tensors:
            starts[tensor.name] = position
            position = padded(position + tensor.n_bytes)
        return starts

    def write(self, tensor: PlannedTensor, pieces: Iterable[NDArray[np.uint8]]) -> None:
        """The next tensor's bytes, in the order of the plan, as one array or several that follow one another."""
        digest = hashlib.sha256()
        with _disk_errors(self.partial):
            self._pad()
        for piece in pieces:
            data = np.ascontiguousarray(piece).data
            with _disk_errors(self.partial):
                self._file.write(data)
            digest.update(data)
        with _disk_errors(self.partial):
            self._file.flush()  # before the journal says that it is there
            self._journal.add(tensor.name, digest.hexdigest())
        self._n_finished += 1

    def _pad(self) -> None:
        position = self._file.tell()
        self._file.write(bytes(padded(position) - position))

    def finish(self, lasting: bool = True) -> Path:
        """All bytes and the magic in place, on disk if it is to outlast this process: the partial file can now be
        opened and checked.
        """
        with _disk_errors(self.partial):
            self._pad()
            self._file.seek(0)
            self._file.write(_MAGIC)
            self._file.flush()
            if lasting:
                os.fsync(self._file.fileno())
            self._file.close()
        return self.partial

    def amend(self, metadata: Mapping[str, Any]) -> None:
        """Other values for entries of the finished file; each must take as many bytes as the one before."""
        header = header_bytes(self._arch, {**self._metadata, **metadata}, self._tensors)
        if len(header) != len(self._header):
            raise ValueError("an amended entry has another size")
        with _disk_errors(self.partial), self.partial.open("r+b") as file:
            file.write(header)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Give the checked file its name."""
        with _disk_errors(self.out):
            os.replace(self.partial, self.out)
            _sync_folder(self.out.parent)
        self._committed = True
        self._journal.remove()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None
    ) -> None:
        if not self._committed:
            self._leave(kind)

    def _leave(self, kind: type[BaseException] | None) -> None:
        with suppress(OSError):  # a full disk fails again when the last buffer is flushed
            self._file.close()
        if self._resume and self._n_finished and kind is not None and issubclass(kind, RESUMABLE):
            self._journal.close()
            return
        self.partial.unlink(missing_ok=True)
        self._journal.remove()


def partial_path(out: Path) -> Path:
    """Where `out` is written before it gets its name."""
    return out.with_name(out.name + ".partial")


def journal_path(partial: Path) -> Path:
    """Where it is noted what of a partial file is finished."""
    return Path(f"{partial}.journal")


class _Info(Protocol):
    """What a header says of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type_name(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...


def header_bytes(arch: str, metadata: Mapping[str, Any], tensors: Sequence[_Info]) -> bytes:
    """Everything before the tensor data, with the magic, without the padding."""
    writer = GGUFWriter(None, arch)
    for key, value in metadata.items():
        if key != "general.architecture":  # GGUFWriter has written it
            _add(writer, key, value)
    for tensor in tensors:
        ggml_type = GGMLQuantizationType(TYPE_IDS[tensor.type_name])
        writer.add_tensor_info(
            tensor.name, list(tensor.shape), np.dtype(np.float32), tensor.n_bytes, raw_dtype=ggml_type
        )
    header = io.BytesIO()
    writer.fout, writer.state = [header], WriterState.EMPTY  # as if it had opened a file
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return header.getvalue()


def padded(n_bytes: int) -> int:
    """Where the next tensor may begin."""
    return int(GGUFWriter.ggml_pad(n_bytes, GGUF_DEFAULT_ALIGNMENT))


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError from writing into an OutputError that says what to do."""
    try:
        yield
    except OSError as exc:
        # numpy's tofile reports a write that ended short without an errno
        if exc.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"the disk is full: {path} can't be written; make room or write elsewhere") from exc
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}") from exc


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets folders be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_UNSIGNED_ARRAYS = ("adapter.alora.invocation_tokens",)  # llama.cpp takes other integers elsewhere


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """One metadata entry with the GGUF type that llama.cpp reads it as."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        _add_int(writer, key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value and key in _UNSIGNED_ARRAYS:
        writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32)
    elif value:
        writer.add_array(key, value)


def _add_int(writer: GGUFWriter, key: str, value: int) -> None:
    if value < 0:
        writer.add_int32(key, value)
    elif value < 1 << 32:
        writer.add_uint32(key, value)
    else:
        writer.add_uint64(key, value)
