"""Fitting. Laws: one seed is one fit, whatever runs beside it, in whatever thread or mode of torch; it leaves no trace;
it takes whatever is known of the prompts, any number of classes and any unit; what it cannot take it refuses in a
line; the loss falls; a fitted dispatcher can be sent elsewhere."""

import copy
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pytest
import torch

from bayes_dispatch.checks.reference import log_density
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.pipeline import TrainingSet
from bayes_dispatch.dispatcher.fitting.svi import SVISettings, fit_globals, isolated
from bayes_dispatch.dispatcher.fitting.temper import KnownPrompts
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.errors import ConfigError, EvidenceError, TensorError

if TYPE_CHECKING:
    from tests.bayes_dispatch.conftest import Sample

    Settings = Callable[..., dict[str, Any]]

BASE = ("base_M", "base_s2", "base_Phi")
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def few(make_sample: "Callable[..., Sample]") -> "Sample":
    return make_sample(40, 3)


@pytest.fixture(scope="module")
def plain(few: "Sample", settings: "Settings") -> Dispatcher:
    """Fitted on the labels of a few prompts; not to be changed."""
    return Dispatcher(NAMES, **settings()).fit(few.evidence, few.labels)


def answers(dispatcher: Dispatcher, evidence: Evidence | np.ndarray) -> np.ndarray:
    weights = dispatcher.posterior(evidence, draws=3, seed=1).weights
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-9)
    probabilities = dispatcher.predict_proba(evidence)
    assert probabilities.shape == weights.shape[1:]
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-9)
    assert (probabilities >= 0).all()
    return weights


def test_it_learns(fitted: Dispatcher, fresh: "Sample") -> None:
    """Pure prompts, of experts far apart, are recognised."""
    pure = fresh.labels >= 0
    probabilities = fitted.predict_proba(fresh.evidence)
    assert (probabilities.argmax(1) == fresh.labels)[pure].mean() > 0.9


@pytest.mark.slow
def test_it_learns_mixtures(fitted: Dispatcher, make_sample: "Callable[..., Sample]") -> None:
    """Posterior means of 200 mixed prompts have at most .7 of a flat guess's squared error (.89 after a short fit)."""
    fresh = make_sample(400, 5, mixed=2)
    mixed = fresh.labels < 0
    mean, truth = fitted.posterior(fresh.evidence).mean[mixed], fresh.weights[mixed]
    assert ((mean - truth) ** 2).sum(1).mean() < 0.5 * ((0.25 - truth) ** 2).sum(1).mean()


def test_fits_repeat(few: "Sample", settings: "Settings") -> None:
    """One seed gives one dispatcher bit for bit, whatever the global generators are at; another gives another."""
    states = []
    for random_state in (0, 0, 1):
        torch.manual_seed(len(states))
        np.random.seed(len(states))  # noqa: NPY002
        dispatcher = Dispatcher(NAMES, random_state, **settings()).fit(few.evidence, few.labels, few.mixtures)
        states.append(answers(dispatcher, few.evidence))
    assert np.array_equal(states[0], states[1])
    assert not np.array_equal(states[0], states[2])


@pytest.mark.usefixtures("unchecked")  # beartype itself draws from Python's generator
def test_fits_leave_no_trace(plain: Dispatcher, few: "Sample", settings: "Settings") -> None:
    """Global generators, Pyro's parameter store and its settings are as before; nor does a first dispatcher change."""
    before = answers(plain, few.evidence)
    pyro.get_param_store()["mine"] = torch.ones(2)

    def outside() -> tuple[Any, ...]:
        numpy_state = [str(part) for part in np.random.get_state()]  # noqa: NPY002
        stored = {name: value.tolist() for name, value in pyro.get_param_store().items()}
        return torch.get_rng_state().tolist(), numpy_state, random.getstate(), stored, dict(pyro.settings.get())

    state = outside()
    try:
        second = Dispatcher(NAMES, 5, **settings()).fit(few.evidence.select(slice(0, 30)), few.labels[:30])
        second.predict_proba(few.evidence)
        second.simulate(5, 4)
        changed = [before != after for before, after in zip(state, outside(), strict=True)]
        assert not any(changed)
    finally:
        pyro.clear_param_store()
    assert np.array_equal(answers(plain, few.evidence), before)


