"""Threads that share a product or attention give what one gives, and are seen by nobody else."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bayes_dispatch.model.mambaformer.compiled import threads
from bayes_dispatch.model.mambaformer.compiled.switch import array, kernels, tensors_only
from bayes_dispatch.model.mambaformer.compiled.threads import prepare_threads, sharing
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]


@pytest.mark.parametrize("columns", [1, 7, 1101])
def test_parts_are_the_product(columns: int) -> None:
    """Of few columns some threads have none."""
    draw = torch.Generator().manual_seed(6)
    x, weight = torch.randn(5, 3000, generator=draw), torch.randn(columns, 3000, generator=draw)
    for parts in (1, 2, 3, 8):
        out = torch.full((5, columns), torch.nan)
        kernels()._multiply_in_parts(array(x), array(weight), out.numpy(), parts)
        torch.testing.assert_close(out, x @ weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("hidden", [False, True])
def test_parts_are_attention(hidden: bool) -> None:
    """To rows of any number of keys, in one piece or many, some wholly hidden; the same bits at each call."""
    draw = torch.Generator().manual_seed(7)
    ends = [3000, 0, 1, 1023, 1024, 1025, 4100]
    most, nothing = max(ends), torch.empty(len(ends), 2, 0, 1)
    queries = torch.randn(len(ends), 6, 1, 8, generator=draw)  # three to a head of keys
    keys, values = (torch.randn(len(ends), 2, most, 8, generator=draw) for _ in range(2))
    seen = torch.arange(most) < torch.tensor(ends)[:, None]
    visible = torch.empty(len(ends), 0, dtype=torch.bool)
    if hidden:
        visible = torch.rand(len(ends), most, generator=draw) < 0.9
        visible[0, :1024] = False
        visible[2:, 0] = True
        seen &= visible
    expected = F.scaled_dot_product_attention(
        queries, keys, values, seen[:, None, None], scale=0.7, enable_gqa=True
    ).nan_to_num()  # a row of no keys
    kept = tuple(array(tensor) for tensor in (keys, values, nothing, nothing))
    for parts in (1, 2, 3, 8):
        found = [np.full((len(ends), 48), np.nan, np.float32) for _ in range(3)]
        for out in found:
            arguments = kept, array(visible), np.array(ends), 0.7, out
            kernels()._attend(array(queries.reshape(len(ends), 48)), parts, *arguments)
        torch.testing.assert_close(torch.from_numpy(found[0]).reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)
        assert (found[0] == found[1]).all()
        assert (found[0] == found[2]).all()


def test_decoding_at_once(make_model: MakeModel) -> None:
    """After a context whose attention two threads share: what tensors give, and the same bits from each of a crowd."""
    config = MambaFormerConfig(blocks=("attention", "mamba2"), d_model=64, n_heads=4, n_kv_heads=2)
    model, ids = make_model(config), torch.randint(0, 258, (2, 1200), generator=torch.Generator().manual_seed(1))
    assert 2 * config.d_model * ids.numel() >= 2 * kernels().SHARED

    def decode(cache: Any) -> Tensor:
        torch.set_num_threads(2)
        with torch.no_grad():
            return torch.cat([model(token, cache=cache).logits for token in ids[:, :8].split(1, dim=1)])

    try:
        with torch.no_grad():
            model(ids, cache=(cache := model.init_cache(2, 1210)))
        with tensors_only():
            expected = decode(cache.clone())
        alone = decode(cache.clone())
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)
        caches = [cache.clone() for _ in range(12)]
        with ThreadPoolExecutor(4) as crowd:
            assert all(torch.equal(one, alone) for one in crowd.map(decode, caches))
        for state in caches[1:]:
            for mine, first in zip(state.states, caches[0].states, strict=True):
                assert all(torch.equal(tensor, first.tensors()[name]) for name, tensor in mine.tensors().items())
    finally:
        torch.set_num_threads(1)


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


PROGRAM = """
import multiprocessing, os, time
import torch
import bayes_dispatch as bd
import bayes_dispatch.model.mambaformer.network  # without it numba and torch may have an OpenMP each
from bayes_dispatch.model.mambaformer.compiled.switch import kernels
from bayes_dispatch.model.mambaformer.compiled.threads import passing, prepare_threads
from bayes_dispatch.model.mambaformer.products import times

x, weight = torch.ones(8, 512), torch.ones(512, 512)

def product():
    with torch.no_grad():
        return bool((times(x, weight) == 512).all())

def in_a_child(work):
    child = os.fork()
    if child == 0:
        os._exit(0 if work() else 3)
    assert os.waitpid(child, 0)[1] == 0

def tasks():
    return len(os.listdir("/proc/self/task")) if counted else None

def settled():  # once those that are ending have ended
    found = None
    while (now := tasks()) != found:
        found = now
        time.sleep(1)
    return found

def are(count):  # soon
    until = time.monotonic() + 60
    while counted and tasks() != count:
        assert time.monotonic() < until, (tasks(), count)
        time.sleep(0.02)

torch.set_num_threads(1)
in_a_child(lambda: product() and torch.get_num_threads() == 1)  # a fork that comes first

kernels()
counted = os.path.isdir("/proc/self/task") and prepare_threads() > 1
before = settled()
assert product() and torch.get_num_threads() == 1
are(before)  # one thread does all
multiprocessing.set_start_method("spawn")  # which nobody has set

torch.set_num_threads(2)
assert passing(product)
are(before)  # two share it, and end with the one that asked
assert product()
are(before and before + 1)
in_a_child(product)  # where one thread does all
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_nobody_else_sees_them() -> None:
    """After a fork, first or last, one thread does all; torch's number and the way to start processes stay; there are
    no more threads than share a product, where numba has OpenMP, and Linux counts them."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
