"""Documents that drafts are made of: files of every kind, the model's own dialogues, what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgellm
from edgellm.errors import TextError
from edgellm.measure.passages import Passage, held_out, own_dialogues, read_passages


def passage(n: int) -> Passage:
    return Passage([n] * 10, 5)


def test_held_out_documents_are_spread_and_learned_from_no_more() -> None:
    passages = [passage(n) for n in range(40)]
    learned, tried = held_out(passages, 4)
    assert [one.tokens[0] for one in tried] == [5, 15, 25, 35]
    assert len(learned) == 36
    assert not {id(one) for one in learned} & {id(one) for one in tried}
    assert [len(part) for part in held_out(passages[:2], 9)] == [1, 1]
    assert [len(part) for part in held_out(passages[:8], 9)] == [6, 2]
    assert [len(part) for part in held_out(passages[:1], 9)] == [1, 0]


def test_dialogues_begin_where_the_last_answer_does(model_path: Path, tmp_path: Path) -> None:
    turns = [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "What is blue?"),
        ("assistant", "The sky, on most days."),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    lines = [{"messages": messages}, messages, {"prompt": "What is blue?", "completion": "The sky, on most days."}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines, {"text": "One day, a very long time ago, it rained."}])))
    passages = read_passages(path, model_path)
    assert [one.is_text for one in passages] == [False, False, False, True]
    with edgellm.load(model_path, edgellm.LoadParams(n_ctx=256)) as model:
        for one in passages[:3]:
            assert model.detokenize(one.tokens[one.begin :]).strip() == "The sky, on most days."
            assert model.detokenize(one.prompt, special=True).endswith("<|im_start|>assistant\n")
        assert passages[0].tokens == passages[1].tokens
        assert passages[2].prompt == model.chat_tokens(messages[2:3])


def test_a_plain_text_is_cut_at_paragraphs(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("\n\n".join(f"Paragraph {n} tells of a fox and of what it did on that day." for n in range(60)))
    passages = read_passages(path, model_path)
    assert len(passages) > 2
    assert all(one.is_text and 0 < one.begin < len(one.tokens) for one in passages)
    with edgellm.load(model_path, edgellm.LoadParams(n_ctx=64)) as model:
        text = "".join(model.detokenize(one.tokens[model.bos is not None :]) for one in passages)
    assert text.strip() == path.read_text()


def test_a_model_asks_and_answers_itself(model: edgellm.Model) -> None:
    first = list(own_dialogues(model, 150, seed=5))
    again = list(own_dialogues(model, 150, seed=5))
    assert [one.tokens for one in first] == [one.tokens for one in again]
    assert sum(len(one.tokens) for one in first) >= 150
    for one in first:
        prompt = model.detokenize(one.prompt, special=True)
        question = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        assert question.strip()
        assert prompt.endswith("<|im_start|>assistant\n")
        assert len(one.tokens) - one.begin >= 8
    other = list(own_dialogues(model, 1, seed=99))
    assert other[0].tokens != first[0].tokens
    assert list(own_dialogues(model, 100, seconds=0)) == []


def test_a_text_that_is_too_short_is_told(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hi")
    with pytest.raises(TextError, match="no text"):
        read_passages(tmp_path / "a.txt", model_path)
