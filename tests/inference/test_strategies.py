"""One contract for all strategies of dispatch: prompts do not meet, weights are weights. Each is what it is meant to
compute."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bayes_dispatch.errors import ConfigError, ForeignExpertError, PromptError, TensorError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.few_shot import categories
from bayes_dispatch.inference.few_shot.categories import QUESTION, CategoryDomain
from bayes_dispatch.inference.few_shot.methods import CrossEntropy, ImportanceSampling, VariationalInference
from bayes_dispatch.inference.few_shot.strategies import (
    AskedExpert,
    AskedModel,
    ByPrompt,
    Classified,
    FewShot,
    Given,
    one_hot_draws,
)
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.scoring.compare import compare_blends
from bayes_dispatch.inference.two_pass.blends import DEFAULT_BLEND, PosteriorMean
from bayes_dispatch.inference.two_pass.system import Dispatched, Strategy

PROMPTS = ["kfpa>apfk\n", "37+58=95\n12+11=", "def mean(xs):"]
PAIRS = [("kfpa>", "apfk\n")]


@pytest.fixture(scope="module")
def make_strategy(bundle: Any) -> Callable[[str], Strategy]:
    """A strategy by name, for the tiny system."""
    scales = {name: torch.full((rank,), 1.2) for name, rank in bundle.model.adaptable().items()}
    asked = ExpertVector("asked", scales, bundle.experts.base)
    made: dict[str, Callable[[], Strategy]] = {
        "dispatched": Dispatched,
        "asked model": AskedModel,
        "asked expert": lambda: AskedExpert(asked),
        "classified": lambda: Classified(lambda evidence: np.tile([0.5, 0.25, 0.25, 0.0], (len(evidence), 1))),
        "few-shot": lambda: FewShot(PAIRS, ImportanceSampling(64, 3)),
        "few-shot, own pairs": lambda: ByPrompt(lambda prompt: FewShot([("", prompt)], CrossEntropy(8, 2, 2))),
        "given": lambda: Given(np.full(4, 0.25)),
    }
    return lambda name: made[name]()


NAMES = ["dispatched", "asked model", "asked expert", "classified", "few-shot", "few-shot, own pairs", "given"]


@pytest.mark.parametrize("name", NAMES)
def test_contract(bundle: Any, make_strategy: Callable[[str], Strategy], name: str) -> None:
    """Draws for each prompt over the bank's components, the same by seed, and served like the dispatcher's; also under
    the blend that nobody chose."""
    strategy = make_strategy(name)
    assert isinstance(strategy, Strategy)
    assert strategy.name
    posterior = strategy.posterior(bundle, PROMPTS, 3)
    assert posterior.experts == bundle.experts.components
    assert posterior.mean.shape == (3, 4)
    np.testing.assert_array_equal(posterior.weights, strategy.posterior(bundle, PROMPTS, 3).weights)
    made = TwoPassGenerator(bundle).generate(
        PROMPTS, blend=PosteriorMean(), max_new_tokens=2, seed=3, strategy=strategy
    )
    np.testing.assert_allclose(made.weights, posterior.mean, atol=1e-6)
    by_default = TwoPassGenerator(bundle).generate(PROMPTS, max_new_tokens=2, seed=3, strategy=strategy)
    assert by_default.weights.shape == posterior.mean.shape
    if len(posterior.weights) == 1:  # nothing is open
        np.testing.assert_allclose(by_default.weights, posterior.mean, atol=1e-6)
    documents = [Document(prompt + "ab", len(prompt.encode())) for prompt in PROMPTS]
    frame = compare_blends(bundle, documents, [PosteriorMean(), DEFAULT_BLEND], seed=3, strategy=strategy).to_frame()
    assert len(frame) == 6
    assert np.isfinite(frame["nll"]).all()


@pytest.mark.parametrize("name", [*NAMES[1:4], NAMES[5]])
def test_prompts_do_not_meet(bundle: Any, make_strategy: Callable[[str], Strategy], name: str) -> None:
    strategy = make_strategy(name)
    together = strategy.posterior(bundle, PROMPTS, 0).mean
    alone = [strategy.posterior(bundle, [prompt], 0).mean[0] for prompt in PROMPTS]
    np.testing.assert_allclose(together, alone)
    with pytest.raises(PromptError):
        strategy.posterior(bundle, [""], 0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", NAMES[:6])
def test_seeds_are_checked(bundle: Any, make_strategy: Callable[[str], Strategy], name: str) -> None:
    for seed in (-1, 1.5, "a"):
        with pytest.raises(ConfigError, match="expected seed to be a whole number ≥ 0, got"):
            make_strategy(name).posterior(bundle, PROMPTS, seed)  # type: ignore[arg-type]


def test_asked_model_is_the_likelihood_of_the_names(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one sequence at a time; names may be given, and batches do not matter."""
    called = {"sort": "sorted words", "base": "other"}
    expected = []
    for name in ("reverse", "sorted words", "add", "other"):
        asked = [256, *(PROMPTS[0] + QUESTION).encode()]
        row = [*asked, *f"{name}\n".encode()]
        with torch.no_grad():
            logs = bundle.model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        expected.append(sum(float(logs[t - 1, row[t]]) for t in range(len(asked), len(row))))
    p = np.exp(np.array(expected) - max(expected))
    found = AskedModel(called).posterior(bundle, PROMPTS, 0)
    np.testing.assert_allclose(found.mean[0], p / p.sum(), atol=1 / 64)
    monkeypatch.setattr(categories, "TOKENS_AT_ONCE", 1)
    np.testing.assert_array_equal(found.weights, AskedModel(called).posterior(bundle, PROMPTS, 0).weights)


