"""A loaded GGUF and its vocabulary.

Weights are memory-mapped or copied, as the load mode says. The path must have passed
`gguf_header.check_loadable`: llama.cpp aborts the process on files which that refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from edgellm.config import DEFAULT_LOAD_MODE, LoadMode
from edgellm.errors import Cancelled, GenerationError, ModelFileError
from edgellm.native import library

LoadProgress = Callable[[float], object]  # a fraction from 0 to 1; returning False cancels

_ATTR_UNKNOWN, _ATTR_CONTROL, _ATTR_USER_DEFINED, _ATTR_LSTRIP, _ATTR_RSTRIP = 1, 1 << 3, 1 << 4, 1 << 7, 1 << 8


class NativeModel:
    """Owns a `llama_model`. Contexts made from it keep it alive; `close` frees it when they are closed."""

    def __init__(
        self,
        path: Path,
        *,
        load_mode: LoadMode | Literal["copy"] | None = None,
        n_gpu_layers: int = -1,
        on_progress: LoadProgress | None = None,
    ) -> None:
        self.path = path
        lib = library.load()
        library.claim_log()
        library.forget_errors()
        watch = _ProgressWatch(on_progress)
        params = lib.llama_model_default_params()
        load_mode = load_mode or DEFAULT_LOAD_MODE
        mmap, mlock = lib.LLAMA_LOAD_MODE_MMAP, lib.LLAMA_LOAD_MODE_MMAP_MLOCK
        modes = {"mlock": mlock, "copy": lib.LLAMA_LOAD_MODE_NONE}  # copy: memory of our own, as it is in the file
        params.load_mode = modes.get(load_mode, mmap)
        params.use_extra_bufts = load_mode == "repack" and library.can_repack()
        params.n_gpu_layers = n_gpu_layers
        callback = lib.llama_progress_callback(watch)
        params.progress_callback = callback
        pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            watch.raise_if_stopped(path)
            reason = library.last_error("llama.cpp gave no reason")
            raise ModelFileError(f"cannot load {path}: {reason}; convert or download the file again")
        self.pointer = pointer
        self.vocab = Vocab(lib, lib.llama_model_get_vocab(pointer))
        self._free = weakref.finalize(self, _free_model, lib, pointer, self.vocab)
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(pointer))
        self.n_embd = int(lib.llama_model_n_embd_out(pointer))
        self.n_swa = int(lib.llama_model_n_swa(pointer))
        self.is_recurrent = bool(lib.llama_model_is_recurrent(pointer) or lib.llama_model_is_hybrid(pointer))
        architecture = _metadata(lib, pointer, "general.architecture")
        pooling = _metadata(lib, pointer, f"{architecture}.pooling_type")
        self.names_pooling = pooling not in ("", "0")  # 0: none, one embedding for each token
        # made for embeddings: some of these have no logits
        self.is_embedder = pooling != "" or _metadata(lib, pointer, f"{architecture}.attention.causal") == "false"

    def close(self) -> None:
        """Free the weights. Every context of this model must be closed before. Twice is fine."""
        self._free()


def _free_model(lib: Any, pointer: Any, vocab: Vocab) -> None:
    vocab.close()  # first: at interpreter exit a daemon thread may be in the middle of tokenizing
    lib.llama_model_free(pointer)


def _metadata(lib: Any, pointer: Any, key: str) -> str:
    """A scalar of the GGUF's metadata as text; "" where it is missing."""
    buffer = ctypes.create_string_buffer(128)
    n = lib.llama_model_meta_val_str(pointer, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if n >= 0 else ""


class _ProgressWatch:
    """llama.cpp's progress callback: exceptions can't cross native code, so they are kept and raised after."""

    def __init__(self, on_progress: LoadProgress | None) -> None:
        self._on_progress = on_progress
        self._stopped: BaseException | bool = False

    def __call__(self, fraction: float, _: object) -> bool:
        try:
            if self._on_progress is not None and self._on_progress(min(fraction, 1.0)) is False:
                self._stopped = True
        except BaseException as exc:  # also KeyboardInterrupt, which the load must hand on
            self._stopped = exc
        return self._stopped is False

    def raise_if_stopped(self, path: Path) -> None:
        if isinstance(self._stopped, BaseException):
            raise self._stopped
        if self._stopped:
            raise Cancelled(f"loading {path} was cancelled")


class Vocab:
    """Text ↔ token ids of one model. From any thread; GenerationError when the model has been closed."""

    def __init__(self, lib: Any, pointer: Any) -> None:
        self._lib, self._pointer = lib, pointer
        self._lock = threading.Lock()  # close() must not free the vocabulary in the middle of a call
        self.size = int(lib.llama_vocab_n_tokens(pointer))
        self.bos = int(lib.llama_vocab_bos(pointer))
        self.eos = int(lib.llama_vocab_eos(pointer))
        self.adds_bos = bool(lib.llama_vocab_get_add_bos(pointer)) and self.bos >= 0
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}

    def close(self) -> None:
        with self._lock:
            self._pointer = None

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        with self._lock:
            if self._pointer is None:
                raise GenerationError("the model is closed; load it again")
            yield self._pointer

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[Any, Any]]:
        """(llama.cpp, pointer) of the vocabulary, which isn't freed meanwhile."""
        with self._open() as pointer:
            yield self._lib, pointer

    @property
    def address(self) -> int:
        """Of the vocabulary in memory."""
        with self._open() as pointer:
            return int(ctypes.cast(pointer, ctypes.c_void_p).value or 0)

    def spelling(self, token: int) -> bytes:
        """The bytes of a token; of a control token those it is written with."""
        return self._read_piece(token, True)

    def is_control(self, token: int) -> bool:
        """Whether no text can contain the token: a control token, or one of the user's that looks like one."""
        with self._open() as pointer:
            attributes = self._lib.llama_vocab_get_attr(pointer, token)
        if attributes & _ATTR_USER_DEFINED:
            text = self.spelling(token)
            return text.startswith(b"<") and text.endswith(b">")
        return bool(attributes & (_ATTR_CONTROL | _ATTR_UNKNOWN))

    def tokenize(self, text: str, *, special: bool, framed: bool = False) -> list[int]:
        """Ids of `text`. special: the text of a control token becomes that token. framed: with the BOS, EOS, CLS, SEP
        that the vocabulary puts around a text.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as exc:
            raise GenerationError(f"the text holds a lone surrogate at character {exc.start}; remove it") from exc
        room = len(data) + 16  # never more tokens than bytes, but for the prefixes of some tokenizers
        ids = (ctypes.c_int32 * room)()
        with self._open() as pointer:
            n = self._lib.llama_tokenize(pointer, data, len(data), ids, room, framed, special)
        if n < 0:
            raise GenerationError("llama.cpp could not tokenize the text; check that the model has a vocabulary")
        return ids[:n]

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; control tokens stand for none."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._read_piece(token)
        return known

    def _read_piece(self, token: int, special: bool = False) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            with self._open() as pointer:
                n = self._lib.llama_token_to_piece(pointer, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def detokenize(self, ids: Sequence[int], *, special: bool) -> str:
        """The text of `ids`, without the space some vocabularies begin a text with; control tokens only if `special`.

        The pieces joined, as they are streamed: llama_detokenize also drops spaces before punctuation.
        """
        self.check_ids(ids)
        data = b"".join(self._read_piece(token, True) if special else self.piece(token) for token in ids)
        return (data.removeprefix(b" ") if self._begins_with_space else data).decode("utf-8", "replace")

    @functools.cached_property
    def _begins_with_space(self) -> bool:
        return b"".join(map(self.piece, self.tokenize("a", special=False))).startswith(b" ")

    def check_ids(self, ids: Sequence[int]) -> None:
        """GenerationError unless every id is an int of this vocabulary."""
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < self.size:
                raise GenerationError(f"{token!r} is not a token id of this model; ids run from 0 to {self.size - 1}")

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation (end of text, end of turn)."""
        known = self._ends.get(token)
        if known is None:
            with self._open() as pointer:
                known = self._ends[token] = bool(self._lib.llama_vocab_is_eog(pointer, token))
        return known

    def text(self, token: int) -> str:
        """The text of a token as it stands in the vocabulary; "" for a token the model lacks (id -1)."""
        with self._open() as pointer:
            return self._read_text(pointer, token)

    def _read_text(self, pointer: Any, token: int) -> str:
        raw = self._lib.llama_vocab_get_text(pointer, token) if token >= 0 else b""
        return str(raw.decode("utf-8", "replace"))

    @functools.cached_property
    def control_tokens(self) -> dict[str, tuple[bool, bool]]:
        """Text of every token that only `special=True` finds → does it swallow spaces (before it, after it)."""
        attribute = self._lib.llama_vocab_get_attr
        found = {}
        with self._open() as pointer:
            for token in range(self.size):
                attributes = attribute(pointer, token)
                if attributes & (_ATTR_CONTROL | _ATTR_UNKNOWN) and (text := self._read_text(pointer, token)):
                    found[text] = (bool(attributes & _ATTR_LSTRIP), bool(attributes & _ATTR_RSTRIP))
        return found
