"""Sets one metadata entry of a GGUF file that exists, by writing the file anew beside it.

Every other byte of metadata, the list of tensors and the tensors' data are copied as they stand; tensors' offsets count
from where the data begins, so that only the padding before it can change.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import BinaryIO

from edgellm.errors import ModelFileError, OutputError
from edgellm.gguf_header import GGUFHeader, read_header
from edgellm.whole_file import whole_file

_COUNTS = struct.Struct("<4sIQQ")  # magic, version, tensors, metadata entries
_STRING, _ARRAY = 8, 9
_CHUNK = 8 << 20


def set_entry(path: Path, key: str, value: str | list[str] | None) -> None:
    """Give the GGUF at `path` this text, or list of texts, under `key`; None removes the entry.

    The new file takes the old one's place when it is whole and on disk. ModelFileError: no GGUF, damaged. OutputError:
    it can't be written there; `path` is then as it was.
    """
    header = read_header(path)
    if header.metadata.get(key) == value:
        return
    _check_room(path, header.n_bytes)
    try:
        with path.open("rb") as old, whole_file(path) as new:
            _write(old, new, header, key, value)
            shutil.copymode(path, new.name)
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}; it is as it was") from exc


def _check_room(path: Path, n_bytes: int) -> None:
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"no permission to write in {path.parent}, where {path.name} would be written anew")
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise OutputError(f"{path.parent} has {free:,} bytes free, writing {path.name} anew takes {n_bytes:,}")


def _write(old: BinaryIO, new: BinaryIO, header: GGUFHeader, key: str, value: str | list[str] | None) -> None:
    entries_end = max((end for _, end in header.spans.values()), default=_COUNTS.size)
    magic, version, n_tensors, n_entries = _COUNTS.unpack(old.read(_COUNTS.size))
    n_entries += (value is not None) - (key in header.spans)
    new.write(_COUNTS.pack(magic, version, n_tensors, n_entries))
    gone = header.spans.get(key, (entries_end, entries_end))
    _copy(old, new, _COUNTS.size, gone[0])
    _copy(old, new, gone[1], entries_end)
    if value is not None:
        new.write(_entry(key, value))
    _copy(old, new, entries_end, header.infos_end)
    new.write(bytes(-new.tell() % header.alignment))
    _copy(old, new, header.data_start, header.n_bytes)


def _copy(old: BinaryIO, new: BinaryIO, start: int, end: int) -> None:
    old.seek(start)
    while start < end:
        data = old.read(min(_CHUNK, end - start))
        if not data:
            raise ModelFileError(f"{old.name} changed while it was read; try again")
        new.write(data)
        start += len(data)


def _entry(key: str, value: str | list[str]) -> bytes:
    """A metadata entry as the format has it: name, type, value."""
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", _STRING) + _string(value)
    items = b"".join(map(_string, value))
    return _string(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + items


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