def test_threads_do_not_mix(plain: Dispatcher, few: "Sample", settings: "Settings") -> None:
    """Fits, simulations, replicated evidence and the NumPyro twin in threads are those of one; so is a later fit."""

    def fit() -> np.ndarray:
        return answers(Dispatcher(NAMES, **settings()).fit(few.evidence, few.labels), few.evidence)

    some, state = few.evidence.select(slice(0, 3)), plain.state
    values = {**state.globals.center(), "w": torch.full((3, 4), 0.25)}
    works: dict[str, Callable[[], np.ndarray]] = {
        "fit": fit,
        "simulate": lambda: plain.simulate(20, 4, seed=1)[0],
        "to_arviz": lambda: plain.to_arviz(some, 8)["posterior_predictive"]["hidden"].values,
        "log_density": lambda: np.array(log_density(state.model, state.prompts(some), values)),
    }
    alone = {"fit": answers(plain, few.evidence)} | {name: work() for name, work in works.items() if name != "fit"}
    with ThreadPoolExecutor(4) as pool:
        at_once = [(name, pool.submit(work)) for _ in range(2) for name, work in works.items()]
    for name, found in at_once:
        np.testing.assert_array_equal(found.result(), alone[name], err_msg=name)
    np.testing.assert_array_equal(fit(), alone["fit"])


def test_names_are_labels(plain: Dispatcher, few: "Sample") -> None:
    """As numbers are: those that ``predict`` gives, and base's, which says that the weights are known."""
    base = few.labels == 2
    names = np.where(base, "base", np.array([*NAMES, None])[few.labels])
    mixtures = np.where(base[:, None], np.eye(4)[3], np.nan)
    expected = TrainingSet.of(few.evidence, np.where(base, -1, few.labels), mixtures, NAMES)
    found = TrainingSet.of(few.evidence, names, None, NAMES)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.known, expected.known)
    codes = np.where(base, len(NAMES), few.labels)
    np.testing.assert_array_equal(TrainingSet.of(few.evidence, codes, None, NAMES).known, expected.known)
    gaps = np.array(
        [np.nan if name is None else name for name in names], dtype=object
    )  # as a column of pandas has them
    np.testing.assert_array_equal(TrainingSet.of(few.evidence, gaps, None, NAMES).labels, found.labels)
    predicted = plain.predict(few.evidence)
    assert "base" in predicted
    again = copy.copy(plain).fit(few.evidence, predicted)
    numbers, other = [(*NAMES, "base").index(name) for name in predicted], copy.copy(again)
    np.testing.assert_array_equal(again.update(predicted).mean, other.update(numbers).mean)
    for labels, shown in ((["a", "d"] * 20, "'d'"), (["a", 1] * 20, "'1'")):
        with pytest.raises(TensorError, match=f"^expected labels among a, b, c, base, got .*{shown}"):
            again.calibrate(few.evidence, labels)
    with pytest.raises(TensorError, match=r"^expected labels among a, b, c, base, got None$"):
        again.update(["a", None])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fits_under_any_mode_of_torch(
    mode: Callable[[], Any], plain: Dispatcher, few: "Sample", settings: "Settings"
) -> None:
    with mode():
        inside = Dispatcher(NAMES, **settings()).fit(few.evidence, few.labels)
        np.testing.assert_array_equal(answers(inside, few.evidence), answers(plain, few.evidence))
    again, expected = (each.recalibrate(few.evidence, few.labels) for each in (inside, plain))
    np.testing.assert_array_equal(answers(again, few.evidence), answers(expected, few.evidence))  # outside, too


def only(evidence: Evidence, view: str) -> Evidence:
    missing = {name: mask for name, mask in evidence.missing.items() if name in (view, "lengths")}
    return Evidence({view: evidence.views[view]}, evidence.lengths, missing)


@pytest.fixture(scope="module")
def fitted_well(make_sample: "Callable[..., Sample]", settings: "Settings") -> Dispatcher:
    sample = make_sample(240, 3)
    return Dispatcher(NAMES, program=Admixture(temper=1.5), **settings(svi=50)).fit(sample.evidence, sample.labels)


@pytest.mark.parametrize("lacking", ["an expert", "a view", "nearly all"])
def test_later_prompts_take_nothing_away_that_they_do_not_show(
    lacking: str, fitted_well: Dispatcher, make_sample: "Callable[..., Sample]"
) -> None:
    """Unlabelled traffic of two experts, of one view, or of three prompts: what is known of the rest stays."""
    later, judged = make_sample(240, 4), make_sample(120, 5)
    rows = {"an expert": later.weights[:, 2] == 0, "a view": np.full(240, True), "nearly all": np.arange(240) < 3}
    evidence = later.evidence.select(np.flatnonzero(rows[lacking]))
    new = fitted_well.recalibrate(only(evidence, "hidden") if lacking == "a view" else evidence)
    counts = only(judged.evidence, "counts")
    pure = judged.labels >= 0
    for some in (judged.evidence, counts):
        right, before = (
            (each.predict_proba(some).argmax(1) == judged.labels)[pure].mean() for each in (new, fitted_well)
        )
        assert right > before - 0.05, some
        assert before > 0.8
    assert new.state.temper == fitted_well.state.temper


