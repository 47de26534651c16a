"""Steps of several tokens: guesses are evaluated together, and the model's own choices decide how many were right.

At every position the token is chosen as without guesses, from the same logits by the same sampler. A guess only saves
the evaluation in between. So the answer has the model's own distribution at any temperature, with penalties too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Protocol

from edgellm.errors import Cancelled
from edgellm.speculation.depth import Depth
from edgellm.speculation.drafts import NOTHING, Draft, Proposal

_PRIOR_OF_COSTLY = 0.85  # guesses that cost something: nobody gives a bad draft by mistake


class Verifier(Protocol):
    """A decoder that can evaluate several guesses and take the wrong ones back (`native.context.Context`)."""

    tokens: list[int]
    n_ctx: int
    n_outputs: int

    def step(self, token: int) -> None: ...

    def verify(self, tokens: Sequence[int]) -> None: ...

    def keep(self, n_tokens: int) -> None: ...


class ChooserAt(Protocol):
    """Chooses from the logits at the i-th of the tokens evaluated last; None = the last one's."""

    def sample(self, i: int | None = None) -> int: ...


class Speculator:
    """The drafts of one generation, of which the one that promises most is checked at each place; and figures of it.

    drafted, accepted: guesses checked, and right. draft_seconds: time the drafts took.
    """

    def __init__(self, drafts: Sequence[Draft], depth: Depth) -> None:
        self.drafts, self.depth = drafts, depth
        self.drafted = self.accepted = 0
        self.draft_seconds = 0.0

    def propose(self, history: Sequence[int], most: int) -> Proposal:
        """At most `most` guesses of what follows the history."""
        if most <= 0:
            return NOTHING
        offers = [(draft, offer) for draft in self.drafts if (offer := _offer(draft, history, most)).tokens]
        if len(offers) > 1:
            offers.sort(key=lambda pair: self._gain(pair[1]), reverse=True)
        for draft, offer in offers:
            k = self.depth.choose(offer.source, len(offer.tokens), offer.prior)
            if not k:
                continue
            if draft.is_free:
                return offer._replace(tokens=offer.tokens[:k])
            proposal = draft.propose(history, k, self.depth.goes_on(draft.name, k))
            if proposal.tokens:
                return proposal
        return NOTHING

    def _gain(self, offer: Proposal) -> float:
        return self.depth.gain(offer.source, len(offer.tokens), offer.prior)

    def checked(self, proposal: Proposal, n_accepted: int, seconds: float, draft_seconds: float) -> None:
        """Learn from a check that took `seconds`, after `draft_seconds` of guessing."""
        self.drafted += len(proposal.tokens)
        self.accepted += n_accepted
        self.depth.check_took(proposal, n_accepted, seconds, draft_seconds)


def _offer(draft: Draft, history: Sequence[int], most: int) -> Proposal:
    """What a draft guesses; where that takes time, as many places for guesses that aren't made yet."""
    if draft.is_free:
        return draft.propose(history, most)
    return Proposal(range(most), draft.name, prior=_PRIOR_OF_COSTLY)


def speculative_steps(
    decoder: Verifier,
    chooser: ChooserAt,
    speculator: Speculator,
    prompt: Sequence[int],
    is_eog: Callable[[int], bool],
    limit: int | None,
) -> Iterator[tuple[Sequence[int], int]]:
    """(new tokens, how many of them were guessed), for ever, after a prompt that was decoded.

    Whenever it yields, the decoder's memory holds what was yielded but for the last token. limit: of new tokens, which
    nothing is guessed beyond.
    """
    history = list(prompt)
    end = len(history) + (decoder.n_ctx if limit is None else limit)
    token = chooser.sample()
    yield (token,), 0
    while True:
        history.append(token)
        started = perf_counter()
        room = min(decoder.n_ctx - len(decoder.tokens), decoder.n_outputs, end - len(history)) - 1
        proposal = _propose(speculator, history, room)
        guessed = perf_counter()
        speculator.draft_seconds += guessed - started
        if not proposal.tokens:
            decoder.step(token)
            token = chooser.sample()
            speculator.depth.step_took(perf_counter() - started)
            yield (token,), 0
            continue
        accepted, token = _check(decoder, chooser, token, proposal.tokens, is_eog)
        speculator.checked(proposal, len(accepted), perf_counter() - guessed, guessed - started)
        history += accepted
        yield (*accepted, token), len(accepted)


def _propose(speculator: Speculator, history: Sequence[int], most: int) -> Proposal:
    try:
        return speculator.propose(history, most)
    except Cancelled:  # in the draft's model; the step that follows notices too
        return NOTHING


def _check(
    decoder: Verifier, chooser: ChooserAt, token: int, guesses: Sequence[int], is_eog: Callable[[int], bool]
) -> tuple[list[int], int]:
    """The guesses that are what the model chooses itself, and its choice after them. The others leave its memory."""
    n_past = len(decoder.tokens)
    decoder.verify([token, *guesses])
    accepted: list[int] = []
    for i, guess in enumerate(guesses):
        chosen = chooser.sample(i)
        if chosen != guess or is_eog(chosen):
            break
        accepted.append(chosen)
    else:
        chosen = chooser.sample(len(guesses))
    decoder.keep(n_past + 1 + len(accepted))
    return accepted, chosen
