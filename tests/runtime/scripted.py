"""A decoder, a sampler and a vocabulary without weights: they play a script, so that logic can be tested exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgellm.errors import Cancelled, ContextFull

EOG = 0


class ScriptedModel:
    """Decoder, chooser and pieces in one. Token t stands for `texts[t - 1]`; token 0 ends the answer."""

    n_outputs = 25

    def __init__(self, *texts: str | bytes, n_ctx: int = 1000, abort_at: int | None = None) -> None:
        self.texts = [text.encode() if isinstance(text, str) else text for text in texts]
        self.tokens: list[int] = []
        self.n_ctx = n_ctx
        self.aborted = False
        self.steps = 0
        self.evaluated: list[list[int]] = []
        self._next = 1
        self._abort_at = abort_at

    def reuse_prefix(self, tokens: Sequence[int]) -> int:
        n = 0
        while n < min(len(self.tokens), len(tokens) - 1) and self.tokens[n] == tokens[n]:
            n += 1
        del self.tokens[n:]
        return n

    def decode(self, tokens: Sequence[int], on_progress: Callable[[int, int], object] | None = None) -> None:
        self.evaluated.append(list(tokens))
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            if on_progress is not None and on_progress(i + 1, len(tokens)) is False:
                raise Cancelled("by the callback")

    def step(self, token: int) -> None:
        if len(self.tokens) >= self.n_ctx:
            raise ContextFull("full")
        self.steps += 1
        if self.steps == self._abort_at:
            raise Cancelled("aborted")
        self.tokens.append(token)

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        pass

    def verify(self, tokens: Sequence[int]) -> None:
        raise AssertionError("nothing was guessed")

    def keep(self, n_tokens: int) -> None:
        raise AssertionError("nothing was guessed")

    def sample(self, i: int | None = None) -> int:
        token = self._next if self._next <= len(self.texts) else EOG
        self._next += 1
        return token

    def piece(self, token: int) -> bytes:
        return self.texts[token - 1]

    def is_eog(self, token: int) -> bool:
        return token == EOG
