"""A draft from text: what followed the longest end of the history anywhere in a collection of token sequences.

Retrieval drafting as in He et al. 2023 ("REST: Retrieval-Based Speculative Decoding"), for what a fine-tune was trained
on, or what it has written before. The file is a suffix array of the *reversed* tokens: its neighbours share what stands
before a place, so one binary search finds the places where the longest end of the history stood. It is mapped, not
loaded, and never unpickled.

The file, little-endian where nothing else is said: the header of `_HEADER` (magic, version, vocabulary size, SHA-256 of
the vocabulary, SHA-256 of all that follows the header, numbers of words, places and documents), then the words and the
places. Words: uint32 *big-endian*, whose bytes compare as the numbers do: all documents' tokens in reverse, END before,
between and after them. Places: uint32 indices into the words, sorted by the _LONGEST words from there on; the word
before each is the token that followed.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.errors import DraftMismatch, ModelFileError, OutputError
from edgellm.speculation.drafts import NOTHING, GoesOn, Proposal, after_match, always
from edgellm.whole_file import whole_file

if TYPE_CHECKING:
    import numpy as np

    from edgellm.gguf_header import GGUFHeader

    Words = np.ndarray[Any, np.dtype[np.int64]]

MAGIC = b"EDGELLMX"
END = 0xFFFFFFFF  # no token
_VERSION = 1
_HEADER = struct.Struct("<8sII32s32sQQQ")
_LONGEST = 32  # tokens that a match is followed back, a power of two
_NEEDLE = 2  # that must match before anything is guessed
_AROUND = 8  # places looked at to either side of where the history would stand
_AHEAD = 4  # tokens by which continuations are told apart
_WORD = 4


def vocabulary_hash(header: GGUFHeader) -> bytes:
    """SHA-256 over a GGUF's tokens: two files have the same where a token means the same text to both."""
    tokens: list[str] = header.metadata.get("tokenizer.ggml.tokens", [])
    return hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogateescape")).digest()


