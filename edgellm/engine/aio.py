"""A blocking iterator as an async one: each step runs on a thread of its own, so the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


async def iterate(stream: Iterator[Item], cancel: Callable[[], None], close: Callable[[], None]) -> AsyncIterator[Item]:
    """The items of `stream`, which only this may use.

    However it ends, also by the cancellation of the task, `cancel` interrupts a step that is running and `close`
    follows it on the same thread.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="edgellm-stream")
    loop = asyncio.get_running_loop()
    done = object()
    try:
        while True:
            item = await loop.run_in_executor(executor, next, stream, done)
            if item is done:
                return
            yield item  # type: ignore[misc]  # mypy can't tell that it isn't the sentinel
    finally:
        cancel()
        executor.submit(close)
        executor.shutdown(wait=False)
