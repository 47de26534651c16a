"""A model whose engine is in a child process: the same answers and errors through the same methods."""

from __future__ import annotations

import asyncio
import inspect
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm
from edgellm import (
    AdapterError,
    Cancelled,
    ContextFull,
    Conversation,
    GenerationError,
    LoadParams,
    Model,
    ModelFileError,
    SamplingParams,
)
from edgellm.engine.isolated import IsolatedModel
from edgellm.engine.parallel import Request
from edgellm.engine.protocol import WINDOW
from tests.runtime.isolated import (
    ENDLESS,
    GREEDY,
    LONG_PROMPT,
    MESSAGES,
    PARAMS,
    PROMPT,
    engine_that,
    eventually,
    is_gone,
    isolated,
    pid_of,
    plain,
    shared,
    started,
    tiny_path,
)

__all__ = ["isolated", "plain", "shared", "tiny_path"]  # fixtures

SEEDED = SamplingParams(max_tokens=24, temperature=1.0, seed=7, stop=("@@",))
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}


@pytest.mark.parametrize("params", [GREEDY, SEEDED, SamplingParams(max_tokens=30, schema=SCHEMA)])
@pytest.mark.parametrize("draft", ["off", "auto"])
def test_answers_are_those_of_a_model_in_this_process(
    plain: Model, shared: Model, params: SamplingParams, draft: str
) -> None:
    expected, found = (model.complete(PROMPT, params, draft=draft) for model in (plain, shared))
    assert (found.text, found.token_ids, found.finish_reason) == (
        expected.text,
        expected.token_ids,
        expected.finish_reason,
    )
    assert found.stats.prompt_tokens == len(PROMPT)
    assert found.stats.completion_tokens == len(found.token_ids) > 0
    assert found.stats.decode_seconds > 0


def test_chats_text_prompts_and_tokens_are_the_same(plain: Model, shared: Model) -> None:
    for model in (plain, shared):
        assert (
            "".join(r.text for r in model.chat(MESSAGES, GREEDY))
            == model.complete(model.chat_tokens(MESSAGES), GREEDY).text
        )
    same: list[Any] = [
        lambda model: [r.text for r in model.chat(MESSAGES, SEEDED, draft="off")],
        lambda model: model.chat_tokens(MESSAGES, answer_follows=False),
        lambda model: model.complete("Once upon <|im_end|> a time", GREEDY).token_ids,
        lambda model: model.prompt_tokens("Once upon <|im_end|> a time"),
        lambda model: model.tokenize("héllo ☃ <|im_end|>", special=True),
        lambda model: model.tokenize("héllo ☃ <|im_end|>"),
        lambda model: model.detokenize([2, 500, 501], special=True),
        lambda model: model.detokenize(np.array([500, 501])),
        lambda model: [model.ends(token) for token in (0, 2, 500)],
        lambda model: (model.n_vocab, model.bos, model.n_ctx, model.n_threads, model.params, dict(model.settings)),
        lambda model: (dict(model.metadata), len(model.metadata), model.path, model.lora),
        lambda model: dict(model.memory_maker),
    ]
    for call in same:
        assert call(shared) == call(plain)


def test_arrays_are_the_same_and_can_be_written_to(plain: Model, shared: Model) -> None:
    expected, found = plain.logits(PROMPT), shared.logits(np.array(PROMPT))  # type: ignore[arg-type]
    assert (found.dtype, found.shape) == (np.float32, (len(PROMPT), 1000))
    np.testing.assert_array_equal(found, expected)
    found += 1
    np.testing.assert_array_equal(shared.embed(["a cat", "dogs"]), plain.embed(["a cat", "dogs"]))
    np.testing.assert_array_equal(shared.embed("a cat"), plain.embed("a cat"))


def test_batches_are_the_same_and_keys_stay_here(plain: Model, shared: Model) -> None:
    keys = [object() for _ in range(5)]
    seen: list[int] = []

    def requests() -> Any:
        for i, key in enumerate(keys):
            seen.append(threading.get_ident())
            tokens = np.array(PROMPT[: 10 + i]) if i % 2 else PROMPT[: 10 + i]
            yield Request(key, tokens if i != 3 else [], SamplingParams(max_tokens=4 + i))  # type: ignore[arg-type]
        yield Request("form", PROMPT[:9], SamplingParams(max_tokens=9, temperature=1.0, seed=1, regex="yes|no"))

    expected = list(plain.answer_all(requests(), 2, n_ctx=64))
    found = list(shared.answer_all(requests(), 2, n_ctx=64))
    assert found == expected
    assert [answer.key for answer in found if answer.error] == [keys[3]]
    assert next(answer.text for answer in found if answer.key == "form") in ("yes", "no")
    assert set(seen) == {threading.get_ident()}

    def bad() -> Any:
        yield Request(1, PROMPT, GREEDY)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(shared.answer_all(bad(), 2))
    assert shared.complete(PROMPT, GREEDY).token_ids == plain.complete(PROMPT, GREEDY).token_ids