def test_few_shot_is_the_same_inside_generation(bundle: Any) -> None:
    """Where gradients are off: SVI still learns, and leaves none behind."""
    strategy = FewShot(PAIRS, VariationalInference(5, 2, draws=32))
    made = TwoPassGenerator(bundle).generate(
        PROMPTS[:1], blend=PosteriorMean(), max_new_tokens=1, seed=3, strategy=strategy
    )
    direct = strategy.posterior(bundle, PROMPTS[:1], 3)
    np.testing.assert_array_equal(made.posterior.weights, direct.weights)
    longer = FewShot(PAIRS, VariationalInference(6, 2, draws=32)).posterior(bundle, PROMPTS[:1], 3)
    assert (longer.weights != direct.weights).any()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in bundle.model.parameters())


def test_one_hot_draws() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(4, 0.4), 50)
    found = one_hot_draws(probabilities, ("a", "b", "c", "base"), list(range(50)))
    even = one_hot_draws(np.tile([0.5, 0.5], (40, 1)), ("a", "base"), list(range(40)))
    assert set(np.unique(even.weights[0].argmax(1))) == {0, 1}  # the first draws, which Thompson sampling takes
    assert set(np.unique(found.weights)) == {0.0, 1.0}
    np.testing.assert_allclose(found.mean, probabilities, atol=1 / len(found.weights))
    with pytest.raises(TensorError, match="expected probabilities of shape"):
        one_hot_draws(probabilities, ("a", "base"), list(range(50)))
    for wrong, message in ((probabilities * 2, "sum to 1"), (probabilities * [3, -1, 1, 1], "at least 0")):
        with pytest.raises(ConfigError, match=message):
            one_hot_draws(wrong, ("a", "b", "c", "base"), list(range(50)))


def test_category_documents_score_the_category_alone() -> None:
    domain = CategoryDomain(tuple(CONVENTIONS[:2]), {"sort": "sorted"})
    seen = set()
    for seed in range(20):
        document = domain.document(np.random.default_rng(seed), 0, 256, "train")
        ((start, stop),) = document.ranges
        assert document.data[:start].endswith(QUESTION.encode())
        assert stop == len(document.data)
        seen.add(document.data[start:stop].decode())
    assert seen == {"reverse\n", "sorted\n"}


def test_a_classifier_may_give_tensors(bundle: Any) -> None:
    """With gradients, as a layer gives them."""
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0], requires_grad=True)
    found = Classified(lambda evidence: shares.tile(len(evidence), 1))  # type: ignore[arg-type, return-value]
    np.testing.assert_array_equal(found.posterior(bundle, PROMPTS, 0).mean, np.tile(shares.tolist(), (len(PROMPTS), 1)))


def test_weights_by_name_are_those_in_order(bundle: Any) -> None:
    found, expected = (
        Given(weights).posterior(bundle, PROMPTS, 0).weights
        for weights in ({"base": 0.25, "sort": 0.75}, np.array([0, 0.75, 0, 0.25]))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("unchecked")
def test_refuses(bundle: Any) -> None:
    for wrong in ("x", AskedModel, 1):
        with pytest.raises(ConfigError, match="expected a strategy such as"):
            TwoPassGenerator(bundle).generate(PROMPTS, max_new_tokens=1, strategy=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="expected a strategy such as"):
            compare_blends(bundle, [Document("ab", 1)], ["base"], strategy=wrong)  # type: ignore[arg-type]
    for pairs in ("ab", [], 5, ["ab"], [("a", "")]):
        with pytest.raises(PromptError, match=r"expected (a list of at least one pair|pair 0)"):
            FewShot(pairs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected names for components"):
        AskedModel({"nobody": "x"}).posterior(bundle, PROMPTS, 0)
    with pytest.raises(ConfigError, match="different names of categories"):
        AskedModel({"sort": "add"}).posterior(bundle, PROMPTS, 0)
    with pytest.raises(TensorError, match="expected weights of shape"):
        Given(np.ones(3) / 3).posterior(bundle, PROMPTS, 0)
    with pytest.raises(ConfigError, match=r"^expected weights of reverse, sort, add, base, got one of 'shift'$"):
        Given({"sort": 0.5, "shift": 0.5}).posterior(bundle, PROMPTS, 0)
    with pytest.raises(TensorError, match=r"^expected numbers as weights of reverse, sort, add, base, got list that"):
        Given({"sort": "x"}).posterior(bundle, PROMPTS, 0)  # type: ignore[dict-item]
    with pytest.raises(TensorError, match=r"^expected weights on the simplex"):
        Given({"sort": 0.5}).posterior(bundle, PROMPTS, 0)
    foreign = ExpertVector("asked", {"a": torch.ones(2)}, "another")
    with pytest.raises(ForeignExpertError, match="made for base model"):
        AskedExpert(foreign).posterior(bundle, PROMPTS, 0)
