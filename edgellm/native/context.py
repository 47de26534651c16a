"""One sequence in one llama.cpp context: decoding, its key/value memory, cancelling.

`tokens` mirrors what the memory holds, so that a caller can reuse it. One thread at a time may decode (the engine
sees to that); `abort` and `close` may be called from any thread at any time, also in the middle of a decode.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.config import LoadParams
from edgellm.errors import Cancelled, ContextFull, GenerationError
from edgellm.native import library
from edgellm.native.context_params import context_params, flag_reader, new_batch
from edgellm.native.logits import HasLogits
from edgellm.native.lora import ActiveAdapters, Adapter
from edgellm.native.model import NativeModel
from edgellm.native.owned import Owned, release

if TYPE_CHECKING:
    import numpy as np

    from edgellm.native.observe import InputWatch

DecodeProgress = Callable[[int, int], object]  # (tokens done, tokens in all); returning False cancels


class Context(HasLogits):
    """A `llama_context` with one sequence.

    n_outputs: at how many positions of one decode call logits may be asked for; it costs a buffer of
    n_outputs × n_vocab floats. embeddings: make a context for `embedding` instead of text. watch: is shown what goes
    into the weights' products (see observe.py).
    """

    def __init__(
        self,
        model: NativeModel,
        params: LoadParams,
        *,
        n_outputs: int = 1,
        embeddings: bool = False,
        watch: InputWatch | None = None,
    ) -> None:
        self._lib = lib = library.load()
        self.model = model
        self.tokens: list[int] = []
        self._n_logits = 0  # rows that may be sampled: those of the last decode call
        self._samplers = weakref.WeakSet()
        self._adapters = ActiveAdapters()
        wanted = params.n_ctx or model.n_ctx_train
        self.n_ctx = min(wanted, model.n_ctx_train) if model.n_ctx_train > 0 else wanted
        self._abort_callback, abort_flag = flag_reader(lib)
        native_params = context_params(lib, params, self.n_ctx, n_outputs)
        if embeddings:
            native_params.embeddings = True
            if not model.names_pooling:
                native_params.pooling_type = lib.LLAMA_POOLING_TYPE_MEAN
        self._watch = watch  # ctypes keeps no reference to its callback
        if watch:
            native_params.cb_eval = watch.callback
        native_params.abort_callback = self._abort_callback
        native_params.abort_callback_data = ctypes.addressof(abort_flag)
        library.forget_errors()
        pointer = lib.llama_init_from_model(model.pointer, native_params)
        if not pointer:
            reason = library.last_error("out of memory?")
            raise GenerationError(
                f"cannot make a context of {self.n_ctx} tokens: {reason}; try a smaller n_ctx or another kv_type"
            )
        # llama.cpp rounds sizes; what it made is what counts
        self.n_ctx = min(self.n_ctx, int(lib.llama_n_ctx(pointer)))
        self.n_batch = int(lib.llama_n_batch(pointer))
        self.n_outputs = min(n_outputs, self.n_batch)
        self.n_threads = int(lib.llama_n_threads(pointer))
        self._memory = lib.llama_get_memory(pointer)
        self._native = Owned(pointer, new_batch(lib, self.n_batch), abort_flag)
        # the model among the arguments keeps it alive until the context is gone
        self._free = weakref.finalize(self, release, lib, self._native, self._samplers, model)

    @property
    def closed(self) -> bool:
        return self._native.pointer is None

    def close(self) -> None:
        """Stop a decode that runs on another thread, then free the samplers and the context. Twice is fine."""
        self._free()

    def set_threads(self, n_threads: int) -> None:
        """How many threads the decodes from now on use."""
        with self._native.lock:
            self._lib.llama_set_n_threads(self._open_pointer(), n_threads, n_threads)
            self.n_threads = n_threads

    def abort(self) -> None:
        """Make the decode that is running, or else the next, raise Cancelled. From any thread."""
        self._native.abort_flag[0] = 1

    def clear_abort(self) -> None:
        self._native.abort_flag[0] = 0

    @property
    def aborted(self) -> bool:
        return bool(self._native.abort_flag[0] != b"\0")

    def use_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Add these LoRAs, by weight, in place of those before. What the memory holds was made without, and goes."""
        with self._native.lock:
            pointer = self._open_pointer()
            self._adapters = ActiveAdapters(adapters)
            self._adapters.switch(pointer, 0)
            if self._memory is not None:
                self._lib.llama_memory_clear(self._memory, False)
        self._n_logits = 0
        self.tokens.clear()

    def reuse_prefix(self, tokens: Sequence[int]) -> int:
        """Keep what the memory already holds of `tokens` and drop the rest. Returns how many tokens are kept.

        At least the last token is left to evaluate, for its logits. A model that can't drop the end of its
        memory (recurrent; a sliding window that has moved on) loses all of it: 0.
        """
        n_past = min(_common_prefix(self.tokens, list(tokens[:-1])), self._adapters.begin(tokens))
        with self._native.lock:
            self._open_pointer()
            if n_past == 0 or not self._roll_back(n_past):
                self._lib.llama_memory_clear(self._memory, False)
                n_past = 0
        self._n_logits = 0
        del self.tokens[n_past:]
        return n_past

    def _roll_back(self, n_past: int) -> bool:
        # Also when nothing seems to be dropped: an interrupt may have hit between a decode and its bookkeeping.
        if not self._lib.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            return False
        window_start = max(0, n_past - self.model.n_swa) if self.model.n_swa > 0 else 0
        first, last = self._memory_range()
        # On sliding-window memory the removal can succeed though the window before n_past is gone.
        return last == n_past - 1 and (self.model.is_recurrent or first <= window_start)

    def _memory_range(self) -> tuple[int, int]:
        lib = self._lib
        return lib.llama_memory_seq_pos_min(self._memory, 0), lib.llama_memory_seq_pos_max(self._memory, 0)

    def decode(self, tokens: Sequence[int], on_progress: DecodeProgress | None = None) -> None:
        """Evaluate `tokens` after those the memory holds; the last one's logits can then be sampled.

        Errors: ContextFull (nothing evaluated), Cancelled (`tokens` says what was), GenerationError.
        """
        if not tokens:
            raise GenerationError("there are no tokens to evaluate")
        self.model.vocab.check_ids(tokens)
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise ContextFull(
                f"{len(self.tokens) + len(tokens)} tokens don't fit the context of {self.n_ctx}; "
                "load with a larger n_ctx, or shorten the text"
            )
        total = len(tokens)
        done = 0
        for chunk in self._chunks(tokens, self.n_batch):
            done += len(chunk)
            self._decode_chunk(chunk, n_logits=1 if done == total else 0)
            if on_progress is not None and on_progress(done, total) is False:
                raise Cancelled(f"cancelled after {done} of {total} prompt tokens")

    def _chunks(self, tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
        """Parts of at most `size`, each with the same adapters all through. Evaluate one before taking the next."""
        at = 0
        while at < len(tokens):
            position = len(self.tokens)
            with self._native.lock:
                self._adapters.switch(self._open_pointer(), position)
            chunk = tokens[at : at + min(size, self._adapters.reach(position))]
            at += len(chunk)
            yield chunk

    def step(self, token: int) -> None:
        """`decode` of one token this model sampled itself: the hot path. Same errors."""
        position = len(self.tokens)
        if position >= self.n_ctx:
            raise ContextFull(f"the context of {self.n_ctx} tokens is full; load with a larger n_ctx")
        native = self._native
        with native.lock:
            pointer = self._open_pointer()
            batch = native.batch
            batch.n_tokens = 1
            batch.token[0] = token
            batch.pos[0] = position
            batch.logits[0] = 1
            code = self._lib.llama_decode(pointer, batch)
            if code == 0:
                self.tokens.append(token)
                self._n_logits = 1
                return
            self._after_failure()
        self._raise_failure(code, 1)

    def verify(self, tokens: Sequence[int]) -> None:
        """`decode` of at most n_outputs tokens, each of whose logits can then be sampled. Same errors."""
        self.model.vocab.check_ids(tokens)
        if not 0 < len(tokens) <= self.n_outputs:
            raise GenerationError(
                f"{len(tokens)} tokens can't be verified at once; this context takes {self.n_outputs}"
            )
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise ContextFull(f"{len(tokens)} more tokens don't fit the context of {self.n_ctx}")
        self._decode_chunk(tokens, n_logits=len(tokens))

    def keep(self, n_tokens: int) -> None:
        """Drop all but the first n_tokens from the memory, but not the logits. GenerationError where that can't be."""
        if n_tokens == len(self.tokens):
            return
        with self._native.lock:
            self._open_pointer()
            kept = self._roll_back(n_tokens)
            if not kept:
                self._lib.llama_memory_clear(self._memory, False)
        del self.tokens[n_tokens if kept else 0 :]
        if not kept:
            self._n_logits = 0
            raise GenerationError("this model's memory can't drop its last tokens; turn speculation off (draft)")

    def _decode_chunk(self, chunk: Sequence[int], n_logits: int) -> None:
        """At most n_batch tokens, with logits at the last `n_logits` of them (at most n_outputs)."""
        native, n, position = self._native, len(chunk), len(self.tokens)
        with native.lock:
            pointer = self._open_pointer()
            batch = native.batch
            batch.n_tokens = n
            ctypes.memmove(batch.token, (ctypes.c_int32 * n)(*chunk), 4 * n)
            ctypes.memmove(batch.pos, (ctypes.c_int32 * n)(*range(position, position + n)), 4 * n)
            ctypes.memmove(batch.logits, bytes(n - n_logits) + b"\1" * n_logits, n)
            self._n_logits = 0
            code = self._lib.llama_decode(pointer, batch)
            if code == 0:
                self.tokens.extend(chunk)
                self._n_logits = n_logits
                return
            self._after_failure()
        self._raise_failure(code, n)

    def _after_failure(self) -> None:
        """Bring memory and mirror together: llama.cpp may have kept a part of the batch, which we drop."""
        self._n_logits = 0
        if self._memory is None:
            return
        kept = len(self.tokens)
        removed = kept and self._lib.llama_memory_seq_rm(self._memory, 0, kept, -1)
        if removed and self._memory_range()[1] == kept - 1:
            return
        self._lib.llama_memory_clear(self._memory, False)
        self.tokens.clear()

    def _raise_failure(self, code: int, n: int) -> None:
        if code == 1:
            raise ContextFull(
                f"no room for {n} more tokens in the context of {self.n_ctx} ({len(self.tokens)} are used); "
                "load with a larger n_ctx"
            )
        if code == 2:
            raise Cancelled("cancelled while tokens were being evaluated")
        reason = library.last_error("llama.cpp gave no reason")
        raise GenerationError(f"llama.cpp could not evaluate {n} tokens (code {code}): {reason}")

    def logits(self, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Evaluate `tokens` from an empty memory. Returns the logits at every one: float32 (n_tokens, n_vocab)."""
        import numpy as np

        result = np.empty((len(tokens), self.model.vocab.size), np.float32)
        at = 0
        for rows in self.logits_from(tokens, 0):
            result[at : at + len(rows)] = rows
            at += len(rows)
        return result

    def logits_from(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        """Evaluate `tokens` from an empty memory; the logits at tokens[first:] in order, some rows at a time.

        float32 (at most n_outputs, n_vocab) each, the caller's own.
        """
        import numpy as np

        self._check_fits(tokens)
        self.reuse_prefix(())
        self._adapters.begin(tokens)
        for chunk in self._chunks(tokens[:first], self.n_batch):
            self._decode_chunk(chunk, n_logits=0)
        for chunk in self._chunks(tokens[first:], self.n_outputs):
            self._decode_chunk(chunk, n_logits=len(chunk))
            with self._native.lock:
                logits = self._lib.llama_get_logits(self._open_pointer())
                if not logits:
                    raise GenerationError("this model gives no logits; it was made for embeddings")
                rows = np.ctypeslib.as_array(logits, shape=(len(chunk), self.model.vocab.size)).copy()
            yield rows

    def embedding(self, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The pooled embedding of `tokens` (at most n_batch): float32 (n_embd,), not normalised."""
        import numpy as np

        self._check_fits(tokens)
        if self._memory is not None:
            self.reuse_prefix(())
        self.tokens.clear()
        self._decode_chunk(tokens, n_logits=len(tokens))
        with self._native.lock:
            row = self._lib.llama_get_embeddings_seq(self._open_pointer(), 0)
            if not row:
                raise GenerationError("this model gives no pooled embedding; use an embedding model")
            return np.ctypeslib.as_array(row, shape=(self.model.n_embd,)).copy()

    def _check_fits(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise GenerationError("there are no tokens to evaluate")
        self.model.vocab.check_ids(tokens)
        if len(tokens) > self.n_ctx:
            raise ContextFull(f"{len(tokens)} tokens don't fit the context of {self.n_ctx}; shorten the text")

    def _logits_index(self, i: int | None) -> int:
        """llama.cpp's; it would abort the process for one without logits."""
        if not self._n_logits:
            raise GenerationError("there are no logits to sample from; evaluate a token first")
        if i is None:
            return -1
        if not 0 <= i < self._n_logits:
            raise GenerationError(f"there are no logits at {i}; the last evaluation has {self._n_logits}")
        return i

    @contextlib.contextmanager
    def locked(self) -> Iterator[tuple[Any, Any]]:
        """(llama.cpp, pointer) of the context, which isn't freed meanwhile."""
        with self._native.lock:
            yield self._lib, self._open_pointer()

    def holds_its_tokens(self) -> bool:
        """Whether the memory ends where `tokens` does."""
        with self._native.lock:
            self._open_pointer()
            return bool(self._memory_range()[1] == len(self.tokens) - 1)


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
