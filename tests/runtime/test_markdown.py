"""Markdown drawn while it streams: in the end the terminal shows what rich draws of the whole text at once."""

from __future__ import annotations

import io
import os
import random
import sys
from pathlib import Path

import pexpect
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console, ConsoleDimensions

from edgellm.cli import chat_markdown
from edgellm.cli.chat_markdown import AnswerMarkdown, MarkdownStream
from tests.runtime.screen import Terminal

TEXT = """# Llamas and alpacas

Llamas are *domesticated* **South American** camelids, `Lama glama`, see [here](http://example.org/llama "a page").
Roses are red
Violets are blue

## What they eat

- grass, which is the larger part of what they eat all day long on the high plains
- hay
  - of lucerne
  - of ~~straw~~ oats

    with a second paragraph
- leaves

1. first
2. second, and it is long enough to be wrapped on any terminal that is narrower than this line
10. tenth

| animal | weight in kg | wool |
|:-------|-------------:|:----:|
| llama | 150 | coarse |
| alpaca | 60 | fine, and much wanted |

---

Setext heading
--------------

> a quotation
that goes on lazily
> > and another inside

```python
def weight(animal: str) -> float:
    return {"llama": 150.0}[animal]  # kg, and a comment that is much too long for a narrow terminal

print(weight("llama"))
```

    indented code

* another list
* of stars
+ and one of plus signs

<div class="x">HTML stays text</div> and a&nbsp;b &amp; c

A line with 🦙 and 漢字, wide characters that take two columns each, 漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字.

The end, with a footnote-like [ref] and **unclosed bold
"""


@pytest.fixture(autouse=True)
def every_piece_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_markdown, "_LEAST_PAUSE", 0.0)
    monkeypatch.setattr(chat_markdown, "_SHARE", 0.0)


