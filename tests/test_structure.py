"""The rules of the tree, so that they stay true: who imports what, how long things are, what they are called."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "eellm").rglob("*.py"))
SOURCES = [*PACKAGE, ROOT / "run.py", *sorted((ROOT / "tests").rglob("*.py"))]

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 500, 60, 6
TORCH_FREE = ("eellm.config", "eellm.metrics", "eellm.drawing", "eellm.analysis", "eellm.report", "eellm.layout")
TORCH_FREE += (
    "eellm.model.spec",
    "eellm.schedule",
    "eellm.plan",
    "eellm.launch",
    "eellm.rundir",
    "eellm.resume",
    "eellm.tasks.before_ranks",
)
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize(("library", "door"), [("megatron", "mcore"), ("lightning", "train")])
def test_a_library_has_one_door(library: str, door: str) -> None:
    users = {name_of(path) for path in PACKAGE if library in imported(path)}
    assert users, "the check looks for the wrong name"
    assert {user for user in users if not user.startswith(f"eellm/{door}/")} == set()


def test_only_tasks_use_the_benchmarks() -> None:
    users = {name_of(path) for path in PACKAGE if "eellm.benchmark" in path.read_text(encoding="utf-8")}
    assert users, "the check looks for the wrong name"
    assert {user for user in users if not user.startswith(("eellm/benchmark/", "eellm/tasks/"))} == set()


@pytest.mark.parametrize(("lower", "higher"), itertools.combinations(("metrics", "drawing", "analysis", "report"), 2))
def test_data_flow_one_way_to_the_report(lower: str, higher: str) -> None:
    imports = re.compile(rf"^\s*(?:from|import) eellm\.{higher}\b", re.MULTILINE)
    sources = {name_of(path): path.read_text(encoding="utf-8") for path in PACKAGE if path.is_relative_to(ROOT / "eellm" / lower)}
    assert sources, "the check looks for the wrong name"
    assert {name for name, text in sources.items() if imports.search(text)} == set()


def test_what_needs_no_torch_does_without() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE]
    free = [module for module in modules if any(module == name or module.startswith(f"{name}.") for name in TORCH_FREE)]
    assert len(free) > 20
    script = f"import importlib, sys\nfor name in {free}: importlib.import_module(name)\n"
    script += "assert not {'torch', 'megatron', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    for function in functions(path):
        assert (function.end_lineno or 0) - function.lineno + 1 <= MAX_FUNCTION, function.name


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_signatures_are_short_and_say_what_they_take(path: Path) -> None:
    for function in functions(path):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        given = [argument for argument in named if argument.arg not in ("self", "cls", "ctx")]
        assert len(given) <= MAX_PARAMETERS, function.name
        if arguments.kwarg is not None and path.parent.name != "mcore" and not path.name.startswith("modeling_"):
            # a signature that a library prescribes may have some, to be ignored; mcore's hooks and transformers' models hand
            # theirs on
            assert arguments.kwarg.arg.startswith("_"), function.name


def test_names_say_what_a_thing_is() -> None:
    parts = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert parts & VAGUE == set()


def test_the_top_level_is_as_agreed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {name.partition("/")[0] for name in listed}
    folders = {"conf", "eellm", "experiments", "notebooks", "tests", ".ci"}
    files = {
        "run.py",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        ".gitignore",
        ".pre-commit-config.yaml",
    }
    assert top <= folders | files


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_library_code_prints_nothing(path: Path) -> None:
    if path.parent.name == "report" or path.name == "progress.py":
        return
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def test_no_machine_of_ours_is_named() -> None:
    words = re.compile(r"/(root|home|work|opt)/\w")
    files = [*SOURCES, *sorted((ROOT / "conf").rglob("*.yaml")), ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    named = {name_of(path) for path in files if words.search(path.read_text(encoding="utf-8"))}
    assert named <= {"tests/test_structure.py"}
