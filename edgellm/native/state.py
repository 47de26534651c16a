"""A context's memory as bytes, to go on from in another process.

llama.cpp's own state has no checksum, and a load that fails leaves a part of it behind: whoever keeps it must know that
it is whole and was made by the same model with the same settings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from edgellm.native.context import Context


def save_state(context: Context) -> bytes:
    """What the memory holds of `context.tokens`; empty where it holds nothing."""
    if not context.tokens:
        return b""
    with context.locked() as (lib, pointer):
        size = lib.llama_state_seq_get_size(pointer, 0)
        buffer = (ctypes.c_uint8 * size)()
        n = lib.llama_state_seq_get_data(pointer, buffer, size, 0)
        return ctypes.string_at(buffer, n)


def restore_state(context: Context, tokens: Sequence[int], data: bytes) -> bool:
    """Put back what `save_state` gave while the memory held `tokens`. False, with the memory empty, where it can't be.

    There are no logits after it: at least the last token of the next prompt is evaluated, as always.
    """
    context.reuse_prefix(())
    if not data or len(tokens) > context.n_ctx:
        return False
    with context.locked() as (lib, pointer):
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        whole = lib.llama_state_seq_set_data(pointer, buffer, len(data), 0) == len(data)
    context.tokens.extend(tokens)
    if whole and context.holds_its_tokens():
        return True
    context.reuse_prefix(())
    return False
