"""What pyproject.toml and the locks promise."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OUTSIDE = {"torch", "torchio"}
"""Installed by a command of their own: which build of torch fits depends on the machine."""
LOCKS = sorted((ROOT / "locks").glob("*.txt"))


def pins(lock: Path) -> dict[str, str]:
    """Package -> version of a lock."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def lock(name: str) -> dict[str, str]:
    return pins(ROOT / "locks" / f"{name}.txt")


def requirements(*extras: str) -> list[Requirement]:
    return [Requirement(text) for extra in extras for text in EXTRAS[extra]]


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_one_onnx_runtime(extra: str) -> None:
    """Only `cpu` and `gpu` name ONNX Runtime, each one variant: two overwrite each other in one folder."""
    found = [r.name for r in requirements(extra) if canonicalize_name(r.name).startswith("onnxruntime")]
    assert found == {"cpu": ["onnxruntime"], "gpu": ["onnxruntime-gpu"]}.get(extra, [])


def test_onnx_runtimes_agree() -> None:
    """CPU and GPU run the same release, and openvino with it."""
    version = {r.name.removesuffix("-gpu"): str(r.specifier) for r in requirements("cpu")}
    assert {r.name.removesuffix("-gpu"): str(r.specifier) for r in requirements("gpu")} == version


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_lock_is_hashed_and_names_no_host(path: Path) -> None:
    """Every pin has a hash; no lock names an index or holds torch."""
    text = path.read_text(encoding="utf-8")
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)
    assert "://" not in text
    assert not OUTSIDE & set(pins(path))


@pytest.mark.parametrize(("name", "variant"), [("cpu", "onnxruntime"), ("gpu", "onnxruntime-gpu")])
def test_engine_locks(name: str, variant: str) -> None:
    """Each engine's lock holds its variant alone; the other locks hold none."""
    assert [package for package in lock(name) if package.startswith("onnxruntime")] == [variant]
    assert not [package for other in ("build", "demo", "dev") for package in lock(other) if package.startswith("onnxr")]


def test_locks_agree() -> None:
    """A package has the same version in every lock, so layers can be installed on top of each other."""
    versions: dict[str, set[str]] = {}
    for path in LOCKS:
        for name, version in pins(path).items():
            versions.setdefault(name, set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("name", "extras"),
    [("cpu", ("cpu",)), ("gpu", ("gpu",)), ("demo", ("demo",)), ("dev", ("demo", "dev", "training"))],
)
def test_lock_meets_the_ranges(name: str, extras: tuple[str, ...]) -> None:
    """Every dependency is in its lock with a version that pyproject.toml allows: run `make locks` after a change there."""
    held = lock(name)
    wanted = [Requirement(text) for text in PROJECT["dependencies"]] + requirements(*extras)
    for requirement in wanted:
        package = canonicalize_name(requirement.name)
        if package not in OUTSIDE:
            assert package in held, f"{requirement}: not locked"
            assert held[package] in requirement.specifier, f"{requirement}: locked {held[package]}"


def test_what_stays_outside_is_pinned() -> None:
    """`make` installs the versions of torch and torchio that pyproject.toml names."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for requirement in requirements("training", "dev"):
        if canonicalize_name(requirement.name) in OUTSIDE:
            assert str(requirement) in makefile


def test_scripts_exist() -> None:
    """Each console script names a module with a `main`."""
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target
