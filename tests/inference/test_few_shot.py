"""Few-shot posteriors: densities are those of Pyro's trace, every method finds the posterior by quadrature and is
calibrated, no information leaves the prior. Seeds decide; bad settings and priors are refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy.stats import beta, kstest

from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.inference.few_shot.answers import AnswerLikelihood
from bayes_dispatch.inference.few_shot.methods import (
    CrossEntropy,
    ImportanceSampling,
    SequentialMonteCarlo,
    VariationalInference,
    _systematic,
)
from bayes_dispatch.inference.few_shot.program import FewShotMethod, FewShotProgram
from bayes_dispatch.inference.few_shot.strategies import FewShot

PAIRS = [("kfpa>", "apfk\n"), ("dcba>", "abcd\n")]


@pytest.fixture(scope="module")
def line(model: Any, make_bank: Any) -> FewShotProgram:
    """One expert beside base: the posterior is a density on an interval."""
    return FewShotProgram(AnswerLikelihood(model, make_bank(model, ("only",), seed=3), PAIRS), prior=(0.8, 1.2))


@pytest.fixture(scope="module")
def exact(line: FewShotProgram) -> tuple[float, float, float]:
    """Mean and standard deviation of the expert's weight, and the log evidence, by quadrature."""
    edges = beta(0.8, 1.2).ppf(np.linspace(0, 1, 2001))
    middle = beta(0.8, 1.2).ppf((np.arange(2000) + 0.5) / 2000)
    assert (np.diff(edges) > 0).all()
    with torch.no_grad():
        logs = line.likelihood(torch.from_numpy(np.stack([middle, 1 - middle], 1))).numpy()
    weights = np.exp(logs - logs.max())
    mean = float(np.average(middle, weights=weights))
    sd = float(np.sqrt(np.average((middle - mean) ** 2, weights=weights)))
    return mean, sd, float(np.log(weights.mean()) + logs.max())


@pytest.mark.parametrize("coupling", [None, 5.0])
def test_densities_are_the_programs(model64: Any, bank: Any, coupling: float | None) -> None:
    program = FewShotProgram(AnswerLikelihood(model64, bank, PAIRS), coupling=coupling)
    torch.manual_seed(0)
    state = program.draw(3)
    assert state.shape == (3, program.rows, 4)
    with torch.no_grad():
        ours = program.log_prior(state) + program.log_likelihood(state)
        for row, value in zip(state, ours.tolist(), strict=True):
            given = {"w": row[0]} | ({} if coupling is None else {"layers": row[1:]})
            trace = poutine.trace(pyro.condition(program, data=given)).get_trace()
            assert float(trace.log_prob_sum()) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    "method",
    [
        ImportanceSampling(proposals=4000, draws=1000),
        SequentialMonteCarlo(particles=1000),
        VariationalInference(steps=150, draws=1000),
    ],
    ids=lambda method: method.name,
)
def test_methods_find_the_posterior(
    line: FewShotProgram, exact: tuple[float, float, float], method: FewShotMethod
) -> None:
    """Against quadrature: means within five standard errors, a fixed seed; SVI has a Dirichlet, which is near."""
    mean, sd, log_evidence = exact
    prior_sd = float(beta(0.8, 1.2).std())
    assert abs(mean - 0.4) > 0.3 * prior_sd or sd < 0.7 * prior_sd  # the answers tell something
    found = method.infer(line, seed=1)
    draws = found.posterior.weights[:, 0, 0]
    near = 5 * sd / np.sqrt(len(draws)) + (0.03 if isinstance(method, VariationalInference) else 0.0)
    assert draws.mean() == pytest.approx(mean, abs=near)
    assert draws.std() == pytest.approx(sd, rel=0.15)
    assert found.log_evidence == pytest.approx(log_evidence, abs=0.1)
    assert found.evaluations > 0


def test_without_information_the_posterior_is_the_prior(model: Any, make_bank: Any) -> None:
    """Experts that are base: each weight follows its marginal. Four tests at a false-alarm rate of .01 in all."""
    bank = make_bank(model)
    still = type(bank)(
        [replace(bank[n], scales={m: torch.ones_like(z) for m, z in bank[n].scales.items()}) for n in bank]
    )
    program = FewShotProgram(AnswerLikelihood(model, still, PAIRS), prior=(0.5, 1.0, 2.0, 1.5))
    draws = SequentialMonteCarlo(particles=600).infer(program, 0).posterior.weights[:, 0]
    for k, a in enumerate((0.5, 1.0, 2.0, 1.5)):
        assert kstest(draws[:, k], beta(a, 5.0 - a).cdf).pvalue > 0.0025