def test_no_prompts_are_refused(fitted_well: Dispatcher, few: "Sample") -> None:
    none = few.evidence.select([])
    with pytest.raises(EvidenceError, match=r"^expected at least 1 prompt, got none$"):
        fitted_well.recalibrate(none)
    for evidence in (none, Evidence({"counts": np.zeros((0, 3))})):
        with pytest.raises(EvidenceError, match=r"^expected at least 2 prompts with a view '\w+', got 0$"):
            Dispatcher(NAMES).fit(evidence)


def test_a_fitted_dispatcher_can_be_sent_elsewhere(fitted: Dispatcher, fresh: "Sample") -> None:
    """It pickles and copies after all of its uses, and answers as before."""
    posterior, fingerprint = fitted.posterior(fresh.evidence, 4), fitted.state.fingerprint
    for sent in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        assert sent.state.fingerprint == fingerprint
        again = sent.posterior(fresh.evidence, 4)
        np.testing.assert_array_equal(again.weights, posterior.weights)
        np.testing.assert_array_equal(sent.predict_proba(fresh.evidence), fitted.predict_proba(fresh.evidence))


@pytest.mark.parametrize("kind", ["counts", "probabilities"])
def test_thousands_of_classes(kind: str, settings: "Settings") -> None:
    """Their float32 shares sum to 1 within rounding that Pyro takes for a mistake."""
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(3_000, 0.5), 30)
    values = chances if kind == "probabilities" else rng.multinomial(50, chances[0], 30)
    evidence = Evidence({"many": values})
    given = settings() | {"program": Admixture(views={"many": kind}, temper=1.0)}
    answers(Dispatcher(NAMES, **given).fit(evidence, np.arange(30) % 3), evidence.select(slice(0, 4)))


def test_every_prompt_a_class_of_its_own(settings: "Settings") -> None:
    hidden = np.random.default_rng(0).normal(size=(20, 4))
    answers(Dispatcher([f"class {k}" for k in range(20)], **settings()).fit(hidden, np.arange(20)), hidden)


def test_units_do_not_matter(few: "Sample", settings: "Settings") -> None:
    """Nor does the unit of one feature among others."""
    hidden = few.evidence.views["hidden"]
    first, *others = (
        Dispatcher(NAMES, **settings()).fit(hidden * unit, few.labels).predict_proba(hidden * unit)
        for unit in (1.0, 1e-20, 1e20, np.geomspace(1e-20, 1e20, hidden.shape[1]))
    )
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-6)


def test_isolation_survives_errors() -> None:
    state = torch.get_rng_state()

    def fail() -> None:
        with isolated(3):
            torch.rand(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), state)


