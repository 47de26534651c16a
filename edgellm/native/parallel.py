"""Several sequences in one llama.cpp context, evaluated together: a weight read once serves them all."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm.config import LoadParams, SamplingParams
from edgellm.errors import Cancelled, ContextFull, GenerationError
from edgellm.native import library
from edgellm.native.context_params import context_params, flag_reader
from edgellm.native.lora import ActiveAdapters, Adapter
from edgellm.native.model import NativeModel
from edgellm.native.sampler import make_chain


@dataclass
class Piece:
    """Tokens of one sequence from `position` on; with the logits after the last one if `wants_logits`."""

    sequence: int
    position: int
    tokens: Sequence[int]
    wants_logits: bool


class ParallelContext:
    """A context for n_sequences, numbered from 0, that share n_ctx tokens of memory. For one thread.

    n_ctx: of all sequences together. It is used by a `with` block, or closed.
    """

    def __init__(self, model: NativeModel, params: LoadParams, n_sequences: int) -> None:
        self._lib = lib = library.load()
        self.model, self.n_ctx, self.n_sequences = model, params.n_ctx, n_sequences
        native = context_params(lib, params, params.n_ctx, n_sequences)
        native.n_seq_max = n_sequences
        native.n_outputs_max_per_seq = 1
        self._abort_callback, abort_flag = flag_reader(lib)
        native.abort_callback = self._abort_callback
        native.abort_callback_data = ctypes.addressof(abort_flag)
        self._abort_flag = abort_flag
        native.kv_unified = True  # sequences share cells, so that a common beginning is held once
        library.forget_errors()
        self._pointer = lib.llama_init_from_model(model.pointer, native)
        if not self._pointer:
            reason = library.last_error("out of memory?")
            raise GenerationError(f"cannot make a context of {params.n_ctx} tokens: {reason}; use fewer at once")
        self.n_batch = int(lib.llama_n_batch(self._pointer))
        self._memory = lib.llama_get_memory(self._pointer)
        self._batch = lib.llama_batch_init(self.n_batch, 0, 1)
        self._chains: dict[int, Any] = {}
        self._lock = threading.Lock()  # close() must not free it in the middle of a decode
        self._free = weakref.finalize(self, _release, lib, self._pointer, self._batch, self._chains, model)

    def close(self) -> None:
        """Stop a decode that runs on another thread, then free it. Twice is fine."""
        self.abort()
        with self._lock:
            self._free()

    def abort(self) -> None:
        """Make the decode that is running, or else the next, raise Cancelled. From any thread."""
        self._abort_flag[0] = 1

    def clear_abort(self) -> None:
        self._abort_flag[0] = 0

    def use_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Add these LoRAs, by weight, before anything is evaluated."""
        self._adapters = ActiveAdapters(adapters)
        self._adapters.switch(self._pointer, 0)

    def start(
        self, sequence: int, params: SamplingParams, prompt: Sequence[int], copied_from: int | None, n: int
    ) -> None:
        """Empty a sequence and give it the first n tokens of another one's memory, and a sampler of its own.

        prompt: what the penalties look back on.
        """
        with self._open() as lib:
            self._clear(sequence)
            if copied_from is not None and n:
                lib.llama_memory_seq_cp(self._memory, copied_from, sequence, 0, n)
            self._chains[sequence] = make_chain(lib, params, self.model.vocab.size, self.n_ctx, prompt)

    def finish(self, sequence: int) -> None:
        """Free what the sequence holds."""
        with self._open():
            self._clear(sequence)

    def _clear(self, sequence: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, sequence, 0, -1)
        chain = self._chains.pop(sequence, None)
        if chain is not None:
            self._lib.llama_sampler_free(chain)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        """llama.cpp, while nobody else frees the context."""
        with self._lock:
            if not self._free.alive:
                raise GenerationError("the model is closed; load it again")
            yield self._lib

    def decode(self, pieces: Sequence[Piece]) -> dict[int, int]:
        """Evaluate all pieces, at most n_batch tokens together. Returns sequence → the token chosen after its piece.

        Errors: ContextFull (no cells left; nothing was evaluated), GenerationError.
        """
        with self._open() as lib:
            rows = self._fill(pieces)
            code = lib.llama_decode(self._pointer, self._batch)
            if code == 0:
                sample = lib.llama_sampler_sample
                return {seq: int(sample(self._chains[seq], self._pointer, row)) for seq, row in rows.items()}
        if code == 2:
            raise Cancelled("cancelled while tokens were being evaluated")
        if code == 1:
            raise ContextFull(f"the {self.n_ctx} tokens of context are used up by {len(self._chains)} sequences")
        reason = library.last_error("llama.cpp gave no reason")
        raise GenerationError(f"llama.cpp could not evaluate {self._batch.n_tokens} tokens (code {code}): {reason}")

    def _fill(self, pieces: Sequence[Piece]) -> dict[int, int]:
        """The batch; returns sequence → where in it the logits of its piece are asked for."""
        batch, n = self._batch, 0
        rows: dict[int, int] = {}
        for piece in pieces:
            for k, token in enumerate(piece.tokens):
                batch.token[n], batch.pos[n] = token, piece.position + k
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, piece.sequence
                batch.logits[n] = 0
                n += 1
            if piece.wants_logits:
                rows[piece.sequence] = n - 1
                batch.logits[n - 1] = 1
        batch.n_tokens = n
        return rows


def _release(lib: Any, pointer: Any, batch: Any, chains: dict[int, Any], _model: NativeModel) -> None:
    for chain in chains.values():
        lib.llama_sampler_free(chain)
    lib.llama_free(pointer)
    lib.llama_batch_free(batch)
