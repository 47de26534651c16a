"""SamplingParams → a llama.cpp sampler chain, bound to the context it samples from."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgellm.config import RANDOM_SEED, SamplingParams
from edgellm.errors import GenerationError
from edgellm.native import library
from edgellm.native.logits import HasLogits

if TYPE_CHECKING:
    from edgellm.constraint import Mask, Matcher


class Sampler:
    """Owns a sampler chain. The context closes it before itself; closing it twice is fine."""

    def __init__(self, context: HasLogits, params: SamplingParams) -> None:
        self._lib = library.load()
        self._context = context
        self._penalty_window = _penalty_window(params, context.n_ctx)
        self._greedy = params.temperature == 0 and not self._penalty_window
        self._chain = _make_chain(self._lib, params, context.model.vocab.size, self._penalty_window)
        self._free = weakref.finalize(self, self._lib.llama_sampler_free, self._chain)
        self._free.atexit = False  # the context does it, when no daemon thread is sampling
        context.adopt(self)

    def accept_prompt(self, tokens: Iterable[int]) -> None:
        """Let the penalties see the end of the prompt. Nothing happens when no penalty is on."""
        _accept_end(self._lib, self._chain, list(tokens), self._penalty_window)

    def sample(self, i: int | None = None) -> int:
        """Choose a token from the logits of the i-th token verified, None = the last evaluated; it then counts for
        the penalties.
        """
        if not self._free.alive:
            raise GenerationError("the model is closed; load it again")
        # The C sampler copies every logit into a table of candidates first. Not worth importing numpy for.
        if self._greedy and (numpy := sys.modules.get("numpy")):
            return self._context.likeliest(numpy, i)
        return self._context.sample(self._chain, i)

    def choose(self, np: ModuleType, i: int | None, allowed: Mask | None = None) -> int:
        """The token `sample` would choose, of those allowed: bool (n_vocab,), None = all. Follow with `accept`."""
        if not self._free.alive:
            raise GenerationError("the model is closed; load it again")

        def see(logits: Any) -> int:
            if self._greedy:
                return int((logits if allowed is None else np.where(allowed, logits, -np.inf)).argmax())
            ids = np.arange(len(logits), dtype=np.int32) if allowed is None else np.flatnonzero(allowed)
            candidates = np.zeros(len(ids), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
            candidates["id"], candidates["logit"] = ids, logits[ids]
            return self._apply(candidates)

        return self._context.look(np, i, see)

    def _apply(self, candidates: Any) -> int:
        lib = self._lib
        data = ctypes.cast(candidates.ctypes.data, ctypes.POINTER(lib.llama_token_data))
        array = lib.llama_token_data_array(data, len(candidates), -1, False)
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def accept(self, token: int) -> None:
        """Let the penalties count a token that `choose` gave."""
        self._lib.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        self._free()


class ConstrainedSampler:
    """Chooses only what a matcher allows: freely first, and only where that isn't allowed among what is.

    Both together are the model's distribution restricted to what is allowed.
    """

    def __init__(self, sampler: Sampler, matcher: Matcher) -> None:
        self._sampler, self._matcher = sampler, matcher

    def accept_prompt(self, tokens: Iterable[int]) -> None:
        self._sampler.accept_prompt(tokens)

    def sample(self, i: int | None = None) -> int:
        import numpy as np

        token = self._sampler.choose(np, i)
        if not self._matcher.allows(token):
            token = self._sampler.choose(np, i, self._matcher.mask())
        self._sampler.accept(token)
        self._matcher.take(token)
        return token


def _penalty_window(params: SamplingParams, n_ctx: int) -> int:
    on = params.repeat_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    if not on:
        return 0
    return n_ctx if params.penalty_last_n < 0 else params.penalty_last_n


def _accept_end(lib: Any, chain: Any, tokens: Sequence[int], window: int) -> None:
    for token in tokens[-window:] if window else ():
        lib.llama_sampler_accept(chain, token)


def _make_chain(lib: Any, params: SamplingParams, n_vocab: int, penalty_window: int) -> Any:
    """llama.cpp's own order: penalties, top-k, top-p, min-p, temperature, draw."""
    chain_params = lib.llama_sampler_chain_default_params()
    chain_params.no_perf = True
    chain = lib.llama_sampler_chain_init(chain_params)

    def add(sampler: Any) -> None:
        lib.llama_sampler_chain_add(chain, sampler)

    if penalty_window:
        add(
            lib.llama_sampler_init_penalties(
                n_vocab,
                penalty_window,
                params.repeat_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
        )
    if params.temperature == 0:
        add(lib.llama_sampler_init_greedy())
        return chain
    add(lib.llama_sampler_init_top_k(params.top_k))
    add(lib.llama_sampler_init_top_p(params.top_p, 1))
    add(lib.llama_sampler_init_min_p(params.min_p, 1))
    add(lib.llama_sampler_init_temp(params.temperature))
    add(lib.llama_sampler_init_dist(RANDOM_SEED if params.seed is None else params.seed))
    return chain
