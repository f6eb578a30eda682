"""The import rule: the daemon imports neither training nor export, and never torch; optional packages only inside functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "daemon": {"training", "export", "torch", "tests"},
    "training": {"export", "tests"},
    "export": {"tests"},
}
OPTIONAL = {"openvino", "nilearn", "matplotlib", "highdicom", "nibabel", "tensorrt", "onnx", "sklearn", "pandas"}


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(top-level package, at module level) of every import."""
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    typed = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
        for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            yield name.split(".")[0], id(node) not in inside and id(node) not in typed


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_downwards(package: str) -> None:
    """export may import training and daemon, training may import daemon, daemon imports neither and never torch."""
    for file in files(package):
        found = {name for name, _ in imports(ast.parse(file.read_text(encoding="utf-8")))}
        assert not found & FORBIDDEN[package], f"{file.relative_to(ROOT)} imports {found & FORBIDDEN[package]}"


def test_optional_packages_are_imported_where_they_are_needed() -> None:
    """A missing extra breaks one command, not the daemon."""
    for file in files("daemon"):
        if "demo" in file.parts:
            continue
        found = {name for name, top in imports(ast.parse(file.read_text(encoding="utf-8"))) if top}
        assert not found & OPTIONAL, f"{file.relative_to(ROOT)} imports {found & OPTIONAL} at module level"


def test_the_help_is_quick_and_loads_nothing_heavy() -> None:
    """`rescan --help` imports neither numpy nor pydicom."""
    code = (
        "import sys, daemon.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'pydicom', 'scipy', 'zmq', 'torch', 'onnxruntime'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "[]"
    assert "rescan demo" in done.stdout
    assert "Not a medical device" in done.stdout
