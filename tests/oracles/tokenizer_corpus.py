"""Texts on which tokenizers are compared: more than 3,000 made from lists, and 2,000 random ones.

Every group aims at a place where pre-tokenizers, normalizers or byte fallback differ.
"""

# ruff: noqa: SIM905 - lists of short texts read better as words in a string
from __future__ import annotations

import itertools
import random
import unicodedata

from converters.tokenizers.corpus import sample_texts

SCRIPTS = {
    "latin": "The quick brown Fox jumps over Łódź naïve ÅNGSTRÖM straße ĳsvogel ǅungla Ŀ",
    "cyrillic": "Съешь ещё этих МЯГКИХ французских булок їжак Њива",
    "greek": "Ξεσκεπάζω την ΨΥΧΟΦΘΌΡΑ βδελυγμία ς Ὀδυσσεύς",
    "hebrew": "דג סקרן שט בים שָׁלוֹם עֲלֵיכֶם",
    "arabic": "نص حكيم له سر قاطع السَّلامُ عَلَيْكُم ٱلرَّحْمَٰن",
    "devanagari": "ऋषियों को सताने वाले दुष्ट क्षत्रिय हिंदी १२३",
    "bengali": "আমি বাংলায় গান গাই ক্ষুদ্র ৪৫৬",
    "tamil": "தமிழ் மொழி யாமறிந்த க்ஷ ௧௨௩",
    "telugu": "తెలుగు భాష క్షేమం",
    "thai": "เป็นมนุษย์สุดประเสริฐ เลิศคุณค่า ๑๒๓",
    "lao": "ພາສາລາວ ສະບາຍດີ",
    "khmer": "ភាសាខ្មែរ សួស្តី",
    "burmese": "မြန်မာဘာသာ မင်္ဂလာပါ",
    "tibetan": "བོད་སྐད་ བཀྲ་ཤིས་བདེ་ལེགས།",
    "georgian": "ქართული ენა ᲥᲐᲠᲗᲣᲚᲘ",
    "armenian": "Հայերեն լեզու ԲԱՐԵՎ",
    "amharic": "ሰማይ አይታረስ ንጉሥ አይከሰስ ፩፪፫",
    "chinese": "天地玄黃宇宙洪荒日月盈昃辰宿列張简体字测试，你好。",
    "japanese": "いろはにほへと チリヌルヲ 漢字かな交じり文 ｶﾀｶﾅ々〆〇",
    "korean": "다람쥐 헌 쳇바퀴에 타고파 각설이 ㄱㄴㄷ 한",
    "vietnamese": "Đường đến trường Nguyễn ĐÀ NẴNG Ẵ ữ",
    "turkish": "Pijamalı hasta yağız şoföre İSTANBUL ISPARTA",
    "cherokee": "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ꮳꮃꭹ",
    "gothic": "𐌼𐌰𐌲 𐌲𐌻𐌴𐍃 𐌹̈𐍄𐌰𐌽",
    "math": "𝐇𝐞𝐥𝐥𝐨 𝒲ℴ𝓇𝓁𝒹 𝔄𝔟𝔠 ℵ ℝ ∀x∈ℕ: ¬∃y ⊂ ∅ → ∞",
    "deseret": "𐐔𐐯𐑅𐐨𐑉𐐯𐐻 𐐀𐐁𐐂",
}
CONTRACTIONS = ("'s 't 're 've 'm 'll 'd 'S 'T 'RE 'VE 'M 'LL 'D 'Re 'lL 'ſ ’s 'x ''s 'sre").split()
SPACES = (
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    " \n",
    "\n ",
    "\t\n",
    "\n\n",
    "\n\n\n",
    " \r\n ",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\u2028",
    "\u0085",
    "\x0b",
    "\x0c",
    "\x1c",
    "\u1680",
    "\u202f",
    "\u205f",
)
PUNCTUATION = (
    ". .. ... ! ?! , ; : - -- — / // \\ | || & && * ** # ## @ $ % ^ ~ ` ``` ' \" ( ) [] {} <> «» "
    "„“ ‘’ 。 、 ！ ？ 「」 … · • § ¶ † £ € ¥ ₿ + = == != <= -> => _ __ ￥ ～ 〜 ؟ ، ।"
).split()
EMOJI = (
    "😀 👍🏽 👩\u200d👩\u200d👧\u200d👦 🇩🇪 🇩🇪🇫🇷🇯🇵 ❤\ufe0f ❤ "
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f 1\ufe0f\u20e3 👨🏿\u200d🚀 "
    "☺\ufe0f 🫠 🪿 ⌚ 🕵\ufe0f\u200d♀\ufe0f ™\ufe0f 🀄 🧿 🫨"
).split()
MARKS = (
    "e\u0301 n\u0303 o\u0308 a\u0328\u0301 A\u030a u\u0308\u0304 q\u0307\u0323 \u0301 x\u20dd "
    "가\u0301 한 क\u094dष ก\u0e49 ل\u0651\u064e Z\u0351\u036b\u0343 e\u0301E\u0301 ﬁ Å Ω ① ² ½ "
    "Ⅷ ㅎㅏㄴ ｶﾞ ẛ\u0323 İ ı ß ẞ"
).split()
CODE = (
    "def f(x, *, y=1):\n    return x**2 + y\n",
    "\tif (a && !b) {\n\t\treturn c[i]->d;\n\t}\n",
    "for(int i=0;i<10;++i){printf(\"%d\\n\",i);}",
    "SELECT a.id, COUNT(*) FROM t a WHERE a.x >= 1.5e-3 GROUP BY 1;",
    "<div class='x y' data-id=\"42\">Hello&nbsp;World</div>",
    "import numpy as np\nx: np.ndarray = np.zeros((3, 4), dtype=np.float32)",
    "git commit -m 'fix: off-by-one' && git push --force-with-lease",
    "const f = async ({a, b}) => `${a}:${b ?? 'none'}`;",
    "\\begin{align*}\n  \\frac{1}{2} &= \\sum_{i=0}^{\\infty} x_i^2\n\\end{align*}",
    "0x1F 0b1010 0o17 1_000_000 3.14e+10 .5 5. 1e9f NaN",
    "fn main() -> Result<(), Box<dyn Error>> { let mut v: Vec<u8> = vec![0u8; 16]; Ok(()) }",
    "https://user:pass@example.com:8080/a/b.html?x=1&y=%20#top",
    "C:\\Users\\name\\file.txt /usr/local/bin/python3.12",
    "{\"a\": [1, 2, {\"b\": null}], \"c\": \"\\u00e9\\n\"}",
    "camelCase PascalCase snake_case SCREAMING_SNAKE kebab-case HTTPServer2 XMLHttpRequest iOS17 x86_64",
    "| a | b |\n|---|:-:|\n| 1 | **2** |\n\n- [ ] todo\n1. one\n> quote",
    "#!/bin/sh\nset -eu\necho \"$HOME\" | sed 's/\\//_/g'",
    "                    deep\n                        deeper\n\t\t\t\t\ttabs",
)  # fmt: skip
CONTROL = (
    "<s> </s> <unk> <pad> <bos> <eos> <mask> [CLS] [SEP] [MASK] [UNK] [PAD] <|im_start|> <|im_end|> "
    "<|endoftext|> <|begin_of_text|> <|eot_id|> <|start_header_id|>user<|end_header_id|> "
    "<start_of_turn> <end_of_turn> <|end|> <|user|> [INST] [/INST] <0x0A> <0xFF> <｜User｜> "
    "<|fim_prefix|> <think> </think> <tool_call> <unused1> <2mass> [multimodal] <table> ▁ ▁▁ "
    "##ing Ġ Ċ [PAD0] <|reserved_special_token_0|> <| |> <|im_ <s s>"
).split()
# characters at the ends of UTF-8's one to four byte ranges, and those that stand for broken bytes
BOUNDARIES = tuple(
    chr(code)
    for code in (
        0x01, 0x7E, 0x7F, 0x80, 0x9F, 0xA0, 0xAD, 0x7FF, 0x800, 0xFFF, 0x1000, 0xCFFF, 0xD000, 0xD7FF, 0xE000, 0xF8FF,
        0xFDD0, 0xFEFF, 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF, 0x10000, 0x1FFFF, 0x2FFFF, 0x3FFFF, 0x40000, 0xE0001, 0xF0000,
        0xFFFFF, 0x100000, 0x10FFFD, 0x10FFFF,
    )
)  # fmt: skip