def test_isolation_leaves_the_generators_of_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there are none, but torch would seed those of each kind."""
    seeded: list[object] = []
    for kind in (torch.cuda, torch.xpu, torch.mps):
        monkeypatch.setattr(kind, "manual_seed" if kind is torch.mps else "manual_seed_all", seeded.append)
    with isolated(3):
        first = torch.rand(5)
    with isolated(3):
        assert torch.equal(torch.rand(5), first)
    assert seeded == []


@pytest.mark.parametrize("known", ["nothing", "some labels", "mixtures", "labels and mixtures", "one expert only"])
def test_whatever_is_known(known: str, few: "Sample", settings: "Settings") -> None:
    labels = {
        "some labels": np.where(np.arange(40) % 5 == 0, few.labels, -1).tolist(),  # a list does, too
        "labels and mixtures": few.labels,
        "one expert only": np.where(few.labels == 1, 1, -1),
    }.get(known)
    mixtures = few.mixtures if "mixtures" in known else None
    dispatcher = Dispatcher(NAMES, **settings()).fit(few.evidence, labels, mixtures)
    answers(dispatcher, few.evidence)
    assert all(torch.isfinite(value).all() for value in dispatcher.state.globals.locations.values())


def test_arrays_are_the_hidden_view(few: "Sample", settings: "Settings") -> None:
    hidden = few.evidence.views["hidden"]
    array, evidence = (
        Dispatcher(NAMES, **settings()).fit(X, few.labels) for X in (hidden, Evidence({"hidden": hidden}))
    )
    assert np.array_equal(answers(array, hidden), answers(evidence, Evidence({"hidden": hidden})))


def test_one_view_alone(few: "Sample", settings: "Settings") -> None:
    missing = {"counts": few.evidence.missing["counts"]}
    counts = Evidence({"counts": few.evidence.views["counts"]}, missing=missing)
    answers(Dispatcher(NAMES, **settings()).fit(counts, few.labels), counts)


def test_mixtures_win_over_labels(few: "Sample", settings: "Settings") -> None:
    wrong = np.where(few.labels < 0, 0, few.labels)
    a, b = (Dispatcher(NAMES, **settings()).fit(few.evidence, y, few.mixtures) for y in (few.labels, wrong))
    assert np.array_equal(answers(a, few.evidence), answers(b, few.evidence))


@pytest.mark.usefixtures("unchecked")
def test_bad_labels_and_mixtures(few: "Sample", settings: "Settings") -> None:
    dispatcher = Dispatcher(NAMES, **settings())
    labels: list[Any] = [
        few.labels + 2,
        few.labels - 1,
        few.labels[:-1],
        few.labels.astype(float),
        np.zeros((40, 1), int),
    ]
    for y in labels:
        with pytest.raises(TensorError, match=r"^expected .*labels.* got [^\n]+$"):
            dispatcher.fit(few.evidence, y)
    flat = np.full((40, 4), 0.25)
    for mixtures in (2 * flat, flat[:-1], flat[:, :3], flat * [-1, 3, 1, 1], np.where(np.eye(40, 4) > 0, np.nan, flat)):
        with pytest.raises(TensorError, match=r"^expected mixtures [^\n]*got [^\n]+$"):
            dispatcher.fit(few.evidence, few.labels, mixtures)
    assert not dispatcher.fitted


def test_bad_evidence(settings: "Settings") -> None:
    dispatcher = Dispatcher(NAMES, **settings())
    with pytest.raises(EvidenceError, match=r"expected finite numbers in 'hidden', .*got nan"):
        dispatcher.fit(np.full((9, 3), np.nan))
    with pytest.raises(
        EvidenceError, match=r"expected one of the views .*views=\{'smell': 'vectors'\}\), got \['smell'\]"
    ):
        dispatcher.fit(Evidence({"smell": np.ones((9, 3))}))
    with pytest.raises(EvidenceError, match="expected at least 2 prompts"):
        dispatcher.fit(np.ones((1, 3)))
    with pytest.raises(EvidenceError, match=r"expected numbers within ±1e\+30 in 'hidden', got 1e\+99"):
        dispatcher.fit(np.full((9, 3), 1e99))
    for count in (0.5, 1e9):
        with pytest.raises(EvidenceError, match=r"expected whole numbers from 0 to 16777216 in view 'counts', got \["):
            dispatcher.fit(Evidence({"counts": np.full((9, 3), count)}))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"steps": 1.5}, {"learning_rate": float("nan")}, {"batch_size": 0}, {"precision": "float16"}],
    ids=str,
)
def test_bad_settings(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^expected .* got [^\n]+$"):
        SVISettings(**changes)


@pytest.mark.usefixtures("unchecked")
def test_settings_take_numbers_of_numpy() -> None:
    """And keep Python's, which go into files."""
    assert asdict(SVISettings(np.int64(3), np.float32(0.5))) == asdict(SVISettings(3, 0.5))


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro says so, before we do
def test_a_fit_that_diverges(few: "Sample", settings: "Settings") -> None:
    given = settings() | {"svi": SVISettings(steps=100, learning_rate=50.0)}
    with pytest.raises(ConfigError, match=r"^expected a learning rate at which .* got 50.0: (nan|inf) at step \d+$"):
        Dispatcher(NAMES, **given).fit(few.evidence, few.labels)


def test_loss_falls_and_globals_are_in_their_supports(fitted: Dispatcher, few: "Sample") -> None:
    """SVI lowers the loss, in mini-batches too, and every draw of the globals lies where its prior does."""
    model = fitted.state.model
    prompts = Prompts(
        torch.zeros(40),
        {"counts": torch.tensor(few.evidence.views["counts"].sum(1)).float()},
        {name: torch.zeros(40, dtype=torch.bool) for name in ("hidden", "counts")},
        {"hidden": torch.randn(40, 3, generator=torch.Generator().manual_seed(0)),
         "counts": torch.tensor(few.evidence.views["counts"]).float()},
        torch.tensor(few.labels),
    )  # fmt: skip
    for batch_size in (40, 16):
        posterior, report = fit_globals(model, prompts, SVISettings(24, 0.1, batch_size, rounds=1), 0)
        losses = report.losses
        assert losses.shape == (24,)
        assert losses[-8:].mean() < losses[:8].mean()
    with isolated(0):
        for sites in (posterior.draw(), posterior.center()):
            assert set(sites) == {"pi", "kappa", "M", "s2", "lt", "xi", "Phi", "conc", *BASE}
            for name in ("pi", "Phi"):
                torch.testing.assert_close(sites[name].sum(-1), torch.ones_like(sites[name].sum(-1)))
            assert all((sites[name] > 0).all() for name in ("pi", "Phi", "kappa", "s2", "lt", "xi", "conc"))


