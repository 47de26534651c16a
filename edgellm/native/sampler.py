"""SamplingParams → a llama.cpp sampler chain, bound to the context it samples from."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

from edgellm.config import RANDOM_SEED, SamplingParams
from edgellm.errors import GenerationError
from edgellm.native import library
from edgellm.native.context import Context


class Sampler:
    """Owns a sampler chain. The context closes it before itself; closing it twice is fine."""

    def __init__(self, context: Context, params: SamplingParams) -> None:
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
        if self._penalty_window:
            for token in list(tokens)[-self._penalty_window :]:
                self._lib.llama_sampler_accept(self._chain, token)

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

    def close(self) -> None:
        self._free()


def _penalty_window(params: SamplingParams, n_ctx: int) -> int:
    on = params.repeat_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    if not on:
        return 0
    return n_ctx if params.penalty_last_n < 0 else params.penalty_last_n


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
