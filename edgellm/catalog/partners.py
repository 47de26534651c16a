"""Which drafts are used for a model by default: what its own file says, or where that can't be written, a note.

The note is for models inside Python packages, in other programs' caches or in folders of others. It lies in the user's
data folder under a fingerprint of the model's bytes, so that it holds for every copy of the file and for no other one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from edgellm.errors import OutputError
from edgellm.gguf_header import GGUFHeader, parts_of
from edgellm.gguf_metadata import set_entry
from edgellm.whole_file import whole_file

PARTNER_KEY = "edgellm.draft"  # of a GGUF: the file of its draft, or a list of them, from the model's own folder on

_PIECES, _PIECE_BYTES = 32, 4096  # of a fingerprint


def partners_of(header: GGUFHeader) -> list[Path]:
    """The drafts that the model's metadata or a note names, whether they are there or not."""
    named = header.metadata.get(PARTNER_KEY, [])
    paths = [header.path.parent / str(name) for name in ([named] if isinstance(named, str) else named)]
    with suppress(OSError, ValueError, TypeError):
        if _folder().is_dir():
            noted = json.loads(_note(header.path).read_text(encoding="utf-8"))
            paths += [Path(name) for name in noted["drafts"]]
    return paths


def set_partners(header: GGUFHeader, drafts: Sequence[Path]) -> str:
    """Use these drafts for the model by default from now on, in place of those before; returns where that is written.

    The model's file names them by their paths from its own folder. OutputError where neither the file nor the user's
    data folder can be written.
    """
    path = header.path.resolve()
    if _is_ours_to_write(path):
        names = [Path(os.path.relpath(draft.resolve(), path.parent)).as_posix() for draft in drafts]
        set_entry(path, PARTNER_KEY, names[0] if len(names) == 1 else names or None)
        return f"in {path.name} ({PARTNER_KEY})"
    note = _note(path)
    try:
        if not drafts:
            note.unlink(missing_ok=True)
            return "in no note any more"
        note.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": path.name, "drafts": [str(draft.resolve()) for draft in drafts]}
        with whole_file(note) as file:
            file.write(json.dumps(content, indent=1).encode())
    except OSError as exc:
        raise OutputError(f"cannot write {note}: {exc.strerror or exc}; name the draft with --draft instead") from exc
    return f"in a note of yours, as {path.name} is part of a package or can't be written"


def fingerprint(path: Path) -> str:
    """SHA-256 over 32 pieces of 4 kB from the later part of a model's file, or its files: 64 hexadecimal digits.

    Enough to tell models apart without reading gigabytes at each start, as training and quantizing change every weight.
    The pieces' places count from the end, so that it stays the same when metadata is added or changed.
    """
    digest = hashlib.sha256()
    for part in [part for part in parts_of(path) if part.is_file()] or [path]:
        n_bytes = part.stat().st_size
        step = 1 << max(0, (n_bytes * 3 // 4 // _PIECES).bit_length() - 1)  # over 3/8 to 3/4 of the file
        with part.open("rb") as file:
            for i in range(_PIECES):
                file.seek(max(0, n_bytes - _PIECE_BYTES - i * step))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def _is_ours_to_write(path: Path) -> bool:
    packages = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    in_package = any(path.is_relative_to(folder) for folder in packages)
    in_cache = "blobs" in path.parts  # of Hugging Face or Ollama, where a file's name is its checksum
    return not (in_package or in_cache) and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _note(path: Path) -> Path:
    return _folder() / f"{fingerprint(path)}.json"


def _folder() -> Path:
    from platformdirs import user_data_path  # 10 ms that a start without notes needn't spend twice

    return user_data_path("edgellm") / "drafts"
