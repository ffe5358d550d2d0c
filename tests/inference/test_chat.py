"""A chat is what recomputing everything at every turn gives, and its memory is bounded; a stream is what `say` gives.
A turn that fails changes nothing, own bytes are no evidence, bad settings are refused."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.errors import (
    BayesDispatchError,
    ConfigError,
    EvidenceError,
    PromptError,
    TensorError,
    UnknownNameError,
)
from bayes_dispatch.inference.chat.conversation import Conversation
from bayes_dispatch.inference.chat.form import Form
from bayes_dispatch.inference.chat.state import Transcript
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import (
    BestExpert,
    Blend,
    FixedWeights,
    PosteriorMean,
    PosteriorPredictive,
    RefinedMean,
)
from bayes_dispatch.inference.two_pass.first_pass import class_counts, depths_of, first_pass
from bayes_dispatch.inference.two_pass.system import cut_of
from bayes_dispatch.model.backbone import Tokens
from bayes_dispatch.model.generation.sampling import row_generators, row_seeds
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.mambaformer.session import MambaFormerSession
from bayes_dispatch.model.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.inference.chat.state import Turn
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

UNMERGED = PosteriorPredictive(6, merge=0.0)
SAID = ["kfpa>apfk\nbcde>", "1", "37+58=95\n12+11=", "café>\n", "ab>ba\nbc>"]


@dataclass
class SlowChat:
    """The same conversation without caches or running sums: every number from the whole transcript."""

    system: Any
    blend: Blend
    seed: int = 0
    threshold: float = 0.01
    max_context: int = 4096
    own_evidence: bool = False
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    data: bytes = b""
    turns: int = 0

    def say(self, text: str, most: int, stop: str | None, temperature: float | None) -> dict[str, Any]:
        tokenizer = self.system.tokenizer
        new = tokenizer.tokenize(text, begin=False)
        room = self.max_context - len(new.ids) - most
        forgotten = 0
        if len(self.ids) > room:
            forgotten = self.forgotten(min(self.max_context // 2, room))
            at = [*self.spans, (len(self.data), 0)][forgotten][0]
            self.ids, self.own, self.data = self.ids[forgotten:], self.own[forgotten:], self.data[at:]
            self.spans = [(start - at, end - at) for start, end in self.spans[forgotten:]]
        self.add(new.ids, new.spans, text.encode(), own=False)
        seeds = row_seeds(self.seed + 2 * self.turns, [self.data])
        posterior = self.system.dispatcher.posterior(self.evidence(), draws=64, seed=seeds)
        given = self.blend.particles(posterior)
        divergence = self.divergence(given) if self.turns else float("nan")
        adapted = not self.turns or divergence > self.threshold
        if adapted:
            self.begin(given)
        else:
            self.count(self.weights, range(len(self.ids) - len(new.ids), len(self.ids)))
        heard, weights = self.joint, self.joint.sum(0) @ self.weights
        rng = row_generators(self.seed + 2 * self.turns + 1, [self.data])[0]
        stream = tokenizer.stream([*tokenizer.tokenize("").ids, *self.ids])
        found: dict[str, Any] = {"text": "", "ids": [], "log_p": [], "entropy": [], "information": []}
        for n in range(most):
            after = self.after(self.weights, self.ids)[:, -1]
            v = self.joint.sum(0)
            mixture = v @ after
            token = self.chosen(mixture * tokenizer.continues.numpy(), temperature, rng)
            found["ids"].append(token)
            found["log_p"].append(np.log(mixture[token]))
            found["entropy"].append(-(mixture * np.log(mixture)).sum())
            found["information"].append((v[:, None] * after * np.log(after / mixture)).sum())
            self.joint = self.updated(self.joint, after[:, token])
            ended = token in tokenizer.ends
            piece = ("" if ended else stream.add(token)) + (stream.end() if ended or n == most - 1 else "")
            whole = found["text"] + piece
            if stop is not None and stop in whole:
                whole, ended = whole[: whole.index(stop) + len(stop)], True
            piece, found["text"] = whole[len(found["text"]) :], whole
            said = bytes([token]) if isinstance(tokenizer, ByteTokenizer) else piece.encode()
            self.add([token], [(0, len(said))], said, own=True)
            if ended:
                break
        if not self.own_evidence:
            self.joint = heard
        self.turns += 1
        return found | {
            "posterior": posterior.weights,
            "weights": weights,
            "divergence": divergence,
            "adapted": adapted,
            "forgotten": forgotten,
        }

    def add(self, ids: Any, spans: Any, data: bytes, own: bool) -> None:
        self.ids, self.own = [*self.ids, *ids], [*self.own, *[own] * len(ids)]
        self.spans = [*self.spans, *((len(self.data) + start, len(self.data) + end) for start, end in spans)]
        self.data += data

    def forgotten(self, most: int) -> int:
        start = len(self.ids) - most
        for place in range(start, start + most // 2 + 1):
            at = [*self.spans, (len(self.data), 0)][place][0]
            if self.data[at - 1 : at] == b"\n" and at < [*self.spans, (0, at + 1)][place][1]:
                return place
        while start < len(self.ids) and self.data[self.spans[start][0]] & 0xC0 == 0x80:
            start += 1
        return start

    def evidence(self) -> Evidence:
        model, block, begin = self.system.model, cut_of(self.system), self.system.tokenizer.tokenize("").ids
        user = np.flatnonzero(~np.array(self.own))
        pooled = user + len(begin)
        pooled = pooled[pooled > 0] if len(user) > 1 else pooled
        said = Tokens(tuple(self.ids[t] for t in user), tuple(self.spans[t] for t in user))
        counts = class_counts(self.data, said)[None]
        lengths = counts.sum(1)
        with torch.no_grad():
            session = model.open(1, len(begin) + len(self.ids), blocks=range(block or model.depth))
            depths = depths_of(block or model.depth)
            read = session.read(torch.tensor([[*begin, *self.ids]]), own=not block, depths=depths)
        hidden = read.hidden[0, pooled].numpy()
        means = np.concatenate([each[0, pooled].numpy().mean(0) for each in (*read.states, read.hidden)])[None]
        if block:
            return Evidence({"hidden": means, "counts": counts}, lengths)
        nll = -float(read.own[0, pooled].mean())
        spread = np.square(hidden - hidden.mean(0)).sum(1).mean()
        residual = np.log(max(spread, 0.01 * np.square(hidden).sum(1).mean()))
        views = {"hidden": means, "counts": counts, "surprise": np.array([[nll, residual]])}
        return Evidence(views, lengths)

    def after(self, weights: np.ndarray, ids: list[int]) -> np.ndarray:
        """(S, T, V) probabilities under each particle after each token, what begins a text among them."""
        read = torch.tensor([[*self.system.tokenizer.tokenize("").ids, *ids]]).repeat(len(weights), 1)
        adaptation = self.system.experts.blend_rows(torch.tensor(weights))
        with torch.no_grad():
            session = self.system.model.open(len(weights), read.shape[1], adaptation)
            return session.read(read, tail=read.shape[1]).after.exp().numpy()

    def prior(self, given: Any) -> None:
        self.weights, self.target = given.weights[0], given.mass[0]
        self.rates = np.array(given.switching)[:, None]
        self.joint = np.tile(self.target, (len(self.rates), 1)) / len(self.rates)

    def updated(self, joint: np.ndarray, likelihood: np.ndarray) -> np.ndarray:
        joint = joint * likelihood
        joint = joint / joint.sum()
        return (1 - self.rates) * joint + self.rates * joint.sum(1, keepdims=True) * self.target

    def count(self, weights: np.ndarray, places: Any) -> None:
        """Filter by tokens, unless nothing is before them."""
        after = self.after(weights, self.ids)
        begin = after.shape[1] - len(self.ids)
        for t in places:
            if begin + t:
                self.joint = self.updated(self.joint, after[:, begin + t - 1, self.ids[t]])

    def begin(self, given: Any) -> None:
        """New particles, filtered by the user's bytes."""
        self.prior(given)
        self.count(self.weights, np.flatnonzero(~np.array(self.own)))
        self.target = given.mass[0] if given.target is None else given.target[0]
        if given.refined:
            self.weights = (self.joint.sum(0) @ self.weights)[None]
            self.target, self.rates, self.joint = np.ones(1), np.zeros((1, 1)), np.ones((1, 1))

    def divergence(self, given: Any) -> float:
        """Of the candidates from what runs, on the last 64 tokens, both from what their posteriors say."""
        window = SlowChat(self.system, self.blend, ids=self.ids[-64:], own=self.own[-64:])
        window.weights, window.target, window.rates = self.weights, self.target, self.rates
        window.joint = np.tile(self.target, (len(self.rates), 1)) / len(self.rates)
        window.count(self.weights, np.flatnonzero(~np.array(window.own)))
        q = np.einsum("s,stv->tv", window.joint.sum(0), self.after(self.weights, window.ids))
        window.begin(given if given.target is None else replace(given, mass=given.target))
        p = np.einsum("s,stv->tv", window.joint.sum(0), self.after(window.weights, window.ids))
        return float((p * np.log(p / q)).sum(1)[-len(window.ids) :].mean())

    @staticmethod
    def chosen(p: np.ndarray, temperature: float | None, rng: np.random.Generator) -> int:
        if temperature is None:
            return int(p.argmax())
        tempered = p ** (1 / temperature)
        cumulative = tempered.cumsum()
        return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def assert_turn(turn: "Turn", slow: dict[str, Any]) -> None:
    assert (turn.token_ids.tolist(), turn.text) == (slow["ids"], slow["text"])
    assert (turn.adapted, turn.forgotten) == (slow["adapted"], slow["forgotten"])
    pairs = [
        (turn.log_probabilities, slow["log_p"]),
        (turn.predictive_entropy, slow["entropy"]),
        (turn.mutual_information, slow["information"]),
        (turn.weights, slow["weights"]),
        (turn.posterior.weights, slow["posterior"]),
        (turn.divergence, slow["divergence"]),
    ]
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-8)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("bundle64", {"blend": UNMERGED, "threshold": 0.0}),
    ("cut64", {"blend": UNMERGED, "threshold": float("inf"), "own_evidence": True}),
    ("cut64", {"blend": PosteriorMean(), "threshold": 0.05}),
    ("cut64", {"blend": RefinedMean(6), "threshold": 0.2}),
    ("bundle64", {"blend": UNMERGED, "threshold": float("inf"), "max_context": 32}),
    ("cut64", {"blend": UNMERGED, "threshold": 0.05, "max_context": 32}),
    ("embedded64", {"blend": RefinedMean(6), "threshold": float("inf")}),
    ("llama64", {"blend": UNMERGED, "threshold": 0.05}),
    ("llama64", {"blend": RefinedMean(6), "threshold": 0.05, "max_context": 32}),
    ("headless64", {"blend": UNMERGED, "threshold": 0.05, "max_context": 32}),
]


