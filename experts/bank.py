"""The experts of one base model: blended by weights, kept as a directory of safetensors files."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_dispatch.arguments import several, shown, simplex, whole
from bayes_dispatch.errors import ConfigError, ForeignExpertError, TensorError, UnknownNameError
from bayes_dispatch.experts.bank_files import StoredExpert, read_bank, write_bank
from bayes_dispatch.experts.blending import Blending, Expert, in_memory, is_lora
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.peft import read_peft, write_peft
from bayes_dispatch.experts.vectors import BASE, ExpertVector, check_expert_name
from bayes_dispatch.model.adaptation import Adaptation, Delta, block_of
from bayes_dispatch.model.backbone import Backbone, check_backbone

__all__ = ["ExpertBank"]

SHOWN = 20  # names in an error
Weights = Tensor | np.ndarray | Sequence[Any]  # of components, along the last axis


class ExpertBank(Mapping[str, Expert]):
    """Experts in a fixed order; component k of a mixture is expert k, and the last component is ``base``.

    A blend is ``z(w) = 1 + Σ_k w_k (z_k − 1)``, and ``base`` has ``z = 1``. For weights that sum to 1 it is
    ``Σ_k w_k z_k``, so that the adapted matrices blend as their scales do: ``W(z(w)) = Σ_k w_k W(z_k)``. The published
    implementation (Transformer², arXiv 2501.06252) also multiplies ``W(z)`` by ``Σ s / Σ (s * z)``. That factor depends
    on ``z``: blending scales is then another thing than blending matrices. Ours has no such factor.

    LoRA experts blend likewise: what is added to a matrix is ``Σ_k w_k up_k down_k``. A bank may hold both kinds.

    A bank is never changed; ``with_expert``, ``without`` and ``renamed`` give another one. A bank that was loaded reads
    each expert when it is first used, and keeps it.

    Attributes:
        names: names of the K experts, in order. components: the same with ``base`` at the end.
        base: fingerprint of the model that all of them were trained on.
        matrices: those that singular-value scales adapt, in order, with the number of scales of each.
        adapts: these, then those that LoRA experts adapt, in order.
        layers: the layers that have one of these, in order: the parts of their names up to the first number, or all of
            a name without one.
        adapt_from: the first block that has one of them: what is below is the same under every blend. With an adapted
            embedding it is 0.
        metadata: of each expert, by name; no expert is read for it.

    Raises:
        ConfigError: no experts, or something else among them, two of one name, or one that is called as a blend is.
        ForeignExpertError: experts of different base models.
        TensorError: experts that scale different matrices.
    """

    def __init__(self, experts: Sequence[Expert]) -> None:
        experts = several("experts", experts)
        if not experts:
            raise ConfigError("expected at least one expert, got none")
        for expert in experts:
            _check_kind(expert)
        if len({expert.name for expert in experts}) < len(experts):
            raise ConfigError(f"expected experts of different names, got {[expert.name for expert in experts]}")
        for expert in experts:
            check_expert_name(expert.name)
        base = experts[0].base
        scaled = [expert for expert in experts if isinstance(expert, ExpertVector)]
        matrices = scaled[0].matrices if scaled else {}
        for expert in experts:
            _check_fit(expert, base, matrices, scaled[0].name if scaled else "")
        _check_factors([expert for expert in experts if isinstance(expert, LoraExpert)])
        self._fill(base, matrices, experts)

    def _fill(self, base: str, matrices: Mapping[str, int], experts: Sequence[Expert | StoredExpert]) -> None:
        self._experts = {expert.name: expert for expert in experts}
        self.base = base
        has_scales = not all(map(is_lora, experts))
        self.matrices: Mapping[str, int] = MappingProxyType(dict(matrices) if has_scales else {})
        self.metadata: Mapping[str, Mapping[str, str]] = MappingProxyType(
            {expert.name: MappingProxyType(dict(expert.metadata)) for expert in experts}
        )
        self.names = tuple(self._experts)
        self.components = (*self.names, BASE)
        self._blending = Blending(self.matrices, experts)
        self.adapts = (*self.matrices, *(name for name in self._blending.low if name not in self.matrices))
        layers = [_layer(matrix) for matrix in self.adapts]
        self.layers = tuple(dict.fromkeys(layers))
        self._layer_of = [self.layers.index(layer) for layer in layers]
        self.adapt_from = min(map(block_of, self.adapts))

    @classmethod
    def _of(cls, base: str, matrices: Mapping[str, int], experts: Sequence[Expert | StoredExpert]) -> "ExpertBank":
        bank = cls.__new__(cls)
        bank._fill(base, matrices, experts)
        return bank

    def __reduce__(self) -> tuple[Callable[..., "ExpertBank"], tuple[str, dict[str, int], list[Expert]]]:
        """With its experts: another process may not see their files."""
        return ExpertBank._of, (self.base, dict(self.matrices), list(self.values()))

    def __getitem__(self, name: str) -> Expert:
        """The expert of that name.

        Raises:
            UnknownNameError: there is none. BundleError, ForeignExpertError: it is on disk, and its file is damaged,
                another expert's or of another base model.
        """
        return in_memory(self._experts[self._known(name)])

    def __contains__(self, name: object) -> bool:
        return name in self._experts

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def blend(self, weights: Weights, alike: bool = False) -> Adaptation:
        """The adaptation ``z(w) = 1 + Σ_k w_k (z_k − 1)``, and ``Σ_k w_k up_k down_k`` where there are LoRA experts.

        Experts without weight are not read from disk.

        Args:
            weights: (K + 1,) for scales that all rows share, or (B, K + 1) for scales of each row; at least 0, of sum
                1. A tensor's dtype is that of the scales; arrays and lists give torch's default one.
            alike: give deltas of every expert, as all blends have them whose sessions are to join.

        Raises:
            TensorError: another number of components.
            ConfigError: weights that are no numbers, negative, not finite, or of another sum.
            BundleError, ForeignExpertError: an expert cannot be read.
        """
        given = self._check(weights, (len(self.components),))
        scales: dict[str, Tensor] = {}
        if self.matrices:
            whole = self._blending.scales(given, range(sum(self.matrices.values())))
            scales = dict(zip(self.matrices, whole.split(list(self.matrices.values()), dim=-1), strict=True))
        return Adaptation(scales, self._blending.deltas(dict.fromkeys(self._blending.low, given), alike))

    def blend_by_matrix(self, weights: Weights) -> Adaptation:
        """``blend`` with weights of its own for each adapted matrix.

        Args:
            weights: (matrices, K + 1) for scales that all rows share, or (B, matrices, K + 1) for scales of each row;
                matrices in the order of ``self.adapts``; else see ``blend``.

        Raises:
            TensorError, ConfigError, BundleError, ForeignExpertError: see ``blend``.
        """
        return self._by_matrix(self._check(weights, (len(self.adapts), len(self.components))))

    def _by_matrix(self, given: Tensor) -> Adaptation:
        weights, blending = dict(zip(self.adapts, given.unbind(dim=-2), strict=True)), self._blending
        stops = list(accumulate(self.matrices.values()))
        places = [range(stop - rank, stop) for rank, stop in zip(self.matrices.values(), stops, strict=True)]
        scales = {
            name: blending.scales(weights[name], place) for name, place in zip(self.matrices, places, strict=True)
        }
        return Adaptation(scales, blending.deltas({name: weights[name] for name in blending.low}))

    def blend_by_layer(self, weights: Weights) -> Adaptation:
        """``blend`` with weights of its own for each layer.

        Args:
            weights: (L, K + 1) for scales that all rows share, or (B, L, K + 1) for scales of each row; layers in the
                order of ``self.layers``; else see ``blend``.

        Raises:
            TensorError, ConfigError, BundleError, ForeignExpertError: see ``blend``.
        """
        given = self._check(weights, (len(self.layers), len(self.components)))
        return self._by_matrix(given[..., self._layer_of, :])

    def blend_rows(self, weights: Tensor, alike: bool = False) -> Adaptation:
        """Scales of each row, from (B, K + 1), or from (B, L, K + 1) with weights of its own for each layer.

        One row is as good as scales that all rows share, which may be folded into a matrix: it gives these.
        """
        given = weights[0] if len(weights) == 1 else weights
        return self.blend(given, alike) if weights.ndim == 2 else self.blend_by_layer(given)

    @classmethod
    def from_peft(cls, backbone: Backbone, adapters: Mapping[str, str | Path]) -> "ExpertBank":
        """LoRA adapters of PEFT directories; ranks, layers and scalings may differ from one to another.

        Args:
            backbone: their base model. adapters: name of the expert → directory.

        Raises:
            ConfigError: no adapter, or one that is not low-rank updates alone, or the name of a model in its place.
            BundleError: a file is missing, damaged or a pickle. ForeignExpertError: one of another base model.
            TensorError: values that are not finite.
        """
        check_backbone(backbone)
        if not isinstance(adapters, Mapping):
            raise ConfigError(f"expected adapters as {{name: directory}}, got {shown(adapters)}")
        base = backbone.fingerprint()
        return cls([read_peft(backbone, base, name, directory) for name, directory in adapters.items()])

    def export(self, weights: Weights, directory: str | Path, backbone: Backbone, rank: int = 16) -> float:
        """Write a blend as one adapter that PEFT, and what reads its format, loads.

        Args:
            weights: (K + 1,). directory: in the place of an earlier export. backbone: the base model.
            rank: of a matrix's update by singular-value scales, at most: those of the largest change. LoRA updates are
                written as they are.

        Returns:
            The largest relative error of a matrix's update, in the Frobenius norm; 0 without scales.

        Raises:
            ForeignExpertError: the experts were made for another model. ConfigError: a model whose matrices no delta
                can be added to, or no such rank. TensorError: weights of rows, or of base alone.
            BundleError: the directory is a link, or holds anything else, an adapter from elsewhere included.
        """
        rank = whole("rank", rank, 1)
        given = self._check(weights, (len(self.components),)).detach()
        if given.ndim != 1:
            raise TensorError(f"expected weights of shape ({len(self.components)},), got {tuple(given.shape)}")
        self.check_base(backbone)
        deltas_of: Any = getattr(backbone, "deltas", None)
        if deltas_of is None:
            raise ConfigError(f"expected a model that adds deltas to its matrices, got a {type(backbone).__name__}")
        adaptation = self.blend(given)
        changed = {matrix: z for matrix, z in adaptation.scales.items() if bool((z != 1).any())}
        deltas, error = dict(adaptation.deltas), 0.0
        for matrix, z in changed.items():
            up, down, change = (part.cpu() for part in deltas_of(Adaptation({matrix: z}))[matrix])
            order = change.abs().argsort(descending=True)
            kept, lost = order[:rank], order[rank:]
            own = Delta(up[:, kept], down[kept], change[kept])
            deltas[matrix] = own if matrix not in deltas else Delta.joined([deltas[matrix], own])
            error = max(error, float(change[lost].norm() / change.norm()))
        write_peft(Path(directory), deltas, str(getattr(backbone, "name", "")), getattr(backbone, "embeddings", ()))
        return error

    def check_base(self, model: Backbone) -> None:
        """Raise ``ForeignExpertError`` unless the experts were made for ``model``, ``ConfigError`` if it is none."""
        check_backbone(model)
        if model.fingerprint() != self.base:
            raise ForeignExpertError(
                f"expected experts made for base model {model.fingerprint()}, got ones for {self.base}"
            )

    @cached_property
    def digest(self) -> str:
        """A hash of all that the experts' weights are, in order, whatever their names and metadata; all are read."""
        experts = self.blend(torch.eye(len(self.components), dtype=torch.double))
        digest = hashlib.blake2b(digest_size=16)
        for name, tensors in [*((n, (z,)) for n, z in experts.scales.items()), *experts.deltas.items()]:
            digest.update(name.encode())
            for values in tensors:
                digest.update(values.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def with_expert(self, expert: Expert) -> "ExpertBank":
        """This bank with one more expert at its end, or with that expert in the place of the one of the same name.

        Raises:
            ConfigError: it is none, or called as a blend is. ForeignExpertError: it was made for another base model.
            TensorError: it scales other matrices.
        """
        _check_kind(expert)
        check_expert_name(expert.name)
        matrices = self.matrices or (expert.matrices if isinstance(expert, ExpertVector) else {})
        _check_fit(expert, self.base, matrices, "the bank")
        if isinstance(expert, LoraExpert):
            others = [name for name, each in self._experts.items() if is_lora(each) and name != expert.name]
            _check_factors([*(each for each in map(self.__getitem__, others) if isinstance(each, LoraExpert)), expert])
        return self._of(self.base, matrices, list({**self._experts, expert.name: expert}.values()))

    def without(self, name: str) -> "ExpertBank":
        """This bank without one expert.

        Raises:
            UnknownNameError: no expert has that name. ConfigError: it is the only one.
        """
        left = [expert for expert in self._experts.values() if expert.name != self._known(name)]
        if not left:
            raise ConfigError(f"expected another expert to stay in the bank, got {name!r}, its only one")
        return self._of(self.base, self.matrices, left)

    def renamed(self, old: str, new: str) -> "ExpertBank":
        """This bank with another name for one expert, in the same place.

        Raises:
            UnknownNameError: no expert is called ``old``. ConfigError: ``new`` is no name, or that of an expert.
            BundleError, ForeignExpertError: the expert cannot be read.
        """
        if new in self:
            raise ConfigError(f"expected a name that no expert of the bank has, got {new!r}")
        check_expert_name(new)
        vector: Expert = replace(self[old], name=new)
        experts = [vector if expert.name == old else expert for expert in self._experts.values()]
        return self._of(self.base, self.matrices, experts)

    def save(self, directory: str | Path) -> None:
        """Make ``directory`` hold this bank; what it holds already is not written again.

        ``bank.json`` is replaced once all else is written: a save that is stopped leaves the bank that was there.
        Other experts are deleted from it; a bank that was loaded from there before can no longer read them.

        Raises:
            BundleError: ``directory`` is a file, or an expert that was never read is not whole.
        """
        write_bank(Path(directory), self.base, self.matrices, list(self._experts.values()))

    @classmethod
    def load(cls, directory: str | Path) -> "ExpertBank":
        """A bank that ``save`` wrote; its experts are read, and checked, when they are first used.

        Raises:
            BundleError: ``bank.json`` is missing, truncated, edited or of another format.
        """
        return cls._of(*read_bank(Path(directory)))

    def _known(self, name: str) -> str:
        if name not in self._experts:
            known = ", ".join((*self.names[:SHOWN], *(["…"] if len(self) > SHOWN else [])))
            raise UnknownNameError(f"expected an expert of {known}, got {name!r}")
        return name

    def _check(self, weights: Weights, shape: tuple[int, ...]) -> Tensor:
        """Weights of this shape, or of one such for each row."""
        try:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else np.shape(weights)
        except ValueError:
            raise TensorError(f"expected weights in rows of one length, got {weights!r:.80}") from None
        if len(got) not in (len(shape), len(shape) + 1) or got[-len(shape) :] != shape:
            expected = ", ".join(map(str, shape))
            alone = f"({expected}{',' * (len(shape) == 1)})"
            raise TensorError(f"expected weights of shape {alone} or (B, {expected}), got {got}")
        found = simplex("weights", weights)
        if isinstance(weights, Tensor) and weights.is_floating_point():
            return weights
        return torch.tensor(found, dtype=torch.get_default_dtype())


def _layer(matrix: str) -> str:
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", matrix)
    return found.group() if found else matrix


def _check_kind(expert: object) -> None:
    if not isinstance(expert, ExpertVector | LoraExpert):
        raise ConfigError(f"expected an ExpertVector or a LoraExpert, got {shown(expert)}")


def _check_fit(expert: Expert, base: str, matrices: Mapping[str, int], like: str) -> None:
    if expert.base != base:
        raise ForeignExpertError(
            f"expected expert {expert.name} to be made for base model {base}, got one for {expert.base}"
        )
    if isinstance(expert, ExpertVector) and expert.matrices != matrices:
        raise TensorError(
            f"expected expert {expert.name} to scale what {like} scales: {dict(matrices)}, got {expert.matrices}"
        )


def _check_factors(experts: Sequence[LoraExpert]) -> None:
    """Raise ``TensorError`` unless factors of one matrix are of one shape (out, in)."""
    shapes: dict[str, tuple[int, int]] = {}
    for expert in experts:
        for matrix, (down, up) in expert.factors.items():
            shape = up.shape[0], down.shape[1]
            if shapes.setdefault(matrix, shape) != shape:
                raise TensorError(
                    f"expected factors of a matrix {shapes[matrix]} for {matrix} of {expert.name}, got {shape}"
                )