def console(width: int, height: int, **options: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    environment = {"TERM": "xterm"}
    made = Console(
        file=file, width=width, height=height, force_terminal=True, color_system="standard", _environ=environment,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return made, file


def whole(text: str, width: int, height: int) -> Terminal:
    made, file = console(width, height)
    made.print(AnswerMarkdown(text))
    terminal = Terminal(width, height)
    terminal.feed(file.getvalue())
    return terminal


def streamed(pieces: list[str], width: int, height: int) -> Terminal:
    made, file = console(width, height)
    stream, terminal = MarkdownStream(made), Terminal(width, height)
    for piece in pieces:
        stream.add(piece)
    stream.finish()
    terminal.feed(file.getvalue())
    return terminal


def without_first_gap(terminal: Terminal) -> list[object]:
    """rich puts an empty line before a list, even where nothing is above it."""
    rows: list[object] = list(terminal.styled)
    while rows and not rows[0]:
        del rows[0]
    return rows


def cut(text: str, rng: random.Random, most: int = 8) -> list[str]:
    pieces = []
    while text:
        n = rng.randint(1, most)
        pieces.append(text[:n])
        text = text[n:]
    return pieces


@pytest.mark.parametrize(("width", "height"), [(20, 10), (33, 24), (40, 5), (80, 24), (120, 50)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_last_screen_is_that_of_the_whole_text(width: int, height: int, seed: int) -> None:
    found = streamed(cut(TEXT, random.Random(seed)), width, height)
    assert found.styled == whole(TEXT, width, height).styled
    assert found.cursor == (0, len(found.rows))


LINES = [
    "", "", "text", "more *text*", "- item", "  - deeper", "* star", "1. one", "2) two", "> quote", "    indented",
    "```", "~~~", "# head", "===", "---", "***", "| a | b |", "|---|---|", "| 1 | 2 |", "\tb", "[x]: http://a", "[x]",
    "`", "**", "<b>", "\\", "漢字漢字漢字漢字漢字漢字", "- - - a", "-", "1.", ">",
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(LINES), max_size=14),
    st.integers(8, 40),
    st.integers(3, 12),
    st.randoms(use_true_random=False),
)
@example(["- a", "", "1"], 20, 5, random.Random(0))
@example(["---", ">", "```", ""], 8, 3, random.Random(0))
def test_any_lines_in_any_pieces(lines: list[str], width: int, height: int, rng: random.Random) -> None:
    text = "\n".join(lines)
    found = streamed(cut(text, rng), width, height)
    defined = any(line.startswith("[x]:") for line in lines)
    if not (defined and "[x]" in lines):  # a definition that comes later can't change what is printed already
        assert without_first_gap(found) == without_first_gap(whole(text, width, height))


def test_a_definition_holds_for_later_blocks() -> None:
    rows = streamed(list("[x]: http://a.example\n\ntext\n\nsee [x] there\n"), 60, 10).rows
    assert rows == ["text", "", "see x (http://a.example) there"]


def test_line_breaks_and_html_are_kept() -> None:
    rows = streamed(["roses\nviolets\n\n<b>x</b> & <br>\n"], 40, 10).rows
    assert rows == ["roses", "violets", "", "<b>x</b> & <br>"]


def test_what_a_terminal_would_obey_is_left_out() -> None:
    made, file = console(40, 10)
    stream = MarkdownStream(made)
    for piece in ("a\x1b]52;c;QUJD\x07b", "\x1b[2J\x9b31m\r", "c\x08"):
        stream.add(piece)
    stream.finish()
    assert "\x07" not in file.getvalue()
    assert "\x1b[2J" not in file.getvalue()
    assert "\r" not in file.getvalue().replace("\r\x1b", "").replace("A\r", "")[1:]
    terminal = Terminal(40, 10)
    terminal.feed(file.getvalue())
    assert terminal.rows == ["a]52;c;QUJDb[2J31mc"]


def test_finished_blocks_are_written_once_and_lines_that_stay_are_left_alone() -> None:
    made, file = console(60, 20)
    stream = MarkdownStream(made)
    for piece in cut("First paragraph.\n\n- one\n- two\n- three\n\nLast paragraph.", random.Random(3), 3):
        stream.add(piece)
    stream.finish()
    written = file.getvalue()
    assert written.count("First paragraph.") == 1
    assert written.count("one") == 1  # a new item leaves the lines above it alone


def test_a_dash_below_a_paragraph_is_no_heading_before_it_is_decided() -> None:
    made, file = console(60, 20)
    stream = MarkdownStream(made)
    stream.add("Items:\n")
    stream.add("-")
    before = file.getvalue()
    stream.add(" one")
    stream.finish()
    terminal = Terminal(60, 20)
    terminal.feed(before)
    assert terminal.rows == ["Items:"]
    assert not any(cell[1] for row in terminal.styled for cell in row)


def test_a_terminal_made_narrower_has_wrapped_what_is_on_it() -> None:
    made, file = console(40, 20)
    stream = MarkdownStream(made)
    stream.add("words that take thirty-eight columns...")
    made.size = ConsoleDimensions(20, 20)
    before = len(file.getvalue())
    stream.add(" and more")
    assert file.getvalue()[before:].startswith("\x1b[2A\r")  # one line by then two rows
    stream.finish()


def test_no_color_leaves_no_colours() -> None:
    made, file = console(60, 20, no_color=True)
    stream = MarkdownStream(made)
    for piece in cut(TEXT, random.Random(0)):
        stream.add(piece)
    stream.finish()
    terminal = Terminal(60, 20)
    terminal.feed(file.getvalue())
    assert terminal.rows == whole(TEXT, 60, 20).rows
    assert {(cell[3], cell[4]) for row in terminal.styled for cell in row} == {("default", "default")}


SCRIPT = """
import random, sys, time
from pathlib import Path
from rich.console import Console
from edgellm.cli.chat_markdown import MarkdownStream
text, rng = Path(sys.argv[1]).read_text(encoding="utf-8"), random.Random(0)
stream = MarkdownStream(Console(file=sys.stdout))
while text:
    n = rng.randint(1, 9)
    stream.add(text[:n])
    text = text[n:]
stream.finish()
print("DONE")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pty")
@pytest.mark.parametrize("width", [20, 30, 40])
def test_in_a_real_terminal_that_is_narrow(tmp_path: Path, width: int) -> None:
    (tmp_path / "text.md").write_text(TEXT, encoding="utf-8")
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    environment.pop("NO_COLOR", None)
    child = pexpect.spawn(
        sys.executable, ["-c", SCRIPT, str(tmp_path / "text.md")], env=environment, encoding="utf-8", timeout=60,
        dimensions=(12, width),
    )  # fmt: skip
    child.expect(pexpect.EOF)
    terminal = Terminal(width, 12)
    terminal.feed(child.before)
    assert terminal.rows == [*whole(TEXT, width, 12).rows, "DONE"]