def is_index(path: Path) -> bool:
    """Whether a file begins as an index does, whatever its name is."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def write_index(out: Path, documents: Iterable[Sequence[int]], vocabulary: GGUFHeader) -> tuple[int, int]:
    """Index token sequences of the model with this header; returns the numbers of documents and of tokens.

    Needs some 40 bytes of memory a token; `out` appears when it is whole. OutputError where it can't be written,
    ValueError for tokens that aren't the vocabulary's.
    """
    import numpy as np

    kept = [np.asarray(document, np.int64) for document in documents if len(document)]
    n_vocab = len(vocabulary.metadata.get("tokenizer.ggml.tokens", []))
    if any(document.min() < 0 or document.max() >= n_vocab for document in kept):
        raise ValueError(f"token ids must be from 0 to {n_vocab - 1}")
    end = np.array([END], np.int64)
    words = np.concatenate([end, *(part for document in kept for part in (document[::-1], end))])
    n_tokens = len(words) - len(kept) - 1
    places = _sorted_places(words)
    payload = words.astype(">u4").tobytes() + places.astype("<u4").tobytes()
    head = _HEADER.pack(
        MAGIC,
        _VERSION,
        n_vocab,
        vocabulary_hash(vocabulary),
        hashlib.sha256(payload).digest(),
        len(words),
        len(places),
        len(kept),
    )
    try:
        with whole_file(out) as file:
            file.write(head)
            file.write(payload)
    except OSError as exc:
        raise OutputError(f"cannot write {out}: {exc.strerror or exc}; make room or choose another folder") from exc
    return len(kept), n_tokens


def _sorted_places(words: Words) -> Words:
    """The places that something follows, sorted by their next _LONGEST words: prefix doubling, Manber & Myers 1990."""
    import numpy as np

    rank = np.unique(words, return_inverse=True)[1].astype(np.int64) + 1
    order = np.arange(len(words))
    length = 1
    while length < _LONGEST:
        then = np.zeros_like(rank)  # beyond the end: less than any word
        then[:-length] = rank[length:]
        key = rank * (len(words) + 2) + then
        order = np.argsort(key, kind="stable")
        in_order = key[order]
        rank[order] = np.cumsum(np.concatenate([[1], in_order[1:] != in_order[:-1]]))
        length *= 2
        if rank[order[-1]] == len(words):
            break
    has_both = np.zeros(len(words), np.bool_)
    has_both[1:] = (words[1:] != END) & (words[:-1] != END)
    sorted_places: Words = order[has_both[order]]
    return sorted_places


class IndexDraft:
    """Guesses the commonest continuation of the longest end of the history that the index knows. For many generations.

    Closing it is the owner's. ModelFileError: damaged, cut off, no index; DraftMismatch: made with another vocabulary.
    """

    is_free = True

    def __init__(self, path: Path, vocabulary: GGUFHeader) -> None:
        self.name = path.name
        self._file = _mapped(path)
        try:
            self._read_header(path, vocabulary)
        except BaseException:
            self._file.close()
            raise

    def _read_header(self, path: Path, vocabulary: GGUFHeader) -> None:
        data = self._file
        if len(data) < _HEADER.size or data[: len(MAGIC)] != MAGIC:
            raise ModelFileError(f"{path} is no draft index; make one with `edgellm draft MODEL --from-text`")
        _, version, self._n_vocab, hashed, digest, n_words, n_places, self.n_documents = _HEADER.unpack_from(data)
        if version != _VERSION or sys.byteorder != "little":
            raise ModelFileError(f"{path} has version {version} of the index format; make it again")
        if len(data) != _HEADER.size + _WORD * (n_words + n_places):
            raise ModelFileError(f"{path} is cut off, or has more than it should; make the index again")
        if hashed != vocabulary_hash(vocabulary):
            raise DraftMismatch(f"{path.name} was made with another vocabulary than the model's; make it again for it")
        with memoryview(data) as view, view[_HEADER.size :] as payload:
            if hashlib.sha256(payload).digest() != digest:
                raise ModelFileError(f"{path} is damaged (its checksum is another); make the index again")
        self._n_words, self._n_places = n_words, n_places
        self.n_tokens = n_words - self.n_documents - 1
        self._places_at = _HEADER.size + _WORD * n_words
        self._place = struct.Struct("<I").unpack_from

    def close(self) -> None:
        """Unmap the file; nothing is guessed from then on. Twice is fine."""
        self._file.close()

    def propose(self, history: Sequence[int], k: int, _: GoesOn = always) -> Proposal:
        try:
            return self._propose(history, k)
        except ValueError:  # closed by another thread
            return NOTHING

    def _propose(self, history: Sequence[int], k: int) -> Proposal:
        wanted = history[: -_LONGEST - 1 : -1]
        if len(wanted) < _NEEDLE or k <= 0 or not self._n_places:
            return NOTHING
        needle = struct.pack(f">{len(wanted)}I", *wanted)
        at = self._bisect(needle)
        near = [(i, self._words_at(i)) for i in (at - 1, at) if 0 <= i < self._n_places]
        length = max(_match_length(needle, words) for _, words in near)
        if length < _NEEDLE:
            return NOTHING
        after = self._continuations(at, needle[: _WORD * length])
        followed = [words[-_WORD:] for words in after]
        firsts = Counter(followed)
        ahead = Counter(words[-_WORD * _AHEAD :] for words in after)
        best = max(after, key=lambda words: (firsts[words[-_WORD:]], ahead[words[-_WORD * _AHEAD :]]))
        return after_match("index", self._tokens(best, k), length, followed)

    def _bisect(self, needle: bytes) -> int:
        """Where in the places the needle would stand."""
        low, high = 0, self._n_places
        data, place, places_at = self._file, self._place, self._places_at
        size = len(needle)
        while low < high:
            middle = (low + high) // 2
            at = _HEADER.size + _WORD * place(data, places_at + _WORD * middle)[0]
            if data[at : at + size] < needle:
                low = middle + 1
            else:
                high = middle
        return low

    def _words_at(self, i: int) -> bytes:
        at = _HEADER.size + _WORD * self._place(self._file, self._places_at + _WORD * i)[0]
        return self._file[at : at + _WORD * _LONGEST]

    def _continuations(self, at: int, needle: bytes) -> list[bytes]:
        """The words before each place near `at` that begins with the needle: what followed, the first token last."""
        data, place, found = self._file, self._place, list[bytes]()
        for there in (range(at - 1, max(-1, at - 1 - _AROUND), -1), range(at, min(self._n_places, at + _AROUND))):
            for i in there:
                start = _HEADER.size + _WORD * place(data, self._places_at + _WORD * i)[0]
                if data[start : start + len(needle)] != needle:
                    break
                found.append(data[max(_HEADER.size, start - _WORD * _LONGEST) : start])
        return found

    def _tokens(self, words: bytes, k: int) -> Sequence[int]:
        """At most k tokens, up to the end of the document."""
        tokens = struct.unpack(f">{len(words) // _WORD}I", words)[: -k - 1 : -1]
        n = next((i for i, token in enumerate(tokens) if token >= self._n_vocab), len(tokens))
        return tokens[:n]


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as exc:  # an empty file can't be mapped
        raise ModelFileError(f"cannot read {path}: {getattr(exc, 'strerror', None) or exc}; check the path") from exc


def _match_length(a: bytes, b: bytes) -> int:
    """How many words two byte strings have in common at their beginning."""
    n = min(len(a), len(b))
    differing = int.from_bytes(a[:n]) ^ int.from_bytes(b[:n])
    return (8 * n - differing.bit_length()) // (8 * _WORD)
