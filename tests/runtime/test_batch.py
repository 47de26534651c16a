"""Many prompts at once: the scheduling with scripted sequences, then real ones, kills and bad lines."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import edgellm
from edgellm import LoadParams, SamplingParams
from edgellm.constraint import Matcher
from edgellm.engine.parallel import Answer, Request, answer_all
from edgellm.errors import GenerationError
from edgellm.native.parallel import Piece
from tests.runtime.ties import assert_same_but_for_ties

EDGELLM = [sys.executable, "-c", "from edgellm.cli.main import main; main()"]


class Scripted:
    """A sequence says its prompt's first token plus 1, 2, 3 …; 100 and multiples end it. Checks what it is given."""

    can_share = True

    def __init__(self, n_sequences: int, n_ctx: int = 1000, n_batch: int = 16) -> None:
        self.n_sequences, self.n_ctx, self.n_batch = n_sequences, n_ctx, n_batch
        self.memory: dict[int, list[int]] = {}
        self.matchers: dict[int, Matcher | None] = {}
        self.forgets = False  # whether nothing can be copied after all
        self.evaluated = 0
        self.widths: list[int] = []

    def start(
        self,
        sequence: int,
        params: SamplingParams,
        matcher: Matcher | None,
        prompt: Sequence[int],
        copied_from: int | None,
        n: int,
    ) -> int:
        assert sequence not in self.memory
        if self.forgets:
            copied_from, n = None, 0
        self.memory[sequence] = [] if copied_from is None else self.memory[copied_from][:n]
        assert self.memory[sequence] == list(prompt[:n])
        self.matchers[sequence] = matcher
        return n

    def finish(self, sequence: int) -> None:
        del self.memory[sequence]

    def decode(self, pieces: Sequence[Piece]) -> None:
        assert 0 < sum(len(piece.tokens) for piece in pieces) <= self.n_batch
        numbers = [piece.sequence for piece in pieces]
        assert numbers == sorted(numbers)  # llama.cpp evaluates one by one what isn't in order
        self.widths.append(len(pieces))
        self.chosen = {}
        for piece in pieces:
            memory = self.memory[piece.sequence]
            assert piece.position == len(memory)
            memory += piece.tokens
            self.evaluated += len(piece.tokens)
            if piece.wants_logits:
                self.chosen[piece.sequence] = memory[-1] + 1

    def choose(self, sequence: int) -> int:
        if self.matchers[sequence] is not None and self.chosen[sequence] % 100 == 13:
            raise GenerationError("a form that nobody can keep to")
        return self.chosen[sequence]

    def piece(self, token: int) -> bytes:
        return f"{token},".encode()

    def is_eog(self, token: int) -> bool:
        return token % 100 == 0


def request(key: object, prompt: list[int], **params: object) -> Request:
    return Request(key, prompt, SamplingParams(**params))  # type: ignore[arg-type]


