"""What models are measured on: a text file, dialogues as JSON lines, or text that a model makes itself."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgellm.config import LoadParams, SamplingParams
from edgellm.engine.model import Model, load
from edgellm.engine.parallel import Request
from edgellm.errors import GenerationError, TextError
from edgellm.measure.scoring import OnProgress, Sample

SELF = "self"
DEFAULT_N_CTX = 512
_SELF_CHUNKS = 8
SELF_SEED = 20260101
_MIN_TOKENS = 8
_RUN = 128  # tokens the model writes from one word
_N_PARALLEL = 8  # runs, so that a weight read once serves them all
_TOP_P = 0.95  # of its distribution: what is less likely is noise
_TOP_K = 1000  # candidates for it: sorting a whole vocabulary takes as long as evaluating a token


def read_samples(
    text: str | Path,
    model: Path,
    *,
    n_ctx: int = DEFAULT_N_CTX,
    n_chunks: int | None = None,
    seed: int = SELF_SEED,
    on_progress: OnProgress | None = None,
) -> list[Sample]:
    """Samples of at most n_ctx tokens from a file, or from what `model` writes for the text "self".

    A text is cut into chunks of n_ctx, each begun with BOS where the vocabulary has one, and the second half of each
    is scored, as llama-perplexity does. Of dialogues (.jsonl: {"messages": […]}, {"prompt", "completion"} or
    {"text"} per line) only the assistant's answers are scored, through the model's chat template.
    Errors: TextError for a file that can't be read or is too short.
    """
    with load(model, LoadParams(n_ctx=n_ctx, load_mode="mmap")) as opened:
        n_ctx = opened.n_ctx
        if text == SELF:
            tokens = _own_text(opened, n_ctx, n_chunks or _SELF_CHUNKS, seed, on_progress)
            return chunks(tokens, n_ctx, n_chunks, opened.bos)
        path = Path(text)
        content = read_text(path)
        if path.suffix == ".jsonl":
            return _dialogues(path, content, opened, n_ctx)[:n_chunks]
        tokens = opened.tokenize(content)
        if opened.bos is not None:
            tokens.insert(0, opened.bos)
        if len(tokens) < _MIN_TOKENS:
            raise TextError(f"{path} has {len(tokens)} tokens; give a longer text, a few thousand words at best")
        return chunks(tokens, n_ctx, n_chunks, opened.bos)


def chunks(tokens: list[int], n_ctx: int, n_chunks: int | None, bos: int | None) -> list[Sample]:
    """Whole chunks of n_ctx tokens (of a shorter text one, of all there is), their second halves scored."""
    size = min(n_ctx, len(tokens))
    samples = []
    for start in range(0, len(tokens) - size + 1, size)[:n_chunks]:
        chunk = tokens[start : start + size]
        samples.append(Sample([bos, *chunk[1:]] if bos is not None else chunk, range(size // 2, size - 1)))
    return samples


def read_text(path: Path) -> str:
    """A file's text. TextError where it can't be read, or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise TextError(f"{path} is no UTF-8 text (byte {exc.start}); convert it to UTF-8") from exc
    except OSError as exc:
        raise TextError(f"cannot read {path}: {exc.strerror or exc}; check the path") from exc


