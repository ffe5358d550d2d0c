"""The checks that all other tests run under: of types, of axes within a call, and only while they are not disabled."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.type_checks import install

SOURCE = '''"""A module of a package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Later

Row = Float[Tensor, " n"]


def whole(number: int, later: Later | None = None) -> int:
    return number if number else "none"


def added(one: Row, other: Float[Tensor, " n"] | None, cut: int = 0) -> tuple[Row, int]:
    return (one if other is None else one + other)[cut:], 0


def bare(number):
    return number


def adding(more):
    def add(number: int) -> int:
        return number + more

    return add


def anything(later: Later) -> Later:
    return later


def counted(to: int) -> Iterator[int]:
    yield from range(to)


@dataclass(frozen=True)
class Pair:
    one: Row
    other: Float[Tensor, " n"]

    @property
    def _width(self) -> int:
        return len(self.one)

    @classmethod
    def of(cls, one: Row) -> Pair:
        return cls(one, one)

    def __mul(self, by: int) -> Row:
        return self.one * by

    def twice(self, by: int = 2) -> Row:
        return self.__mul(by)


class Wide(Pair):
    pass
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Of a package whose annotations are checked."""
    package = tmp_path / "a_package_to_check"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "module.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    install(package.name)
    yield importlib.import_module("a_package_to_check.module")
    sys.meta_path[:] = before
    for name in ("a_package_to_check", "a_package_to_check.module"):
        del sys.modules[name]


def test_types_are_checked_of_what_goes_in_and_comes_out(module: ModuleType) -> None:
    assert module.whole(3, later="whatever its module cannot resolve") == 3
    assert module.bare("x") == "x"
    for wrong in ("3", 0):  # 0 gives a text
        with pytest.raises(TypeError, match="violates type hint"):
            module.whole(wrong)
    one, two = module.adding(1), module.adding(2)
    assert (one(1), two(1)) == (2, 3)
    for add in (one, two, module.adding("x")):
        with pytest.raises(TypeError, match="violates type hint"):
            add("1")
    with pytest.raises(TypeError, match="violates type hint"):
        module.adding(0.5)(1)
    assert module.anything("x") == "x"
    assert list(module.counted(2)) == [0, 1]
    with pytest.raises(TypeError, match="counted"):  # before it is advanced
        module.counted("2")


def test_axes_are_of_one_size_within_a_call(module: ModuleType) -> None:
    assert len(module.added(torch.ones(2), None)[0]) == 2
    assert len(module.added(torch.ones(3), torch.ones(3))[0]) == 3
    for wrong in ((torch.ones(2), torch.ones(1)), (torch.ones(2, 2), None), (torch.ones(2).int(), None)):
        with pytest.raises(TypeError, match="violates type hint"):
            module.added(*wrong)
    with pytest.raises(TypeError, match="violates type hint"):
        module.added(torch.ones(2), None, cut=1)


def test_dataclasses_and_methods(module: ModuleType) -> None:
    row = torch.ones(2)
    assert module.Pair.of(row).twice().tolist() == [2, 2]
    assert module.Wide(row, row)._width == 2
    for kind in (module.Pair, module.Wide):
        with pytest.raises(TypeError, match="violates type hint"):
            kind(row, torch.ones(3))
    with pytest.raises(TypeError, match="violates type hint"):
        module.Pair.of("row")
    with pytest.raises(TypeError, match="violates type hint"):
        module.Pair.of(row).twice(by=0.5)


@pytest.mark.usefixtures("unchecked")
def test_without_checks_all_goes_through(module: ModuleType) -> None:
    assert module.whole("3") == "3"
    assert len(module.added(torch.ones(2), None, cut=1)[0]) == 1
    assert len(module.Pair(torch.ones(2), torch.ones(3)).twice(by=0.5)) == 2


def test_a_package_that_is_there_already_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^expected pytest not to be imported yet, got it already imported$"):
        install("pytest")


def test_of_this_package_all_is_checked() -> None:
    from bayes_dispatch.model.mambaformer.config import MambaFormerConfig

    with pytest.raises(TypeError, match="violates type hint"):
        MambaFormerConfig(d_model="wide")  # type: ignore[arg-type]
