"""Several engines answer as one, also when one of them ends amid: nothing is told twice, and nothing that differs."""

import pickle
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import monotonic, sleep
from typing import Any

import pytest

from bayes_dispatch.errors import PromptError
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import as_blend
from bayes_dispatch.inference.two_pass.prompts import Writing
from bayes_dispatch.serving.engine import BatchedEngine, Limits
from bayes_dispatch.serving.replicas import TRIES, LostError, ReplicatedEngine, events_of
from bayes_dispatch.serving.work import BusyError, Engine, EngineState, Event, Work
from tests.serving.told import Told


class Here:
    """Engines of this process. Like a router, it does not know that one has ended before it is told so."""

    def __init__(self, **engines: Engine) -> None:
        self.engines = engines
        self.taken: list[str] = []
        self.known, self.asked = True, 0  # of states

    async def run(self, work: Work, tried: Sequence[str]) -> AsyncGenerator[tuple[str | None, Sequence[Event]], None]:
        name = next((name for name in self.engines if name not in tried), next(iter(self.engines)))
        self.taken.append(name)
        yield name, []
        async for events in events_of(self.engines[name], work):
            yield name, events

    async def states(self) -> Mapping[str, EngineState] | None:
        self.asked += 1
        return {name: engine.state for name, engine in self.engines.items()} if self.known else None


class Reseeded(Here):
    """Whose second engine writes something else."""

    def run(self, work: Work, tried: Sequence[str]) -> AsyncGenerator[tuple[str | None, Sequence[Event]], None]:
        return super().run(replace(work, seed=work.seed + 1000 * len(tried)), tried)


class Unreached(Here):
    """Whose engines cannot be reached at first."""

    async def run(self, work: Work, tried: Sequence[str]) -> AsyncGenerator[tuple[str | None, Sequence[Event]], None]:
        if len(self.taken) < 2 * TRIES:
            self.taken.append("nobody")
            return
        async for told in super().run(work, tried):
            yield told


Start = Callable[..., ReplicatedEngine]


@pytest.fixture(autouse=True)
def _unchecked(unchecked: None) -> None:
    """As for one engine."""


@pytest.fixture
def here(cut64: Any) -> Iterator[Callable[..., Here]]:
    """Makes two engines, and ends them."""
    made: list[BatchedEngine] = []

    def make(kind: type[Here] = Here, **limits: int) -> Here:
        engines = {name: BatchedEngine(cut64, Limits(**limits)) for name in ("first", "second")}
        made.extend(engines.values())
        return kind(**engines)

    yield make
    for engine in made:
        engine.close(0)


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[ReplicatedEngine] = []

    def make(replicas: Here) -> ReplicatedEngine:
        made.append(ReplicatedEngine(replicas))
        return made[-1]

    yield make
    for engine in made:
        engine.close(0)


def work(system: Any, tokens: int = 8, seed: int = 0, blend: str = "posterior_predictive(6)", **more: Any) -> Work:
    prompt = more.pop("prompt", "ab>ba\nab>")
    return Work(
        prompt, as_blend(blend, system.experts.components), Writing.of(tokens, True, 1.5, None, None), seed, **more
    )


def alone(system: Any, asked: Work) -> str:
    assert asked.writing is not None
    return (
        TwoPassGenerator(system)
        .generate(
            [asked.prompt],  # type: ignore[list-item]
            blend=asked.blend,
            max_new_tokens=asked.writing.max_new_tokens,
            do_sample=True,
            temperature=1.5,
            seed=asked.seed,
        )
        .texts[0]
    )


def until(true: Callable[[], bool]) -> None:
    deadline = monotonic() + 30
    while not true():
        assert monotonic() < deadline
        sleep(0.002)


def idle(engine: Engine) -> bool:
    state = engine.state
    return not (state.running or state.waiting or state.rows)


@pytest.mark.parametrize("after", [0, 1, 12])
def test_what_an_ended_replica_began_another_goes_on_with(
    cut64: Any, here: Callable[..., Here], start: Start, after: int
) -> None:
    """Whether it has told nothing, its posterior, or a dozen tokens."""
    replicas = here(running=3, piece=4)
    engine, heard = start(replicas), [Told() for _ in range(6)]
    assert isinstance(engine, Engine)
    works = [
        work(cut64, 30, seed, ["posterior_predictive(6)", "reverse", "refined_mean(6)"][seed % 3]) for seed in range(6)
    ]
    for each, own in zip(works, heard, strict=True):
        engine.submit(each, own)
    first = heard[0]
    until(lambda: bool(replicas.taken) and (first.begun is not None or not after) and len(first.tokens) >= after - 1)
    replicas.engines["first"].close(0)
    for each, own in zip(works, heard, strict=True):
        assert own.why() == "length"
        assert own.text == alone(cut64, each)
    assert "second" in replicas.taken
    assert idle(replicas.engines["second"])


