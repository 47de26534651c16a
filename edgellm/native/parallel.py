"""Several sequences in one llama.cpp context, evaluated together: a weight read once serves them all."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm.config import LoadParams, SamplingParams
from edgellm.errors import Cancelled, ContextFull, GenerationError
from edgellm.native import library
from edgellm.native.context_params import context_params, flag_reader
from edgellm.native.logits import HasLogits
from edgellm.native.lora import ActiveAdapters, Adapter
from edgellm.native.model import NativeModel
from edgellm.native.owned import Owned, release
from edgellm.native.sampler import ConstrainedSampler, Sampler

if TYPE_CHECKING:
    from edgellm.constraint import Matcher


@dataclass
class Piece:
    """Tokens of one sequence from `position` on; with the logits after the last one if `wants_logits`."""

    sequence: int
    position: int
    tokens: Sequence[int]
    wants_logits: bool


class ParallelContext(HasLogits):
    """A context for n_sequences, numbered from 0, that have an n_sequences-th of n_ctx tokens each. For one thread.

    n_ctx: of all sequences together.
    """

    def __init__(self, model: NativeModel, params: LoadParams, n_sequences: int) -> None:
        self._lib = lib = library.load()
        self.model, self.n_ctx, self.n_sequences = model, params.n_ctx, n_sequences
        self.can_share = not model.is_recurrent  # a recurrent state is that of the last token only
        native = context_params(lib, params, params.n_ctx, n_sequences)
        native.n_seq_max = n_sequences
        native.n_outputs_max_per_seq = 1
        # a memory of its own for each: in a common one every token would look at the cells of all, if only to skip them
        native.kv_unified = False
        self._abort_callback, abort_flag = flag_reader(lib)
        native.abort_callback = self._abort_callback
        native.abort_callback_data = ctypes.addressof(abort_flag)
        library.forget_errors()
        pointer = lib.llama_init_from_model(model.pointer, native)
        if not pointer:
            reason = library.last_error("out of memory?")
            raise GenerationError(f"cannot make a context of {params.n_ctx} tokens: {reason}; use fewer at once")
        self.n_batch = int(lib.llama_n_batch(pointer))
        self._memory = lib.llama_get_memory(pointer)
        self._native = Owned(pointer, lib.llama_batch_init(self.n_batch, 0, 1), abort_flag)
        self._samplers = weakref.WeakSet()
        self._choosers: dict[int, Sampler | ConstrainedSampler] = {}
        self._rows: dict[int, int] = {}  # sequence → where in the last batch its logits are
        self._free = weakref.finalize(self, release, lib, self._native, self._samplers, model)

    def close(self) -> None:
        """Stop a decode that runs on another thread, then free it. Twice is fine."""
        self._free()

    def abort(self) -> None:
        """Make the decode that is running, or else the next, raise Cancelled. From any thread."""
        self._native.abort_flag[0] = 1

    def clear_abort(self) -> None:
        self._native.abort_flag[0] = 0

    def use_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Add these LoRAs, by weight, before anything is evaluated."""
        self._adapters = ActiveAdapters(adapters)
        self._adapters.switch(self._native.pointer, 0)

    def start(
        self,
        sequence: int,
        params: SamplingParams,
        matcher: Matcher | None,
        prompt: Sequence[int],
        copied_from: int | None,
        n: int,
    ) -> int:
        """Empty a sequence and give it the first n tokens of another one's memory, and a sampler of its own.

        matcher: of the answer's form, which the sampler then keeps to. prompt: what the penalties look back on.
        Returns how many tokens the sequence holds now: n, or none.
        """
        with self._native.lock:
            self._open_pointer()
            self._clear(sequence)
            held = n if copied_from is not None and self._copy(copied_from, sequence, n) else 0
        sampler = Sampler(self, params)
        sampler.accept_prompt(prompt)
        self._choosers[sequence] = sampler if matcher is None else ConstrainedSampler(sampler, matcher)
        return held

    def _copy(self, source: int, target: int, n: int) -> bool:
        """Only a whole memory can be copied into another; what is too much of it is then dropped."""
        lib, memory = self._lib, self._memory
        lib.llama_memory_seq_cp(memory, source, target, -1, -1)
        first_needed = max(0, n - self.model.n_swa) if self.model.n_swa > 0 else 0
        if (
            lib.llama_memory_seq_rm(memory, target, n, -1)
            and lib.llama_memory_seq_pos_max(memory, target) == n - 1
            and lib.llama_memory_seq_pos_min(memory, target) <= first_needed
        ):
            return True
        lib.llama_memory_seq_rm(memory, target, -1, -1)
        return False

    def finish(self, sequence: int) -> None:
        """Free what the sequence holds."""
        with self._native.lock:
            self._open_pointer()
            self._clear(sequence)

    def _clear(self, sequence: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        self._rows.pop(sequence, None)
        self._choosers.pop(sequence, None)

    def decode(self, pieces: Sequence[Piece]) -> None:
        """Evaluate all pieces, at most n_batch tokens together.

        Errors: ContextFull (no cells left; nothing was evaluated), Cancelled, GenerationError.
        """
        with self._native.lock:
            pointer = self._open_pointer()
            self._rows = self._fill(pieces)
            code = self._lib.llama_decode(pointer, self._native.batch)
        if code == 0:
            return
        self._rows = {}
        if code == 2:
            raise Cancelled("cancelled while tokens were being evaluated")
        if code == 1:
            raise ContextFull(f"the {self.n_ctx} tokens of context are used up by {len(self._choosers)} sequences")
        n, reason = self._native.batch.n_tokens, library.last_error("llama.cpp gave no reason")
        raise GenerationError(f"llama.cpp could not evaluate {n} tokens (code {code}): {reason}")

    def choose(self, sequence: int) -> int:
        """The token chosen after the sequence's piece of the last decode. GenerationError: its form allows none."""
        return self._choosers[sequence].sample(sequence)

    def _logits_index(self, i: int | None) -> int:
        if i is None or i not in self._rows:
            raise GenerationError(f"there are no logits of sequence {i}")
        return self._rows[i]

    def _fill(self, pieces: Sequence[Piece]) -> dict[int, int]:
        """The batch; returns sequence → where in it the logits of its piece are asked for."""
        batch, n = self._native.batch, 0
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
