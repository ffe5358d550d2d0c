"""Answers are those of ``generate`` and of a chat, whatever runs beside them; rows are freed, owners take turns,
caches are bounded, and what fails fails alone."""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from threading import Thread
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bayes_dispatch.errors import BayesDispatchError, ConfigError, PromptError, PromptTooLongError, TensorError
from bayes_dispatch.inference.chat.form import Form
from bayes_dispatch.inference.chat.state import Transcript
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import Blend, Particles, PosteriorMean, as_blend
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.inference.two_pass.prompts import Writing
from bayes_dispatch.inference.two_pass.readers import CachedReader
from bayes_dispatch.model.generation.sampling import Sampling
from bayes_dispatch.serving.engine import READ_AT_ONCE, BatchedEngine, Limits
from bayes_dispatch.serving.reading import Heard, Reading, hear
from bayes_dispatch.serving.waiting import Request, WaitingLine
from bayes_dispatch.serving.work import Begun, BusyError, Ended, Engine, Event, Message, Ticket, Work
from tests.serving.told import Held, Told

PROMPTS = ["ab>ba\nab>", "1+2=3\n" * 6, "9", "ba>ab\nabc>" * 3, "12+1="]
BLENDS = ["posterior_predictive(6)", "posterior_mean", "reverse", "refined_mean(6)", "base", "thompson_sample"]


@pytest.fixture(autouse=True)
def _unchecked(unchecked: None) -> None:
    """The engine's thread is timed against; checks of every shape would only slow it."""


