"""llama.cpp's tokenizer on a vocabulary of ours: ids of texts and pieces of ids, in a process of its own.

Native code aborts the process on some mistakes, and a vocabulary needs no weights to be tried.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.tokenizers.vocabulary import Vocabulary, fit, vocabulary_metadata
from converters.writer import Writer

N_FRAMED = 100


@dataclass(frozen=True)
class Seen:
    """Ids of each text, control tokens' text taken as text (`plain`) or as the tokens (`parsed`), of the first texts
    with BOS and EOS (`framed`), and the text that the pieces of `plain` join to."""

    plain: list[list[int]]
    parsed: list[list[int]]
    framed: list[list[int]]
    decoded: list[str]


def write_vocabulary(path: Path, vocabulary: Vocabulary, n_vocab: int | None = None) -> Vocabulary:
    """A GGUF without weights, by the converter's own writer; the vocabulary as it went into the file."""
    fitted = fit(vocabulary, n_vocab or len(vocabulary.tokens))
    with Writer(path, "llama", vocabulary_metadata(fitted), []) as writer:
        writer.finish()
        writer.commit()
    return fitted


def llama_vocab(path: Path, texts: list[str]) -> Seen:
    """What llama.cpp makes of the texts."""
    child = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({"path": str(path), "texts": texts}).encode(),
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:].decode("utf-8", "replace")
    return Seen(**json.loads(child.stdout))


def _main() -> None:
    from llama_cpp import llama_cpp as api

    request = json.load(sys.stdin)
    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    params = api.llama_model_default_params()
    params.vocab_only = True
    model = api.llama_model_load_from_file(request["path"].encode(), params)
    assert model, "llama.cpp can't load the vocabulary"
    vocab = api.llama_model_get_vocab(model)
    texts = request["texts"]
    plain = [_tokenize(api, vocab, text, False, False) for text in texts]
    print(
        json.dumps(
            {
                "plain": plain,
                "parsed": [_tokenize(api, vocab, text, False, True) for text in texts],
                "framed": [_tokenize(api, vocab, text, True, False) for text in texts[:N_FRAMED]],
                "decoded": [_decode(api, vocab, ids) for ids in plain],
            }
        )
    )


def _tokenize(api: Any, vocab: Any, text: str, add_special: bool, parse_special: bool) -> list[int]:
    raw = text.encode()
    ids = (ctypes.c_int32 * (len(raw) + 16))()
    n = api.llama_tokenize(vocab, raw, len(raw), ids, len(ids), add_special, parse_special)
    assert n >= 0
    return list(ids[:n])


def _decode(api: Any, vocab: Any, ids: list[int]) -> str:
    """The pieces joined, bytes that are no UTF-8 replaced, as the runtime's stream does."""
    buffer = ctypes.create_string_buffer(1024)
    joined = b""
    for token in ids:
        n = api.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
        joined += buffer.raw[:n]
    return joined.decode("utf-8", "replace")


if __name__ == "__main__":
    _main()
