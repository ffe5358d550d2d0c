"""The prior's file: what was written is what is read, or one clear line; and no crash leaves anything between."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bayes_dispatch.dispatcher.prior.file import read_prior, update_prior, write_prior
from bayes_dispatch.dispatcher.prior.online import PriorState, label_likelihood, observe, prior_state
from bayes_dispatch.errors import BundleError
from bayes_dispatch.storage import digest

NAMES = ("a", "b", "base")

LIVES = """
import os, signal, sys
import numpy as np
from bayes_dispatch.dispatcher.prior.online import label_likelihood, observe, prior_state
from bayes_dispatch.dispatcher.prior.file import read_prior, update_prior, write_prior

path, names = sys.argv[1], ("a", "b", "base")

def next_state(state):
    return observe(state, label_likelihood(np.array([state.events % 3]), 3))
"""


def after(events: int) -> PriorState:
    """The state after labels 0, 1, 2, 0, …"""
    state = prior_state(np.array([3.0, 3.0, 1.5]), NAMES)
    for event in range(events):
        state = observe(state, label_likelihood(np.array([event % 3]), 3))
    return state


def assert_same(found: PriorState, expected: PriorState) -> None:
    for name in ("mean", "covariance", "initial"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.names, found.events) == (expected.names, expected.events)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_prior(tmp_path / "prior.json", after(3))
    return tmp_path / "prior.json"


def test_round_trip(path: Path) -> None:
    """Bit for bit; over what was there, through links, into new directories; and nothing else stays behind."""
    assert_same(read_prior(path, NAMES), after(3))
    link = path.with_name("link.json")
    link.symlink_to(path)
    write_prior(link, after(5))
    assert link.is_symlink()
    assert_same(read_prior(path, list(NAMES)), after(5))
    write_prior(str(path.parent / "new" / "prior.json"), after(0))
    assert_same(read_prior(str(path.parent / "new" / "prior.json"), NAMES), after(0))
    assert sorted(file.name for file in path.parent.iterdir()) == ["link.json", "new", "prior.json"]


def rewrite(path: Path, **changes: object) -> None:
    """Another content, with a right digest."""
    body = {**json.loads(path.read_text()), **changes}
    body.pop("digest")
    path.write_text(json.dumps({**body, "digest": digest(body)}))


def test_an_update_that_fails_changes_nothing(path: Path) -> None:
    """Whether the change raises, or the file before it is damaged."""

    def change(state: PriorState) -> PriorState:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        update_prior(path, after(0), change)
    assert_same(read_prior(path, NAMES), after(3))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BundleError, match="expected JSON"):
        update_prior(path, after(0), lambda state: state)
    assert [file.name for file in path.parent.iterdir()] == ["prior.json"]


def test_a_full_disk_takes_neither_the_prior_nor_its_backup(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is a second name of the file, as ``cp -al`` makes it."""
    os.link(path, backup := path.with_name("backup.json"))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    def update() -> None:
        update_prior(path, after(0), lambda state: after(state.events + 1))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            update()
    assert_same(read_prior(path, NAMES), after(3))
    update()
    assert_same(read_prior(path, NAMES), after(4))
    assert_same(read_prior(backup, NAMES), after(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b"{}"), "expected format 'serving-prior' in .*, got None"),
        (lambda p: p.write_text(p.read_text().replace('"digest"', '"digits"')), r"expected digest None.*edited"),
        (lambda p: rewrite(p, names=["b", "a", "base"]), r"expected names \['a', 'b', 'base'\] in .*, got \['b', 'a'"),
        (lambda p: rewrite(p, mean=[0.5, 0.5]), r"expected a serving prior in .*, got ConfigError: expected"),
        (lambda p: rewrite(p, mean=[0.5, 0.5, float("nan")]), "expected a serving prior in .*ConfigError"),
        (lambda p: rewrite(p, covariance=None), "expected a serving prior in .*ConfigError"),
        (lambda p: rewrite(p, initial=["x", 1, 2]), "expected a serving prior in .*ValueError"),
        (lambda p: rewrite(p, initial={}), "expected a serving prior in .*TypeError"),
        (lambda p: rewrite(p, events="3"), "expected a serving prior in .*ConfigError"),
        (lambda p: rewrite(p, events=-3), "expected a serving prior in .*ConfigError"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_files(unchecked: None, path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(path)
    with pytest.raises(BundleError, match=f"^{message}[^\n]*$"):
        read_prior(path, NAMES)


def run(script: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LIVES + script, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


@pytest.mark.slow
def test_killed_at_random_moments(path: Path) -> None:
    """Eight lives, each killed within a tenth of a second of its first event: all that was reported is there."""
    script = """
state = read_prior(path, names)
while True:
    state = next_state(state)
    write_prior(path, state)
    print(state.events, flush=True)
"""
    rng, known = np.random.default_rng(0), 3
    for _ in range(8):
        with run(script, path) as process:
            assert process.stdout is not None
            first = int(process.stdout.readline())
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.1))
            process.kill()
            reported = [first, *map(int, process.stdout.read().splitlines())]
        assert first == known + 1
        found = read_prior(path, NAMES)
        assert found.events - reported[-1] in (0, 1)
        assert_same(found, after(found.events))
        known = found.events
    assert known > 3 + 8


@pytest.mark.slow
def test_updates_of_several_processes_all_count(path: Path) -> None:
    """Three update as fast as they can; every read in the meantime is whole, and no temporary file stays."""
    script = """
start = prior_state(np.array([3.0, 3.0, 1.5]), names)
for _ in range(100):
    update_prior(path, start, next_state)
"""
    processes = [run(script, path) for _ in range(3)]
    while any(process.poll() is None for process in processes):
        read_prior(path, NAMES)
    for process in processes:
        with process:
            assert process.returncode == 0
    assert_same(read_prior(path, NAMES), after(303))
    assert [file.name for file in path.parent.iterdir()] == ["prior.json"]
