"""A Dirichlet over families and one within each family: the hierarchical prior that keeps hundreds of experts apart.

With one Dirichlet over hundreds of experts each concentration is tiny, and nothing says that a prompt which is half one
expert's is more likely to be half a related one's. The tree gives families the sparsity of a small Dirichlet, and the
members of a family that of another (Minka 1999, "The Dirichlet-tree distribution"; Dennis 1991).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["DirichletTree", "family_sums"]


class DirichletTree(TorchDistribution):
    """``w_k = u_f · v_k`` with ``u ~ Dirichlet(top)`` over families and ``v ~ Dirichlet(leaves of f)`` within each.

    It is ``Dirichlet(leaves)`` where ``top`` is the sum of the leaves in every family.

    Args:
        top: ``(·, F)`` concentration of the families.
        leaves: ``(·, W)`` concentration of the members within their families.
        families: ``(W,)`` family of each member, from 0; every family has one.
    """

    support = constraints.simplex
    has_rsample = True
    arg_constraints = {}  # noqa: RUF012  (torch's own form of declaration)

    def __init__(self, top: Tensor, leaves: Tensor, families: Tensor) -> None:
        batch = torch.broadcast_shapes(top.shape[:-1], leaves.shape[:-1])
        self.top, self.leaves = top.expand(*batch, top.shape[-1]), leaves.expand(*batch, leaves.shape[-1])
        self.families = families
        super().__init__(batch, leaves.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> DirichletTree:
        """The same distribution with a larger batch shape."""
        shape = torch.Size(batch_shape)
        return DirichletTree(
            self.top.expand(*shape, self.top.shape[-1]),
            self.leaves.expand(*shape, self.leaves.shape[-1]),
            self.families,
        )

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Float[Tensor, "... weight"]:
        """Draws ``(sample_shape, batch, W)``."""
        shares = dist.Dirichlet(self.top).rsample(torch.Size(sample_shape))  # (…, F)
        gammas = torch.distributions.Gamma(self.leaves, torch.ones_like(self.leaves)).rsample(torch.Size(sample_shape))
        gammas = gammas.clamp(min=torch.finfo(gammas.dtype).tiny)
        within = gammas / family_sums(gammas, self.families, self.top.shape[-1])[..., self.families]
        return shares[..., self.families] * within

    def log_prob(self, value: Float[Tensor, "... weight"]) -> Float[Tensor, "..."]:
        """Log density with respect to that of the Dirichlet: all but one of the weights."""
        sums = family_sums(self.leaves, self.families, self.top.shape[-1])  # (·, F)
        shares = family_sums(value, self.families, self.top.shape[-1])
        density = (torch.xlogy(self.leaves - 1, value)).sum(-1) + torch.xlogy(self.top - sums, shares).sum(-1)
        constant = self.top.sum(-1).lgamma() - self.top.lgamma().sum(-1) + sums.lgamma().sum(-1)
        return density + constant - self.leaves.lgamma().sum(-1)


def family_sums(values: Tensor, families: Tensor, count: int) -> Tensor:
    """Sums ``(·, F)`` of values ``(·, W)`` over the members of each family."""
    out = torch.zeros(*values.shape[:-1], count, dtype=values.dtype)
    return out.index_add(-1, families, values)