@pytest.mark.parametrize(("name", "given"), CASES, ids=repr)
def test_a_chat_is_what_recomputing_gives(request: pytest.FixtureRequest, name: str, given: dict[str, Any]) -> None:
    system = request.getfixturevalue(name)
    chat, slow = TwoPassGenerator(system).chat(**given, seed=3), SlowChat(system, **given, seed=3)
    found = []
    for n, text in enumerate(SAID):
        temperature = None if n == 1 else 2.0
        drawn = {} if temperature is None else {"do_sample": True, "temperature": temperature}
        turn = chat.say(text, 5, stop="e", **drawn)
        assert_turn(turn, slow.say(text, 5, "e", temperature))
        assert (chat.transcript.ids.tolist(), chat.transcript.own.tolist()) == (slow.ids, slow.own)
        assert chat.transcript.data == slow.data
        found.append(turn)
    adapted = [turn.adapted for turn in found]
    assert all(adapted) if given["threshold"] == 0 else not all(adapted)
    assert any(turn.forgotten for turn in found) == ("max_context" in given)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_two_hundred_turns(cut64: "Bundle") -> None:
    """Equal to recomputing at every turn, re-adaptations among them; the memory is bounded."""
    given: dict[str, Any] = {"blend": UNMERGED, "threshold": 0.004, "max_context": 80, "seed": 1}
    chat, slow = TwoPassGenerator(cut64).chat(**given), SlowChat(cut64, **given)
    rng, adapted, nbytes = np.random.default_rng(0), 0, []
    for n in range(200):
        domain = [b"ab>ba\n", b"ba>ab\n", b"1+2=3\n"][n // 20 % 3]
        text = (domain * 2)[: rng.integers(3, 12)].decode()
        turn = chat.say(text, 4, stop=None, do_sample=True)
        assert_turn(turn, slow.say(text, 4, None, 1.0))
        adapted += turn.adapted
        nbytes.append(chat.nbytes)
        assert len(chat.transcript) <= 80
    assert 10 < adapted < 190
    whole = TwoPassGenerator(cut64).chat(**given)
    turn = whole.say("ab>ba\n" * 12 + "ab>b", 4, stop=None)
    rows = len(np.unique(UNMERGED.particles(turn.posterior).run[0], axis=0))  # draws may be vertices
    assert max(nbytes) * rows <= whole.nbytes * 6  # as much as six rows of a transcript of 80 bytes take


def test_memory_stays_with_a_window(make_model: Callable[..., MambaFormerForCausalLM], bundle: "Bundle") -> None:
    """State-space blocks and windows: once these are full the caches are of one size however much is said."""
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.vectors import ExpertVector
    from bayes_dispatch.model.mambaformer.config import MambaFormerConfig

    model = make_model(replace(MambaFormerConfig.tiny(), attention_window=16))
    experts = [ExpertVector(e.name, dict(e.scales), model.fingerprint()) for e in bundle.experts.values()]
    system = Bundle(model, ExpertBank(experts), bundle.dispatcher)
    chat = TwoPassGenerator(system).chat(blend=FixedWeights((1.0, 0.0, 0.0, 0.0)), max_context=60)
    sizes = []
    for n in range(12):
        chat.say(f"{n}+{n}=", 6, stop=None)
        sizes.append(chat.nbytes)
        assert len(chat.transcript) <= 60
    assert len(set(sizes[2:])) == 1


@pytest.mark.parametrize("blend", [PosteriorPredictive(6, merge=0.05), RefinedMean(6), PosteriorMean()], ids=repr)
def test_the_first_turn_is_generate(cut64: "Bundle", blend: Blend) -> None:
    generator = TwoPassGenerator(cut64)
    given: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "stop": "e"}
    turn = generator.chat(blend=blend, seed=5).say(SAID[0], 6, **given)
    alone = generator.generate([SAID[0]], blend=blend, max_new_tokens=6, seed=5, **given)
    assert (turn.text,) == alone.texts
    np.testing.assert_allclose(turn.log_probabilities, alone.log_probabilities[0, : len(turn.token_ids)], atol=1e-10)
    np.testing.assert_allclose(turn.weights, alone.weights[0], atol=1e-10)
    assert turn.cost == alone.cost


