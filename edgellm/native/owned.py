"""What a context owns of native memory, and how it is let go, also when the interpreter exits during a decode."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from edgellm.native.model import NativeModel

_EXIT_PATIENCE_S = 10.0  # a decode that was told to abort returns after one graph node


class Owned:
    """What must outlive the Context object until it is freed: pointers, the lock around native calls, the flag."""

    def __init__(self, pointer: Any, batch: Any, abort_flag: Any) -> None:
        self.pointer, self.batch, self.abort_flag = pointer, batch, abort_flag
        self.lock = threading.Lock()


def release(lib: Any, native: Owned, samplers: weakref.WeakSet[Any], _model: NativeModel) -> None:
    native.abort_flag[0] = 1
    # At interpreter exit a daemon thread may still be decoding. Rather leak than free it under its feet.
    if native.lock.acquire(timeout=_EXIT_PATIENCE_S):
        for sampler in list(samplers):
            sampler.close()
        pointer, native.pointer = native.pointer, None
        lib.llama_free(pointer)
        lib.llama_batch_free(native.batch)
        native.lock.release()
