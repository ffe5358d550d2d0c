"""Threads that share a product give what one gives, and are seen by nobody else."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from bayes_dispatch.model.mambaformer.compiled import threads
from bayes_dispatch.model.mambaformer.compiled.switch import array, kernels
from bayes_dispatch.model.mambaformer.compiled.threads import prepare_threads, sharing

TASKS = Path("/proc/self/task")


@pytest.mark.parametrize("columns", [1, 7, 1101])
def test_parts_are_the_product(columns: int) -> None:
    """Of few columns some threads have none."""
    draw = torch.Generator().manual_seed(6)
    x, weight = torch.randn(5, 3000, generator=draw), torch.randn(columns, 3000, generator=draw)
    for parts in (1, 2, 3, 8):
        out = torch.full((5, columns), torch.nan)
        kernels()._multiply_in_parts(array(x), array(weight), out.numpy(), parts)
        torch.testing.assert_close(out, x @ weight.T, rtol=1e-4, atol=1e-3)


def test_only_as_many_as_torch_may_use() -> None:
    """And numba's own setting of this thread is as before."""
    before, most = numba.get_num_threads(), prepare_threads()
    try:
        for count in range(1, most + 2):
            torch.set_num_threads(count)
            with sharing() as found:
                assert found == min(count, most)
                assert numba.get_num_threads() == (found if found > 1 else before)
            assert numba.get_num_threads() == before
    finally:
        torch.set_num_threads(1)


def test_those_that_cannot_be_asked_at_once_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer, most in (("workqueue", 1), ("omp", numba.get_num_threads()), ("tbb", numba.get_num_threads())):
        monkeypatch.setattr(numba, "threading_layer", lambda layer=layer: layer)
        assert prepare_threads.__wrapped__() == most


def test_a_thread_that_ends_gives_its_result_or_its_error() -> None:
    assert threads.passing(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        threads.passing(lambda: 1 / 0)


def test_a_decoded_token_is_of_as_many(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    for name in ("step_mamba2", "step_attention"):
        compiled = getattr(kernels(), name)

        def told(x: object, count: int, *rest: object, compiled: Any = compiled) -> None:
            asked.append(count)
            compiled(x, count, *rest)

        monkeypatch.setattr(kernels(), name, told)
    session = make_model().open(2, 9)
    with torch.no_grad():
        session.read(torch.zeros(2, 3, dtype=torch.long))
        for count in (2, 1):
            torch.set_num_threads(count)
            asked.clear()
            session.read(torch.zeros(2, 1, dtype=torch.long))
            assert asked
            assert set(asked) == {min(count, prepare_threads())}


BEGIN = """
import multiprocessing, os, time
import torch
import bayes_dispatch as bd
import bayes_dispatch.model.mambaformer.network  # without it numba and torch may have an OpenMP each
from bayes_dispatch.model.mambaformer.compiled.switch import kernels
from bayes_dispatch.model.mambaformer.compiled.threads import passing
from bayes_dispatch.model.mambaformer.products import times

torch.set_num_threads(1)
x, weight = torch.ones(8, 512), torch.ones(512, 512)

def product():
    with torch.no_grad():
        return bool((times(x, weight) == 512).all())

def tasks():  # threads, once those that are ending have ended
    found = None
    while (now := len(os.listdir("/proc/self/task"))) != found:
        found = now
        time.sleep(1)
    return found

def in_a_child(work):
    child = os.fork()
    if child == 0:
        os._exit(0 if work() else 3)
    assert os.waitpid(child, 0)[1] == 0
"""
PROGRAMS = {
    "torch's number and the way to start processes stay": """
torch.set_num_threads(1)
assert product() and torch.get_num_threads() == 1
multiprocessing.set_start_method("spawn")
""",
    "after a fork one thread does all": """
torch.set_num_threads(2)
assert product()
in_a_child(product)
""",
    "so it does where the fork came first, and torch's number stays": """
torch.set_num_threads(1)
in_a_child(lambda: product() and torch.get_num_threads() == 1)
""",
}
COUNTED = {
    "one thread does all of a product": """
torch.set_num_threads(1)
kernels()
before = tasks()
assert product() and tasks() == before
""",
    "two share it, and end with the one that asked": """
torch.set_num_threads(2)
kernels()
before = tasks()
assert passing(product) and tasks() == before
assert product() and tasks() == before + 1
""",
}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("name", PROGRAMS)
def test_nobody_else_sees_them(name: str) -> None:
    subprocess.run([sys.executable, "-c", BEGIN + PROGRAMS[name]], check=True, timeout=120)


@pytest.mark.skipif(not TASKS.is_dir() or prepare_threads() < 2, reason="needs two cores, OpenMP, and Linux to count")
@pytest.mark.parametrize("name", COUNTED)
def test_how_many_there_are(name: str) -> None:
    subprocess.run([sys.executable, "-c", BEGIN + COUNTED[name]], check=True, timeout=120)
