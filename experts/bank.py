"""The experts of one base model: blended by weights, kept as a directory of safetensors files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.errors import ConfigError, ForeignExpertError, TensorError, UnknownNameError
from bayes_dispatch.experts.bank_files import StoredExpert, read_bank, write_bank
from bayes_dispatch.experts.vectors import BASE, ExpertVector
from bayes_dispatch.model.adaptation import Adaptation, block_of
from bayes_dispatch.model.backbone import Backbone

__all__ = ["ExpertBank"]

SHOWN = 20  # names in an error


class ExpertBank(Mapping[str, ExpertVector]):
    """Experts in a fixed order; component k of a mixture is expert k, and the last component is ``base``.

    A blend is ``z(w) = 1 + Σ_k w_k (z_k − 1)``, and ``base`` has ``z = 1``. For weights that sum to 1 it is
    ``Σ_k w_k z_k``, so that the adapted matrices blend as their scales do: ``W(z(w)) = Σ_k w_k W(z_k)``. The published
    implementation (Transformer², arXiv 2501.06252) also multiplies ``W(z)`` by ``Σ s / Σ (s * z)``. That factor depends
    on ``z``: blending scales is then another thing than blending matrices. Ours has no such factor.

    A bank is never changed; ``with_expert``, ``without`` and ``renamed`` give another one. A bank that was loaded reads
    each expert when it is first used, and keeps it.

    Attributes:
        names: names of the K experts, in order. components: the same with ``base`` at the end.
        base: fingerprint of the model that all of them were trained on.
        matrices: the adapted matrices, in order, with the number of scales of each.
        layers: the layers that have one of them, in order: the parts of their names up to the first number, or all of
            a name without one.
        adapt_from: the first block that has one of them: what is below is the same under every blend. With an adapted
            embedding it is 0.
        metadata: of each expert, by name; no expert is read for it.

    Raises:
        ConfigError: no experts, or two of one name. ForeignExpertError: experts of different base models.
        TensorError: experts that scale different matrices.
    """

    def __init__(self, experts: Sequence[ExpertVector]) -> None:
        if not experts:
            raise ConfigError("expected at least one expert, got none")
        if len({expert.name for expert in experts}) < len(experts):
            raise ConfigError(f"expected experts of different names, got {[expert.name for expert in experts]}")
        first = experts[0]
        for expert in experts:
            _check_fit(expert, first.base, first.matrices, first.name)
        self._fill(first.base, first.matrices, experts)

    def _fill(self, base: str, matrices: Mapping[str, int], experts: Sequence[ExpertVector | StoredExpert]) -> None:
        self._experts = {expert.name: expert for expert in experts}
        self.base = base
        self.matrices: Mapping[str, int] = MappingProxyType(dict(matrices))
        self.metadata: Mapping[str, Mapping[str, str]] = MappingProxyType(
            {expert.name: MappingProxyType(dict(expert.metadata)) for expert in experts}
        )
        self.names = tuple(self._experts)
        self.components = (*self.names, BASE)
        layers = [_layer(matrix) for matrix in self.matrices]
        self.layers = tuple(dict.fromkeys(layers))
        self._layer_of = [self.layers.index(layer) for layer in layers]
        self.adapt_from = min(map(block_of, self.matrices))
        self._deviations: Tensor | None = None
        self._waiting = set(range(len(experts)))  # rows of it that no blend needed so far

    @classmethod
    def _of(
        cls, base: str, matrices: Mapping[str, int], experts: Sequence[ExpertVector | StoredExpert]
    ) -> "ExpertBank":
        bank = cls.__new__(cls)
        bank._fill(base, matrices, experts)
        return bank

    def __getitem__(self, name: str) -> ExpertVector:
        """The expert of that name.

        Raises:
            UnknownNameError: there is none. BundleError, ForeignExpertError: it is on disk, and its file is damaged,
                another expert's or of another base model.
        """
        expert = self._experts[self._known(name)]
        return expert.vector if isinstance(expert, StoredExpert) else expert

    def __contains__(self, name: object) -> bool:
        return name in self._experts

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def blend(self, weights: Float[Tensor, "*B components"]) -> Adaptation:
        """The adaptation ``z(w) = 1 + Σ_k w_k (z_k − 1)``; experts without weight are not read from disk.

        Args:
            weights: (K + 1,) for scales that all rows share, or (B, K + 1) for scales of each row; in the dtype that
                the scales shall have.

        Raises:
            TensorError: another number of components, or weights that are not finite.
            BundleError, ForeignExpertError: an expert cannot be read.
        """
        if weights.ndim not in (1, 2) or weights.shape[-1] != len(self.components):
            expected = f"({len(self.components)},) or (B, {len(self.components)})"
            raise TensorError(f"expected weights of shape {expected}, got {tuple(weights.shape)}")
        scales = 1 + weights @ self._deviations_under(weights)
        return Adaptation(dict(zip(self.matrices, scales.split(list(self.matrices.values()), dim=-1), strict=True)))

    def blend_by_matrix(self, weights: Float[Tensor, "*B matrices components"]) -> Adaptation:
        """``blend`` with weights of its own for each adapted matrix.

        Args:
            weights: (matrices, K + 1) for scales that all rows share, or (B, matrices, K + 1) for scales of each row;
                matrices in the order of ``self.matrices``, in the dtype that the scales shall have.

        Raises:
            TensorError: another number of matrices or components, or weights that are not finite.
            BundleError, ForeignExpertError: an expert cannot be read.
        """
        shape = (len(self.matrices), len(self.components))
        if weights.ndim not in (2, 3) or tuple(weights.shape[-2:]) != shape:
            expected = f"({shape[0]}, {shape[1]}) or (B, {shape[0]}, {shape[1]})"
            raise TensorError(f"expected weights of shape {expected}, got {tuple(weights.shape)}")
        parts = self._deviations_under(weights).split(list(self.matrices.values()), dim=-1)
        return Adaptation(
            {name: 1 + own @ part for name, own, part in zip(self.matrices, weights.unbind(dim=-2), parts, strict=True)}
        )

    def blend_by_layer(self, weights: Float[Tensor, "*B layers components"]) -> Adaptation:
        """``blend`` with weights of its own for each layer.

        Args:
            weights: (L, K + 1) for scales that all rows share, or (B, L, K + 1) for scales of each row; layers in the
                order of ``self.layers``, in the dtype that the scales shall have.

        Raises:
            TensorError: another number of layers or components, or weights that are not finite.
            BundleError, ForeignExpertError: an expert cannot be read.
        """
        shape = (len(self.layers), len(self.components))
        if weights.ndim not in (2, 3) or tuple(weights.shape[-2:]) != shape:
            expected = f"({shape[0]}, {shape[1]}) or (B, {shape[0]}, {shape[1]})"
            raise TensorError(f"expected weights of shape {expected}, got {tuple(weights.shape)}")
        return self.blend_by_matrix(weights[..., self._layer_of, :])

    def check_base(self, model: Backbone) -> None:
        """Raise ``ForeignExpertError`` unless the experts were made for ``model``."""
        if model.fingerprint() != self.base:
            raise ForeignExpertError(
                f"expected experts made for base model {model.fingerprint()}, got ones for {self.base}"
            )

    def with_expert(self, expert: ExpertVector) -> "ExpertBank":
        """This bank with one more expert at its end, or with that expert in the place of the one of the same name.

        Raises:
            ForeignExpertError: it was made for another base model. TensorError: it scales other matrices.
        """
        _check_fit(expert, self.base, self.matrices, "the bank")
        return self._of(self.base, self.matrices, list({**self._experts, expert.name: expert}.values()))

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
        vector = replace(self[old], name=new)
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

    def _deviations_under(self, weights: Tensor) -> Tensor:
        """z − 1 of all components, (K + 1, scales), like ``weights``; still 0 for experts that have no weight there.

        Where gradients are wanted all are read: those of no weight have a gradient, too.
        """
        if self._deviations is None:
            with torch.inference_mode(False):  # it stays, and blends may be differentiated later
                shape = (len(self.components), sum(self.matrices.values()))
                self._deviations = torch.zeros(shape, dtype=torch.float64)  # base deviates nowhere
        if self._waiting:
            weighty = weights.detach().reshape(-1, len(self.components)).ne(0).any(dim=0).tolist()
            for k in [k for k in self._waiting if weighty[k] or weights.requires_grad]:
                scales = self[self.names[k]].scales
                self._deviations[k] = torch.cat([scales[name].detach() for name in self.matrices]).double() - 1
                self._waiting.discard(k)
        return self._deviations.to(weights, copy=bool(self._waiting))  # a graph may keep it, and rows be filled later


def _layer(matrix: str) -> str:
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", matrix)
    return found.group() if found else matrix


def _check_fit(expert: ExpertVector, base: str, matrices: Mapping[str, int], like: str) -> None:
    if expert.base != base:
        raise ForeignExpertError(
            f"expected expert {expert.name} to be made for base model {base}, got one for {expert.base}"
        )
    if expert.matrices != matrices:
        raise TensorError(
            f"expected expert {expert.name} to scale what {like} scales: {dict(matrices)}, got {expert.matrices}"
        )
