"""What llguidance needs to know of a vocabulary. Making it takes most of a second, so a model keeps it."""

from __future__ import annotations

import ctypes
from typing import Any

from edgellm.native.model import Vocab


def grammar_tokenizer(vocab: Vocab) -> Any:
    """llguidance's LLTokenizer for the vocabulary. It must not be used when the model is closed."""
    from llguidance import LLTokenizer

    with vocab.opened() as (lib, pointer):
        ends = [token for token in range(vocab.size) if lib.llama_vocab_is_eog(pointer, token)] or [vocab.eos]
    return LLTokenizer.from_llamacpp(
        tokens=[_spelling(vocab, token) for token in range(vocab.size)],
        vocab_ptr=vocab.address,
        tokenize_fptr=ctypes.cast(lib.llama_tokenize, ctypes.c_void_p).value,
        # the token that ends a turn first: it is what the model is asked to end with
        eos_token=sorted(ends, key=lambda token: token != vocab.eos),
        slices=None,
    )


def _spelling(vocab: Vocab, token: int) -> bytes:
    """The token's bytes; those of a control token behind a byte that no text has."""
    text = vocab.spelling(token)
    return b"\xff" + text if vocab.is_control(token) else text
