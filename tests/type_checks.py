"""Checks of every annotation of the package while tests run: beartype for types, jaxtyping for axes.

As ``jaxtyping.install_import_hook`` does, with two differences that halve the time of many tests. Axes are kept for
functions whose annotations have some, and arguments are checked once. And only the package's own modules are compiled
anew: that hook also passes over the bytecode of each library which one of them imports.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

Scope = Callable[[], AbstractContextManager[None]]

CHECKER = beartype(conf=BeartypeConf(violation_type=TypeError))  # as jaxtyping raises: what reads files expects it
CALLED = "__beartype_func"  # of the function that beartype makes: the keyword whose default is the one that it checks
_CHECKS: dict[CodeType, Callable[[], tuple[Any, Scope]] | None] = {}  # a closure is defined often


def install(package: str) -> None:
    """Check all modules of a package, not imported yet; they raise where a value and its annotation differ."""
    if package in sys.modules:
        raise RuntimeError(f"expected {package} not to be imported yet, got it already imported")
    sys.meta_path.insert(0, _Finder(package))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checked unless ``jaxtyping.config`` disables it.

    An annotation that cannot be resolved when the function is defined is any type.
    """
    if not function.__annotations__:
        return function
    if inspect.isgeneratorfunction(function):  # beartype would check its arguments only when it is first advanced
        return jaxtyping.jaxtyped(function, typechecker=CHECKER)
    if function.__code__ not in _CHECKS:
        hints = {name: _resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
        anything = all(hint is Any or hint is object for hint in hints.values())
        _CHECKS[function.__code__] = None if anything else functools.cache(partial(_check, function, hints))
    make, check, scope = _CHECKS[function.__code__], None, nullcontext
    if make is None:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal check, scope
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if check is None:  # only now: most functions are never called by those tests that run in one process
            made, scope = make()
            own = FunctionType(made.__code__, made.__globals__, made.__name__)
            own.__kwdefaults__ = made.__kwdefaults__ | {CALLED: function}
            check = own
        if scope is nullcontext:  # to enter it takes longer than many a check
            return check(*args, **kwargs)
        with scope():
            return check(*args, **kwargs)

    return call


def _check(function: Callable[..., Any], hints: dict[str, Any]) -> tuple[Any, Scope]:
    """What beartype makes of a function, and within what it is called: each axis is of one size there."""
    plain: Any = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    plain.__kwdefaults__, plain.__annotations__ = function.__kwdefaults__, hints
    plain.__module__, plain.__qualname__ = function.__module__, function.__qualname__
    made = CHECKER(plain)
    if made is plain:  # of any types alone

        def made(*args: Any, __beartype_func: Callable[..., Any] = function, **kwargs: Any) -> Any:
            return __beartype_func(*args, **kwargs)

    return made, partial(jaxtyping.jaxtyped, "context") if any(map(_has_axes, hints.values())) else nullcontext


def checked_class(kind: type) -> type:
    """The class, the fields of which are checked when an object is made, if it is a dataclass."""
    made = vars(kind).get("__init__")
    if dataclasses.is_dataclass(kind) and made is not None and not hasattr(made, "__wrapped__"):
        kind.__init__ = checked(made)
    return kind


def _resolved(hint: Any, namespace: dict[str, Any]) -> Any:
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"value": hint}), namespace, include_extras=True)["value"]
    except Exception:  # a class that is still being defined, or one imported for type checkers alone
        return Any


def _has_axes(hint: Any) -> bool:
    if isinstance(hint, list):  # the arguments of a Callable
        return any(map(_has_axes, hint))
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(_has_axes, get_args(hint)))


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):  # innermost, where annotations are as written
                node.decorator_list.append(ast.copy_location(ast.Name("_checked", ast.Load()), node))
            elif isinstance(node, ast.ClassDef):  # outermost, after @dataclass
                node.decorator_list.insert(0, ast.copy_location(ast.Name("_checked_class", ast.Load()), node))
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_checked=checked, _checked_class=checked_class)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