def test_a_stream_is_what_say_gives(cut64: "Bundle") -> None:
    generator = TwoPassGenerator(cut64)
    said, streamed = (generator.chat(blend=PosteriorPredictive(6), seed=2) for _ in range(2))
    for text in SAID[:3]:
        turn = said.say(text, 6, do_sample=True, stop=None)
        events = list(streamed.stream(text, 6, do_sample=True, stop=None))
        assert "".join(event.text for event in events) == turn.text
        assert [event.token_id for event in events] == turn.token_ids.tolist()
        assert [event.last for event in events] == [False] * 5 + [True]
        assert streamed.turn is not None
        np.testing.assert_array_equal(streamed.turn.log_probabilities, turn.log_probabilities)


def test_a_turn_in_inference_mode_is_as_any(cut64: "Bundle") -> None:
    chats = [TwoPassGenerator(cut64).chat(blend=PosteriorMean(), seed=2) for _ in range(2)]
    with torch.inference_mode():
        chats[0].say(SAID[0], 3, stop=None)
    chats[1].say(SAID[0], 3, stop=None)
    assert chats[0].say(SAID[1], 3, stop=None).text == chats[1].say(SAID[1], 3, stop=None).text


def test_a_closed_stream_ends_the_reply(cut64: "Bundle") -> None:
    """What follows is what a reply of that length would have been followed by."""
    generator = TwoPassGenerator(cut64)
    closed, short = (generator.chat(blend=UNMERGED, seed=2) for _ in range(2))
    stream = closed.stream(SAID[0], 9, stop=None)
    for _ in range(3):
        next(stream)
    with pytest.raises(ConfigError, match="expected one reply at a time"):
        closed.say("a", 2)
    stream.close()
    short.say(SAID[0], 3, stop=None)
    assert closed.turn is not None
    assert (closed.turn.text, closed.transcript.data) == (short.turn.text, short.transcript.data)  # type: ignore[union-attr]
    one, other = (chat.say(SAID[2], 5, stop=None) for chat in (closed, short))
    np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-10)
    unread = closed.stream("a", 2)
    del unread
    assert closed.turns == 2


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_stream_that_is_thrown_into_is_no_turn(cut64: "Bundle", tokens: int) -> None:
    """After its last token, too."""
    chat = TwoPassGenerator(cut64).chat(blend=UNMERGED, seed=2)
    stream = chat.stream("ab>", tokens, stop=None)
    assert [next(stream).last for _ in range(tokens)] == [*([False] * (tokens - 1)), True]
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())
    assert (chat.turns, chat.turn, len(chat.transcript)) == (0, None, 0)
    stream = chat.stream("ab>", tokens, stop=None)
    events = [next(stream) for _ in range(tokens)]
    stream.close()
    assert chat.turn is not None
    assert (chat.turns, chat.turn.text) == (1, "".join(event.text for event in events))


