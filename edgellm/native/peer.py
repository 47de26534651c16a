"""`llama_cpp.Llama`, the high-level class that edgellm leaves out, as somebody to be compared with (`bench --compare`).

The whole package llama_cpp is imported for it, with all it needs, and it is asked the way its documentation does.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgellm.errors import GenerationError
from edgellm.native import library


class Peer:
    """A model loaded by `llama_cpp.Llama`, on the same number of threads. GenerationError where that can't load it."""

    def __init__(self, path: Path, *, n_ctx: int, n_threads: int, n_batch: int) -> None:
        library.load()
        llama_cpp: Any = importlib.import_module(library.PACKAGE)
        try:
            self._llama = llama_cpp.Llama(
                str(path),
                n_ctx=n_ctx,
                n_threads=n_threads,
                n_threads_batch=n_threads,
                n_batch=n_batch,
                n_ubatch=n_batch,
                verbose=False,
            )
        except (ValueError, OSError, AssertionError) as exc:
            raise GenerationError(f"the class Llama of {library.PACKAGE} can't load {path.name}: {exc}") from exc
        finally:
            library.claim_log()  # importing the package put its own in place of ours

    def stream(self, tokens: Sequence[int], n_tokens: int) -> Iterator[int]:
        """Write greedily after a prompt of token ids: yields 1 for each token as it comes, at most n_tokens of them."""
        chunks = self._llama.create_completion(
            list(tokens), max_tokens=n_tokens, temperature=0.0, repeat_penalty=1.0, stream=True
        )
        for chunk in chunks:
            if chunk["choices"][0]["finish_reason"] is None:
                yield 1

    def close(self) -> None:
        self._llama.close()