def _own_text(model: Model, n_ctx: int, n_chunks: int, seed: int, on_progress: OnProgress | None) -> list[int]:
    """n_chunks × n_ctx tokens of the model's own distribution, in short runs; the same for the same seed.

    Each run begins with BOS and a random word, after Liu et al. 2023 (LLM-QAT): from BOS alone an instruction-tuned
    model says the same few things over and over, and a file calibrated on those is worse than one that isn't.
    """
    wanted, n_done = n_ctx * n_chunks, 0
    rng = random.Random(seed)
    bos = [model.bos] if model.bos is not None else []
    starts, written = list[list[int]](), dict[int, list[int]]()

    def requests() -> Iterator[Request]:
        while n_done < wanted:
            starts.append([*bos, _random_word(model, rng)])
            params = SamplingParams(
                temperature=1.0, top_k=_TOP_K, top_p=_TOP_P, min_p=0.0, seed=seed + len(starts), max_tokens=_RUN
            )
            yield Request(len(starts) - 1, starts[-1], params)

    n_parallel = min(_N_PARALLEL, -(-wanted // _RUN))
    for answer in model.answer_all(requests(), n_parallel, n_ctx=_RUN + len(bos) + 2):
        assert isinstance(answer.key, int)
        written[answer.key] = starts[answer.key] + list(answer.token_ids)
        n_done += len(written[answer.key])
        if on_progress:
            on_progress("writing a text", min(n_done, wanted), wanted)
    return [token for k in sorted(written) for token in written[k]][:wanted]


def _random_word(model: Model, rng: random.Random) -> int:
    """A token that is a word, or begins one."""
    while True:
        token = rng.randrange(model.n_vocab)
        text = model.detokenize([token]).strip()
        if len(text) > 1 and text.isalpha():
            return token


def _dialogues(path: Path, content: str, model: Model, n_ctx: int) -> list[Sample]:
    samples: list[Sample] = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                samples += _of_line(json.loads(line), model, n_ctx)
            except (ValueError, KeyError, TypeError, GenerationError) as exc:
                raise TextError(f"{path}, line {number}: {reason(exc)}") from exc
    if not samples:
        raise TextError(f'{path} has no answers to score; a line looks like {{"messages": [{{"role": …}}]}}')
    return samples


def reason(exc: Exception) -> str:
    """Why a line of dialogues can't be used."""
    if isinstance(exc, json.JSONDecodeError):
        return f"no JSON ({exc})"
    if isinstance(exc, KeyError):
        return f"{exc} is missing; a line has messages, or prompt and completion, or text"
    return str(exc)


def dialogue_or_text(record: Any) -> list[Any] | str:
    """What a line of JSON holds: a dialogue's messages, or a text. ValueError, KeyError: neither."""
    if isinstance(record, list):
        return record
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    if "messages" in record:
        if not isinstance(record["messages"], list):
            raise ValueError("messages must be a list")
        return record["messages"]
    if "text" in record:
        if not isinstance(record["text"], str):
            raise ValueError("text must be a string")
        return record["text"]
    pair = [("user", record["prompt"]), ("assistant", record["completion"])]
    return [{"role": role, "content": text} for role, text in pair]


def _of_line(record: Any, model: Model, n_ctx: int) -> Iterator[Sample]:
    found = dialogue_or_text(record)
    if isinstance(found, str):
        tokens = ([model.bos] if model.bos is not None else []) + model.tokenize(found)
        yield from _cut(tokens, list(range(len(tokens) - 1)), n_ctx)
    else:
        yield from _answers(found, model, n_ctx)


def _answers(messages: Sequence[Any], model: Model, n_ctx: int) -> Iterator[Sample]:
    """The dialogue with all its answers scored; one sample an answer where the template changes earlier turns."""
    tokens: list[int] = []
    positions: list[int] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        begin, answered = _answered(model, messages[: i + 1])
        if answered[: len(tokens)] != tokens:
            yield from _cut(tokens, positions, n_ctx)
            positions = []
        tokens = answered
        positions += range(begin - 1, len(answered) - 1)
    yield from _cut(tokens, positions, n_ctx)


def _answered(model: Model, messages: Sequence[Any]) -> tuple[int, list[int]]:
    """Tokens up to the one that ends the last message, an answer; where that answer begins."""
    tokens = model.chat_tokens(messages, answer_follows=False)
    begin = answer_begins(model, messages, tokens)
    end = next((i + 1 for i in range(begin, len(tokens)) if model.ends(tokens[i])), len(tokens))
    return begin, tokens[:end]


def answer_begins(model: Model, messages: Sequence[Any], tokens: Sequence[int]) -> int:
    """Where in the tokens of a dialogue its last message's own begin: at least 1."""
    prompt = model.chat_tokens(messages[:-1]) if len(messages) > 1 else []
    pairs = enumerate(zip(prompt, tokens, strict=False))
    return max(1, next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(tokens))))


def _cut(tokens: list[int], positions: list[int], n_ctx: int) -> Iterator[Sample]:
    """At most the first n_ctx tokens of a dialogue."""
    positions = [i for i in positions if i + 1 < min(len(tokens), n_ctx)]
    if positions:
        yield Sample(tokens[: positions[-1] + 2], positions)