def test_own_bytes_are_no_evidence(cut64: "Bundle") -> None:
    """Whatever it drew, the weights before the next turn's first byte are those that the user's bytes left."""
    generator = TwoPassGenerator(cut64)

    def weights(own_evidence: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
        chat = generator.chat(blend=UNMERGED, seed=7, own_evidence=own_evidence)
        heard = chat.say(SAID[0], 8, do_sample=True, temperature=1.0 + seed, stop=None).weights
        return heard, chat.weights

    for seed in (0, 1):
        heard, kept = weights(False, seed)
        np.testing.assert_allclose(kept, heard, atol=1e-12)
        heard, kept = weights(True, seed)
        assert np.abs(kept - heard).max() > 1e-3


def test_only_what_is_stale_is_read_again(cut64: "Bundle", bundle64: "Bundle") -> None:
    """Below the cut every byte is read once; going on reads the turn, re-adaptation all of it above the cut."""
    for system, block in ((cut64, 1), (bundle64, 0)):
        for threshold in (0.0, float("inf")):
            chat = TwoPassGenerator(system).chat(blend=UNMERGED, threshold=threshold)
            first = chat.say(SAID[0], 4, stop=None)
            before = len(chat.transcript)
            turn = chat.say(SAID[2], 4, stop=None)
            particles = UNMERGED.particles((turn if turn.adapted else first).posterior)
            rows = len(np.unique(particles.run[0], axis=0))  # draws may be vertices
            new = len(SAID[2]) + 1  # and the last byte of the reply before
            total = before + 1 + len(SAID[2])
            assert turn.cost.prefill == new * block + rows * (3 - block) * (total if threshold == 0 else new)
            assert turn.cost.decode == 3 * (block + rows * (3 - block))
            assert turn.cost.prompt_tokens == len(SAID[2])


@pytest.mark.usefixtures("unchecked")
def test_bad_turns_change_nothing(cut64: "Bundle", monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TwoPassGenerator(cut64)
    chat, untouched = (generator.chat(blend=UNMERGED, max_context=64) for _ in range(2))
    chat.say(SAID[0], 4)
    untouched.say(SAID[0], 4)
    cases: list[tuple[Any, dict[str, Any], type[BayesDispatchError], str]] = [
        ("", {}, PromptError, "expected a turn of 1 to 60 tokens.*got 0"),
        ("a" * 61, {}, PromptError, "got 61"),
        (b"a\xff", {}, PromptError, "expected UTF-8 text, got byte 0xff at position 1"),
        ("\ud800", {}, PromptError, "lone surrogate"),
        (3, {}, PromptError, "expected a turn to be text, got int"),
        ("a", {"stop": ""}, ConfigError, "expected stop to be a text of at least one byte"),
        ("a", {"temperature": 0.0}, ConfigError, "temperature"),
    ]
    for text, given, error, message in cases:
        with pytest.raises(error, match=message):
            chat.say(text, 4, **given)
    with pytest.raises(ConfigError, match="expected max_new_tokens to be a whole number from 1"):
        chat.say("a", 0)
    nans: list[tuple[str, type[BayesDispatchError], str]] = [
        ("below", EvidenceError, r"expected finite numbers in 'hidden', .*got nan"),
        ("upper", TensorError, "expected finite log-probabilities from the model, got NaN"),
    ]
    for part, error, message in nans:
        run = getattr(MambaFormerForCausalLM, part)
        with monkeypatch.context() as patch:
            patch.setattr(MambaFormerForCausalLM, part, lambda *a, _run=run, **b: _run(*a, **b) * float("nan"))
            with pytest.raises(error, match=message):
                chat.say("a", 4)
    one, other = (each.say(SAID[2], 4) for each in (chat, untouched))
    assert one.text == other.text
    np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-10)
    assert (chat.turns, chat.transcript.data) == (2, untouched.transcript.data)


def test_an_interrupted_turn_changes_nothing(cut64: "Bundle", monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever Ctrl-C comes: amid the model's blocks, or between two bytes of ``say``."""
    generator = TwoPassGenerator(cut64)
    chat, untouched = (generator.chat(blend=UNMERGED) for _ in range(2))
    for each in (chat, untouched):
        each.say(SAID[0], 4)
    upper = MambaFormerForCausalLM.upper
    for stop_at in (0, 1, 3):
        calls = iter(range(100))

        def interrupted(*given: Any, _calls: Any = calls, _at: int = stop_at, **named: Any) -> Any:
            found = upper(*given, **named)
            if next(_calls) == _at:
                raise KeyboardInterrupt
            return found

        with monkeypatch.context() as patch:
            patch.setattr(MambaFormerForCausalLM, "upper", interrupted)
            with pytest.raises(KeyboardInterrupt):
                chat.say(SAID[2], 6, stop=None)
    interrupt(lambda: chat.say(SAID[2], 6, stop=None), "say", 5)
    assert (chat.turns, chat.transcript.data) == (1, untouched.transcript.data)
    one, other = (each.say(SAID[2], 4) for each in (chat, untouched))
    assert one.text == other.text
    np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-10)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_file_is_never_ahead(cut64: "Bundle", tmp_path: Path, streamed: bool) -> None:
    """At whichever line of the end of a turn Ctrl-C comes, the file has the turns that the chat has."""
    generator = TwoPassGenerator(cut64)
    chat = generator.chat(blend=UNMERGED, file=tmp_path / "chat")

    def end() -> None:
        if not streamed:
            chat.say("ab>", 2)
        stream = chat.stream("ab>", 4, stop=None)
        next(stream)
        stream.close()

    for line in range(30):
        if not interrupt(end, "_end", line):
            break
        assert generator.resume_chat(tmp_path / "chat").turns == chat.turns
    assert line > 8
    assert chat.turns > 1
    assert chat.say("ab>", 2).text == generator.resume_chat(tmp_path / "chat").say("ab>", 2).text


def interrupt(work: Callable[[], object], function: str, line: int) -> bool:
    """Do work, with Ctrl-C before a line of a function: whether it came to that."""
    lines, before = iter(range(1000)), sys.gettrace()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return trace

    sys.settrace(lambda frame, event, argument: trace if frame.f_code.co_name == function else None)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_one_reply_at_a_time(cut64: "Bundle", in_threads: Callable[[int, Callable[[], Any]], list[Any]]) -> None:
    """Of threads that speak at once each is answered whole or refused; the chat goes on."""
    chat = TwoPassGenerator(cut64).chat(blend=UNMERGED)

    def say() -> str:
        try:
            chat.say("ab>", 3, stop=None)
        except ConfigError as error:
            return str(error)
        return "answered"

    found = in_threads(4, say)
    answered = found.count("answered")
    assert answered >= 1
    assert all(each == "answered" or each.startswith("expected one reply at a time") for each in found)
    assert (chat.turns, len(chat.transcript)) == (answered, 6 * answered)
    untouched = TwoPassGenerator(cut64).chat(blend=UNMERGED)
    for _ in range(answered):
        untouched.say("ab>", 3, stop=None)
    assert chat.say("1+2=", 3).text == untouched.say("1+2=", 3).text
    assert chat.transcript.data == untouched.transcript.data


def test_settings_are_checked(bundle: "Bundle", llama64: Any, unchecked: None) -> None:
    generator, other = TwoPassGenerator(bundle), TwoPassGenerator(llama64)
    assert other.chat().settings.max_context == 511  # and what begins a text
    with pytest.raises(ConfigError, match="expected max_context to be a whole number from 2 to 511, got 512"):
        other.chat(max_context=512)
    with pytest.raises(UnknownNameError, match=r"expected a blend of best_expert, .*, base, got 'mean'"):
        generator.chat(blend="mean")
    assert generator.chat(blend="max").settings.blend == BestExpert()
    assert generator.chat().settings.blend == PosteriorPredictive()
    wrong = [("threshold", value) for value in (-1.0, float("nan"), "a")]
    for name, value in [*wrong, ("max_context", 1), ("seed", -1), ("own_evidence", "no")]:
        with pytest.raises(ConfigError, match=f"expected {name} to be"):
            generator.chat(**{"blend": PosteriorMean(), name: value})


@pytest.mark.parametrize("name", ["cut64", "bundle64", "llama64", "headless64"])
def test_evidence_of_one_turn_is_the_first_pass(request: pytest.FixtureRequest, name: str) -> None:
    system = request.getfixturevalue(name)
    cut, begin = cut_of(system), system.tokenizer.tokenize("").ids
    for said in ("a", SAID[3] + SAID[0] * 20):
        words = system.tokenizer.tokenize(said, begin=False)
        text = Transcript.empty().followed_by(words.ids, words.spans, said.encode(), user=True)
        conversation = Conversation(system, cut, begin, 400)
        expected = first_pass(system.model, system.tokenizer, [said], cut=cut).evidence
        with torch.no_grad():
            conversation.read(text)
            found = conversation.evidence(text)
        assert set(found.views) == set(expected.views)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        for view, values in expected.views.items():
            np.testing.assert_allclose(found.views[view], values, rtol=0, atol=1e-10)


def test_tokens_of_the_model_are_read_by_steps(bundle64: "Bundle", monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the blocks below a cut nothing is asked for where no evidence is: compiled steps could not tell."""
    asked, read = list[tuple[int, Any]](), MambaFormerSession.read

    def watched(self: MambaFormerSession, ids: Any, *given: Any, **named: Any) -> Any:
        asked.append((ids.shape[1], named["depths"]))
        return read(self, ids, *given, **named)

    words = bundle64.tokenizer.tokenize(SAID[0], begin=False)
    text = Transcript.empty().followed_by(words.ids, words.spans, SAID[0].encode(), user=True)
    conversation = Conversation(bundle64, 2, (256,), 400)
    monkeypatch.setattr(MambaFormerSession, "read", watched)
    with torch.no_grad():
        for n in range(3):
            conversation.read(text)
            text = text.followed_by([97 + n], own=True)
        found = conversation.evidence(text)
    assert asked == [(1 + len(words.ids), (1,)), (1, ()), (1, ())]
    expected = first_pass(bundle64.model, bundle64.tokenizer, [SAID[0]], cut=2).evidence
    np.testing.assert_allclose(found.views["hidden"], expected.views["hidden"], rtol=0, atol=1e-10)


def test_a_dispatcher_that_reads_nothing_costs_no_first_pass(bundle64: "Bundle") -> None:
    parts = {name: getattr(bundle64, name) for name in ("model", "tokenizer", "experts")}
    system: Any = SimpleNamespace(**parts, dispatcher=Dispatcher.flat(bundle64.experts.names))
    chat = TwoPassGenerator(system).chat(blend=PosteriorMean())
    first, second = (chat.say(text, 3, stop=None).cost for text in SAID[:2])
    compared = 2 * 3 * (1 + len(SAID[0]) + 3 + len(SAID[1]))  # rows, blocks and tokens of the divergence
    assert (first.first_pass, second.first_pass) == (0, compared)


TEMPLATE = (
    "<s>{% if messages[0]['role'] != 'system' %}[system]\nBe kind.</s>{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture
def templated(llama64: SimpleNamespace) -> SimpleNamespace:
    """The same, with a template of chats that has a system's words first."""
    from bayes_dispatch.model.transformers.tokenizer import TransformersTokenizer
    from tests.tiny import tiny_tokenizer

    inner = tiny_tokenizer()
    inner.chat_template = TEMPLATE
    tokenizer = TransformersTokenizer(inner, llama64.model.vocab_size, [2])
    return SimpleNamespace(**{**vars(llama64), "tokenizer": tokenizer})


def test_a_template_stands_around_turns(templated: SimpleNamespace) -> None:
    """As in the template's own conversation, in which a reply ends; the user's words are never special tokens."""
    inner, form = templated.tokenizer.inner, Form.of(templated.tokenizer)
    chat, expected = TwoPassGenerator(templated).chat(blend=UNMERGED, seed=1), []
    for text in ("ab the", "12</s>", " a\n"):
        turn = chat.say(text, 40, do_sample=True, temperature=9.0)
        said, own = chat.transcript, turn.token_ids.tolist()
        words = templated.tokenizer.tokenize(text, begin=False).ids
        start, closing = len(expected), [2] if expected and expected[-1] != 2 else []
        expected += [*closing, *inner.encode("[user]\n")[1:], *words, *inner.encode("</s>[assistant]\n")[1:], *own]
        assert said.ids.tolist() == expected
        assert said.said[0].endswith(text.encode())
        assert 2 not in [*said.ids[said.user], *own[:-1]]
    first = inner.apply_chat_template([{"role": "user", "content": "ab the"}], add_generation_prompt=True)["input_ids"]
    assert [*form.begin, *expected][: len(first)] == first
    assert said.last(len(said) - start + 9).ids.tolist() == expected[start:]  # what is forgotten ends with a reply
    ended = Transcript.empty().followed_by((5, 2), [(0, 1), (1, 1)], b"a", own=True)
    assert form.heard(ended, b"", Tokens((), ())).ids.tolist()[:4] == [5, 2, *inner.encode("[u")[1:]]


@pytest.mark.parametrize(
    ("template", "message"), [("{{ raise_exception('no') }}", "got no"), ("hidden", "got one that")]
)
def test_templates_that_are_none(llama64: SimpleNamespace, template: str, message: str) -> None:
    llama64.tokenizer.inner.chat_template = template
    try:
        with pytest.raises(ConfigError, match=f"expected a chat template .*{message}"):
            TwoPassGenerator(llama64).chat()
    finally:
        llama64.tokenizer.inner.chat_template = None


def test_a_template_of_words_ends_no_reply(templated: SimpleNamespace) -> None:
    """Its first word after a reply may be said in one."""
    inner = templated.tokenizer.inner
    inner.chat_template = "{% for m in messages %}ab {{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    form = Form.of(templated.tokenizer)
    assert (inner.decode([*form.closing, *form.before]), form.ends) == ("ab user: ", {2})
