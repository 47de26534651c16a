"""Draws docs/terminal.svg: a conversion and a chat, as a terminal of 100 columns shows them.

    python docs/record.py [docs/terminal.svg]

Needs the extra `dev`. The commands really run, in a temporary folder; what stands in the picture is what they print.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

WIDTH, HEIGHT = 100, 200
PROMPT = "$ "


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}


def run(command: str, folder: Path, typed: list[str], screen: pyte.Screen) -> None:
    """Run a command on the screen; type a line each time the chat waits for one."""
    stream = pyte.Stream(screen)
    stream.feed(PROMPT + command + "\r\n")
    child = pexpect.spawn(
        "bash",
        ["-c", command],
        cwd=str(folder),
        env=environment(),
        encoding="utf-8",
        timeout=100,
        dimensions=(40, WIDTH),
    )
    child.logfile_read = type("Feed", (), {"write": staticmethod(stream.feed), "flush": staticmethod(lambda: None)})()
    for line in typed:
        child.expect(r">.*\x1b\[\?25h")  # the prompt, and the cursor is shown
        child.expect(pexpect.TIMEOUT, timeout=1)
        child.send(line + "\r")
        child.expect("context [0-9]+/")
    if typed:
        child.expect(pexpect.TIMEOUT, timeout=2)
        child.sendeof()
    child.expect(pexpect.EOF)


def drawn(screen: pyte.Screen) -> Text:
    """The screen's lines up to the last that isn't empty."""
    lines = [_line(screen.buffer[y]) for y in range(HEIGHT)]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    return Text("\n").join(lines)


def _line(cells: dict[int, pyte.screens.Char]) -> Text:
    text = Text()
    for x in range(WIDTH):
        cell = cells[x]
        color = None if cell.fg == "default" else f"#{cell.fg}" if len(cell.fg) == 6 and cell.fg.isalnum() else cell.fg
        color = {"brown": "yellow"}.get(color or "", color)
        try:
            style = Style(color=color, bold=cell.bold, italic=cell.italics, underline=cell.underscore)
        except Exception:  # a name that rich doesn't know
            style = Style(bold=cell.bold)
        text.append(cell.data, style)
    text.rstrip()
    return text


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("terminal.svg"))
    screen = pyte.Screen(WIDTH, HEIGHT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            ["edgellm", "demo", "--keep", "work"],
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        run("edgellm convert work/base --adapter work/reminders -o mine.gguf", folder, [], screen)
        run("edgellm chat mine.gguf --temperature 0", folder, ["Remind me to feed the chickens on Saturday"], screen)
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(drawn(screen))
    console.save_svg(str(out), title="edgellm")


if __name__ == "__main__":
    main()
