"""One generation of a model: an iterator that can be cancelled and closed, and its async twin."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType

from edgellm.generation import FinishReason, GenerationResponse, GenerationStats


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: GenerationStats


class Ticket:
    """Stands for one generation while it waits for its turn and has it."""

    def __init__(self, owner: object) -> None:
        self.owner = owner  # the task it belongs to; None = whichever thread takes the first item
        self.cancelled = False


class Stream(Iterator[GenerationResponse]):
    """Iterate it for the answer. The model's turn is taken at the first item and given back at the end.

    The turn also returns on `close()`, on leaving a `with` block, and when the object is thrown away.
    """

    def __init__(
        self,
        ticket: Ticket,
        responses: Generator[GenerationResponse, None, None],
        cancel: Callable[[Ticket], None],
    ) -> None:
        # `responses` must not know this object: a cycle would keep an abandoned stream alive, and its turn
        self._ticket, self._responses, self._cancel = ticket, responses, cancel

    def __next__(self) -> GenerationResponse:
        return next(self._responses)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def through(
        self,
        change: Callable[[Generator[GenerationResponse, None, None]], Generator[GenerationResponse, None, None]],
    ) -> Stream:
        """This stream with its responses changed, in its place."""
        return Stream(self._ticket, change(self._responses), self._cancel)

    def cancel(self) -> None:
        """Interrupt it, from any thread: it ends with the finish reason "cancelled", or raises Cancelled."""
        self._cancel(self._ticket)

    def close(self) -> None:
        """End it here, on the thread that iterates it. The model keeps what it has evaluated, for the next call."""
        self._responses.close()


async def iterate_async(open_stream: Callable[[], Stream]) -> AsyncIterator[GenerationResponse]:
    """The items of a stream, each computed on a thread of its own, so that the event loop stays free.

    When the consumer goes away, or its task is cancelled, the step that is running is interrupted.
    """
    import asyncio  # here: a cold `edgellm run` doesn't wait for it
    from concurrent.futures import ThreadPoolExecutor

    executor = ThreadPoolExecutor(1, thread_name_prefix="edgellm-stream")
    loop = asyncio.get_running_loop()
    stream: Stream | None = None
    try:
        stream = await loop.run_in_executor(executor, open_stream)
        while (item := await loop.run_in_executor(executor, next, stream, None)) is not None:
            yield item
    finally:
        if stream is not None:
            stream.cancel()
            await loop.run_in_executor(executor, stream.close)
        executor.shutdown(wait=False)