@pytest.mark.slow
def test_weights_by_layer(model: Any, bank: Any) -> None:
    """A tight coupling is one set of weights; both methods agree on the shared weights of a loose one."""
    likelihood = AnswerLikelihood(model, bank, PAIRS)
    shared = SequentialMonteCarlo(particles=400).infer(FewShotProgram(likelihood), 0)
    tight = SequentialMonteCarlo(particles=400).infer(FewShotProgram(likelihood, coupling=3e3), 0)
    assert tight.layers is not None
    assert shared.layers is None
    assert tight.layers.weights.shape == (400, len(likelihood.layers), 4)
    np.testing.assert_allclose(tight.posterior.mean, shared.posterior.mean, atol=0.12)
    loose = FewShotProgram(likelihood, coupling=4.0)
    sampled, weighted = (m.infer(loose, 1) for m in (SequentialMonteCarlo(400), ImportanceSampling(4000, 400)))
    np.testing.assert_allclose(sampled.posterior.mean, weighted.posterior.mean, atol=0.1)
    assert sampled.layers is not None
    assert weighted.layers is not None
    np.testing.assert_allclose(sampled.layers.mean, weighted.layers.mean, atol=0.1)
    assert sampled.log_evidence == pytest.approx(weighted.log_evidence, abs=0.3)


@pytest.mark.parametrize("coupling", [None, 5.0])
def test_cross_entropy_climbs(model: Any, bank: Any, coupling: float | None) -> None:
    program = FewShotProgram(AnswerLikelihood(model, bank, PAIRS), coupling=coupling)
    found = CrossEntropy().infer(program, 0)
    assert found.posterior.weights.shape == (1, 1, 4)
    assert found.log_evidence is None
    torch.manual_seed(0)
    with torch.no_grad():
        best = program.log_likelihood(program.draw(300)).max()
        assert program.log_likelihood(torch.from_numpy(found.state)) > best - 0.5


