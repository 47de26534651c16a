"""The statistics of a conversion's original on a text: collected, or what an earlier conversion left in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path

from converters.original import Original
from converters.prepare import Inputs
from converters.quantize.gram import DEFAULT_MEMORY, Gram, collect_gram, read_gram
from converters.quantize.importance import Importance, collect_importance, read_importance, write_importance
from edgellm.errors import CheckpointError, OutputError
from edgellm.measure.scoring import OnProgress, Sample
from edgellm.measure.texts import SELF, read_samples

_N_CTX = 512
_SELF_CHUNKS = 48
_VERSION = 2  # of what is collected: another one makes older cache files unknown


def calibrate(
    inputs: Inputs,
    original: Original,
    text: str | Path,
    *,
    n_chunks: int | None = None,
    n_threads: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[Importance, bool]:
    """The importance of the original's columns on a text ("self": one that it writes), and whether it was cached.

    n_chunks: at most so many pieces from all over the text.
    """
    path = cache_path(inputs, text)
    if n_chunks is not None:
        path = path.with_suffix(f".{n_chunks}.gguf")
    with suppress(CheckpointError):
        return read_importance(path), True
    samples = spread(calibration_samples(original, text, on_progress), n_chunks)
    importance = collect_importance(
        original.path, samples, Path(text).name, n_threads=n_threads, on_progress=on_progress
    )
    with suppress(OSError):  # a cache that can't be written costs only time
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(importance, path)
    return importance, False


def calibrate_gram(
    inputs: Inputs,
    original: Original,
    text: str | Path,
    *,
    memory: int = DEFAULT_MEMORY,
    n_threads: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[Gram, bool]:
    """The Gram matrices of the original's inputs on a text, in the cache's folder, and whether they were there.

    memory: bytes that may hold matrices at a time. OutputError where the cache has no room for them.
    """
    folder = cache_path(inputs, text).with_suffix(".gram")
    with suppress(CheckpointError):
        return read_gram(folder), True
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        samples = calibration_samples(original, text, on_progress)
        collect_gram(original.path, samples, partial, memory=memory, n_threads=n_threads, on_progress=on_progress)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as exc:
        raise OutputError(f"cannot keep Gram matrices in {folder}: {exc.strerror or exc}; make room there") from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return read_gram(folder), False


def keep_gram(
    inputs: Inputs,
    original: Original,
    text: str | Path,
    folder: Path,
    memory: int,
    n_threads: int,
    on_progress: OnProgress | None,
) -> None:
    """`calibrate_gram` with the result in a folder of the user's. OutputError where that can't be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and isn't an empty folder; name another for the Gram matrices")
    found, _ = calibrate_gram(inputs, original, text, memory=memory, n_threads=n_threads, on_progress=on_progress)
    try:
        shutil.copytree(found.folder, folder, dirs_exist_ok=True)
    except (OSError, shutil.Error) as exc:
        raise OutputError(f"cannot write the Gram matrices to {folder}: {exc}; make room there") from exc


def calibration_samples(original: Original, text: str | Path, on_progress: OnProgress | None) -> list[Sample]:
    """The text in pieces of as many tokens as statistics are collected on together. Read, or written, only once."""
    if str(text) not in original.samples:
        n_chunks = _SELF_CHUNKS if text == SELF else None
        found = read_samples(text, original.path, n_ctx=_N_CTX, n_chunks=n_chunks, on_progress=on_progress)
        original.samples[str(text)] = found
    return original.samples[str(text)]


def spread(samples: Sequence[Sample], n: int | None) -> Sequence[Sample]:
    """At most n of them, from all over the text."""
    n = len(samples) if n is None else min(n, len(samples))
    return [samples[i * len(samples) // n] for i in range(n)]


def save_importance(importance: Importance, path: Path) -> None:
    """Write llama.cpp's file. OutputError where that fails."""
    try:
        _write(importance, path)
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}") from exc


def _write(importance: Importance, path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write_importance(importance, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def cache_path(inputs: Inputs, text: str | Path) -> Path:
    """Where what was collected on a text is kept; other suffixes for other kinds of it."""
    return user_cache_path("edgellm") / "statistics" / f"{statistics_key(inputs, text)}.gguf"


def statistics_key(inputs: Inputs, text: str | Path) -> str:
    """A hash of the contents of all that statistics depend on: weights, configuration, tokenizer, adapters, text."""
    own = f"{SELF}, {_SELF_CHUNKS} runs of words" if text == SELF else ""
    digest = hashlib.sha256(f"{_VERSION} {inputs.pre} {inputs.settings} {own}".encode())
    for place in (*inputs.files, inputs.source.tokenizer_folder, *([] if text == SELF else [Path(text)])):
        files = [place] if place.is_file() else sorted(place.glob("*"))
        for file in (file for file in files if file.is_file()):
            with file.open("rb") as opened:
                digest.update(file.suffix.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:32]
