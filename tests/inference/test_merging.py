"""Merged particles: the mixture changes by less than the tolerance, nearly as few rows are kept as any search finds,
copies cost nothing, prompts can be dropped, and what is compared of a large vocabulary fits into memory."""

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.inference.two_pass import particles as particles_module
from bayes_dispatch.inference.two_pass import readers
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.filtering import ParticleFilter, predictive
from bayes_dispatch.inference.two_pass.first_pass import read_prefix
from bayes_dispatch.inference.two_pass.merging import divergences, representatives
from bayes_dispatch.inference.two_pass.particles import MEASURED, Decoding
from bayes_dispatch.model.mambaformer.session import MambaFormerSession
from bayes_dispatch.model.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

seeds = st.integers(0, 2**31)


def random_predictives(seed: int, particles: int, tokens: int, spread: float) -> torch.Tensor:
    """(1, S, T, V) log-probabilities, alike where ``spread`` is small."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, 1, tokens, 6, generator=draw, dtype=torch.double)
    own = torch.randn(1, particles, tokens, 6, generator=draw, dtype=torch.double)
    return (shared + spread * own).log_softmax(-1)


@settings(max_examples=50, deadline=None)
@given(
    seeds, st.integers(1, 7), st.integers(1, 4), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([1e-4, 1e-2, 0.3])
)
def test_the_mixture_changes_by_less_than_the_tolerance(
    seed: int, particles: int, tokens: int, spread: float, tolerance: float
) -> None:
    log_p = random_predictives(seed, particles, tokens, spread)
    v = np.random.default_rng(seed).dirichlet(np.full(particles, 0.3))
    kl = divergences(log_p, torch.ones(1, tokens, dtype=torch.bool))[0] / tokens
    chosen = representatives(v, kl, tolerance)
    assert (chosen[chosen] == chosen).all()
    assert (v * kl[np.arange(particles), chosen]).sum() <= tolerance
    p = log_p[0].exp().numpy()  # (S, T, V)
    before, after = (np.einsum("s,stv->tv", v, each) for each in (p, p[chosen]))
    assert (before * np.log(before / after)).sum() / tokens <= tolerance + 1e-12


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 5))
def test_nearly_as_few_as_any_search_finds(seed: int, particles: int) -> None:
    log_p = random_predictives(seed, particles, 3, 0.3)
    v = np.random.default_rng(seed).dirichlet(np.ones(particles))
    kl = divergences(log_p, torch.ones(1, 3, dtype=torch.bool))[0] / 3
    found = len(set(representatives(v, kl, 0.01).tolist()))
    enough = (
        size
        for size in range(1, particles + 1)
        for some in itertools.combinations(range(particles), size)
        if (v * kl[:, some].min(1)).sum() <= 0.01
    )
    assert found <= next(enough) + 1


def test_divergences_of_counted_tokens_only() -> None:
    log_p = random_predictives(0, 3, 4, 1.0)
    counted = torch.tensor([[True, False, True, False]])
    p = log_p[0].exp().numpy()
    expected = sum((p[:, None, t] * np.log(p[:, None, t] / p[None, :, t])).sum(-1) for t in (0, 2))
    np.testing.assert_allclose(divergences(log_p, counted)[0], expected, atol=1e-12)


def test_tokens_of_no_probability_keep_apart_what_differs() -> None:
    """One that is masked under all particles changes nothing; one that is masked under one alone tells it apart."""
    counted = torch.ones(1, 2, dtype=torch.bool)
    log_p = random_predictives(3, 3, 2, 2.0)
    masked = torch.nn.functional.pad(log_p, (0, 1), value=-torch.inf)
    np.testing.assert_allclose(divergences(masked, counted), divergences(log_p, counted), atol=1e-12)
    alone = torch.log_softmax(torch.zeros(1, 3, 2, 4).double(), -1)
    alone[0, 1, 0] = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]).log()
    kl = divergences(alone, counted)[0] / 2
    assert np.isfinite(kl).all()
    for mass in ([0.4, 0.2, 0.4], [0.5, 0.5, 0.0]):
        assert representatives(np.array(mass), kl, 0.1).tolist() == [0, 0, 0]  # what it says, the others say, too
    assert len(set(representatives(np.array([0.2, 0.6, 0.2]), kl, 0.01).tolist())) == 2
    assert kl[0, 1] > 1e100


def test_a_particle_of_no_probability_needs_no_row_and_copies_one() -> None:
    log_p = random_predictives(3, 4, 2, 2.0)
    log_p[:, 2] = log_p[:, 0]
    kl = divergences(log_p, torch.ones(1, 2, dtype=torch.bool))[0] / 2
    chosen = representatives(np.array([0.4, 0.0, 0.2, 0.4]), kl, 1e-9)
    assert len(set(chosen.tolist())) == 2
    assert chosen[2] == chosen[0]


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([(0.0,), (0.1,), (0.0, 0.3)]))
def test_merging_copies_changes_nothing(seed: int, switching: tuple[float, ...]) -> None:
    """A filter over copies, merged into one after some tokens, predicts and reports what the whole one does."""
    rng = np.random.default_rng(seed)
    kinds = np.array([[0, 1, 0, 2, 1], [0, 0, 0, 0, 1]])  # of two prompts: particles of the same kind are copies
    particles = Particles(rng.dirichlet(np.ones(3), size=(2, 5)), rng.dirichlet(np.ones(5), size=2), switching)
    whole, merged = ParticleFilter(particles), ParticleFilter(particles)
    table = torch.from_numpy(rng.dirichlet(np.ones(4), size=(6, 2, 3))).log()  # (token, prompt, kind, V)
    spread = table[:, torch.arange(2)[:, None], torch.from_numpy(kinds)]  # (token, prompt, particle, V)
    for t in range(3):
        for each in (whole, merged):
            each.update(spread[t, :, :, :1])
    first = np.array([[0, 1, 0, 3, 1], [0, 0, 0, 0, 4]])
    means = whole.mean()
    left = merged.merge(first)
    assert left == [[0, 1, 3], [0, 4]]
    np.testing.assert_allclose(merged.mean(), means, atol=1e-12)
    index = torch.tensor([[0, 1, 3], [0, 4, 0]])
    for t in range(3, 6):
        rows = spread[t, torch.arange(2)[:, None], index]
        one, other = predictive(whole.log_weights, spread[t]), predictive(merged.log_weights, rows)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
        whole.update(spread[t, :, :, 1:2])
        merged.update(rows[..., 1:2])


def test_prompts_can_be_dropped() -> None:
    particles = Particles(np.eye(3)[None].repeat(3, 0), np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]]))
    weights = ParticleFilter(particles)
    before = weights.mean()
    weights.select([2, 0], 3)
    np.testing.assert_array_equal(weights.mean(), before[[2, 0]])
    assert weights.mean()[0, 2] == pytest.approx(0.8)


def test_no_more_log_probabilities_than_may_be_are_compared_at_once(
    model64: "MambaFormerForCausalLM", bank: "ExpertBank", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts of unlike lengths, one shorter than what is measured; a bound changes no divergence."""
    weights = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 3))
    particles = Particles(weights, np.full((2, 3), 1 / 3))
    texts = [[256, *b"kfpa>apfk\nbc"], [256, *b"12+34=46\n" * 5]]

    def measured(kind: type[readers.CachedReader] | type[readers.UncachedReader]) -> np.ndarray:
        prefix = read_prefix(model64, 0, texts, 257, 60)
        reader: readers.ParticleReader
        if kind is readers.CachedReader:
            reader = readers.CachedReader(model64, bank, particles, prefix, [0, 1], 60)
        else:
            reader = readers.UncachedReader(model64, bank, particles, prefix.ids, prefix.tokens)
        decoding = Decoding(reader, particles, ByteTokenizer().continues, prefix.ids, prefix.tokens)
        with torch.no_grad():
            kl = readers.straight(decoding.read_prompts(measured=True))
        assert kl is not None
        return kl

    kinds = (readers.CachedReader, readers.UncachedReader)
    expected = measured(kinds[0])
    numbers, compared = [], []
    after = MambaFormerSession.after

    def counted_after(self: MambaFormerSession, hidden: torch.Tensor) -> torch.Tensor:
        numbers.append(hidden.shape[0] * hidden.shape[1])
        return after(self, hidden)

    def counted_divergences(log_p: torch.Tensor, counted: torch.Tensor) -> np.ndarray:
        numbers.append(log_p[..., 0].numel())
        compared.append(log_p.shape[2])
        return divergences(log_p, counted)

    rows = weights.shape[0] * weights.shape[1]
    monkeypatch.setattr(readers, "AFTER_AT_ONCE", 5 * rows * model64.vocab_size)
    monkeypatch.setattr("bayes_dispatch.model.mambaformer.session.LOGITS_AT_ONCE", 5 * rows * model64.vocab_size)
    monkeypatch.setattr("bayes_dispatch.model.mambaformer.session.ROWS_AT_ONCE", 1)
    monkeypatch.setattr(MambaFormerSession, "after", counted_after)
    monkeypatch.setattr(particles_module, "divergences", counted_divergences)
    for kind in kinds:
        np.testing.assert_allclose(measured(kind), expected, rtol=0, atol=1e-12)
        assert sum(compared) == MEASURED
        compared.clear()
    assert max(numbers) == 5 * rows
