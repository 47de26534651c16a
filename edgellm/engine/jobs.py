"""The lines of a batch job, and its results: appended one by one, so that a killed job goes on where it was.

A line holds {"custom_id", "prompt"} or {"custom_id", "messages"}, with max_tokens, temperature … beside them, or an
OpenAI batch body {"custom_id", "body": {"messages", …}}. An answer carries the same custom_id; to a body it comes in
OpenAI's shape (https://platform.openai.com/docs/guides/batch).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from edgellm.chat.answers import read_whole, with_marks
from edgellm.chat.template import check_messages
from edgellm.config import SamplingParams
from edgellm.engine.model import Model
from edgellm.engine.parallel import Answer, Request
from edgellm.errors import EdgeLLMError, OutputError, TextError

_SETTINGS = {field.name for field in fields(SamplingParams)}
_OTHER_NAMES = {"max_completion_tokens": "max_tokens"}


@dataclass(frozen=True)
class Job:
    """A line. error: why it can't be answered, "" if it can. body: what asks, in either shape."""

    custom_id: str
    body: Mapping[str, Any]
    is_openai: bool = False
    error: str = ""


def read_jobs(path: Path) -> list[Job]:
    """All lines; a bad one becomes a job with an error. TextError: no such file, or a custom_id that stands twice."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise TextError(f"cannot read {path}: {exc.strerror or exc}; check the path") from exc
    jobs = [_job(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not jobs:
        raise TextError(f'{path} has no lines; give one JSON object a line, such as {{"prompt": "Hello"}}')
    seen: set[str] = set()
    for job in jobs:
        if job.custom_id in seen:
            raise TextError(f"{path}: the custom_id {job.custom_id!r} stands twice; answers could not be told apart")
        seen.add(job.custom_id)
    return jobs


def _job(line: bytes, number: int) -> Job:
    name = f"line-{number}"
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as exc:
        return Job(name, {}, error=f"line {number} is not JSON: {exc}")
    if not isinstance(content, dict):
        return Job(name, {}, error=f"line {number} is not a JSON object")
    name = str(content.get("custom_id", name))
    body, is_openai = content.get("body"), "body" in content
    asked = body if is_openai else content
    if not isinstance(asked, dict):
        return Job(name, {}, is_openai, f"line {number}: its body is not a JSON object")
    if not isinstance(asked.get("prompt"), str) and not isinstance(asked.get("messages"), list):
        return Job(name, asked, is_openai, f"line {number} has neither a prompt (text) nor messages (a list)")
    return Job(name, asked, is_openai)


def answers(
    model: Model, jobs: list[Job], params: SamplingParams, system: str | None, n_parallel: int, n_ctx: int
) -> Iterator[tuple[Job, dict[str, Any], int]]:
    """(job, the record to write, tokens written) in the order they are finished. Cancelled where that happens."""
    refused: list[tuple[Job, str]] = []

    def requests() -> Iterator[Request]:
        for job in jobs:
            try:
                if job.error:
                    raise TextError(job.error)
                yield _request(model, job, params, system)
            except (EdgeLLMError, ValueError, TypeError) as exc:
                refused.append((job, " ".join(str(exc).split())))

    for answer in model.answer_all(requests(), n_parallel, n_ctx=n_ctx):
        while refused:
            yield _refused(*refused.pop(0))
        job = answer.key
        assert isinstance(job, Job)
        if answer.error:
            yield _refused(job, answer.error)
        else:
            yield job, _record(job, answer, model), len(answer.token_ids)
    while refused:
        yield _refused(*refused.pop(0))


def _request(model: Model, job: Job, params: SamplingParams, system: str | None) -> Request:
    given = {_OTHER_NAMES.get(name, name): value for name, value in job.body.items()}
    changes = {name: value for name, value in given.items() if name in _SETTINGS and value is not None}
    changes |= _form(job.body.get("response_format"))
    asked = job.body.get("messages")
    messages = check_messages([{"role": "user", "content": job.body["prompt"]}] if asked is None else asked)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    params = with_marks(replace(params, **changes), _template(model))
    return Request(job, model.chat_tokens(messages), params)


def _template(model: Model) -> str:
    return str(model.metadata.get("tokenizer.chat_template"))


def _form(asked: Any) -> dict[str, Any]:
    """OpenAI's response_format: its schema, any JSON object, or text."""
    if asked is None or asked == {"type": "text"}:
        return {}
    if asked == {"type": "json_object"}:
        return {"schema": {"type": "object"}}
    try:
        return {"schema": asked["json_schema"]["schema"]}
    except (TypeError, KeyError):
        raise TextError("response_format is none of text, json_object, json_schema with a schema") from None


def _record(job: Job, answer: Answer, model: Model) -> dict[str, Any]:
    text = read_whole(answer.text, _template(model))
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.token_ids),
        "total_tokens": answer.prompt_tokens + len(answer.token_ids),
    }
    if not job.is_openai:
        return {
            "custom_id": job.custom_id,
            "text": text,
            "finish_reason": answer.finish_reason,
            "usage": usage,
            "error": None,
        }
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    body = {"object": "chat.completion", "model": model.path.name, "choices": [choice], "usage": usage}
    return {"custom_id": job.custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def _refused(job: Job, reason: str) -> tuple[Job, dict[str, Any], int]:
    record: dict[str, Any] = {"custom_id": job.custom_id, "error": {"message": reason}}
    return job, record | ({"response": None} if job.is_openai else {}), 0


class Results:
    """The file of answers. `done`: the custom_ids it holds; what a killed job left of a line is cut off."""

    def __init__(self, path: Path) -> None:
        """OutputError where it can't be written, or holds something else."""
        self.n_written = self.n_errors = 0
        self.done: set[str] = set()
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is no file that answers could be appended to; name another")
        try:
            self._file = path.open("ab+")
            self._file.seek(0)
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self.done = {_custom_id(path, line) for line in whole.splitlines()}
            self._file.truncate(len(whole))
            self._file.seek(0, os.SEEK_END)
        except OSError as exc:
            raise OutputError(f"cannot write {path}: {exc.strerror or exc}; choose another place") from exc

    def write(self, job: Job, record: Mapping[str, Any]) -> None:
        """Append a record: a whole line, or after a kill one that the next run cuts off. OutputError: disk full."""
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()
        except OSError as exc:
            raise OutputError(f"cannot write the answer to {job.custom_id}: {exc.strerror or exc}; make room") from exc
        self.n_written += 1
        self.n_errors += record["error"] is not None

    def close(self) -> None:
        self._file.close()


def _custom_id(path: Path, line: bytes) -> str:
    try:
        return str(json.loads(line)["custom_id"])
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{path} holds something else than answers of a batch job; name another file") from None
