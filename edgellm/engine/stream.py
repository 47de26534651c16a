"""One generation of a model as an iterator that can be cancelled and closed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from edgellm.errors import Cancelled
from edgellm.generation import GenerationResponse

Work = Callable[[], Iterator[GenerationResponse]]


class Stream(Iterator[GenerationResponse]):
    """Iterate it for the answer; the model's turn is taken at the first item and given back at the end.

    The turn also returns on `close()`, on leaving a `with` block, and when the object is thrown away.
    """

    def __init__(self, run: Callable[[Stream], Generator[GenerationResponse, None, None]]) -> None:
        self.cancelled = False
        self._generator = run(self)

    def __next__(self) -> GenerationResponse:
        return next(self._generator)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the generation here. The model keeps what it has evaluated, for the next call."""
        self._generator.close()

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled("cancelled before the first token")
