"""Imports flow one way: model → experts → inference → serving → app; dispatcher and checks stand apart from model and
experts. There is no circle, every room is planned, and the rules catch what they should."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bayes_dispatch"

# What each room may import of the project, besides itself. A room is a folder, or a file beside the folders.
ALLOWED = {
    "errors": set(),
    "arguments": {"errors"},
    "storage": {"errors", "arguments"},
    "loops": set(),
    "model": {"errors", "arguments", "storage", "loops"},
    "experts": {"errors", "arguments", "storage", "model"},
    "dispatcher": {"errors", "arguments", "storage", "loops"},
    "checks": {"errors", "arguments", "storage", "dispatcher"},
    "inference": {"errors", "arguments", "storage", "model", "experts", "dispatcher", "checks"},
    "serving": {"errors", "arguments", "storage", "model", "experts", "dispatcher", "checks", "inference"},
    "app": {"errors", "arguments", "storage", "model", "experts", "dispatcher", "checks", "inference", "serving"},
}
PUBLIC = {"__init__", "__main__"}  # the lazy names and the command: they see all rooms

# Libraries that one file or room of the package alone may import.
CONFINED = {
    "arviz": f"{PACKAGE}.dispatcher.arviz_data",
    "jax": f"{PACKAGE}.checks.reference",
    "numpyro": f"{PACKAGE}.checks.reference",
}

# Formats that run code when they are read, and calls that run text.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"__import__", "eval", "exec", "torch.load", "torch.jit.load"}


def sources() -> dict[str, Path]:
    """Module name → file, for the five folders; the symlinks inside bayes_dispatch/ are not followed."""
    modules = {}
    for folder in (PACKAGE, "model", "experts", "inference", "serving"):
        for path in (ROOT / folder).rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.parents):
                parts = path.relative_to(ROOT).with_suffix("").parts
                modules[".".join(parts if folder == PACKAGE else (PACKAGE, *parts))] = path
    return {name.removesuffix(".__init__"): path for name, path in modules.items()}


SOURCES = sources()


def room_of(module: str) -> str:
    """The room of a module of the project, given by its full name."""
    return [*module.split("."), "__init__"][1]


def imported(tree: ast.AST) -> set[str]:
    """Full names of all that is imported anywhere in the file, also inside functions and for type checkers alone.

    `from a import b` counts as `a.b` where that is a module of the project, else as `a`.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names.update(full if (full := f"{base}.{alias.name}") in SOURCES else base for alias in node.names)
    return names


def violations(module: str, source: str) -> list[str]:
    """What a file with this name and text does against the rules."""
    tree, room, found = ast.parse(source), room_of(module), []
    for name in imported(tree):
        library = name.split(".")[0]
        if library == PACKAGE and room not in PUBLIC and room_of(name) not in {room} | ALLOWED[room]:
            found.append(f"{room} imports {room_of(name)}: {name}")
        if library in ("", "model", "experts", "inference"):
            found.append(f"not by its full name: {name}")
        if not f"{module}.".startswith(f"{CONFINED.get(library, module)}."):
            found.append(f"only {CONFINED[library]} may import {library}")
        if library in UNSAFE_MODULES:
            found.append(f"unsafe format: {library}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (call := ast.unparse(node.func)) in UNSAFE_CALLS:
            found.append(f"unsafe call: {call}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("unsafe call: allow_pickle")
    return found


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_file_keeps_the_rules(module: str) -> None:
    assert violations(module, SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.scan", "from bayes_dispatch.experts.bank import ExpertBank"),
        ("model.scan", "from bayes_dispatch import experts"),
        ("model.scan", "from bayes_dispatch import Dispatcher"),
        ("model.scan", "import bayes_dispatch.dispatcher.evidence.evidence"),
        ("experts.bank", "def f():\n    from bayes_dispatch.inference import blends"),
        ("experts.bank", "from bayes_dispatch.dispatcher.evidence.evidence import Evidence"),
        ("experts.domains.text", "from bayes_dispatch.inference.two_pass.blends import Blend"),
        ("inference.generator", "from bayes_dispatch.app.bundle import Bundle"),
        (
            "dispatcher.posterior",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bayes_dispatch.model import backbone",
        ),
        ("dispatcher.posterior", "from bayes_dispatch.experts import bank"),
        ("dispatcher.posterior", "from bayes_dispatch.inference import blends"),
        ("dispatcher.posterior", "import arviz as az"),
        ("dispatcher.posterior", "import jax.numpy as jnp"),
        ("errors", "from bayes_dispatch.dispatcher.evidence.evidence import Evidence"),
        ("inference.generator", "from . import blends"),
        ("inference.generator", "from model.cache import Cache"),
        ("app.bundle", "import pickle"),
        ("app.bundle", "import torch\ntorch.load('a')"),
        ("app.bundle", "eval('1')"),
        ("app.bundle", "np.load('a', allow_pickle=True)"),
    ],
)
def test_rules_catch(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "experts.bank",
            "from bayes_dispatch.errors import ConfigError\nimport bayes_dispatch.model.adaptation",
        ),
        (
            "inference.generator",
            "from bayes_dispatch.experts import bank\nfrom bayes_dispatch.dispatcher import posterior",
        ),
        ("app.commands.main", "from bayes_dispatch.inference import generator"),
        ("dispatcher.arviz_data", "import arviz as az"),
        ("model.backbone", "model.eval()\nnp.load('a', allow_pickle=False)"),
    ],
)
def test_rules_allow(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source) == []


def test_errors_import_nothing() -> None:
    assert imported(ast.parse(SOURCES[f"{PACKAGE}.errors"].read_text(encoding="utf-8"))) == set()


def test_every_room_is_planned() -> None:
    """A new folder has to say what it may import."""
    assert {room_of(module) for module in SOURCES} - PUBLIC <= ALLOWED.keys()


def test_no_import_cycle() -> None:
    """Imports form no cycle; those inside functions and for type checkers count as well."""
    graph = {
        module: {name for name in imported(ast.parse(path.read_text(encoding="utf-8"))) if name in SOURCES} - {module}
        for module, path in SOURCES.items()
    }
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert graph == {}