def test_every_public_method_is_there_with_the_same_signature() -> None:
    names = [name for name in dir(Model) if not name.startswith("_")]
    assert len(names) > 20
    for name in names:
        ours, theirs = inspect.getattr_static(IsolatedModel, name), inspect.getattr_static(Model, name)
        assert type(ours) is type(theirs)
        if callable(theirs):
            assert inspect.signature(ours) == inspect.signature(theirs), name
    native = {name for name, value in vars(Model).items() if "self._held" in _source(value)}
    asked = {name for name in native if not name.startswith("_") or name == "__repr__"}
    assert len(asked) > 10
    assert asked <= set(vars(IsolatedModel)), "what uses native code must be asked of the child"


def _source(value: object) -> str:
    function = value.fget if isinstance(value, property) else getattr(value, "func", value)
    return inspect.getsource(function) if inspect.isfunction(function) else ""


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate(""), GenerationError, "empty"),
        (lambda m: m.generate([1000]), GenerationError, "1000 is not a token id.*0 to 999"),
        (lambda m: m.generate([1.5]), GenerationError, "must be integers"),
        (lambda m: m.generate("a\ud800"), GenerationError, "surrogate"),
        (lambda m: m.chat([{"role": "user"}]), GenerationError, "no text"),
        (lambda m: m.chat([{"role": "user", "content": object()}]), GenerationError, "object"),
        (lambda m: m.chat("x"), GenerationError, "non-empty list"),
        (lambda m: m.complete([5] * 24_001), ContextFull, "24001 tokens but the context holds 24000"),
        (lambda m: m.logits([]), GenerationError, "token"),
        (lambda m: m.embed([]), GenerationError, "nothing to embed"),
        (lambda m: m.complete(PROMPT, SamplingParams(schema=[1])), GenerationError, "not a list"),
        (lambda m: m.complete(PROMPT, SamplingParams(regex="(")), GenerationError, "form can't be used"),
        (lambda m: m.complete(PROMPT, draft="no-such-file.gguf"), ModelFileError, "no such file"),
        (lambda m: m.set_lora("no-such-file.gguf"), AdapterError, "cannot read the adapter"),
        (lambda m: m.tokenize("x", special=True, other=1), TypeError, "other"),
    ],
)
def test_errors_cross_and_nothing_is_broken_after(shared: Model, call: Any, error: Any, message: str) -> None:
    pid = pid_of(shared)
    with pytest.raises(error, match=message) as raised:
        call(shared)
    assert type(raised.value) is error
    assert shared.complete(PROMPT, SamplingParams(max_tokens=1)).stats.completion_tokens == 1
    assert pid_of(shared) == pid


def test_a_file_that_cannot_be_loaded_is_an_error_and_leaves_no_child(tmp_path: Path, tiny_path: Path) -> None:
    children = _children()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_path.read_bytes()[:50_000])
    with pytest.raises(ModelFileError, match=r"broken\.gguf"):
        edgellm.load(broken, isolated=True)
    with pytest.raises(ModelFileError, match="no such file"):
        edgellm.load("nothing-here.gguf", isolated=True)
    assert _children() == children


def _children() -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_progress_of_load_and_prompt_comes_on_the_callers_thread(tiny_path: Path) -> None:
    seen: list[tuple[float, int]] = []

    def note(fraction: float) -> None:
        seen.append((fraction, threading.get_ident()))

    with edgellm.load(tiny_path, PARAMS, isolated=True, on_progress=note) as model:
        assert seen[-1][0] == 1.0
        assert seen == sorted(seen)
        assert {thread for _, thread in seen} == {threading.get_ident()}
        seen.clear()
        model.complete(LONG_PROMPT[:2048], SamplingParams(max_tokens=1), on_progress=note)
        assert [fraction for fraction, _ in seen] == [0.25, 0.5, 0.75, 1.0]
        assert {thread for _, thread in seen} == {threading.get_ident()}


def _fail(_: float) -> None:
    raise ZeroDivisionError


def test_a_progress_callback_cancels_and_fails(tiny_path: Path, shared: Model) -> None:
    children = _children()
    with pytest.raises(Cancelled):
        edgellm.load(tiny_path, PARAMS, isolated=True, on_progress=lambda fraction: False)
    with pytest.raises(ZeroDivisionError):
        edgellm.load(tiny_path, PARAMS, isolated=True, on_progress=_fail)
    assert _children() == children
    with pytest.raises(Cancelled):
        shared.complete(LONG_PROMPT, on_progress=lambda fraction: False)
    with pytest.raises(ZeroDivisionError):
        shared.complete(LONG_PROMPT[::-1], on_progress=_fail)
    assert shared.complete(PROMPT, GREEDY).finish_reason == "length"
    assert shared.context_used < 100  # neither prompt was read to its end


def test_a_consumer_that_pauses_stops_the_engine(shared: Model) -> None:
    with shared.generate(PROMPT, ENDLESS, draft="off") as stream:
        first = next(stream)
        used = [0, shared.context_used]
        assert eventually(lambda: used.append(shared.context_used) or used[-1] == used[-20:][0])  # type: ignore[func-returns-value]
        assert used[-1] <= len(PROMPT) + 2 * WINDOW  # some pieces are of two tokens
        rest = [next(stream) for _ in range(3 * WINDOW)]
    tokens = [token for response in (first, *rest) for token in response.token_ids]
    assert shared.complete(PROMPT, SamplingParams(max_tokens=len(tokens)), draft="off").token_ids == tokens


