"""Other programs than the default: families, priors, and views of any name, each of which speaks. Evidence that does
not fit is refused."""

from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.dispatcher.program.views import VectorsView
from bayes_dispatch.errors import ConfigError, EvidenceError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bayes_dispatch.conftest import Sample

    Settings = Callable[..., dict[str, Any]]

NAMES = ("a", "b", "c")
ONE_LINE = r"^expected [^\n]*got [^\n]+$"
ALL = {"hidden": "vectors", "counts": "counts", "surprise": "surprise", "keywords": "counts"}
ALL |= {"embedding": "vectors", "classifier": "probabilities"}


@pytest.fixture(scope="module")
def many_views(make_sample: "Callable[..., Sample]") -> "tuple[Sample, Evidence]":
    """The small world with four more views that tell the same."""
    sample = make_sample(80, 4)
    rng = np.random.default_rng(0)
    views = dict(sample.evidence.views)
    views["surprise"] = np.stack([2 + sample.weights[:, 3], rng.normal(size=80)], 1) + 0.2 * rng.normal(size=(80, 2))
    views["keywords"] = rng.poisson(4 * sample.weights).astype(float)
    views["embedding"] = sample.weights @ rng.normal(size=(4, 5)) + 0.1 * rng.normal(size=(80, 5))
    views["classifier"] = np.stack([rng.dirichlet(10 * w[:3] + 0.1) for w in sample.weights])
    missing = {
        **sample.evidence.missing,
        "keywords": views["keywords"].sum(1) == 0,
        "classifier": np.arange(80) % 7 == 1,
    }
    return sample, Evidence(views, sample.evidence.lengths, missing)


def check(dispatcher: Dispatcher, evidence: Evidence, tmp_path: "Path") -> None:
    """Draws on the simplex, simulations, and the same from a file."""
    posterior = dispatcher.posterior(evidence, draws=6, seed=1)
    np.testing.assert_allclose(posterior.weights.sum(-1), 1, atol=1e-9)
    dispatcher.save(tmp_path / "saved")
    loaded = Dispatcher.load(tmp_path / "saved")
    assert np.array_equal(loaded.posterior(evidence, draws=6, seed=1).weights, posterior.weights)
    assert loaded.program == dispatcher.program
    assert np.isfinite(dispatcher.log_evidence(evidence)).all()
    truth, found = dispatcher.simulate(9, draws=4)
    assert truth.shape == found.weights.shape[1:]


@pytest.mark.slow
def test_every_view_at_once(many_views: "tuple[Sample, Evidence]", settings: "Settings", tmp_path: "Path") -> None:
    sample, evidence = many_views
    dispatcher = Dispatcher(NAMES, **settings(svi=20), program=Admixture(views=ALL))
    dispatcher.fit(evidence, sample.labels, sample.mixtures)
    names = {view.name: view.kind for view in dispatcher.state.model.views}
    assert names == ALL
    sites = dispatcher.state.globals.locations
    assert {"M", "Phi", "a", "embedding_M", "keywords_Phi", "classifier_conc"} <= set(sites)
    check(dispatcher, evidence, tmp_path)
    by_default = Dispatcher(NAMES, **settings()).fit(evidence, sample.labels)
    assert [view.name for view in by_default.state.model.views] == ["hidden", "counts", "surprise"]


@pytest.mark.parametrize("kind", ["keywords", "embedding", "classifier", "surprise"])
def test_each_view_speaks(kind: str, many_views: "tuple[Sample, Evidence]", settings: "Settings") -> None:
    """Alone, each of the further views tells its experts apart better than chance (surprise knows base only)."""
    sample, evidence = many_views
    program = Admixture(views={kind: ALL[kind]})
    dispatcher = Dispatcher(NAMES, **settings(svi=40), program=program)
    dispatcher.fit(evidence, sample.labels, sample.mixtures)
    present = ~evidence.is_missing(kind)
    if kind == "surprise":
        mean = dispatcher.posterior(evidence, draws=200).mean[:, 3]
        assert np.corrcoef(mean[present], sample.weights[present, 3])[0, 1] > 0.3
    else:
        pure = present & (sample.labels >= 0)
        right = dispatcher.predict_proba(evidence).argmax(1) == sample.labels
        assert right[pure].mean() > 0.7


