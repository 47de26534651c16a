"""Writes a GGUF that is either whole or not there.

The header goes to `OUT.partial` first, without its magic number, then the tensors one by one; `commit` adds the
magic, flushes to disk and renames. A crash, a full disk or a power cut leaves an earlier output as it was, and
what is left of the new one carries another name and no magic: nothing takes it for a model.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from converters.plan import PlannedTensor
from converters.quantize.types import TYPE_IDS
from edgellm.errors import OutputError

_MAGIC = b"GGUF"


def check_output(out: Path, n_bytes: int, force: bool) -> None:
    """Refuse an output that can't be written, before any work is done."""
    with _disk_errors(out):  # a name too long, for one
        out.with_name(out.name + ".partial").exists()
    if out.is_dir():
        raise OutputError(f"{out} is a folder; name the GGUF file to write")
    if out.exists() and not force:
        raise OutputError(f"{out} exists; add --force to replace it, or name another file")
    if not out.parent.is_dir():
        raise OutputError(f"there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise OutputError(f"no permission to write in {out.parent}; choose another folder with -o")
    free = shutil.disk_usage(out.parent).free
    if free < n_bytes:
        raise OutputError(f"{out.parent} has {free:,} bytes free, the GGUF needs about {n_bytes:,}; make room")


class Writer:
    """A GGUF in the making; use as a context manager. Without `commit` nothing remains."""

    def __init__(self, out: Path, arch: str, metadata: Mapping[str, Any], tensors: Sequence[PlannedTensor]) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self._writer = GGUFWriter(self.partial, arch)
        for key, value in metadata.items():
            if key != "general.architecture":  # GGUFWriter has written it
                _add(self._writer, key, value)
        for tensor in tensors:
            ggml_type = GGMLQuantizationType(TYPE_IDS[tensor.type_name])
            self._writer.add_tensor_info(
                tensor.name, list(tensor.shape), np.dtype(np.float32), tensor.n_bytes, raw_dtype=ggml_type
            )
        self._committed = False

    def __enter__(self) -> Writer:
        try:
            self._write_header()
        except BaseException:
            self._discard()
            raise
        return self

    def _write_header(self) -> None:
        with _disk_errors(self.partial):
            self._writer.write_header_to_file()
            self._writer.write_kv_data_to_file()
            self._writer.write_ti_data_to_file()
            self._file.seek(0)
            self._file.write(bytes(len(_MAGIC)))
            self._file.seek(0, os.SEEK_END)

    @property
    def _file(self) -> Any:
        assert self._writer.fout is not None
        return self._writer.fout[0]

    def write(self, pieces: Iterable[NDArray[np.uint8]]) -> None:
        """The next tensor's bytes, in the order of the plan, as one array or several that follow one another."""
        with _disk_errors(self.partial):
            self._pad()
        for piece in pieces:
            with _disk_errors(self.partial):
                self._file.write(np.ascontiguousarray(piece).data)

    def _pad(self) -> None:
        position = self._file.tell()
        self._file.write(bytes(GGUFWriter.ggml_pad(position, self._writer.data_alignment) - position))

    def finish(self) -> Path:
        """All bytes on disk and the magic in place: the partial file can now be opened and checked."""
        with _disk_errors(self.partial):
            self._pad()
            self._file.seek(0)
            self._file.write(_MAGIC)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._writer.close()
        return self.partial

    def commit(self) -> None:
        """Give the checked file its name."""
        with _disk_errors(self.out):
            os.replace(self.partial, self.out)
            _sync_folder(self.out.parent)
        self._committed = True

    def __exit__(self, *exc_info: type[BaseException] | BaseException | TracebackType | None) -> None:
        if not self._committed:
            self._discard()

    def _discard(self) -> None:
        for file in self._writer.fout or ():
            with suppress(OSError):  # a full disk fails again when the last buffer is flushed
                file.close()
        self.partial.unlink(missing_ok=True)


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
    elif value:
        writer.add_array(key, value)


def _add_int(writer: GGUFWriter, key: str, value: int) -> None:
    if value < 0:
        writer.add_int32(key, value)
    elif value < 1 << 32:
        writer.add_uint32(key, value)
    else:
        writer.add_uint64(key, value)
