"""Weights of experts to what they add to a model: scales of its matrices, and products of factors beside them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayes_dispatch.experts.bank_files import LORA, StoredExpert
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.model.adaptation import Delta

__all__ = ["Blending", "Expert", "in_memory", "is_lora"]

STACKS = 16  # sets of LoRA experts whose stacked factors are kept
Expert = ExpertVector | LoraExpert


class Blending:
    """The tensors of experts, each read when a blend first needs it, and kept.

    Args:
        matrices: those that singular-value scales adapt, in order, with the number of scales of each.
        experts: K, whose weights come in this order, and base's last.

    Attributes:
        low: the matrices that LoRA experts adapt, in order, and which experts do.
    """

    def __init__(self, matrices: Mapping[str, int], experts: Sequence[Expert | StoredExpert]) -> None:
        self._matrices, self._experts = matrices, list(experts)
        self._scaled = [k for k, expert in enumerate(experts) if not is_lora(expert)]
        ranks = [dict(expert.matrices) if is_lora(expert) else {} for expert in experts]
        self.low = {name: [k for k, own in enumerate(ranks) if name in own] for each in ranks for name in each}
        self._deviations: dict[int, Tensor] = {}  # of experts that a blend needed so far
        self._stacks: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor, list[int]]] = {}

    def scales(self, weights: Tensor, place: range) -> Tensor:
        """``z(w)`` (*B, place), for weights (*B, K + 1); those scales of all matrices, in order, that ``place`` tells.

        Where gradients are wanted all experts are read: those of no weight have a gradient, too.
        """
        weighty = weights.detach().reshape(-1, len(self._experts) + 1).ne(0).any(dim=0).tolist()
        used = [k for k in self._scaled if weights.requires_grad or weighty[k]]  # others deviate nowhere
        if not used:
            return weights.new_ones((*weights.shape[:-1], len(place)))
        deviations = torch.stack([self._deviation(k)[place.start : place.stop] for k in used]).to(weights)
        return 1 + weights[..., used] @ deviations

    def deltas(self, weights: Mapping[str, Tensor], alike: bool = False) -> dict[str, Delta]:
        """What LoRA experts add to each matrix, for its weights (*B, K + 1)."""
        found: dict[str, Delta] = {}
        for matrix, given in weights.items():
            flat = given.detach().reshape(-1, len(self._experts) + 1)
            weighty = flat.ne(0).any(dim=0).tolist()
            used = tuple(k for k in self.low[matrix] if alike or given.requires_grad or weighty[k])
            if used:
                up, down, ranks = self._stacked(matrix, used)
                repeats = torch.tensor(ranks, device=given.device)
                found[matrix] = Delta(up, down, given[..., list(used)].repeat_interleave(repeats, -1))
        return found

    def _stacked(self, matrix: str, used: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int]]:
        """``up`` (out, Σ r) and ``down`` (Σ r, in) of some experts, and their ranks; threads may make them twice."""
        found = self._stacks.get((matrix, used))
        if found is None:
            own = []
            for k in used:
                expert = in_memory(self._experts[k])
                assert isinstance(expert, LoraExpert)
                own.append(expert.factors[matrix])
            with torch.inference_mode(False):
                down, up = torch.cat([down for down, _ in own]), torch.cat([up for _, up in own], 1)
            found = up, down, [len(down) for down, _ in own]
            stacks = self._stacks
            if len(stacks) >= STACKS * len(self.low):
                stacks = {}
            stacks[matrix, used] = found
            self._stacks = stacks
        return found

    def _deviation(self, k: int) -> Tensor:
        """z − 1 of one expert, (scales,), in doubles; threads may compute it twice, and see it whole."""
        found = self._deviations.get(k)
        if found is None:
            expert = in_memory(self._experts[k])
            assert isinstance(expert, ExpertVector)
            scales = expert.scales
            with torch.inference_mode(False):  # it stays, and blends may be differentiated later
                found = torch.cat([scales[name] for name in self._matrices]).double() - 1
            self._deviations[k] = found
        return found


def is_lora(expert: Expert | StoredExpert) -> bool:
    """Whether it adds products of factors; no expert is read for it."""
    return isinstance(expert, LoraExpert) or (isinstance(expert, StoredExpert) and expert.kind == LORA)


def in_memory(expert: Expert | StoredExpert) -> Expert:
    """The expert, read if it is on disk.

    Raises:
        BundleError, ForeignExpertError: its file is damaged, another expert's or of another base model.
    """
    return expert.vector if isinstance(expert, StoredExpert) else expert
