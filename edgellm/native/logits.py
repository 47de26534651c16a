"""What a sampler chooses from: the logits of the tokens that a context evaluated last."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from edgellm.errors import GenerationError
from edgellm.native.model import NativeModel
from edgellm.native.owned import Owned


class HasLogits:
    """A context of either kind. n_ctx: the tokens it holds, of all sequences."""

    n_ctx: int
    model: NativeModel
    _lib: Any
    _native: Owned
    _samplers: weakref.WeakSet[Any]

    def _logits_index(self, i: int | None) -> int:
        """llama.cpp's number of the i-th choice. GenerationError for one without logits."""
        raise NotImplementedError

    def adopt(self, sampler: object) -> None:
        """Have `sampler.close()` called before the context goes away."""
        self._samplers.add(sampler)

    def sample(self, chain: Any, i: int | None = None) -> int:
        """Let a sampler chain (see sampler.py) choose from the logits of the i-th token of those evaluated last;
        None = of the last one.
        """
        with self._native.lock:
            return int(self._lib.llama_sampler_sample(chain, self._open_pointer(), self._logits_index(i)))

    def likeliest(self, np: ModuleType, i: int | None = None) -> int:
        """The token with the largest logit, of the same choice; np is numpy."""
        with self._native.lock:
            return int(self._row(np, i).argmax())

    def look(self, np: ModuleType, i: int | None, see: Callable[[Any], int]) -> int:
        """What `see` makes of the logits of the same choice, float32 (n_vocab,), which it must not keep or change."""
        with self._native.lock:
            return see(self._row(np, i))

    def likeliest_and_probability(self, np: ModuleType) -> tuple[int, float]:
        """`likeliest` after the last evaluated token, and the probability the model gives it."""
        with self._native.lock:
            row = self._row(np, None)
            token = int(row.argmax())
            return token, 1 / float(np.exp(row - row[token]).sum())

    def _row(self, np: ModuleType, i: int | None) -> Any:
        """Valid while the lock is held."""
        logits = self._lib.llama_get_logits_ith(self._open_pointer(), self._logits_index(i))
        return np.ctypeslib.as_array(logits, (self.model.vocab.size,))

    def _open_pointer(self) -> Any:
        if self._native.pointer is None:
            raise GenerationError("the model is closed; load it again")
        return self._native.pointer