@pytest.fixture(params=["cut64", "llama64", "hybrid64", "headless64", "embedded64"])
def system(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def start() -> Iterator[Callable[..., BatchedEngine]]:
    """Makes engines, and ends them."""
    made = []

    def make(system: Any, **limits: int) -> BatchedEngine:
        engine = BatchedEngine(system, Limits(**limits))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close(0)


def work(
    system: Any, prompt: Any = "ab>", blend: str = "base", tokens: int = 8, seed: int = 0, **settings: Any
) -> Work:
    writing = Writing.of(tokens, True, 1.5, settings.pop("stop", None))
    return Work(prompt, named(system, blend), writing, seed, **settings)


def named(system: Any, blend: str) -> Blend:
    return as_blend(blend, system.experts.components)


def run(engine: BatchedEngine, works: list[Work]) -> list[Told]:
    heard = [Told() for _ in works]
    for each, own in zip(works, heard, strict=True):
        engine.submit(each, own)
    for own in heard:
        own.why()
    return heard


def test_answers_are_those_of_generate_whatever_runs_beside(system: Any, start: Callable[..., BatchedEngine]) -> None:
    """Of every blend at once, of lengths of their own, read in pieces and, half of them, at once."""
    generator = TwoPassGenerator(system)
    works = [
        work(
            system,
            PROMPTS[(n + n // 6) % 5],
            BLENDS[n % 6],
            tokens=3 + 3 * (n % 3),
            seed=n,
            stop="a" if n % 4 == 3 else None,
        )
        for n in range(12)
    ]
    answers = [
        generator.generate(
            [each.prompt], blend=each.blend, max_new_tokens=each.writing.max_new_tokens, do_sample=True,  # type: ignore[list-item,union-attr]
            temperature=1.5, seed=each.seed, stop=list(each.writing.stops) or None,  # type: ignore[union-attr]
        )
        for each in works
    ]  # fmt: skip
    for piece, some in ((2, works), (256, works[:6])):
        engine, read, written = start(system, piece=piece, running=4), 0, 0
        assert isinstance(engine, Engine)
        for each, own, alone in zip(some, run(engine, some), answers, strict=False):
            assert each.writing is not None
            assert own.ended is not None
            assert own.ended.error is None
            count = alone.lengths[0]
            assert [token.token_id for token in own.tokens] == alone.token_ids[0, :count].tolist()
            assert own.text == alone.texts[0]
            for name in ("log_probability", "predictive_entropy", "mutual_information"):
                plural = name.replace("probability", "probabilities")
                told = [getattr(token, name) for token in own.tokens]
                np.testing.assert_allclose(told, getattr(alone, plural)[0, :count], atol=1e-7)
            np.testing.assert_allclose([token.weights for token in own.tokens], alone.paths[0][-count:], atol=1e-7)
            assert own.begun is not None
            np.testing.assert_allclose(own.begun.posterior.weights, alone.posterior.weights, atol=1e-7)
            assert own.begun.prompt_tokens == len(system.tokenizer.tokenize(each.prompt).ids)
            read, written = read + own.begun.prompt_tokens, written + len(own.tokens)
            stopped = own.text.endswith("a") and each.writing.stops
            ended = stopped or own.tokens[-1].token_id in system.tokenizer.ends
            assert own.ended.reason == ("stop" if ended else "length")
        state = engine.state
        assert (state.waiting, state.running, state.rows, state.cache_bytes) == (0, 0, 0, 0)
        assert (state.new_tokens, state.prompt_tokens) == (written, read)


def test_a_conversation_is_that_of_a_chat(system: Any, start: Callable[..., BatchedEngine]) -> None:
    """Its first reply; a system's words come before the user's and are no evidence."""
    engine = start(system)
    said = tuple(Message("user", words) for words in ("ab>ba\nab>",))
    chat = TwoPassGenerator(system).chat(blend=named(system, "posterior_predictive(6)"), seed=3)
    turn = chat.say(said[0].content, 8, do_sample=True, temperature=1.5)
    form = Form.of(system.tokenizer)
    asked = work(system, said, "posterior_predictive(6)", seed=3, stop=form.stop)
    (own,) = run(engine, [asked])
    assert own.text == turn.text
    assert [token.token_id for token in own.tokens] == turn.token_ids.tolist()
    longer = (Message("system", "1+2=3"), *said, Message("assistant", "ba\n"), Message("user", "b>"))
    heard = hear(system.tokenizer, form, None, replace(asked, prompt=longer))
    assert heard.transcript.data == b"1+2=3\n\nab>ba\nab>ba\nb>"
    assert heard.transcript.said[0] == b"ab>ba\nab>b>"
    cut_off = (*longer[:2], Message("assistant", "ba"), longer[3])  # as servers send it
    if form.stop is not None:
        assert (
            hear(system.tokenizer, form, None, replace(asked, prompt=cut_off)).transcript.data == heard.transcript.data
        )
    assert int(heard.transcript.own.sum()) == len(system.tokenizer.tokenize("ba\n", begin=False).ids)


@pytest.mark.parametrize(
    "roles", [(), ("assistant",), ("system",), ("user", "assistant"), ("user", "user"), ("user", "system", "user")]
)
def test_turns_of_no_conversation_are_refused(
    cut64: Any, start: Callable[..., BatchedEngine], roles: tuple[str, ...]
) -> None:
    turns = tuple(Message(role, "ab") for role in roles)
    with pytest.raises(ConfigError, match="expected turns"):
        start(cut64).submit(work(cut64, turns), Told())


def test_a_prompt_can_be_dispatched_alone(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    (own,) = run(start(cut64), [replace(work(cut64, "ab>ba\n", seed=5), writing=None)])
    assert own.why() == "dispatched"
    assert own.tokens == []
    assert own.begun is not None
    alone = TwoPassGenerator(cut64).generate(["ab>ba\n"], blend="base", max_new_tokens=1, seed=5)
    np.testing.assert_allclose(own.begun.posterior.weights, alone.posterior.weights)


def test_what_is_told_of_a_prompt_is_small_to_send(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    """Though a calibrated posterior has the whole dispatcher."""
    known = first_pass(cut64.model, cut64.tokenizer, ["ab>ba\n"] * 4, cut=cut64.cut).evidence
    calibrated = copy.copy(cut64.dispatcher).calibrate(known, [0] * 4)
    system = replace(cut64, dispatcher=calibrated)
    asked = replace(work(cut64, "ab>ba\n", seed=5), writing=None)
    (own,), (plain,) = run(start(system), [asked]), run(start(cut64), [asked])
    assert len(pickle.dumps(own.begun)) == len(pickle.dumps(plain.begun))


def test_reading_alone_holds_up_no_cancelling(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    """Prompts that are dispatched alone, one after the other: the first of them only may still end."""
    engine, heard = start(cut64, piece=16), [Told() for _ in range(6)]
    asked = replace(work(cut64, "ab>ba\n" * 400), writing=None)
    for ticket in [engine.submit(asked, own) for own in heard]:
        ticket.cancel()
    assert [own.why() for own in heard] == ["cancelled"] * 6


def test_what_nobody_waits_for_is_dropped_and_frees_its_rows(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    """Cancelled before, while it is read or written, and late; what stays is as it would have been."""
    engine = start(cut64, piece=1)
    long = [work(cut64, "ab>ba\n" * 20, "posterior_predictive(6)", 400, seed=n) for n in range(3)]
    heard, tickets = [Told() for _ in range(5)], list[Ticket]()
    for each, own in zip(long, heard, strict=False):
        tickets.append(engine.submit(each, own))
    stays = work(cut64, seed=9, tokens=30)
    tickets.append(engine.submit(stays, heard[3]))
    engine.submit(replace(long[0], patience=0.05), heard[4])
    while not heard[0].tokens:
        sleep(0.01)
    for ticket in tickets[:3]:
        ticket.cancel()
    assert [own.why() for own in heard[:3]] == ["cancelled"] * 3
    assert heard[4].why() == "late"
    assert heard[3].why() in ("length", "stop")
    (again,) = run(engine, [stays])
    assert heard[3].text == again.text
    for ticket in tickets:
        ticket.cancel()  # harmless
    assert engine.state.rows == engine.state.cache_bytes == 0


def test_caches_stay_within_their_bound(llama64: Any, start: Callable[..., BatchedEngine]) -> None:
    """What has no room beside others waits for it, what never has any is refused; all else is answered."""
    probe = start(llama64)
    for rows, said in ((20, 18), (13, 12)):  # those of two of six particles, and six or none of what reads a third
        bound = probe._bytes(rows, 60, said=said)
        engine, most = start(llama64, cache_bytes=bound), 0
        heard = [Told() for _ in range(8)]
        for n, own in enumerate(heard):
            engine.submit(work(llama64, "ab>" * 5, "posterior_predictive(6, merge=0.0)", 30, seed=n), own)
        while not all(own.over.is_set() for own in heard):
            most = max(most, engine.state.cache_bytes)
            sleep(0.001)
        assert {own.why() for own in heard} <= {"length", "stop"}
        assert 0 < most <= bound
    for never in (work(llama64, "ab", tokens=500), work(llama64, "ab>" * 5, "posterior_predictive(40)", 60)):
        with pytest.raises(ConfigError, match=r"fit in .* fewer tokens or draws"):
            engine.submit(never, Told())


def test_what_reads_a_prompt_is_counted(llama64: Any, start: Callable[..., BatchedEngine]) -> None:
    """The row of the first pass, and what refines particles beside these."""
    probe = start(llama64)
    asked = work(llama64, "ab>" * 40, "refined_mean(6)", 2)
    tokens = probe.submit(asked, Told()).tokens
    rows = 8  # of the first pass, six particles and their mean
    bound = probe._bytes(rows, tokens, tokens, said=6)
    with pytest.raises(ConfigError, match=f"got {rows} rows of {tokens} tokens"):
        start(llama64, cache_bytes=bound - 1).submit(asked, Told())
    (own,) = run(start(llama64, cache_bytes=bound), [asked])
    assert own.why() in ("length", "stop")
    engine, own, seen = start(llama64, piece=1), Told(), set[tuple[int, bool]]()
    engine.submit(asked, own)
    while not own.over.is_set():
        state = engine.state
        if state.running and not own.tokens:
            seen.add((state.rows, state.cache_bytes > 0))
        sleep(0.001)
    assert (1, True) in seen
    assert (2, True) < max(seen) <= (8, True)  # equal particles are one row


def test_a_first_pass_off_the_text_alone_has_no_row(bundle64: Any) -> None:
    """No expert leaves a block below; then the model is read for views of its states alone."""
    parts = {name: getattr(bundle64, name) for name in ("model", "tokenizer", "experts")}
    asked = replace(work(bundle64, "ab>ba"), writing=None)
    for views, rows in (({"counts"}, 0), ({"counts", "hidden"}, 1)):
        system: Any = SimpleNamespace(**parts, dispatcher=SimpleNamespace(views=views))
        heard = hear(system.tokenizer, Form.of(system.tokenizer), None, asked)
        reading = Reading(system, heard, asked, 2, lambda _: None)
        with torch.no_grad():
            assert not reading.step()
        held, nbytes = reading.held
        assert (held, nbytes > 0) == (rows, rows > 0)


def test_what_is_kept_between_the_passes_is_counted(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    """The blocks that are adapted read what the first pass leaves of each token."""
    probe, asked = start(cut64), replace(work(cut64, "ab>" * 300), writing=None)
    tokens = probe.submit(asked, Told()).tokens
    bound = probe._bytes(1, tokens, tokens)
    assert bound > probe._bytes(1, tokens)
    with pytest.raises(ConfigError, match="fit in"):
        start(cut64, cache_bytes=bound - 1).submit(asked, Told())
    engine, own, most = start(cut64, cache_bytes=bound, piece=2), Told(), 0
    engine.submit(asked, own)
    while not own.over.is_set():
        most = max(most, engine.state.cache_bytes)
        sleep(0.001)
    assert own.why() == "dispatched"
    assert 0 < most <= bound


def test_what_a_long_request_left_is_counted(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    """Rows keep the room of the longest that was beside them; readers that have joined keep nothing of their own."""
    probe = start(cut64)
    bound = probe._bytes(2, 3000, said=2) * 2
    engine, heard, stays = start(cut64, cache_bytes=bound), [Told() for _ in range(12)], Told()
    long = Told()
    engine.submit(work(cut64, "ab>", tokens=400, seed=1), stays)
    ticket = engine.submit(work(cut64, "ab>", tokens=2900), long)
    while not long.tokens:
        sleep(0.001)
    ticket.cancel()
    most = 0
    for n, own in enumerate(heard):
        engine.submit(work(cut64, "ab>", tokens=20, seed=n), own)
    while not all(own.over.is_set() for own in heard):
        most = max(most, engine.state.cache_bytes)
        sleep(0.001)
    assert 0 < most <= bound


def test_an_engine_that_breaks_tells_everybody(
    cut64: Any, start: Callable[..., BatchedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, heard = start(cut64, running=1), [Told() for _ in range(3)]

    def broken(self: BatchedEngine, **_: int) -> None:
        raise MemoryError("no more")

    for own in heard:
        engine.submit(work(cut64, tokens=500), own)
    with monkeypatch.context() as patch:
        patch.setattr(BatchedEngine, "_publish", broken)
        assert heard[2].why() == "broken"
        assert {own.why() for own in heard} <= {"broken", "length", "stop"}
    assert engine.state.closing
    with pytest.raises(BusyError):
        engine.submit(work(cut64), Told())


def test_more_than_can_wait_is_refused(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    engine = start(cut64, waiting=2, running=1, waiting_tokens=700)
    first = Told()
    ticket = engine.submit(work(cut64, tokens=5000), first)
    while not first.tokens:
        sleep(0.01)
    heard = [Told(), Told()]
    engine.submit(work(cut64, tokens=300), heard[0])
    with pytest.raises(BusyError, match="700 waiting tokens") as refused:
        engine.submit(work(cut64, tokens=600), Told())
    assert 1 <= refused.value.retry_after <= 60
    engine.submit(work(cut64, tokens=3), heard[1])
    with pytest.raises(BusyError, match="at most 2 waiting"):
        engine.submit(work(cut64, tokens=3), Told())
    assert (engine.state.waiting, engine.state.running) == (2, 1)
    ticket.cancel()
    assert {own.why() for own in heard} <= {"length", "stop"}


def test_what_one_has_many_particles_beside_is_counted(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    """Where one has many, what may follow takes as much of all others."""
    probe, asked = start(cut64), [work(cut64, "a", "base", 40, seed=n) for n in range(12)]
    asked[3] = work(cut64, "a", "posterior_predictive(30, merge=0.0)", 40)
    bound = probe._bytes(40, 44, 44, said=60)
    engine, heard, most = start(cut64, cache_bytes=bound), [Told() for _ in asked], 0
    for each, own in zip(asked, heard, strict=True):
        engine.submit(each, own)
    while not all(own.over.is_set() for own in heard):
        most = max(most, engine.state.cache_bytes)
        sleep(0.001)
    assert {own.why() for own in heard} <= {"length", "stop"}
    assert probe._bytes(31, 41, said=30) <= most <= bound


def test_a_long_prompt_holds_up_no_short_one(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    """All that have begun take turns, piece by piece."""
    engine, first, order = start(cut64, piece=4), Held(), list[str]()

    def telling(name: str, own: Told) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            order.extend([name] * isinstance(event, Begun | Ended))
            own(event)

        return tell

    long, short = Told(), Told()
    engine.submit(work(cut64, tokens=1), first)
    engine.submit(work(cut64, "ab>ba\n" * 20, "posterior_predictive(6)", 1), telling("long", long))
    engine.submit(work(cut64, "a", tokens=1), telling("short", short))
    first.go.set()
    assert {long.why(), short.why()} <= {"length", "stop"}
    assert order == ["short", "short", "long", "long"]


def test_one_owner_cannot_have_all_turns_of_those_that_read(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    engine, first, order = start(cut64, piece=4), Held(), list[str]()

    def telling(name: str, own: Told) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            order.extend([name] * isinstance(event, Begun))
            own(event)

        return tell

    several, short = [Told() for _ in range(READ_AT_ONCE)], Told()
    engine.submit(work(cut64, tokens=1), first)
    for told in several:
        engine.submit(work(cut64, "ab>ba\n" * 20, "posterior_predictive(6)", 1, owner="a"), telling("a", told))
    engine.submit(work(cut64, "a", tokens=1, owner="b"), telling("b", short))
    first.go.set()
    assert {told.why() for told in (*several, short)} <= {"length", "stop"}
    assert order == ["b", *["a"] * READ_AT_ONCE]


def test_one_owner_cannot_have_all_places_that_others_wait_for(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    engine, first, order = start(cut64, running=2), Held(), list[str]()
    engine.submit(work(cut64, tokens=5000, owner="a"), first)
    while first.begun is None:
        sleep(0.001)
    for name in ("a1", "a2", "b1", "b2"):

        def tell(event: Event, name: str = name) -> None:
            order.extend([name] * isinstance(event, Begun))

        engine.submit(work(cut64, tokens=1, owner=name[0]), tell)
    first.go.set()
    while len(order) < 4:
        sleep(0.001)
    assert order == ["b1", "b2", "a1", "a2"]


@dataclass
class Late:
    """A blend that cannot be made of the second posterior that it gets."""

    name: str = "late"
    asked: int = 0

    def particles(self, posterior: Any) -> Particles:
        self.asked += 1
        if self.asked > 1:
            raise ConfigError("expected another posterior, got this one")
        return PosteriorMean().particles(posterior)


class Grows(Late):
    """A blend of more particles of the second posterior."""

    def particles(self, posterior: Any) -> Particles:
        self.asked += 1
        return as_blend(f"posterior_predictive({2 + self.asked})").particles(posterior)


def test_a_blend_that_needs_more_than_was_counted_fails(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    (own,) = run(start(cut64), [replace(work(cut64), blend=Grows())])
    assert own.why() == "failed"
    assert "at most 4 rows, as of another prompt, got 5 of late" in str(own.ended and own.ended.error)


@pytest.mark.parametrize(("merge", "last"), [(0.0, 1), (0.003, 32)])
@pytest.mark.parametrize("rows", [1, 6])
def test_a_piece_is_of_all_rows(cut64: Any, rows: int, merge: float, last: int) -> None:
    """So that many particles hold up the others no longer than one; those that may merge are compared over a tail."""
    piece, depth = 12, cut64.model.depth
    asked = work(cut64, "ab>ba\n" * 10, f"posterior_predictive({rows}, merge={merge})")
    heard = hear(cut64.tokenizer, Form.of(cut64.tokenizer), None, asked)
    reading, done = Reading(cut64, heard, asked, piece, lambda _: None), [0]
    with torch.no_grad():
        while not reading.step():
            if reading._reader is not None:
                done.append(reading._reader.evaluated)
    steps = np.diff([*done, reading.decoding.reader.evaluated])
    assert len(steps) > (len(heard) - last) * rows // piece
    assert steps[:-1].max() <= piece * depth
    assert steps[-1] <= max(piece, rows * last) * depth


def test_a_model_that_cannot_read_on_reads_a_prompt_at_once(llama64: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each pass, however many rows there are."""
    monkeypatch.setattr(llama64.model.parts, "continues", False)
    asked = work(llama64, "ab>ba\n" * 10, "posterior_predictive(6)")
    heard = hear(llama64.tokenizer, Form.of(llama64.tokenizer), None, asked)
    reading = Reading(llama64, heard, asked, 2, lambda _: None)
    with torch.no_grad():
        assert [reading.step() for _ in range(3)] == [False, False, True]


def test_owners_take_turns() -> None:
    """But for who has half of the places while another waits; what has no room is not overtaken."""
    line, three = WaitingLine(100, 10**6), Heard((0, 1, 2), Transcript.empty(), frozenset(), None)

    def add(names: str) -> None:
        for name in names.split():
            given: Any = SimpleNamespace(owner=name[0], writing=None, name=name)
            line.add(Request(given, three, lambda _: None, np.inf), 1)

    def take(busy: str, places: int = 4, room: str = "abc") -> str | None:
        has: Any = [SimpleNamespace(work=SimpleNamespace(owner=owner)) for owner in busy]
        found: Any = line.next(has, places, lambda request: request.work.owner in room)
        return None if found is None else found.work.name

    add("a1 a2 a3 b1")
    assert take("aa") == "b1"
    assert take("aa") == "a1"
    assert take("", room="bc") is None
    add("b1 b2 c1")
    assert [take("a"), take("aac", room="b"), take("abb", room="c"), take("ab", 3), take("b", 3)] == [
        "a2",
        "b1",
        "c1",
        "a3",
        "b2",
    ]
    add("a1 a2 a3 b1 c1 b2")
    order = [next_.work.name for next_ in iter(partial(line.next, [], 8, lambda _: True), None)]  # type: ignore[attr-defined]
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(line) == 0


def test_one_owner_cannot_fill_the_line() -> None:
    """Nor can all of them fill more than there is; who has nothing in it may come with much."""
    line = WaitingLine(4, 100)

    def add(owner: str, tokens: int) -> None:
        asked: Any = SimpleNamespace(owner=owner)
        line.add(Request(asked, Heard((0,) * tokens, Transcript.empty(), frozenset(), None), lambda _: None, np.inf), 1)

    add("a", 40)
    with pytest.raises(BusyError, match="at most 50 waiting tokens, got 20 more"):
        add("a", 20)
    add("a", 5)
    with pytest.raises(BusyError, match="at most 2 waiting requests"):
        add("a", 1)
    add("b", 55)
    with pytest.raises(BusyError, match="at most 100 waiting tokens"):
        add("c", 1)
    assert len(line.clear()) == 3
    assert len(line) == 0
    for _ in range(4):  # who has no name has all of it
        add("", 25)
    with pytest.raises(BusyError, match="at most 4 waiting requests"):
        add("", 1)


def test_a_reply_of_no_stated_length_takes_the_room_there_is(cut64: Any) -> None:
    form, asked = Form.of(cut64.tokenizer), work(cut64, (Message("user", "abc"),), tokens=50)
    read = len(hear(cut64.tokenizer, form, None, asked))
    with pytest.raises(PromptTooLongError, match=f"at most 20 tokens with the 50 that follow, got {read}"):
        hear(cut64.tokenizer, form, 20, asked)
    shorter = replace(asked, shorter=True)
    assert hear(cut64.tokenizer, form, 20, shorter).tokens == 20
    assert hear(cut64.tokenizer, form, 90, shorter).tokens == read + 50
    with pytest.raises(PromptError, match="at most"):
        hear(cut64.tokenizer, form, read, shorter)


def test_who_gets_nan_is_told_alone(
    cut64: Any, start: Callable[..., BatchedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, whole = start(cut64), CachedReader.read

    def poisoned(self: CachedReader, tokens: torch.Tensor) -> torch.Tensor:
        said = whole(self, tokens)
        said[tokens == ord("%")] = torch.nan  # after a token that nothing else writes
        return said

    monkeypatch.setattr(CachedReader, "read", poisoned)
    monkeypatch.setattr(
        Sampling, "choose", lambda self, logits, _: torch.full((len(logits),), ord("%" if self.top_k else "a"))
    )
    bad = work(cut64, tokens=200)
    assert bad.writing is not None
    bad = replace(bad, writing=replace(bad.writing, sampling=Sampling(do_sample=True, top_k=3)))
    good, wrong = run(engine, [work(cut64, tokens=200, blend="posterior_mean"), bad])
    assert (good.why(), len(good.tokens), good.text[:3]) == ("length", 200, "aaa")
    assert (wrong.why(), wrong.text) == ("broken", "%")
    assert wrong.ended is not None
    assert isinstance(wrong.ended.error, TensorError)


def test_a_step_that_fails_ends_what_it_was_for_and_nothing_later(
    cut64: Any, start: Callable[..., BatchedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(cut64)
    whole = CachedReader.read

    def broken(self: CachedReader, tokens: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(CachedReader, "read", broken)
        both = run(engine, [work(cut64, seed=n) for n in range(2)])
    assert [own.why() for own in both] == ["broken"] * 2
    assert all(own.ended is not None and isinstance(own.ended.error, MemoryError) for own in both)
    assert CachedReader.read is whole
    (later,) = run(engine, [work(cut64)])
    assert later.why() in ("length", "stop")


def test_a_step_that_fails_leaves_the_prompt_that_is_read(
    cut64: Any, start: Callable[..., BatchedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has sessions of its own."""
    engine, whole, runs, reads = start(cut64, piece=2), CachedReader.read, Told(), Told()
    asked = work(cut64, "ab>ba\n" * 20, "posterior_predictive(6)")
    (alone,) = run(engine, [asked])

    def broken(self: CachedReader, tokens: torch.Tensor) -> torch.Tensor:
        if engine._reading and not runs.over.is_set():
            raise MemoryError("no more")
        return whole(self, tokens)

    monkeypatch.setattr(CachedReader, "read", broken)
    engine.submit(work(cut64, tokens=5000), runs)
    engine.submit(asked, reads)
    assert runs.why() == "broken"
    assert reads.why() == alone.why()
    assert reads.text == alone.text


def test_a_prompt_that_fails_fails_alone(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    engine = start(cut64)
    good, bad = run(engine, [work(cut64, tokens=20), replace(work(cut64), blend=Late())])
    assert good.why() in ("length", "stop")
    assert bad.why() == "failed"
    assert bad.ended is not None
    assert isinstance(bad.ended.error, BayesDispatchError)


class ByLayer:
    """A blend of other weights in each layer."""

    name = "by_layer"

    def particles(self, posterior: Any) -> Particles:
        found = PosteriorMean().particles(posterior)
        return replace(found, layers=found.weights[:, :, None])


def test_what_cannot_be_asked_is_refused_at_once(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    engine = start(cut64)
    for wrong in (
        replace(work(cut64), prompt=""),
        replace(work(cut64), prompt="\ud800"),
        work(cut64, false_alarm_rate=0.1),  # this system has no gate
        work(cut64, abstain=True),
        work(cut64, blend="top_k(40)"),
        work(cut64, blend="posterior_predictive(1000)"),
        replace(work(cut64), blend=ByLayer()),
    ):
        with pytest.raises(BayesDispatchError, match="expected"):
            engine.submit(wrong, Told())


def test_a_listener_that_raises_harms_nobody(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    def fails(_: Event) -> None:
        raise RuntimeError("gone")

    engine, own = start(cut64), Told()
    engine.submit(work(cut64, tokens=300), fails)
    engine.submit(work(cut64, tokens=5), own)
    assert own.why() in ("length", "stop")
    while engine.state.running:
        sleep(0.01)


def test_it_closes_when_all_is_said_or_patience_is_over(cut64: Any) -> None:
    for patience, expected in ((60.0, {"length", "stop"}), (0.0, {"closed"})):
        engine, heard = BatchedEngine(cut64), [Told() for _ in range(3)]
        for own in heard:
            engine.submit(work(cut64, tokens=200), own)
        engine.close(patience)
        assert {own.why() for own in heard} <= expected
        with pytest.raises(BusyError, match="shutting down"):
            engine.submit(work(cut64), Told())
        engine.close(0)


def test_threads_may_ask_at_once(cut64: Any, start: Callable[..., BatchedEngine]) -> None:
    engine = start(cut64, running=3)
    expected = [own.text for own in run(engine, [work(cut64, PROMPTS[n % 5], BLENDS[n % 6], 6, n) for n in range(12)])]
    found: dict[int, str] = {}

    def ask(first: int) -> None:
        for n in range(first, 12, 3):
            (own,) = run(engine, [work(cut64, PROMPTS[n % 5], BLENDS[n % 6], 6, n)])
            found[n] = own.text

    threads = [Thread(target=ask, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(12)] == expected
