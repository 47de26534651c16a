"""Which module may import which: the arrows of docs/architecture.md, read from the source of both packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {"errors", "config", "constraint", "gguf_header", "gguf_metadata", "gguf_adapter", "whole_file"}

# part of edgellm → the parts it may import, besides itself
ALLOWED = {
    "errors": set(),
    "_pyinstaller": set(),
    "config": {"errors"},
    "constraint": {"errors", "config"},
    "gguf_header": {"errors"},
    "whole_file": set(),
    "gguf_metadata": {"errors", "gguf_header", "whole_file"},
    "gguf_adapter": {"errors", "gguf_header"},
    "native": BASE,
    "text": BASE | {"native"},
    "speculation": BASE | {"native", "text"},
    "generation": BASE | {"native", "text", "speculation"},
    "chat": BASE | {"native", "text", "speculation", "generation"},
    "catalog": BASE,
    "measure": BASE | {"native", "text", "speculation", "generation", "chat", "catalog", "engine"},
    "engine": BASE | {"native", "text", "speculation", "generation", "chat", "catalog"},
    "tools": BASE | {"generation", "chat"},
    "cli": BASE | {"native", "text", "speculation", "generation", "chat", "catalog", "engine", "measure", "edgellm"},
    "edgellm": BASE | {"native", "text", "generation", "chat", "catalog", "engine"},  # the package's __init__
}
FOR_CONVERTERS = BASE | {"native", "measure"}
MAY_USE_CONVERTERS = {"edgellm/cli/convert.py", "edgellm/cli/demo.py", "edgellm/cli/draft.py"}

Import = tuple[str, bool]  # module, whether inside a function


def imports(tree: ast.AST, package: str, inside: bool = False) -> Iterator[Import]:
    """Every import that can run; blocks under `if TYPE_CHECKING` can't."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            yield from ((f"{base}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        else:
            deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, deeper)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> list[Import]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return list(imports(ast.parse(path.read_text()), package))


def part_of(module: str) -> str:
    """`edgellm.native.model.Vocab` → `native`; a name of the package itself, such as `edgellm.load`, → `edgellm`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "edgellm"


@pytest.mark.parametrize("path", sources("edgellm"), ids=lambda path: str(path.relative_to(ROOT)))
def test_edgellm_imports_point_one_way(path: Path) -> None:
    name = path.relative_to(ROOT / "edgellm").parts[0].removesuffix(".py")
    own = "edgellm" if name == "__init__" else name
    assert own in ALLOWED, f"{own} is new: say in docs/architecture.md what it may import, and here"
    for module, inside in imports_of(path):
        top = module.split(".")[0]
        assert top != "torch", f"{path}: edgellm never imports torch"
        assert top != "llama_cpp" or own == "native", f"{path}: only edgellm/native imports llama_cpp"
        if top == "converters":
            assert str(path.relative_to(ROOT)) in MAY_USE_CONVERTERS, f"{path} imports {module}"
            assert inside, f"{path}: {module} must be imported inside a function"
        if top == "edgellm":
            assert part_of(module) in ALLOWED[own] | {own}, f"{path}: {own} must not import {module}"


@pytest.mark.parametrize("path", sources("converters"), ids=lambda path: str(path.relative_to(ROOT)))
def test_converters_import_only_the_lower_layers(path: Path) -> None:
    for module, inside in imports_of(path):
        top = module.split(".")[0]
        assert top != "llama_cpp", f"{path}: only edgellm/native imports llama_cpp"
        assert top != "torch" or inside, f"{path}: torch must be imported inside the function that needs it"
        if top == "edgellm" and module != "edgellm.__version__":
            assert part_of(module) in FOR_CONVERTERS, f"{path} must not import {module}"


def test_native_reaches_llama_cpp_by_name_only_in_one_file() -> None:
    """library.py imports it through importlib, which the syntax tree doesn't show."""
    users = {path.name for path in sources("edgellm") if '"llama_cpp' in path.read_text()}
    freezing = {"hook-edgellm.py", "hook-llama_cpp.py"}  # PyInstaller alone runs these
    assert users - freezing == {"library.py"}
