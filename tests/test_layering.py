"""Imports flow one way: model → experts → inference → the files that join them; the dispatcher stands apart."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bayes_dispatch"

# Files of bayes_dispatch/ that join the parts. All the others there work on arrays alone.
JOINING = {
    "__init__",
    "__main__",
    "bundle",
    "cli",
    "cli_chat",
    "cli_compare",
    "cli_generate",
    "cli_experts",
    "cli_measure",
    "cli_own_expert",
    "demo",
    "diagnosis",
    "held_out",
    "own_expert",
    "train",
}

# What each layer may import of the project, besides `errors` (anybody) and itself.
ALLOWED = {
    "errors": set(),
    "model": set(),
    "experts": {"model"},
    "dispatcher": set(),
    "inference": {"model", "experts", "dispatcher"},
    "joining": {"model", "experts", "dispatcher", "inference"},
}

# Libraries that one file of the package alone may import.
CONFINED = {"arviz": f"{PACKAGE}.idata", "jax": f"{PACKAGE}.reference", "numpyro": f"{PACKAGE}.reference"}

# Formats that run code when they are read, and calls that run text.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"__import__", "eval", "exec", "torch.load", "torch.jit.load"}


def sources() -> dict[str, Path]:
    """Module name → file, for the four folders; the symlinks inside bayes_dispatch/ are not followed."""
    modules = {f"{PACKAGE}.{path.stem}": path for path in (ROOT / PACKAGE).glob("*.py")}
    for folder in ("model", "experts", "inference"):
        for path in (ROOT / folder).rglob("*.py"):
            modules[".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts))] = path
    return {name.removesuffix(".__init__"): path for name, path in modules.items()}


SOURCES = sources()


def layer_of(module: str) -> str:
    """The layer of a module of the project, given by its full name."""
    part = [*module.split("."), "__init__"][1]
    if part in ("errors", "model", "experts", "inference"):
        return part
    return "joining" if part in JOINING else "dispatcher"


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
    tree, layer, found = ast.parse(source), layer_of(module), []
    for name in imported(tree):
        library = name.split(".")[0]
        if (
            library == PACKAGE
            and layer_of(name) not in ({layer, "errors"} if layer != "errors" else set()) | ALLOWED[layer]
        ):
            found.append(f"{layer} imports {layer_of(name)}: {name}")
        if library in ("", "model", "experts", "inference"):
            found.append(f"not by its full name: {name}")
        if CONFINED.get(library, module) != module:
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
        ("model.scan", "import bayes_dispatch.evidence"),
        ("experts.bank", "def f():\n    from bayes_dispatch.inference import blends"),
        ("experts.bank", "from bayes_dispatch.evidence import Evidence"),
        ("experts.domains.text", "from bayes_dispatch.inference.blends import Blend"),
        ("inference.generator", "from bayes_dispatch.bundle import Bundle"),
        (
            "posterior",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bayes_dispatch.model.cache import Cache",
        ),
        ("posterior", "from bayes_dispatch.experts import bank"),
        ("posterior", "from bayes_dispatch.inference import blends"),
        ("posterior", "import arviz as az"),
        ("posterior", "import jax.numpy as jnp"),
        ("errors", "from bayes_dispatch.evidence import Evidence"),
        ("inference.generator", "from . import blends"),
        ("inference.generator", "from model.cache import Cache"),
        ("bundle", "import pickle"),
        ("bundle", "import torch\ntorch.load('a')"),
        ("bundle", "eval('1')"),
        ("bundle", "np.load('a', allow_pickle=True)"),
    ],
)
def test_rules_catch(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("experts.bank", "from bayes_dispatch.errors import ConfigError\nfrom bayes_dispatch.model.files import read"),
        (
            "inference.generator",
            "from bayes_dispatch.experts import bank\nfrom bayes_dispatch.posterior import DispatchPosterior",
        ),
        ("cli", "from bayes_dispatch import __version__\nfrom bayes_dispatch.inference import generator"),
        ("idata", "import arviz as az"),
        ("model.mambaformer", "model.eval()\nnp.load('a', allow_pickle=False)"),
    ],
)
def test_rules_allow(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source) == []


def test_errors_import_nothing() -> None:
    assert imported(ast.parse(SOURCES[f"{PACKAGE}.errors"].read_text(encoding="utf-8"))) == set()


def test_no_import_cycle_within_a_layer() -> None:
    """Imports at the top level of the files form no cycle (imports inside functions may close one)."""
    graph = {
        module: {name for name in imported(top_level(path)) if name in SOURCES} - {module}
        for module, path in SOURCES.items()
    }
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert graph == {}


def top_level(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], type_ignores=[])
