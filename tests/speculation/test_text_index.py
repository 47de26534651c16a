"""The index against a search by brute force; files that are damaged or another model's; never across documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgellm.errors import DraftMismatch, ModelFileError, OutputError
from edgellm.gguf_header import GGUFHeader
from edgellm.speculation.drafts import NOTHING, after_match
from edgellm.speculation.text_index import IndexDraft, is_index, write_index

N_VOCAB = 50
LONGEST = 32


def vocabulary(n: int = N_VOCAB, name: str = "token") -> GGUFHeader:
    tokens = {"tokenizer.ggml.tokens": [f"{name} {i}" for i in range(n)]}
    return GGUFHeader(Path("model.gguf"), 3, tokens, {}, 0, {}, {}, 0, 0, 32)


def made(folder: Path, documents: Sequence[Sequence[int]]) -> IndexDraft:
    out = folder / "draft.ngram"
    write_index(out, documents, vocabulary())
    return IndexDraft(out, vocabulary())


def matches(documents: Sequence[Sequence[int]], history: Sequence[int]) -> tuple[int, list[list[int]]]:
    """The longest end of the history that stands before a token of a document, and all that follows there."""
    found: dict[int, list[list[int]]] = {}
    for document in documents:
        for place in range(1, len(document)):
            n = 0
            while n < min(place, len(history), LONGEST) and document[place - 1 - n] == history[-1 - n]:
                n += 1
            found.setdefault(n, []).append(list(document[place:]))
    longest = max(found, default=0)
    return longest, found.get(longest, [])


texts = st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=texts, history=st.lists(st.integers(0, 3), max_size=45), k=st.integers(1, 24))
def test_proposes_what_brute_force_finds(
    tmp_path: Path, documents: list[list[int]], history: list[int], k: int
) -> None:
    draft = made(tmp_path, documents)
    proposal = draft.propose(history, k)
    length, after = matches(documents, history)
    draft.close()
    if length < 2:
        assert proposal == NOTHING
        return
    assert list(proposal.tokens) in [tokens[:k] for tokens in after]
    if len(after) <= 8:  # it looks at all of them then
        assert proposal == after_match("index", proposal.tokens, length, [tokens[0] for tokens in after])
        firsts = Counter(tokens[0] for tokens in after)
        assert firsts[proposal.tokens[0]] == max(firsts.values())


def test_long_matches_are_told_by_32_tokens(tmp_path: Path) -> None:
    document = list(range(N_VOCAB))
    draft = made(tmp_path, [document, [7, 8, 1, 2]])
    assert list(draft.propose(document[:40], 5).tokens) == [40, 41, 42, 43, 44]
    assert draft.propose(document[:40], 5).source == "index 4 once"
    assert draft.propose([9, 7, 8], 5).source == "index 0 disputed"
    draft.close()


def test_never_guesses_beyond_a_documents_end(tmp_path: Path) -> None:
    draft = made(tmp_path, [[1, 2, 3], [4, 5, 6, 7]])
    assert list(draft.propose([1, 2], 10).tokens) == [3]
    assert draft.propose([2, 3], 10) == NOTHING  # nothing follows, though another document stands there
    assert draft.propose([3, 4], 10) == NOTHING  # nowhere in one document
    assert list(draft.propose([9, 4, 5], 10).tokens) == [6, 7]
    assert (draft.n_documents, draft.n_tokens) == (2, 7)
    draft.close()


def test_the_commonest_continuation_wins(tmp_path: Path) -> None:
    draft = made(tmp_path, [[1, 2, 3, 9], [1, 2, 4, 5], [0, 1, 2, 4, 6], [1, 2, 3, 8], [1, 2, 4, 5]])
    assert list(draft.propose([7, 1, 2], 2).tokens) == [4, 5]
    draft.close()


def test_an_empty_index_knows_nothing(tmp_path: Path) -> None:
    draft = made(tmp_path, [[], [3]])
    assert draft.propose([1, 2, 3], 4) == NOTHING
    assert draft.propose([], 4) == NOTHING
    draft.close()


def test_closing_ends_guessing_and_may_be_repeated(tmp_path: Path) -> None:
    draft = made(tmp_path, [[1, 2, 3]])
    draft.close()
    draft.close()
    assert draft.propose([1, 2], 3) == NOTHING


def test_a_file_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    made(tmp_path, [[1, 2, 3]]).close()
    for other in (vocabulary(N_VOCAB - 1), vocabulary(name="word")):
        with pytest.raises(DraftMismatch, match="another vocabulary"):
            IndexDraft(tmp_path / "draft.ngram", other)


def test_every_cut_and_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    made(tmp_path, [[1, 2, 3, 4, 5], [6, 7, 8]]).close()
    whole = (tmp_path / "draft.ngram").read_bytes()
    bad = tmp_path / "bad.ngram"
    cut = [whole[:n] for n in range(len(whole))] + [whole + b"\0"]
    flipped = [whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :] for i in range(len(whole))]
    for data in cut + flipped:
        bad.write_bytes(data)
        try:
            draft = IndexDraft(bad, vocabulary())
        except (ModelFileError, DraftMismatch):
            continue
        guessed = draft.propose([1, 2, 3], 5).tokens  # a count in the header that nothing depends on
        draft.close()
        assert all(0 <= token < N_VOCAB for token in guessed)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises(ModelFileError):
            IndexDraft(tmp_path / name, vocabulary())
        assert not is_index(tmp_path / name)


def test_writing_refuses_foreign_tokens_and_full_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token ids"):
        write_index(tmp_path / "a", [[1, N_VOCAB]], vocabulary())
    with pytest.raises(OutputError):
        write_index(tmp_path / "no" / "a", [[1, 2]], vocabulary())
    assert list(tmp_path.iterdir()) == []
