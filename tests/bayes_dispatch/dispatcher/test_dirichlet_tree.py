"""The Dirichlet tree: a Dirichlet where it should be one, moments of its draws, and a density that integrates to 1."""

import numpy as np
import torch
from torch.distributions import Dirichlet

from bayes_dispatch.dispatcher.program.dirichlet_tree import DirichletTree, family_sums

FAMILIES = torch.tensor([0, 1, 0, 2, 1, 1])


def test_it_is_a_dirichlet_where_families_weigh_what_their_members_do() -> None:
    leaves = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)).double() + 0.1
    tree = DirichletTree(family_sums(leaves, FAMILIES, 3), leaves, FAMILIES)
    w = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(6), (5, 3)))
    torch.testing.assert_close(tree.log_prob(w), Dirichlet(leaves).log_prob(w))
    alone = DirichletTree(leaves, torch.ones_like(leaves), torch.arange(6))  # families of one: leaves do not matter
    torch.testing.assert_close(alone.log_prob(w), Dirichlet(leaves).log_prob(w))


def test_density_is_that_of_its_draws() -> None:
    """E over a flat Dirichlet of the density ratio is 1, and so are weighted moments those of draws.

    200,000 draws; seven comparisons within 5 standard errors, false alarm < 1e-5, fixed seed.
    """
    tree = DirichletTree(torch.tensor([2.0, 5.0, 1.5]), torch.tensor([1.5, 2.0, 3.0, 1.0, 1.2, 2.0]), FAMILIES)
    count = 200_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flat, drawn = Dirichlet(torch.ones(6)).sample((count,)), tree.sample((count,))
    ratio = (tree.log_prob(flat) - Dirichlet(torch.ones(6)).log_prob(flat)).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / count**0.5
    torch.testing.assert_close(drawn.sum(-1), torch.ones(count))
    weighted = ratio.unsqueeze(-1) * flat
    error = (weighted.var(0) / count + drawn.var(0) / count).sqrt()
    assert ((weighted.mean(0) - drawn.mean(0)).abs() < 5 * error).all()


def test_tiny_leaves_stay_on_the_simplex() -> None:
    tree = DirichletTree(torch.tensor([0.1, 0.1, 0.1]), torch.full((6,), 1e-3), FAMILIES).expand([4])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = tree.sample((50,))
    assert drawn.shape == (50, 4, 6)
    assert torch.isfinite(drawn).all()
    torch.testing.assert_close(drawn.sum(-1), torch.ones(50, 4))