def listed_texts() -> list[str]:
    """Texts made from the lists: each group alone, within words, and crossed with another group."""
    out = list(sample_texts())
    for text in SCRIPTS.values():
        words = text.split()
        out += [text, text.upper(), text.lower(), text.title(), text[::-1], *words, "".join(words), "\n".join(words)]
        out += [f" {text}  ", f"{text}123{text}", f"({text})", unicodedata.normalize("NFD", text)]
    out += [f"{a} {b}" for a, b in itertools.permutations((text.split()[0] for text in SCRIPTS.values()), 2)]
    digits = (
        "1",
        "12",
        "123",
        "1234",
        "12345",
        "123456",
        "1234567",
        "0012",
        "9" * 30,
        "٣٤٥٦",
        "१२३४",
        "１２３４",
        "①②③④",
        "Ⅷ½²",
    )
    out += [
        frame.replace("{}", d)
        for d in digits
        for frame in ("{}", " {}", "a{}", "{}a", "{}.{}", "{},{}", "-{}", "{}%", "x{} y", "${}")
    ]
    out += [
        f"{word}{c}{after}" for word in ("I", "we", "WE", "né", "1") for c in CONTRACTIONS for after in ("", " x", "y")
    ]
    out += [
        f"{a}{space}{b}"
        for space in SPACES
        for a, b in (("a", "b"), ("", "b"), ("a", ""), (".", "1"), ("中", "文"), ("!", "!"))
    ]
    out += [f"x{a}{b}y" for a, b in itertools.product(SPACES[:16], repeat=2)]
    out += [
        f"{char * n}{end}"
        for char in " \n\t-=_.a1*#"
        for n in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
        for end in ("", "x")
    ]
    out += [
        frame.replace("{}", p)
        for p in PUNCTUATION
        for frame in ("{}", " {}", "a{}", "{}a", "a {} b", "{}\n", "1{}2", "{}{}{} {}")
    ]
    out += [f"{a}{b}" for a, b in zip(PUNCTUATION, PUNCTUATION[7:] + PUNCTUATION[:7], strict=True)]
    out += [
        frame.replace("{}", e)
        for e in (*EMOJI, *MARKS)
        for frame in ("{}", " {}", "a{}b", "A{}B", "{}{}", "x {}! 1", "é{}")
    ]
    out += [
        text
        for code in CODE
        for text in (code, code.strip(), code.replace(" ", "  "), code.upper(), *code.splitlines())
    ]
    out += [frame.replace("{}", c) for c in CONTROL for frame in ("{}", " {} ", "a{}b", "{}\n{}", "say {} now")]
    out += [frame.replace("{}", b) for b in BOUNDARIES for frame in ("{}", "a{}b", " {} ", "{}{}", "é{}中")]
    return list(dict.fromkeys(out))