def test_every_request_gets_its_own_answer_and_a_free_sequence_is_used_at_once() -> None:
    scripted = Scripted(3)
    starts = [95, 190, 299, 393, 497, 550]
    answers = {a.key: a for a in answer_all(scripted, lambda _: scripted, [request(s, [s]) for s in starts])}
    for start in starts:
        expected = list(range(start + 1, (start // 100 + 1) * 100))
        assert list(answers[start].token_ids) == expected
        assert answers[start].text == "".join(f"{n}," for n in expected)
        assert (answers[start].finish_reason, answers[start].prompt_tokens) == ("stop", 1)
    assert scripted.memory == {}
    assert scripted.widths[:5] == [3] * 5  # others took over while 550 was still writing


def test_a_common_beginning_is_read_once() -> None:
    scripted = Scripted(4)
    common = [7] * 40
    answers = list(answer_all(scripted, lambda _: scripted, [request(i, [*common, 96 + i % 2]) for i in range(8)]))
    assert len(answers) == 8
    assert scripted.evaluated < 40 + 8 * 8


def test_a_beginning_that_cant_be_shared_is_read_again() -> None:
    scripted = Scripted(4)
    scripted.forgets = True
    answers = list(answer_all(scripted, lambda _: scripted, [request(i, [*[7] * 40, 96 + i % 2]) for i in range(8)]))
    assert [len(a.token_ids) for a in sorted(answers, key=lambda a: int(str(a.key)))] == [3, 2] * 4
    assert scripted.evaluated >= 8 * 41


def test_a_form_that_fails_ends_its_own_answer_alone() -> None:
    def matcher_of(params: SamplingParams) -> Matcher | None:
        if params.regex == "bad":
            raise GenerationError("no such form")
        return object() if params.regex else None  # type: ignore[return-value]

    scripted = Scripted(3)
    asked = [request("bad", [90], regex="bad"), request("fails", [110], regex="x"), request("free", [110])]
    found = {a.key: a for a in answer_all(scripted, lambda _: scripted, asked, matcher_of)}
    assert (found["bad"].error, found["bad"].token_ids) == ("no such form", ())
    assert (found["fails"].error, found["fails"].token_ids) == ("a form that nobody can keep to", ())
    assert len(found["free"].token_ids) == 89
    assert scripted.memory == {}


def test_limits_stop_strings_and_refusals() -> None:
    scripted = Scripted(2, n_ctx=40)
    asked = [
        request("limit", [1], max_tokens=3),
        request("stop", [5], stop=("8,",)),
        request("none", []),
        request("long", [1] * 20),
        request("zero", [1], max_tokens=0),
        request("full", [30] * 10),
    ]
    found = {a.key: a for a in answer_all(scripted, lambda _: scripted, asked)}
    assert (found["limit"].text, found["limit"].finish_reason) == ("2,3,4,", "length")
    assert (found["stop"].text, found["stop"].finish_reason) == ("6,7,", "stop")
    assert "empty" in found["none"].error
    assert "20 tokens, each sequence has room for 20" in found["long"].error
    assert found["zero"] == Answer("zero", finish_reason="length", prompt_tokens=1)
    assert (len(found["full"].token_ids), found["full"].finish_reason) == (10, "length")


def test_a_long_prompt_is_read_in_pieces_while_others_write() -> None:
    scripted = Scripted(2, n_batch=8)
    asked = [request("a", [190]), request("b", [50] * 30, max_tokens=2)]
    found = {a.key: a for a in answer_all(scripted, lambda _: scripted, asked)}
    assert len(found["a"].token_ids) == 9
    assert found["b"].token_ids == (51, 52)
    assert scripted.widths[1:4] == [2, 2, 2]


def test_the_first_sequences_are_used_first() -> None:
    scripted = Scripted(4)
    assert len(list(answer_all(scripted, lambda _: scripted, [request(i, [190]) for i in range(2)]))) == 2
    assert list(scripted.matchers) == [0, 1]


def test_prompts_are_read_in_batches_of_the_models_size(model_path: Path) -> None:
    for asked, n_ctx, n_batch in ((None, 1024, 512), (64, 1024, 64), (2, 1024, 4), (None, 32, 128)):
        with (
            edgellm.load(model_path, LoadParams(n_ctx=64, n_batch=asked)) as model,
            model._held.parallel_context(4, n_ctx) as context,
        ):
            assert context.n_batch == n_batch


def test_real_answers_are_those_of_one_at_a_time(model_path: Path) -> None:
    questions = ["Name three colours.", "What is a llama?", "Write a haiku.", "Name three colours.", "Count to five."]
    params = SamplingParams(max_tokens=16)
    with edgellm.load(model_path, LoadParams(n_ctx=256)) as model:
        prompts = [model.chat_tokens([{"role": "user", "content": q}]) for q in questions]
        requests = [Request(i, prompt, params) for i, prompt in enumerate(prompts)]
        together = {a.key: list(a.token_ids) for a in model.answer_all(requests, 3)}
        for i, prompt in enumerate(prompts):
            alone = model.complete(prompt, params, draft="off").token_ids
            assert_same_but_for_ties(model, prompt, alone, together[i])
        seeded = SamplingParams(max_tokens=8, temperature=1.0, seed=3, repeat_penalty=1.2)
        sampled = list(model.answer_all([Request(i, prompts[0], seeded) for i in range(2)], 2))
    assert sampled[0].token_ids == sampled[1].token_ids != ()


def edgellm_batch(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*EDGELLM, "batch", *map(str, arguments)], capture_output=True, timeout=120, check=False)


def test_lines_of_every_shape_and_bad_ones(model_path: Path, tmp_path: Path) -> None:
    lines = [
        '{"custom_id": "plain", "prompt": "Say hello.", "max_tokens": 5}',
        '{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}',
        '{"custom_id": "o", "body": {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 3}}',
        "no json",
        '{"custom_id": "n", "prompt": 5}',
        '{"custom_id": "t", "prompt": "x", "temperature": -1}',
        '{"custom_id": "m", "messages": [{"role": "user"}]}',
        '{"custom_id": "e", "messages": []}',
        '{"custom_id": "s", "messages": ["Hi"]}',
        '{"custom_id": "f", "prompt": "Is water wet?", "schema": {"type": "boolean"}}',
        '{"custom_id": "r", "prompt": "Name a colour.", "regex": "red|blue", "temperature": 1.5}',
        '{"custom_id": "j", "body": {"messages": [{"role": "user", "content": "Hi"}], "response_format":'
        ' {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}}}',
        '{"custom_id": "u", "prompt": "x", "schema": {"type": "nothing"}}',
        '{"custom_id": "v", "body": {"messages": [{"role": "user", "content": "Hi"}], "response_format": "x"}}',
        "[1]",
        "",
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    result = edgellm_batch(model_path, source, "-o", out, "--n-ctx", 256, "--parallel", 2, "--system", "Be brief.")
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"15 answers, 9 of them errors" in result.stderr
    records = {r["custom_id"]: r for r in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert set(records) == {"plain", "line-2", "o", "line-4", "n", "t", "m", "e", "s", *"frjuv", "line-15"}
    assert records["plain"]["usage"]["completion_tokens"] == 5
    assert records["plain"]["error"] is None
    assert records["line-2"]["text"]
    answer = records["o"]["response"]["body"]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 3
    assert records["f"]["text"] in ("true", "false")
    assert records["r"]["text"] in ("red", "blue")
    assert records["j"]["response"]["body"]["choices"][0]["message"]["content"] in ('"yes"', '"no"')
    assert "form can't be used" in records["u"]["error"]["message"]
    assert "response_format" in records["v"]["error"]["message"]
    assert "temperature is -1" in records["t"]["error"]["message"]
    again = edgellm_batch(model_path, source, "-o", out)
    assert (again.returncode, b"15 of 15 lines are answered already" in again.stderr) == (0, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has no lines"), ('{"custom_id": 1, "prompt": "a"}\n{"custom_id": 1, "prompt": "b"}', "stands twice")],
)
def test_files_that_are_no_jobs(model_path: Path, tmp_path: Path, content: str, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(content, encoding="utf-8")
    result = edgellm_batch(model_path, source, "-o", tmp_path / "out.jsonl")
    assert (result.returncode, message in result.stderr.decode()) == (3, True)
    assert not (tmp_path / "out.jsonl").exists()
    missing = edgellm_batch(model_path, tmp_path / "none.jsonl", "-o", tmp_path / "out.jsonl")
    assert missing.returncode == 3


def test_a_file_with_something_else_is_left_alone(model_path: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "notes.txt"
    source.write_text('{"prompt": "a"}', encoding="utf-8")
    out.write_text("my notes\n", encoding="utf-8")
    result = edgellm_batch(model_path, source, "-o", out)
    assert (result.returncode, b"something else" in result.stderr) == (1, True)
    assert out.read_text(encoding="utf-8") == "my notes\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_killed_twenty_times_loses_and_repeats_nothing(model_path: Path, tmp_path: Path) -> None:
    n = 400
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"custom_id": "{i}", "prompt": "Say {i}."}}\n' for i in range(n)), encoding="utf-8")
    command = [*EDGELLM, "batch", str(model_path), str(source), "-o", str(out), "-n", "6", "--n-ctx", "128"]
    rng, before = random.Random(0), 0
    for kill in range(21):
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            if kill < 20:
                wanted = before + rng.randrange(1, 14)
                while process.poll() is None and _n_lines(out) < wanted:
                    time.sleep(rng.random() / 50)
                process.send_signal(signal.SIGKILL)
            process.wait()
        assert _n_lines(out) >= before
        before = _n_lines(out)
        if kill % 3 == 0 and kill < 20:
            with out.open("ab") as file:  # as if it had been killed in the middle of writing a line
                file.write(b'{"custom_id": "3')
    ids = [json.loads(line)["custom_id"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert sorted(ids, key=int) == [str(i) for i in range(n)]


def _n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_only_files_are_written_to(model_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a", "max_tokens": 2}', encoding="utf-8")
    for out in (tmp_path, Path(os.devnull), tmp_path / "none" / "out.jsonl"):
        result = edgellm_batch(model_path, source, "-o", out)
        assert (result.returncode, result.stderr.count(b"\n")) == (1, 1)