def test_concatenations() -> None:
    """Features are byte-weighted means, counts and lengths are sums, weights are shares of bytes."""
    lengths = torch.tensor([10.0, 30.0, 60.0, 20.0])
    counts = torch.tensor([[10.0, 0], [0, 30], [30, 30], [5, 15]])
    one_hot = torch.eye(4)
    prompts = Prompts(
        lengths,
        {"counts": counts.sum(-1)},
        {name: torch.zeros(4, dtype=torch.bool) for name in ("hidden", "counts")},
        {"hidden": one_hot, "counts": counts},
    )
    joined, known = KnownPrompts(prompts, one_hot.double().numpy()).concatenate(200, np.random.default_rng(0))
    weights = torch.from_numpy(known).float()
    torch.testing.assert_close(joined.observed["hidden"], weights)  # one-hot features: their mean is the shares
    torch.testing.assert_close(weights.sum(-1), torch.ones(200))
    torch.testing.assert_close(joined.totals["counts"], joined.observed["counts"].sum(-1))
    torch.testing.assert_close(joined.totals["counts"], joined.lengths)
    assert (joined.lengths <= 60).all()
    assert ((weights > 0).sum(-1) > 1).any()


def test_known_prompts_are_pure_or_mixed() -> None:
    weights = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [np.nan] * 3, [0, 1.0, 0]])
    prompts = Prompts(
        torch.full((4,), 10.0), {}, {"hidden": torch.zeros(4, dtype=torch.bool)},
        {"hidden": torch.arange(4.0).unsqueeze(-1)},
    )  # fmt: skip
    source = KnownPrompts(prompts, weights)
    assert [rows.tolist() for rows in source.groups] == [[0, 3], [1]]
    judged, known = source.judged(np.random.default_rng(0), 75)
    assert np.isfinite(known).all()
    np.testing.assert_allclose(known.sum(1), 1)
    assert len(judged) == len(known) > 3


def test_precision_and_restarts(few: "Sample", settings: "Settings") -> None:
    """Double precision all through the globals, the best of several restarts, and a report of how it went."""
    given = settings() | {"svi": SVISettings(steps=20, rounds=2, restarts=2, precision="float64", conditional_steps=10)}
    dispatcher = Dispatcher(NAMES, **given).fit(few.evidence, few.labels)
    assert {value.dtype for value in dispatcher.state.globals.locations.values()} == {torch.float64}
    report = dispatcher.report
    assert len(report.final) == 2
    assert len(dispatcher.recalibrate(few.evidence, few.labels).report.final) == 1  # which has one start
    assert report.losses[-8:].mean() == pytest.approx(min(report.final), rel=0.2)
    assert len(report.losses) in (20, 40)
    assert np.isfinite(report.change)
    single = Dispatcher(NAMES, **settings(svi=20)).fit(few.evidence, few.labels)
    assert {value.dtype for value in single.state.globals.locations.values()} == {torch.float32}
    a, b = (each.state.globals.center()["M"].double() for each in (dispatcher, single))
    torch.testing.assert_close(a, b, atol=0.3, rtol=0)


@pytest.mark.slow
def test_many_prompts_come_in_mini_batches(make_sample: "Callable[..., Sample]", settings: "Settings") -> None:
    """Far more prompts than a step takes: the network in place of local parameters finds the same experts."""
    sample = make_sample(1_500, 9)
    given = settings() | {"svi": SVISettings(steps=150, batch_size=100, rounds=1, conditional_steps=0)}
    dispatcher = Dispatcher(NAMES, **given).fit(sample.evidence, sample.labels, sample.mixtures)
    start = Dispatcher(NAMES, **given | {"svi": SVISettings(steps=150, rounds=1, conditional_steps=0)})
    start.fit(sample.evidence, sample.labels, sample.mixtures)
    for name in ("M", "Phi"):
        a, b = (each.state.globals.center()[name] for each in (dispatcher, start))
        torch.testing.assert_close(a, b, atol=0.15, rtol=0)
    assert dispatcher.report.losses[-20:].mean() < dispatcher.report.losses[:20].mean()
