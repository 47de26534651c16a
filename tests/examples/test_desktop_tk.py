"""The desktop example on a virtual screen: a real window, a tiny model; and its engine with scripted ones."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import edgellm
from edgellm.catalog.cards import resolve
from edgellm.generation import GenerationResponse, GenerationStats

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "desktop_tk.py"
NO_SCREEN = sys.platform == "linux" and shutil.which("Xvfb") is None


@pytest.fixture(scope="module")
def desktop() -> ModuleType:
    pytest.importorskip("tkinter", reason="this Python was built without Tk")
    spec = importlib.util.spec_from_file_location("desktop_tk", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["desktop_tk"] = module
    spec.loader.exec_module(module)
    return module


def until(condition: Callable[[], object], work: Callable[[], object] = lambda: None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        work()
        time.sleep(0.01)


def response(text: str, finish_reason: Any = None) -> GenerationResponse:
    return GenerationResponse(text, (), (), finish_reason, GenerationStats())


class Scripted:
    """A model whose answers are what `script` gives for the n-th question."""

    def __init__(self, script: Callable[[int], Iterator[GenerationResponse]]) -> None:
        self.script, self.n, self.cancelled, self.closed = script, 0, False, False

    def chat(self, messages: Any, params: Any, **_: Any) -> Iterator[GenerationResponse]:
        self.asked = [message["content"] for message in messages]
        self.n += 1
        return self.script(self.n)

    n_ctx = 1000

    def chat_tokens(self, messages: Any, **_: Any) -> list[int]:
        return [1] * len(messages)

    def detokenize(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True


def events_until(engine: Any, kind: str) -> list[Any]:
    seen = []
    while not seen or seen[-1].kind != kind:
        seen.append(engine.events.get(timeout=60))
    return seen


def test_a_crash_is_an_event_and_the_conversation_goes_on(desktop: ModuleType) -> None:
    def script(n: int) -> Iterator[GenerationResponse]:
        yield response("Hel")
        if n == 2:
            raise edgellm.EngineCrashed("the engine's process ended")
        yield response("lo", "stop")

    model = Scripted(script)
    engine = desktop.Engine(lambda path, **_: model)
    engine.load("x")
    events_until(engine, "ready")
    engine.ask("one")
    assert [event.text for event in events_until(engine, "done")][:2] == ["Hel", "lo"]
    engine.ask("two")
    assert "conversation is kept" in events_until(engine, "crashed")[-1].text
    engine.ask("three")
    events_until(engine, "done")
    assert model.asked[:2] == ["one", "Hello"]
    assert model.asked[-1] == "three"
    engine.close()
    assert model.closed


def test_loading_can_be_stopped_and_what_fails_is_told(desktop: ModuleType) -> None:
    def load(path: str, on_progress: Callable[[float], bool], **_: Any) -> Any:
        if path == "bad":
            raise edgellm.ModelFileError("bad is damaged")
        until(lambda: on_progress(0.5) is False)
        raise edgellm.Cancelled("loading was cancelled")

    engine = desktop.Engine(load)
    engine.ask("too early")
    assert "no model is loaded" in events_until(engine, "failed")[-1].text
    engine.load("bad")
    assert events_until(engine, "failed")[-1].text == "bad is damaged"
    engine.load("slow")
    assert engine.events.get(timeout=60).fraction == 0.5
    engine.stop()
    assert events_until(engine, "done")[-1].text == "stopped"
    engine.close()


def test_a_killed_engine_comes_back(desktop: ModuleType, model: Path) -> None:
    engine = desktop.Engine()
    engine.load(model)
    events_until(engine, "ready")
    engine.ask("Count from one to five hundred.")
    events_until(engine, "text")
    os.kill(engine._model.engine_pid, signal.SIGKILL)
    assert "conversation is kept" in events_until(engine, "crashed")[-1].text
    engine.ask("Tell me a long story.")
    while not events_until(engine, "text")[-1].text:
        pass
    engine.stop()
    events_until(engine, "done")
    said = [message["content"] for message in engine._conversation.messages if message["role"] == "user"]
    assert said == ["Count from one to five hundred.", "Tell me a long story."]
    engine.close()


@pytest.fixture(scope="module")
def screen() -> Iterator[str]:
    """The name of a virtual screen."""
    if NO_SCREEN:
        pytest.skip("Xvfb is missing: apt-get install xvfb")
    command = ["Xvfb", "-displayfd", "1", "-screen", "0", "1024x768x24", "-nolisten", "tcp"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        yield f":{server.stdout.readline().decode().strip()}"
        server.terminate()


@pytest.fixture(scope="module")
def model() -> Path:
    """The real one: a tiny one has said all it can before anybody could stop it."""
    return resolve(None)


@pytest.mark.skipif(sys.platform != "linux", reason="the virtual screen is X11's")
def test_the_window_loads_answers_and_stops(
    desktop: ModuleType, screen: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tkinter

    from PIL import ImageGrab

    monkeypatch.setenv("DISPLAY", screen)
    window = desktop.Window(tkinter.Tk(), desktop.Engine(), {"tiny": model})

    def shown() -> str:
        return str(window.text.get("1.0", "end"))

    def wait(condition: Callable[[], object]) -> None:
        until(condition, window.root.update)

    window.pick("tiny")
    wait(lambda: not window.is_busy)
    assert window.status["text"] == str(model)
    window.entry.insert(0, "Tell me a long story.")
    window.send_button.invoke()
    assert window.is_busy
    wait(lambda: len(shown()) > 60)
    assert "Tell me a long story." in shown()
    picture = ImageGrab.grab(xdisplay=screen)
    picture.save(tmp_path / "desktop.png")
    assert len(picture.getcolors(1 << 24)) > 8
    window.stop_button.invoke()
    wait(lambda: not window.is_busy)
    assert window.status["text"].startswith(("cancelled", "stopped", "length"))
    kept = shown()
    window.entry.insert(0, "And now?")
    window.entry.event_generate("<Return>")
    window.send()
    wait(lambda: len(shown()) > len(kept) + 20)
    window.close()
    assert not window.engine._thread.is_alive()


def test_the_picker_offers_what_can_chat_here(desktop: ModuleType) -> None:
    assert "smollm2-135m-instruct" in desktop.chat_models()
