"""Small tokenizers of every kind, trained by the reference libraries on the corpus, in checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from converters.tokenizers.corpus import sample_texts
from converters.tokenizers.pretokenizer import PreTokenizer
from converters.tokenizers.sentencepiece_proto import parse_sentencepiece


def save(folder: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    """tokenizer.json and tokenizer_config.json as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def byte_level(folder: Path, pre: PreTokenizer) -> None:
    """A byte-level BPE with the pre-tokenizer of a table entry."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=bool(pre.ignore_merges)))
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(pre.steps)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>", "</s>", "<|sep|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts() * 2, trainer)
    tokenizer.add_tokens(["<tool>"])
    save(folder, tokenizer, eos_token="</s>", **({} if pre.bos is False else {"bos_token": "<s>"}))


def wordpiece(folder: Path, **normalizer: Any) -> None:
    """BERT's pipeline."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sample_texts() * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True)
    save(folder, tokenizer, **{f"{name}_token": text for name, text in names})


def sentencepiece_model(folder: Path, kind: str, **options: Any) -> None:
    """tokenizer.model by SentencePiece's own trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for text in sample_texts() for line in text.splitlines() if line.strip()]
    with (folder / "tokenizer.model").open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 2),
            model_writer=out,
            model_type=kind,
            vocab_size=1500,
            hard_vocab_limit=False,
            minloglevel=2,
            **(
                {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
                | options
            ),
        )


def unigram(folder: Path, **options: Any) -> None:
    """XLM-RoBERTa's pipeline around a Unigram model of SentencePiece's, with its normalization."""
    sentencepiece_model(
        folder,
        "unigram",
        byte_fallback=False,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
        **options,
    )
    model = parse_sentencepiece((folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer.model").unlink()
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(text, score) for text, score, _ in model.pieces[3:]]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(model.charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"), ("pad", "<pad>"), ("cls", "<s>"), ("sep", "</s>")
    save(folder, tokenizer, **{f"{name}_token": text for name, text in names}, mask_token="<mask>")
