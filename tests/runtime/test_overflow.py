"""What a conversation leaves out when the context is full: with a scripted model token by token, then on a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgellm
from edgellm import ContextFull, Conversation, GenerationError, Model, SamplingParams
from edgellm.chat.overflow import choose_forgotten, without_forgotten
from edgellm.chat.session import Memory
from edgellm.generation import GenerationResponse, GenerationStats

Messages = Sequence[Mapping[str, Any]]


def message_tokens(message: Mapping[str, Any]) -> list[str]:
    return [f"<{message['role']}>", *message["content"].split(), "<end>"]


class Stream(Iterator[GenerationResponse]):
    def __init__(self, responses: list[GenerationResponse]) -> None:
        self._responses = iter(responses)

    def __next__(self) -> GenerationResponse:
        return next(self._responses)

    def close(self) -> None:
        pass


class ScriptedChat:
    """A word is a token; a message takes two more, and what introduces the answer one. Remembers what it was sent."""

    memory_maker: Mapping[str, Any] = {}

    def __init__(self, n_ctx: int, *answers: str, opening: str = "") -> None:
        self.n_ctx = n_ctx
        self.sent: list[list[Mapping[str, Any]]] = []
        self._answers = iter(answers)
        self._opening = opening
        self._words: list[str] = []

    def chat_tokens(self, messages: Messages, *, answer_follows: bool = True) -> list[int]:
        words = [word for message in messages for word in message_tokens(message)]
        words += [f"<assistant>\n{self._opening}"] if answer_follows else []
        for word in words:
            if word not in self._words:
                self._words.append(word)
        return [self._words.index(word) for word in words]

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        return " ".join(self._words[i] for i in ids)

    def chat(self, messages: Messages, *_: object, **__: object) -> Stream:
        n_tokens = len(self.chat_tokens(messages))
        if n_tokens > self.n_ctx:
            raise ContextFull(f"the prompt has {n_tokens} tokens but the context holds {self.n_ctx}")
        self.sent.append(list(messages))
        *words, last = next(self._answers, "yes").split(" ")
        stats = GenerationStats()
        pieces = [GenerationResponse(word + " ", (1,), (False,), None, stats) for word in words]
        return Stream([*pieces, GenerationResponse(last, (1,), (False,), "stop", stats)])

    def save_memory(self) -> Memory:
        return Memory((), {}, b"")

    def restore_memory(self, memory: Memory) -> bool:
        return True


def say(conversation: Conversation, text: str, params: SamplingParams | None = None) -> str:
    return "".join(response.text for response in conversation.say(text, params))


def test_turns_go_whole_from_the_oldest_on_until_half_is_free() -> None:
    """8 tokens a turn (3 + 4 words, 2 + 1) behind 4 of instructions; 1 more introduces the answer."""
    model = ScriptedChat(64)
    conversation = Conversation(model, "be brief")
    used = []
    for i in range(12):
        say(conversation, f"a b {i}")
        used.append((len(model.chat_tokens(model.sent[-1])), conversation.n_forgotten))
    # 4 + 8 i + 6; at most 64 - 8 = 56, then down to at most 32
    assert used[:6] == [(10, 0), (18, 0), (26, 0), (34, 0), (42, 0), (50, 0)]
    assert used[6:10] == [(26, 8), (34, 8), (42, 8), (50, 8)]
    assert used[10:] == [(26, 16), (34, 16)]
    assert len(conversation.messages) == 25  # the transcript keeps all
    for sent in model.sent:
        assert [m["role"] for m in sent][:2] == ["system", "user"]
        assert sent[0]["content"] == "be brief"
    assert [m["content"] for m in model.sent[6] if m["role"] == "user"] == ["a b 4", "a b 5", "a b 6"]


def test_a_limit_of_tokens_leaves_less_room_free() -> None:
    model = ScriptedChat(64)
    conversation = Conversation(model, "be brief")
    for i in range(7):
        say(conversation, f"a b {i}", SamplingParams(max_tokens=4))
    assert len(model.chat_tokens(model.sent[-1])) == 58
    assert conversation.n_forgotten == 0


def test_a_message_too_long_for_the_context_changes_nothing() -> None:
    model = ScriptedChat(40)
    conversation = Conversation(model, "be brief")
    say(conversation, "hello")
    before = list(conversation.messages)
    with pytest.raises(
        ContextFull, match=r"a prompt of 47 tokens even without all earlier turns.*holds 40; shorten it"
    ):
        conversation.say("word " * 40)
    assert conversation.messages == before
    assert conversation.n_forgotten == 0
    assert say(conversation, "again") == "yes"


def test_a_message_that_only_fits_alone_is_sent_alone() -> None:
    model = ScriptedChat(40)
    conversation = Conversation(model, "be brief")
    say(conversation, "hello")
    say(conversation, "word " * 33)
    assert [m["role"] for m in model.sent[-1]] == ["system", "user"]
    assert len(model.chat_tokens(model.sent[-1])) == 40


def test_what_fits_again_is_sent_again() -> None:
    model = ScriptedChat(64)
    conversation = Conversation(model)
    for i in range(8):
        say(conversation, f"a b {i}")
    assert conversation.n_forgotten > 0
    for _ in range(5):
        conversation.undo()
    say(conversation, "and now")
    assert conversation.n_forgotten == 0
    assert len(model.sent[-1]) == 7


def test_overflow_error_leaves_nothing_out() -> None:
    model = ScriptedChat(30)
    conversation = Conversation(model, overflow="error")
    for i in range(4):
        say(conversation, f"a b {i}")
    with pytest.raises(ContextFull, match="the context holds 30"):
        say(conversation, "one more")
    assert len(model.sent) == 4
    assert conversation.n_forgotten == 0
    with pytest.raises(GenerationError, match='takes "drop" or "error"'):
        Conversation(model, overflow="forget")  # type: ignore[arg-type]


def test_clear_and_another_model_begin_anew() -> None:
    model = ScriptedChat(40)
    conversation = Conversation(model, "be brief")
    for i in range(8):
        say(conversation, f"a b {i}")
    assert conversation.n_forgotten > 0
    conversation.use_model(ScriptedChat(1000))
    assert conversation.n_forgotten == 0
    say(conversation, "hello")
    assert conversation.n_forgotten == 0
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]


def test_a_saved_conversation_remembers_what_was_left_out(tmp_path: Path) -> None:
    model = ScriptedChat(40)
    conversation = Conversation(model)
    for i in range(8):
        say(conversation, f"a b {i}")
    conversation.save(tmp_path / "talk")
    loaded = Conversation.load(model, tmp_path / "talk")
    assert loaded.n_forgotten == conversation.n_forgotten > 0
    assert loaded.messages == conversation.messages
    assert loaded.usage() == conversation.usage()


def test_usage_adds_up() -> None:
    model = ScriptedChat(64)
    conversation = Conversation(model, "be brief")
    usage = conversation.usage()
    assert (usage.instructions, usage.turns, usage.free) == (5, 0, 59)  # with <user>, which precedes any text
    say(conversation, "hello")
    usage = conversation.usage()
    assert usage.instructions + usage.turns == 4 + 3 + 3
    for i in range(8):
        say(conversation, f"a b {i}")
    usage = conversation.usage()
    assert usage.n_forgotten == conversation.n_forgotten > 0
    assert usage.instructions + usage.turns == len(model.chat_tokens(model.sent[-1])) - 1 + 3
    assert usage.free == 64 - usage.instructions - usage.turns


def test_the_prompt_is_what_would_be_sent() -> None:
    model = ScriptedChat(64)
    conversation = Conversation(model, "be brief")
    assert conversation.prompt("hello") == "<system> be brief <end> <user> hello <end> <assistant>\n"
    say(conversation, "hello")
    assert conversation.prompt() == "<system> be brief <end> <user> hello <end> <assistant> yes <end>"
    with pytest.raises(GenerationError, match="no prompt yet"):
        Conversation(model).prompt()


def test_thinking_the_template_opens_is_part_of_the_answer() -> None:
    model = ScriptedChat(64, "let me see</think> It is 4", opening="<think>\n")
    conversation = Conversation(model)
    assert say(conversation, "2 + 2") == "<think>\nlet me see</think> It is 4"
    assert conversation.messages[-1]["content"] == "<think>\nlet me see</think> It is 4"
    assert conversation.last_answer == "It is 4"


ROLES = st.lists(st.sampled_from(["user", "user", "assistant", "tool"]), max_size=12)


@given(
    ROLES, st.lists(st.integers(0, 30), min_size=13, max_size=13), st.integers(8, 80), st.integers(0, 13), st.booleans()
)
def test_whatever_was_said_the_last_turn_is_sent_and_fits(
    roles: list[str], sizes: list[int], n_ctx: int, n_forgotten: int, has_system: bool
) -> None:
    messages = [{"role": "system", "content": "s"}] * has_system
    messages += [{"role": r, "content": "w " * n} for r, n in zip([*roles, "user"], sizes, strict=False)]

    def count(sent: Messages) -> int:
        return sum(len(message_tokens(message)) for message in sent) + 1

    try:
        chosen = choose_forgotten(messages, n_forgotten, n_ctx, None, count)
    except ContextFull:
        assert count([*messages[:has_system], messages[-1]]) > n_ctx
        return
    sent = without_forgotten(messages, chosen)
    assert count(sent) <= n_ctx
    assert sent[-1] is messages[-1]
    assert sent[:has_system] == messages[:has_system]
    assert chosen == 0 or sent[has_system]["role"] == "user"


# --- on a real model: what a turn evaluates is what its memory lacks ---

SHORT = SamplingParams(max_tokens=6)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.fixture
def turn(tiny_chat: Model) -> Callable[[Conversation, str], tuple[list[int], int]]:
    """Says something; gives the prompt's tokens and how many of them were evaluated."""

    def take(conversation: Conversation, text: str) -> tuple[list[int], int]:
        last = list(conversation.say(text, SHORT))[-1]
        prompt = tiny_chat.chat_tokens(without_forgotten(conversation.messages[:-1], conversation.n_forgotten))
        assert last.stats.prompt_tokens == len(prompt)
        return prompt, last.stats.evaluated_prompt_tokens

    return take


