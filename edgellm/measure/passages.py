"""Texts for drafts, whole: a user's files, or what a model asks and answers itself.

Where `texts.py` cuts samples to score, these stay documents, with the places where somebody else's text ends and the
model's own begins: drafts learn all of it, and are tried from such places on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from time import monotonic
from typing import Any

from edgellm.config import LoadParams, SamplingParams
from edgellm.engine.model import Model, load
from edgellm.errors import GenerationError, TextError
from edgellm.measure.scoring import OnProgress
from edgellm.measure.texts import SELF, SELF_SEED, answer_begins, dialogue_or_text, read_text, reason

_UNLIKE = ("Hello", "7")  # two questions without a common beginning
_QUESTION_TOKENS, _ANSWER_TOKENS = 96, 384
_ANSWER_TEMPERATURE = 0.7  # as in chats
_PROMPT_SHARE, _PROMPT_TOKENS = 2, 256  # of a plain text: its first half, at most so much, is the prompt
_MIN_TOKENS = 8
_N_CTX = 1024
_PARAGRAPH_TOKENS = 256  # a plain text is cut where a paragraph ends, into about as much


@dataclass(frozen=True)
class Passage:
    """A document's tokens; where the last part begins that the model itself writes, or would write. is_text: that is
    anywhere, the document is nobody's dialogue.
    """

    tokens: list[int]
    begin: int
    is_text: bool = False

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.begin]


def read_passages(
    text: str | Path,
    model: Path,
    *,
    n_tokens: int = 1 << 62,
    seconds: float = float("inf"),
    seed: int = SELF_SEED,
    on_progress: OnProgress | None = None,
) -> list[Passage]:
    """The documents of a file: dialogues or {"text"} as JSON lines, else a plain text's paragraphs; or, for the text
    "self", what `model` asks and answers itself until it has written n_tokens or `seconds` are over.

    Errors: TextError for a file that can't be read, or has a line that is none of these.
    """
    with load(model, LoadParams(n_ctx=_N_CTX)) as opened:
        if text == SELF:
            return list(own_dialogues(opened, n_tokens, seconds, seed, on_progress))
        return _of_file(Path(text), opened)


def _of_file(path: Path, model: Model) -> list[Passage]:
    content = read_text(path)
    found = _lines(path, content, model) if path.suffix == ".jsonl" else _plain(content, model)
    passages = [passage for passage in found if len(passage.tokens) >= _MIN_TOKENS]
    if not passages:
        raise TextError(f"{path} holds no text of {_MIN_TOKENS} tokens or more; give a longer one")
    return passages


def held_out(passages: Sequence[Passage], most: int) -> tuple[list[Passage], list[Passage]]:
    """(to learn from, to be tried on): every so manieth, at most `most` and a fourth of them; at least one of two."""
    n = max(1, min(most, len(passages) // 4)) if len(passages) > 1 else 0
    if not n:
        return list(passages), []
    step = len(passages) / n
    chosen = {int((i + 0.5) * step) for i in range(n)}
    kept = [passage for i, passage in enumerate(passages) if i not in chosen]
    return kept, [passages[i] for i in sorted(chosen)]


def own_dialogues(
    model: Model,
    n_tokens: int,
    seconds: float = float("inf"),
    seed: int = SELF_SEED,
    on_progress: OnProgress | None = None,
) -> Iterator[Passage]:
    """Questions that the model makes up where its template has a user speak, and its answers to them.

    Xu et al. 2024 ("Magpie"). A model without a template goes on from the beginning of a text. Another seed gives other
    texts; the same one similar ones, as several tokens evaluated together are rounded otherwise than one by one.
    """
    ends, written, number = monotonic() + seconds, 0, 0
    while written < n_tokens and monotonic() < ends:
        passage = _own_dialogue(model, seed + 2 * number)
        number += 1
        if len(passage.tokens) - passage.begin >= _MIN_TOKENS:
            written += len(passage.tokens)
            if on_progress and n_tokens < 1 << 62:
                on_progress("writing a text", min(written, n_tokens), n_tokens)
            yield passage


def _own_dialogue(model: Model, seed: int) -> Passage:
    start = [model.bos] if model.bos is not None else model.tokenize("\n")[:1]
    try:
        two = [model.chat_tokens([{"role": "user", "content": text}]) for text in _UNLIKE]
    except GenerationError:
        return _written(model, start, SamplingParams(temperature=1.0, seed=seed, max_tokens=_ANSWER_TOKENS))
    # what the template puts before a question
    before = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*two, strict=False))]
    asking = SamplingParams(temperature=1.0, seed=seed, max_tokens=_QUESTION_TOKENS, stop=("\n",))
    question = model.complete(before or start, asking).text.strip()
    prompt = model.chat_tokens([{"role": "user", "content": question or "Hello!"}])
    answering = SamplingParams(temperature=_ANSWER_TEMPERATURE, seed=seed + 1, max_tokens=_ANSWER_TOKENS)
    return _written(model, prompt, answering)


def _written(model: Model, prompt: list[int], params: SamplingParams) -> Passage:
    """The prompt and what the model makes of it, with the token that ended it where that can be known."""
    done = model.complete(prompt, params)
    tokens = [*prompt, *done.token_ids]
    if done.finish_reason == "stop":
        tokens += _end_of_turn(model)
    return Passage(tokens, len(prompt))


def _end_of_turn(model: Model) -> list[int]:
    """The token that ends an answer in the model's template; nothing where there is none."""
    try:
        dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        tokens = model.chat_tokens(dialogue, answer_follows=False)
    except GenerationError:
        return []
    return next(([token] for token in reversed(tokens) if model.ends(token)), [])


def _plain(content: str, model: Model) -> Iterator[Passage]:
    """A text in pieces that end with a paragraph."""
    piece: list[int] = []
    for paragraph in content.split("\n\n"):
        piece += model.tokenize(paragraph + "\n\n")
        if len(piece) >= _PARAGRAPH_TOKENS:
            yield _of_text(piece, model)
            piece = []
    if piece:
        yield _of_text(piece, model)


def _of_text(tokens: list[int], model: Model) -> Passage:
    tokens = [model.bos, *tokens] if model.bos is not None else tokens
    return Passage(tokens, max(1, min(len(tokens) // _PROMPT_SHARE, _PROMPT_TOKENS)), is_text=True)


def _lines(path: Path, content: str, model: Model) -> Iterator[Passage]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield _of_line(json.loads(line), model)
            except (ValueError, KeyError, TypeError, GenerationError) as exc:
                raise TextError(f"{path}, line {number}: {reason(exc)}") from exc


def _of_line(record: Any, model: Model) -> Passage:
    found = dialogue_or_text(record)
    if isinstance(found, str):
        return _of_text(model.tokenize(found), model)
    answers = [i for i, m in enumerate(found) if isinstance(m, dict) and m.get("role") == "assistant"]
    messages = found[: answers[-1] + 1] if answers else found
    tokens = model.chat_tokens(messages, answer_follows=False)
    return Passage(tokens, answer_begins(model, messages, tokens) if answers else len(tokens))