def test_sessions_cross_and_go_on_in_either_kind(plain: Model, shared: Model, tmp_path: Path) -> None:
    system = "Be brief, and answer in the words of the village by the sea. " * 5
    conversation = Conversation(shared, system)
    list(conversation.say("Hello", GREEDY))
    conversation.save(tmp_path / "session")
    for model in (plain, shared):
        model.complete([5, 6, 7], SamplingParams(max_tokens=1))
        again = Conversation.load(model, tmp_path / "session")
        assert (again.messages, again.notice) == (conversation.messages, "")
        *_, last = again.say("More", GREEDY)
        assert last.stats.prompt_tokens - last.stats.evaluated_prompt_tokens > len(model.tokenize(system))


def test_adapters_cross(plain: Model, shared: Model) -> None:
    with pytest.raises(AdapterError):
        shared.set_lora(plain.path)
    assert shared.lora == ()


def test_a_draft_is_found_from_where_the_host_is(shared: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared.path.parent)
    assert shared.complete(PROMPT, GREEDY, draft=[shared.path.name]).stats.completion_tokens == 24
    monkeypatch.chdir(Path(shared.path.anchor))
    with pytest.raises(ModelFileError, match="no such file"):
        shared.complete(PROMPT, GREEDY, draft=[shared.path.name])


def test_async_answers_are_the_same(plain: Model, shared: Model) -> None:
    async def answer(model: Model) -> tuple[str, str]:
        raw = "".join([r.text async for r in model.agenerate(PROMPT, GREEDY)])
        return raw, "".join([r.text async for r in model.achat(MESSAGES, GREEDY)])

    assert asyncio.run(answer(shared)) == asyncio.run(answer(plain))


def test_the_log_of_the_engine_comes_out_here_and_stdout_is_nobodys(
    tiny_path: Path, caplog: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = "import os\nfrom edgellm.engine.model import Model\nquiet = Model.tokenize\n" + (
        "Model.tokenize = lambda *a, **k: os.write(1, b'noise ' * 1000) and print('more') or quiet(*a, **k)"
    )
    engine_that(noise, monkeypatch)
    with caplog.at_level("DEBUG", logger="edgellm"):
        with edgellm.load(tiny_path, PARAMS, isolated=True) as model:
            assert model.tokenize("Hello") == model.tokenize("Hello")
        assert any("general.architecture" in record.getMessage() for record in caplog.records)
        assert any("noise noise" in record.getMessage() for record in caplog.records)
    assert capfd.readouterr() == ("", "")


def test_two_models_at_once_closed_in_any_order(tiny_path: Path, plain: Model) -> None:
    expected = plain.complete(PROMPT, GREEDY).token_ids
    first, second = (edgellm.load(tiny_path, PARAMS, isolated=True) for _ in range(2))
    pids = pid_of(first), pid_of(second)
    with first.generate(PROMPT, ENDLESS) as stream:
        next(stream)
        assert second.complete(PROMPT, GREEDY).token_ids == expected
    first.close()
    assert second.complete(PROMPT, GREEDY).token_ids == expected
    second.close()
    assert all(map(is_gone, pids))
    first.close()


def test_closed_is_closed(tiny_path: Path) -> None:
    model = edgellm.load(tiny_path, PARAMS, isolated=True)
    stream = model.generate(PROMPT, ENDLESS)
    next(stream)
    pid = pid_of(model)
    model.close()
    assert is_gone(pid)
    with pytest.raises(GenerationError, match="closed"):
        list(stream)
    for call in (
        lambda: model.generate("x"),
        lambda: model.logits([1]),
        lambda: model.tokenize("x"),
        model.save_memory,
    ):
        with pytest.raises(GenerationError, match="closed"):
            call()
    model.cancel()
    assert model.engine_pid is None  # type: ignore[attr-defined]
    assert "closed" in repr(model)
    assert model.metadata["general.architecture"] == "llama"


def test_close_ends_a_call_on_another_thread(tiny_path: Path) -> None:
    model = edgellm.load(tiny_path, PARAMS, isolated=True)
    outcome: list[str] = []
    reading = threading.Event()

    def work() -> None:
        try:
            model.complete(LONG_PROMPT, on_progress=lambda _: reading.set())
        except GenerationError as exc:
            outcome.append(str(exc))

    thread = started(work)
    assert reading.wait(60)
    model.close()
    thread.join()
    assert outcome == ["the model is closed; load it again"]


def test_a_model_thrown_away_takes_its_child_along(tiny_path: Path) -> None:
    model: Model | None = edgellm.load(tiny_path, PARAMS, isolated=True)
    assert model is not None
    pid = pid_of(model)
    del model
    assert eventually(lambda: is_gone(pid))


def test_parameters_are_settled_in_the_child(shared: Model) -> None:
    assert isinstance(shared.params, LoadParams)
    assert shared.settings["n_threads"] == shared.n_threads == 1