Turn = Callable[[Conversation, str], tuple[list[int], int]]


def test_after_undo_only_the_other_message_is_evaluated(tiny_chat: Model, turn: Turn) -> None:
    conversation = Conversation(tiny_chat, "You are a brief and friendly helper.")
    turn(conversation, "Tell me about the sea.")
    before, _ = turn(conversation, "And what about the mountains?")
    conversation.undo()
    after, evaluated = turn(conversation, "Is there a lighthouse?")
    assert evaluated == len(after) - common(before, after)
    introduction = tiny_chat.tokenize("<|im_end|>\n<|im_start|>assistant\n", special=True)
    assert evaluated == len(tiny_chat.tokenize("Is there a lighthouse?") + introduction)


def test_after_another_system_message_all_behind_it_is_evaluated(tiny_chat: Model, turn: Turn) -> None:
    conversation = Conversation(tiny_chat, "You are a brief and friendly helper.")
    before, _ = turn(conversation, "Tell me about the sea.")
    conversation.set_system("You are a brief and rather gloomy helper.")
    after, evaluated = turn(conversation, "And then?")
    assert evaluated == len(after) - common(before, after)
    assert common(before, after) == len(tiny_chat.tokenize("<|im_start|>system\nYou are a brief and", special=True))


def test_a_resumed_session_evaluates_only_the_new_turn(tiny_chat: Model, tiny_chat_path: Path, tmp_path: Path) -> None:
    conversation = Conversation(tiny_chat, "You are a brief and friendly helper.")
    for text in ("Tell me about the sea.", "And the lighthouse on the cape?"):
        list(conversation.say(text, SHORT))
    conversation.save(tmp_path / "talk")
    held = list(tiny_chat._context.tokens)
    with edgellm.load(tiny_chat_path, edgellm.LoadParams(n_ctx=512, n_threads=1)) as fresh:
        resumed = Conversation.load(fresh, tmp_path / "talk")
        assert resumed.notice == ""
        prompt = fresh.chat_tokens([*resumed.messages, {"role": "user", "content": "And then?"}])
        last = list(resumed.say("And then?", SHORT))[-1]
    assert last.stats.evaluated_prompt_tokens == len(prompt) - common(held, prompt)
    assert common(held, prompt) >= len(tiny_chat.chat_tokens(conversation.messages[:-1]))


def test_dropping_turns_evaluates_once_and_then_only_what_is_new(tiny_chat: Model, turn: Turn) -> None:
    conversation = Conversation(tiny_chat, "You are a brief and friendly helper.")
    n_dropped = n_before = 0
    for i in range(24):
        forgotten = conversation.n_forgotten
        held = list(tiny_chat._context.tokens)
        prompt, evaluated = turn(
            conversation, f"Tell me story number {i}, about the sea and the lighthouse on the cape."
        )
        assert evaluated == len(prompt) - common(held, prompt)
        if conversation.n_forgotten > forgotten:
            n_dropped += 1
            assert len(prompt) <= tiny_chat.n_ctx // 2
        else:  # the answer's tokens may read differently as text; all before it is held
            assert evaluated <= len(prompt) - n_before
        n_before = len(prompt)
    assert n_dropped >= 2