def random_texts(n: int = 2000, seed: int = 20261122) -> list[str]:
    """`n` strings of 1 to 40 characters: half from all of Unicode, half mixing a few blocks with ASCII and spaces."""
    rng = random.Random(seed)
    blocks = (
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x300, 0x370),
        (0x370, 0x530),
        (0x590, 0x780),
        (0x900, 0xE00),
        (0xE00, 0x1100),
        (0x1E00, 0x2070),
        (0x2070, 0x2800),
        (0x3000, 0x3100),
        (0x4E00, 0xA000),
        (0xAC00, 0xD7A4),
        (0xFB00, 0xFE00),
        (0xFF00, 0x10000),
        (0x10300, 0x10400),
        (0x1D400, 0x1D800),
        (0x1F300, 0x1FB00),
    )
    texts = []
    for i in range(n):
        length = rng.randint(1, 40)
        if i % 2:
            codes = [rng.randint(1, 0x10FFFF) for _ in range(length)]
        else:
            chosen = [(0x20, 0x7F), (0x20, 0x21), *rng.sample(blocks, 3)]
            codes = [rng.randrange(*rng.choice(chosen)) for _ in range(length)]
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000) or "?")
    return texts


def corpus() -> list[str]:
    """All texts that no text repeats; none holds NUL, which C strings end at."""
    return list(dict.fromkeys(text for text in (*listed_texts(), *random_texts()) if "\0" not in text))
