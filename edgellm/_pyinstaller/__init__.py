"""Hooks that PyInstaller finds by itself where edgellm is installed: a frozen app takes the native libraries along."""

from __future__ import annotations

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """For PyInstaller's entry point `hook-dirs`."""
    return [str(Path(__file__).parent)]
