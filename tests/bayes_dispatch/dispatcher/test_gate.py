"""The gate keeps its false-alarm rate at every length and in every group, and finds foreign prompts, which go to
base. It is read as saved, one by one is all at once, and feedback moves nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import betabinom

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.errors import BundleError, ConfigError, NotFittedError, TensorError
from bayes_dispatch.storage import read_directory, write_directory
from tests.bayes_dispatch.conftest import coarsely

EXPERTS = ("sort", "reverse", "add")
LENGTHS = (32, 64, 128)
RATE = 0.05
FALSE_ALARM = 1e-4  # of each two-sided band

WORLD = np.random.default_rng(7)
MEANS, CLASSES = 2 * WORLD.normal(size=(3, 6)), WORLD.dirichlet(np.full(5, 0.3), 3)


def prompts(count: int, seed: int, length: int | None = None, mixed: bool = False) -> Evidence:
    """Of three experts that are far apart, one each or blends of all; longer ones are less noisy."""
    rng = np.random.default_rng([seed, 1])
    lengths = rng.choice(LENGTHS, count) if length is None else np.full(count, length)
    weights = rng.dirichlet(np.full(3, 1.0), count) if mixed else np.eye(3)[rng.integers(3, size=count)]
    hidden = weights @ MEANS + rng.normal(size=(count, 6)) * np.sqrt(16 / lengths)[:, None]
    counts = np.stack([rng.multinomial(n, p) for n, p in zip(lengths, weights @ CLASSES, strict=True)])
    return Evidence({"hidden": hidden, "counts": counts}, lengths)


def foreign(count: int, seed: int, length: int) -> Evidence:
    """As far away as the experts are from each other, with tokens of all classes alike."""
    rng = np.random.default_rng([seed, 2])
    counts = rng.multinomial(length, np.full(5, 0.2), count)
    return Evidence({"hidden": 3 * rng.normal(size=(count, 6)), "counts": counts}, np.full(count, length))


@pytest.fixture(scope="module")
def dispatcher(settings: Callable[..., dict[str, Any]]) -> Dispatcher:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    hidden = MEANS[labels] + 0.5 * rng.normal(size=(200, 6))
    counts = np.stack([rng.multinomial(64, CLASSES[label]) for label in labels])
    train = Evidence({"hidden": hidden, "counts": counts}, np.full(200, 64))
    return coarsely(Dispatcher(EXPERTS, **settings(svi=50)).fit(train, labels))


@pytest.fixture(scope="module")
def gate(dispatcher: Dispatcher) -> Gate:
    return Gate.calibrate(dispatcher, prompts(1200, 1))


class TestRate:
    @pytest.mark.parametrize("length", LENGTHS)
    def test_false_alarms_are_as_many_as_stated_at_every_length(
        self, gate: Gate, dispatcher: Dispatcher, length: int
    ) -> None:
        """Of 2,000 prompts, beta-binomial: exactly, as scores have no ties. Each length has a bin of its own."""
        calibrated = int((gate.bins == gate._bins(np.array([float(length)]))).sum())
        k = int(RATE * (calibrated + 1))
        band = betabinom(2000, k, calibrated + 1 - k).ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2])
        alarms = gate.decide(dispatcher, prompts(2000, 2, length), RATE).foreign.sum()
        assert 250 < calibrated < 350
        assert band[0] <= alarms <= band[1]

    def test_none_where_a_prompt_is_shorter_than_those_of_calibration(self, dispatcher: Dispatcher) -> None:
        """Regressions on 32 to 128 tokens do not tell how noisy shorter ones are. An odd short one of calibration, the
        rest of a line, changes nothing. A longer one is compared with the longest.
        """
        gate = Gate.calibrate(dispatcher, Evidence.concatenate([prompts(1200, 1), prompts(4, 2, 1)]))
        for length, found in ((1, 0), (12, 0), (31, 0), (32, 200), (300, 200)):
            assert gate.decide(dispatcher, foreign(200, 3, length), RATE).foreign.sum() == found
        assert (gate.p_values(dispatcher, prompts(200, 4, 12)) == 1).all()

    def test_on_average_over_small_calibrations(self, dispatcher: Dispatcher) -> None:
        """100 calibrations of 60 ranks, one bin, 20 fresh prompts each: at k / (n + 1) = 3 / 61, by 5 standard errors
        of independent calibrations; false alarms in fewer than 1 of 100,000 seeds.
        """
        rates = []
        for seed in range(100):
            gate = Gate.calibrate(dispatcher, prompts(80, 1000 + seed), bins=1)
            rates.append(gate.decide(dispatcher, prompts(20, 2000 + seed), RATE).foreign.mean())
        assert abs(np.mean(rates) - 3 / 61) < 5 * np.std(rates) / 100**0.5
        assert gate.least_rate == 1 / 61

    def test_of_each_group_whatever_their_shares(self, dispatcher: Dispatcher) -> None:
        """Blends alone: at the rate where they are a group of calibration, far above where they are a few of many.

        96 to 104 blends of each length: the mean of three independent Beta(4, 95) is above .1 in 1 of 10,000 seeds.
        """
        held_out = Evidence.concatenate([prompts(1000, 5), prompts(400, 6, mixed=True)])
        groups, fresh = np.repeat([3, 1], [1000, 400]), prompts(2000, 7, mixed=True)
        grouped, pooled = Gate.calibrate(dispatcher, held_out, groups), Gate.calibrate(dispatcher, held_out)
        assert grouped.decide(dispatcher, fresh, RATE).foreign.mean() < 0.1
        assert grouped.decide(dispatcher, prompts(1000, 8), RATE).foreign.mean() < 0.05
        assert pooled.decide(dispatcher, fresh, RATE).foreign.mean() > 0.13

    def test_a_group_that_lacks_lengths_gets_wider_bins(self, dispatcher: Dispatcher) -> None:
        """Blends of 32 tokens alone: bins that the lengths part would hold none of them, so there is one bin."""
        held_out = Evidence.concatenate([prompts(600, 10), prompts(300, 11, length=32, mixed=True)])
        gate = Gate.calibrate(dispatcher, held_out, np.repeat([0, 1], [600, 300]))
        assert (len(gate.edges), set(gate.bins.tolist())) == (1, {1})
        assert gate.least_rate == 1 / (1 + np.bincount(gate.groups).min())
        assert len(Gate.calibrate(dispatcher, held_out).edges) > 1
        assert np.isfinite(gate.p_values(dispatcher, prompts(50, 12))).all()

    def test_a_group_with_few_prompts_of_some_lengths_gets_wider_bins(self, dispatcher: Dispatcher) -> None:
        """Short prompts and long ones, a dozen of each among the others: with two bins the rate could not be .05."""
        parts = [(440, 32), (16, 128), (16, 32), (440, 128)]
        held_out = Evidence.concatenate([prompts(count, 15, length) for count, length in parts])
        gate = Gate.calibrate(dispatcher, held_out, np.repeat([0, 1], 456))
        assert (len(gate.edges), gate.least_rate) == (1, 1 / (1 + 342))

    def test_the_smallest_group_has_its_ranks(self, dispatcher: Dispatcher) -> None:
        """Of four prompts three are ranked, whatever the seed: a group that were left out would have no guarantee."""
        held_out = Evidence.concatenate([prompts(96, 13), prompts(4, 14, mixed=True)])
        for seed in range(8):
            gate = Gate.calibrate(dispatcher, held_out, np.repeat([0, 5], [96, 4]), bins=1, seed=seed)
            assert np.bincount(gate.groups).tolist() == [72, 3]
            assert gate.least_rate == 1 / 4

    def test_a_group_that_would_lock_the_gate(self, dispatcher: Dispatcher) -> None:
        """Nothing could be ranked in it: no rate could ever be kept."""
        held_out = Evidence.concatenate([prompts(97, 13), Evidence(prompts(20, 14).views)])
        with pytest.raises(ConfigError, match=r"expected prompts of known length in every .*, got none in \[7\]$"):
            Gate.calibrate(dispatcher, held_out, np.repeat([2, 7], [97, 20]))
        with pytest.raises(ConfigError, match=r"expected at least 4 prompts of each group, got 3 of 7$"):
            Gate.calibrate(dispatcher, prompts(100, 13), np.repeat([2, 7], [97, 3]))

    def test_p_values_are_ranks(self, gate: Gate, dispatcher: Dispatcher) -> None:
        fresh = prompts(50, 9)
        scores, places = gate.foreignness(dispatcher, fresh), gate._bins(fresh.known_lengths())
        expected = [
            (1 + (gate.scores[gate.bins == place] >= score).sum()) / (1 + (gate.bins == place).sum())
            for score, place in zip(scores, places, strict=True)
        ]
        np.testing.assert_allclose(gate.p_values(dispatcher, fresh), expected)


class TestPower:
    @pytest.mark.parametrize("length", LENGTHS)
    def test_foreign_prompts_are_found(self, gate: Gate, dispatcher: Dispatcher, length: int) -> None:
        """At least 95 of 100, as nearly all are found; at .98 fewer come in 1 of 65 seeds, and they are fixed."""
        assert gate.decide(dispatcher, foreign(100, 10, length), RATE).foreign.sum() >= 95

    @pytest.mark.parametrize("families", [None, {"words": EXPERTS}, {"words": EXPERTS[:2], "sums": EXPERTS[2:]}])
    def test_what_base_explains_is_foreign_too(
        self, families: dict[str, Sequence[str]] | None, settings: Callable[..., dict[str, Any]]
    ) -> None:
        """Of a dispatcher that was fitted on prompts of base, and knows new ones."""
        rng, means = np.random.default_rng(1), np.concatenate([MEANS, -2 * MEANS[:1]])

        def of(labels: np.ndarray) -> Evidence:
            hidden = means[labels] + 0.5 * rng.normal(size=(len(labels), 6))
            return Evidence({"hidden": hidden}, np.full(len(labels), 64))

        labels = rng.integers(4, size=300)
        program = Admixture(families=families)
        given = settings(svi=50) | {"program": program}
        dispatcher = coarsely(Dispatcher(EXPERTS, **given).fit(of(labels), mixtures=np.eye(4)[labels]))
        held_out, own = of(rng.integers(3, size=300)), of(np.full(100, 3))
        assert dispatcher.mean(own)[:, -1].mean() > 0.85
        assert Gate.calibrate(dispatcher, held_out).decide(dispatcher, own, RATE).foreign.sum() >= 95


class TestPrompts:
    def test_one_by_one_is_all_at_once(self, gate: Gate, dispatcher: Dispatcher) -> None:
        fresh = prompts(12, 13)
        alone = [gate.foreignness(dispatcher, fresh.select([row]))[0] for row in range(12)]
        np.testing.assert_allclose(gate.foreignness(dispatcher, fresh), alone, rtol=1e-9)

    def test_feedback_moves_nothing(self, gate: Gate, dispatcher: Dispatcher) -> None:
        fresh, before = prompts(12, 14), dispatcher.prior
        expected = gate.p_values(dispatcher, fresh)
        dispatcher.update([2] * 30)
        found = gate.p_values(dispatcher, fresh)
        dispatcher.prior = before
        np.testing.assert_array_equal(found, expected)

    def test_unknown_lengths_rank_among_themselves(self, dispatcher: Dispatcher) -> None:
        known, unknown = prompts(400, 15), prompts(100, 16)
        held_out = Evidence.concatenate([known, Evidence(unknown.views)])
        gate = Gate.calibrate(dispatcher, held_out)
        assert (gate.bins == 0).sum() == (~np.isin(gate.bins, (1, 2, 3))).sum() > 50
        without = Evidence(foreign(20, 17, 64).views)
        assert gate.p_values(dispatcher, without).min() == 1 / (1 + (gate.bins == 0).sum())
        never = Gate.calibrate(dispatcher, known).p_values(dispatcher, without)
        np.testing.assert_array_equal(never, 1)  # nothing to compare them with
        of_unknown = Gate.calibrate(dispatcher, Evidence(known.views))
        np.testing.assert_array_equal(of_unknown.p_values(dispatcher, foreign(20, 17, 64)), 1)  # likewise

    def test_the_same_seed_is_the_same_gate(self, dispatcher: Dispatcher) -> None:
        held_out = prompts(100, 18)
        first, again, other = (Gate.calibrate(dispatcher, held_out, seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first.scores, again.scores)
        assert not np.array_equal(first.scores, other.scores)


class TestDecision:
    def test_foreign_prompts_go_to_base(self, gate: Gate, dispatcher: Dispatcher) -> None:
        evidence = Evidence.concatenate([prompts(10, 19), foreign(10, 20, 64)])
        posterior = dispatcher.posterior(evidence, draws=16)
        decision = gate.decide(dispatcher, evidence, 0.01)
        moved = decision.to_base(posterior)
        assert decision.foreign.tolist() == (decision.p_values <= 0.01).tolist() == [False] * 10 + [True] * 10
        assert (moved.weights[:, decision.foreign, -1] == 1).all()
        np.testing.assert_array_equal(moved.weights[:, ~decision.foreign], posterior.weights[:, ~decision.foreign])
        assert moved.experts == posterior.experts
        np.testing.assert_array_equal(moved.log_evidence, posterior.log_evidence)
        with pytest.raises(TensorError, match="expected a posterior of 20 prompts, got one of 3"):
            decision.to_base(posterior.select([0, 1, 2]))

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("rate", [0.0, 0.003, 1.0, -1.0, float("nan"), "a", None])
    def test_a_rate_that_cannot_be_kept(self, gate: Gate, dispatcher: Dispatcher, rate: Any) -> None:
        with pytest.raises(ConfigError, match=r"expected a false-alarm rate of at least 0\.0033.* below 1, got"):
            gate.decide(dispatcher, prompts(1, 0), rate)

    def test_another_dispatcher(self, gate: Gate, dispatcher: Dispatcher) -> None:
        other = coarsely(dispatcher, temper=2 * dispatcher.state.temper)
        with pytest.raises(ConfigError, match=r"expected the dispatcher .* that the gate was calibrated for, got"):
            gate.p_values(other, prompts(1, 0))
        with pytest.raises(NotFittedError):
            gate.check_dispatcher(Dispatcher(EXPERTS))


@pytest.mark.parametrize(
    ("count", "given", "error", "message"),
    [
        (79, {}, ConfigError, "expected at least 80 prompts, got 79"),
        (80, {"bins": 0}, ConfigError, "expected bins to be a whole number ≥ 1, got 0"),
        (80, {"groups": np.zeros(79, int)}, TensorError, "expected groups ≥ 0 of 80 prompts"),
        (80, {"groups": np.full(80, -1)}, TensorError, "expected groups ≥ 0 of 80 prompts"),
        (80, {"groups": [[1], [1, 2]]}, TensorError, "expected numbers as groups, got list"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_calibration(
    dispatcher: Dispatcher, count: int, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Gate.calibrate(dispatcher, prompts(count, 0), **given)


class TestFiles:
    def test_round_trip(self, gate: Gate, dispatcher: Dispatcher, tmp_path: Path) -> None:
        gate.save(tmp_path / "gate")
        again, fresh = Gate.load(str(tmp_path / "gate")), prompts(30, 22)
        np.testing.assert_array_equal(again.p_values(dispatcher, fresh), gate.p_values(dispatcher, fresh))
        assert sorted(path.name for path in (tmp_path / "gate").iterdir()) == ["gate.json", "gate.safetensors"]
        dispatcher.save(tmp_path / "dispatcher")
        again.check_dispatcher(Dispatcher.load(tmp_path / "dispatcher"))

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 1},
            {"dispatcher": None},
            {"scores": np.zeros(3)},
            {"scores": np.full(900, np.nan)},
            {"bins": np.full(900, 5)},
            {"bins": np.full(900, 1.0)},
            {"groups": np.full(900, -1)},
            {"edges": np.array([64.0, 64.0])},
            {"location": np.zeros(2)},
            {"shares": np.zeros((2, 2))},
            {"more": np.zeros(3)},
        ],
        ids=str,
    )
    def test_what_is_no_gate(self, gate: Gate, tmp_path: Path, change: dict[str, Any]) -> None:
        """Even where the digest is right."""
        gate.save(tmp_path)
        document, arrays = read_directory(tmp_path, "gate")
        for name, value in change.items():
            (arrays if isinstance(value, np.ndarray) else document)[name] = value
        write_directory(tmp_path, "gate", document, arrays)
        with pytest.raises(BundleError, match=r"^expected [^\n]*got [^\n]+$"):
            Gate.load(tmp_path)


@pytest.mark.parametrize("count", [19, 21, 61, 299, 999, 12_345])
def test_the_least_rate_can_be_asked_for_as_it_is_shown(count: int) -> None:
    """1/62 is .0161 in three digits, and more than that."""
    one, places = np.ones(3), np.ones(count, dtype=int)
    gate = Gate("", one / 3, one, one, np.ones(1), np.zeros(count), places, places - 1)
    gate.check_rate(float(gate.least_rate_shown))
    assert gate.least_rate <= float(gate.least_rate_shown) < 1.01 * gate.least_rate


def test_it_cannot_be_changed(gate: Gate) -> None:
    for own in (gate, pickle.loads(pickle.dumps(gate))):
        with pytest.raises(ValueError, match="read-only"):
            own.scores[0] = 9


def test_arrays_are_evidence_as_for_the_dispatcher(dispatcher: Dispatcher) -> None:
    known, fresh = (prompts(200, seed).views["hidden"] for seed in (1, 2))
    found = [
        Gate.calibrate(dispatcher, one).decide(dispatcher, other)
        for one, other in ((known, fresh), (Evidence({"hidden": known}), Evidence({"hidden": fresh})))
    ]
    np.testing.assert_array_equal(found[0].p_values, found[1].p_values)
