"""The original that a model is compared with: computed beside it, or read from an earlier run's file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from edgellm.errors import EdgeLLMError
from edgellm.measure.divergence import Rows
from edgellm.measure.scoring import Sample, Scorer


class Reference:
    """Log-probabilities of a scorer, sample by sample."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._rows: Iterator[Rows] = iter(())

    def begin(self, sample: Sample) -> None:
        self._rows = self._scorer.log_probs(sample)

    def read(self, n: int) -> Rows:
        """The next `n` positions. Scorers of the same vocabulary and context give rows in the same portions."""
        rows = next(self._rows)
        assert len(rows) == n
        return rows

    def close(self, finished: bool) -> None:
        """finished: every sample was read."""
        self._scorer.close()


class KeepingReference(Reference):
    """Also writes what it computes to a file, which gets its name when it is complete."""

    def __init__(self, scorer: Scorer, path: Path, n_rows: int) -> None:
        super().__init__(scorer)
        self._path, self._partial = path, path.with_suffix(f".{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._partial.open("wb") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": (n_rows, scorer.vocab.size)}
                )
        except OSError as exc:
            raise _unusable(path, exc) from exc

    def read(self, n: int) -> Rows:
        rows = super().read(n)
        try:
            with self._partial.open("ab") as file:
                file.write(np.ascontiguousarray(rows).data)
        except OSError as exc:
            raise _unusable(self._path, exc) from exc
        return rows

    def close(self, finished: bool) -> None:
        super().close(finished)
        with suppress(OSError):
            if finished:
                os.replace(self._partial, self._path)
            else:
                self._partial.unlink()


class KeptReference(Reference):
    """Reads what a KeepingReference wrote."""

    def __init__(self, path: Path, n_rows: int, n_vocab: int) -> None:
        self._at = 0
        try:
            self._kept = np.load(path, mmap_mode="r")
        except OSError as exc:
            raise _unusable(path, exc) from exc
        except ValueError as exc:
            raise EdgeLLMError(f"{path} is damaged; delete it") from exc
        if self._kept.shape != (n_rows, n_vocab) or self._kept.dtype != np.float32:
            raise EdgeLLMError(f"{path} is damaged; delete it")

    def begin(self, sample: Sample) -> None:
        pass

    def read(self, n: int) -> Rows:
        self._at += n
        return np.array(self._kept[self._at - n : self._at])

    def close(self, finished: bool) -> None:
        pass


def open_reference(model: Path, samples: Sequence[Sample], n_ctx: int, n_vocab: int, keep: Path | None) -> Reference:
    """The reference model, checked to have as many tokens; through the folder `keep` where one is given."""
    n_rows = sum(len(sample.positions) for sample in samples)
    path = keep / f"{_fingerprint(model, samples, n_ctx)}.npy" if keep else None
    if path and path.is_file():
        return KeptReference(path, n_rows, n_vocab)
    scorer = Scorer(model, n_ctx)
    if scorer.vocab.size != n_vocab:
        found = scorer.vocab.size
        scorer.close()
        raise EdgeLLMError(
            f"{model} has {found} tokens, the model {n_vocab}: only models of one vocabulary can be compared"
        )
    return KeepingReference(scorer, path, n_rows) if path else Reference(scorer)


def _fingerprint(model: Path, samples: Sequence[Sample], n_ctx: int) -> str:
    """Of the reference's bytes and everything it is asked for."""
    with model.open("rb") as file:
        digest = hashlib.sha256(hashlib.file_digest(file, "sha256").digest())
    digest.update(f"{n_ctx}".encode())
    for sample in samples:
        digest.update(np.asarray([len(sample.tokens), *sample.tokens, *sample.positions], np.int64).tobytes())
    return digest.hexdigest()[:32]


def _unusable(path: Path, exc: Exception) -> EdgeLLMError:
    return EdgeLLMError(f"cannot use {path} to keep log-probabilities: {exc}; choose another folder")