@pytest.mark.parametrize(
    "method",
    [ImportanceSampling(50, 20), SequentialMonteCarlo(16), VariationalInference(3, 2, draws=30), CrossEntropy(8, 2, 2)],
    ids=lambda method: method.name,
)
def test_seeds_decide_and_nothing_else_moves(line: FewShotProgram, method: FewShotMethod) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (method.infer(line, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.state, again.state)
    assert (one.state != other.state).any()
    assert torch.equal(before, torch.get_rng_state())
    assert not dict(pyro.get_param_store())


@pytest.mark.slow
def test_calibration_by_simulation(model: Any, make_bank: Any) -> None:
    """Ranks of weights drawn from the prior among posterior draws, given answers that the blended model wrote.

    Chi-squared over eight bins, 120 simulations, three components: a false-alarm rate of .01 in all.
    """
    from scipy.stats import chisquare

    bank = make_bank(model, ("a", "b"), seed=4)
    rng = np.random.default_rng(0)
    ranks = []
    for simulation in range(120):
        truth = rng.dirichlet(np.full(3, 2 / 3))
        pairs = []
        for question in ("kfpa>", "37+58="):
            row = [256, *question.encode()]
            for _ in range(6):
                with torch.no_grad():
                    logits = model(torch.tensor([row]), adaptation=bank.blend(torch.tensor(truth).float())).logits
                p = logits[0, -1, :128].double().softmax(-1).numpy()  # bytes of ASCII: any text of them is UTF-8
                row.append(int(rng.choice(128, p=p)))
            pairs.append((question, bytes(row[1 + len(question) :])))
        program = FewShotProgram(AsciiLikelihood(model, bank, pairs), prior=(2 / 3,) * 3)
        draws = SequentialMonteCarlo(particles=64).infer(program, simulation).posterior.weights[:, 0]
        ranks.append((draws < truth).mean(0))
    for column in np.array(ranks).T:
        counts = np.histogram(column, 8, (0, 1 + 1e-9))[0]
        assert chisquare(counts).pvalue > 0.01 / 3


class AsciiLikelihood(AnswerLikelihood):
    """The likelihood among the bytes of ASCII, which the simulations draw from."""

    def _score(self, batch: Any, weights: torch.Tensor) -> torch.Tensor:
        particles, pairs = len(weights), len(batch.ids)
        ids, tokens = batch.ids.repeat(particles, 1), batch.tokens.repeat(particles)
        mask = (torch.arange(ids.shape[1]) < tokens[:, None]).long()
        adaptation = self.experts.blend_rows(weights.to(self.model.dtype).repeat_interleave(pairs, 0))
        log_p = (
            self.model(ids, attention_mask=mask, adaptation=adaptation).logits[:, :-1, :128].double().log_softmax(-1)
        )
        said = log_p.gather(2, ids[:, 1:, None].clamp(max=127))[..., 0]
        return (said * batch.counted[:, 1:].repeat(particles, 1)).sum(1).unflatten(0, (particles, pairs))


@pytest.mark.parametrize(
    "method",
    [ImportanceSampling(50, 20), SequentialMonteCarlo(16), VariationalInference(3, 2, draws=30), CrossEntropy(8, 2, 2)],
    ids=lambda method: method.name,
)
def test_an_expert_under_which_the_model_overflows_is_refused(
    model: Any, bank: Any, method: FewShotMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, whole = iter(range(100)), AnswerLikelihood.by_pair  # where it is not, some never end
    monkeypatch.setattr(AnswerLikelihood, "by_pair", lambda self, weights: (next(calls), whole(self, weights))[1])
    scales = {name: torch.full((rank,), 1e30) for name, rank in model.adaptable().items()}
    broken = type(bank)([bank["add"], replace(bank["add"], name="large", scales=scales)])
    program = FewShotProgram(AnswerLikelihood(model, broken, PAIRS))
    with pytest.raises(TensorError, match="expected finite log-likelihoods of the answers under blends"):
        method.infer(program, seed=0)


@pytest.mark.parametrize("width", [1.0, 1e3, 1e9, 1e30])
def test_steps_leave_enough_particles_effective_and_go_on(width: float) -> None:
    """However many nats lie between the particles."""
    likelihood = -width * torch.linspace(0, 1, 64).double()
    step = SequentialMonteCarlo(keep=0.5)._step(likelihood, 1.0)
    weights = (step * likelihood).softmax(0)
    assert 0 < step <= 1
    assert float(1 / weights.square().sum()) >= 0.499 * len(weights) or width > 1e12  # as near as steps come


def test_resampled_particles_come_in_random_order() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([0.5, 0.3, 0.2]).double()
    chosen = _systematic(weights, 100)
    assert chosen.bincount().tolist() == pytest.approx([50, 30, 20], abs=1)
    assert not torch.equal(chosen, chosen.sort().values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImportanceSampling(10), "proposals to be a whole number from 25 "),
        (lambda: ImportanceSampling(draws="x"), "draws to be a whole number from 1 "),
        (lambda: SequentialMonteCarlo(4), "particles to be a whole number from 8 "),
        (lambda: SequentialMonteCarlo(keep=1), "keep to be a finite number > 0 and < 1, got 1"),
        (lambda: SequentialMonteCarlo(moves=1.5), "moves to be a whole number"),
        (lambda: VariationalInference(draws=3), "draws to be a whole number from 25 "),
        (lambda: VariationalInference(learning_rate="a"), "learning_rate to be a finite number > 0, got 'a'"),
        (lambda: CrossEntropy(5, 9), "an elite of at most the population, 5, got 9"),
        (lambda: CrossEntropy(spread=float("nan")), "spread to be a finite number > 0, got nan"),
        (lambda: FewShot(PAIRS, "x"), r"a method such as SequentialMonteCarlo\(\), got 'x'"),
        (lambda: FewShot(PAIRS, CrossEntropy), "a method such as"),
    ],
)
def test_refuses_settings(make: Any, message: str, unchecked: None) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_refuses_priors(line: FewShotProgram, unchecked: None) -> None:
    for prior in ((1.0,), (1.0, 0.0), (1.0, float("nan")), (1.0, "a"), "ab", 2.0):
        with pytest.raises(ConfigError, match=r"expected (a concentration of the prior to be|2 concentrations of a)"):
            FewShotProgram(line.likelihood, prior)  # type: ignore[arg-type]
    for coupling in (0.0, "a"):
        with pytest.raises(ConfigError, match="coupling to be a finite number > 0"):
            FewShotProgram(line.likelihood, coupling=coupling)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed to be a whole number"):
        CrossEntropy(8, 2, 2).infer(line, -1)