def test_families_and_priors(many_views: "tuple[Sample, Evidence]", settings: "Settings", tmp_path: "Path") -> None:
    """A prior of one expert reaches what is served at once; families come back from a file."""
    sample, evidence = many_views
    program = Admixture(families={"first": ["a", "c"]}, prior={"b": 300.0, "base": 0.5})
    dispatcher = Dispatcher(NAMES, **settings(svi=20), program=program)
    dispatcher.fit(evidence, sample.labels, sample.mixtures)
    assert dispatcher.state.model.tree == (0, 1, 0, 2)
    assert dispatcher.prior.mean[1] > 0.9
    check(dispatcher, evidence, tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_whatever_a_program_is_told_in_it_is_plain(settings: "Settings", sample: "Sample", tmp_path: "Path") -> None:
    """So it can be saved, comes back the same, and is out of its teller's reach."""
    prior: dict[str, Any] = {"a": np.int64(30), "b": np.float32(2.5)}
    families = {"x": np.array(["a", "b"])}
    given = {"views": MappingProxyType({"hidden": np.str_("vectors")}), "families": families, "prior": prior}
    program = Admixture(**given)
    assert (program.prior, program.families) == ({"a": 30.0, "b": 2.5}, {"x": ("a", "b")})
    dispatcher = Dispatcher(NAMES, **settings(svi=1), program=program).fit(sample.evidence, sample.labels)
    prior["a"], families["y"] = 3.0, np.array(["c"])
    dispatcher.save(tmp_path / "saved")
    loaded = Dispatcher.load(tmp_path / "saved")
    assert loaded.program == dispatcher.program == program
    assert loaded.fingerprint == dispatcher.fingerprint


def test_an_expert_without_family_is_one() -> None:
    program = Admixture(families={"x": ["e", "b"], "y": ["c"]})
    model = program.model(["a", "b", "c", "d", "e"], (VectorsView(1),))
    assert model.families == (0, 1, 2, 3, 1)
    assert model.tree == (0, 1, 2, 3, 1, 4)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"views": {}}, {"views": {"hidden": "smell"}}, {"views": {"a b": "counts"}}, {"views": {"pi": "counts"}}),
        *({"views": {"weights": "counts"}}, {"views": {"lengths": "vectors"}}),
        *({"views": {"hidden": "vectors", name: "counts"}} for name in ("M", "s2", "base_s2", "lt", "xi")),
        *({"views": {"counts": "counts", name: "vectors"}} for name in ("Phi", "conc", "base_Phi", "counts_feature")),
        *({"views": {"surprise": "surprise", "a2": "counts"}}, {"views": {"a": "vectors", "a_base": "vectors"}}),
        *({"views": {"hidden": "counts"}}, {"prior": {"a": 0.0}}, {"prior": {"a": float("nan")}}),
        *({"views": ["hidden"]}, {"views": {"hidden": ["counts"]}}, {"prior": 3.0}, {"families": {"x": {"a", "b"}}}),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_programs(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=ONE_LINE):
        Admixture(**arguments)


def test_sizes_are_as_exact_as_they_are_told(settings: "Settings", sample: "Sample") -> None:
    """Percentages of four digits sum to 1 for the generators that draw sizes; exact ones stay to the last bit."""
    program = Admixture(sizes=(0.3333, 0.3333, 0.3333))
    assert sum(program.sizes) == pytest.approx(1, abs=1e-15)
    assert Admixture(sizes=(0.7, 0.2, 0.1)).sizes == (0.7, 0.2, 0.1)
    dispatcher = Dispatcher(NAMES, **settings(svi=1), program=program).fit(sample.evidence, sample.labels)
    assert dispatcher.simulate(3, draws=2)[0].shape == (3, 4)


@pytest.mark.parametrize(
    "arguments", [{"prior": {"z": 1.0}}, {"families": {"x": ["a", "z"]}}, {"families": {"x": ["a"], "y": ["a"]}}]
)
def test_programs_for_other_experts(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=ONE_LINE):
        Dispatcher(NAMES, program=Admixture(**arguments))


def test_evidence_that_does_not_fit(settings: "Settings") -> None:
    ones = np.ones((30, 3))
    cases: list[tuple[dict[str, str], dict[str, np.ndarray]]] = [
        ({"smell": "vectors"}, {"hidden": ones}),
        ({"words": "counts"}, {"words": -ones}),
        ({"classes": "probabilities"}, {"classes": ones}),
    ]
    for kinds, views in cases:
        with pytest.raises(EvidenceError, match=ONE_LINE):
            Dispatcher(NAMES, **settings(), program=Admixture(views=kinds)).fit(Evidence(views))