def test_another_text_is_an_error(cut64: Any, here: Callable[..., Here], start: Start) -> None:
    replicas, heard = here(Reseeded), Told()
    engine = start(replicas)
    engine.submit(work(cut64, 400), heard)
    until(lambda: len(heard.tokens) > 20)
    replicas.engines["first"].close(0)
    assert heard.why() == "broken"
    assert isinstance(heard.ended and heard.ended.error, LostError)
    until(lambda: idle(replicas.engines["second"]))


def test_who_loses_every_replica_is_told(cut64: Any, here: Callable[..., Here], start: Start) -> None:
    replicas, heard = here(), Told()
    engine = start(replicas)
    for each in replicas.engines.values():
        each.close(0)
    engine.submit(work(cut64), heard)
    assert heard.why() == "broken"
    assert isinstance(heard.ended and heard.ended.error, LostError)
    assert len(replicas.taken) == TRIES


def test_who_reaches_no_replica_waits_for_one(cut64: Any, here: Callable[..., Here], start: Start) -> None:
    """However often, since nothing was broken by the request."""
    heard, asked = Told(), work(cut64)
    start(here(Unreached)).submit(asked, heard)
    assert heard.why() == "length"
    assert heard.text == alone(cut64, asked)


def test_a_full_replica_passes_work_on(cut64: Any, here: Callable[..., Here], start: Start) -> None:
    """Where all are full, the client hears so, with seconds to wait."""
    replicas = here(running=1, waiting=1)
    engine, heard = start(replicas), []
    for n in range(5):
        heard.append(Told())
        engine.submit(work(cut64, 1000, seed=n), heard[-1])
        until(
            lambda n=n: (
                heard[n].ended is not None
                or sum(e.state.running + e.state.waiting for e in replicas.engines.values()) == n + 1
            )
        )  # type: ignore[misc]
        if n % 2 == 0 and n < 4:
            until(lambda: heard[-1].begun is not None)  # it runs, and waits no more
    assert [own.ended is None for own in heard] == [True] * 4 + [False]
    assert heard[4].why() == "failed"
    refused = heard[4].ended and heard[4].ended.error
    assert isinstance(refused, BusyError)
    assert refused.retry_after >= 1
    assert replicas.taken == ["first", "first", "first", "second", "first", "second", "first", "second"]


def test_who_cancels_frees_the_rows_of_its_replica(cut64: Any, here: Callable[..., Here], start: Start) -> None:
    replicas, heard = here(), Told()
    ticket = start(replicas).submit(work(cut64, 3000), heard)
    until(lambda: len(heard.tokens) > 3)
    ticket.cancel()
    assert heard.why() == "cancelled"
    until(lambda: idle(replicas.engines["first"]))
    ticket.cancel()


def test_patience_counts_from_the_beginning(cut64: Any, here: Callable[..., Here], start: Start) -> None:
    replicas, heard = here(), Told()
    start(replicas).submit(work(cut64, 3000, patience=0.1), heard)
    assert heard.why() == "late"
    until(lambda: idle(replicas.engines["first"]))


def test_what_a_replica_refuses_is_told(cut64: Any, here: Callable[..., Here], start: Start) -> None:
    heard = Told()
    start(here()).submit(work(cut64, prompt=""), heard)
    assert heard.why() == "failed"
    assert isinstance(heard.ended and heard.ended.error, PromptError)


def test_closing_drains_and_then_cuts_off(cut64: Any, here: Callable[..., Here], start: Start) -> None:
    replicas = here()
    for patience, reason in ((30, "length"), (0, "closed")):
        engine, heard = start(replicas), Told()
        engine.submit(work(cut64, 40 if patience else 3000), heard)
        until(lambda own=heard: own.begun is not None)  # type: ignore[misc]
        engine.close(patience)
        assert heard.why() == reason
        assert engine.state.closing
        with pytest.raises(BusyError, match="shutting down"):
            engine.submit(work(cut64), Told())
        until(lambda: idle(replicas.engines["first"]))


def test_the_state_is_of_all_replicas(
    cut64: Any, here: Callable[..., Here], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts stay when a replica goes; without any, nothing is served; it is as it was where nothing is known."""
    monkeypatch.setattr("bayes_dispatch.serving.replicas.REPORTS", 0.01)
    replicas, heard = here(), [Told(), Told()]
    engine = start(replicas)
    for name, own in zip(("first", "second"), heard, strict=True):
        replicas.engines[name].submit(work(cut64, 5), own)
        assert own.why() == "length"
    until(lambda: engine.state.new_tokens == 10)
    del replicas.engines["first"]
    until(lambda: len(engine._alive) == 1)
    assert engine.state.new_tokens == 10
    assert (engine.state.running, engine.state.rows, engine.state.closing) == (0, 0, False)
    replicas.known, known = False, replicas.asked
    gone = replicas.engines.pop("second")
    until(lambda: replicas.asked > known + 2)
    assert engine.state.serves
    replicas.known = True
    until(lambda: not engine.state.serves)
    replicas.engines["second"] = gone
    until(lambda: engine.state.serves)


def test_a_refusal_comes_whole_from_another_process() -> None:
    found = pickle.loads(pickle.dumps(BusyError("full", 7)))
    assert (type(found), str(found), found.retry_after) == (BusyError, "full", 7)
