"""The experts of one base model: blended by weights, kept as a directory of safetensors files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from bayes_dispatch.errors import BundleError, ConfigError, ForeignExpertError, TensorError, UnknownNameError
from bayes_dispatch.experts.vectors import BASE, ExpertVector
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.files import read_json, read_tensors, write_directory, write_json, write_tensors

__all__ = ["ExpertBank"]


class ExpertBank(Mapping[str, ExpertVector]):
    """Experts in a fixed order; component k of a mixture is expert k, and the last component is ``base``.

    Attributes:
        names: names of the K experts, in order. components: the same with ``base`` at the end.
        base: fingerprint of the model that all of them were trained on.

    Raises:
        ConfigError: no experts, or two of one name. ForeignExpertError: experts of different base models.
        TensorError: experts that scale different matrices.
    """

    def __init__(self, experts: Sequence[ExpertVector]) -> None:
        if not experts:
            raise ConfigError("expected at least one expert, got none")
        self._experts = {expert.name: expert for expert in experts}
        if len(self._experts) < len(experts):
            raise ConfigError(f"expected experts of different names, got {[expert.name for expert in experts]}")
        first = experts[0]
        for expert in experts:
            if expert.base != first.base:
                raise ForeignExpertError(
                    f"expected expert {expert.name} to be made for base model {first.base}, got one for {expert.base}"
                )
            shapes, expected = ({n: tuple(z.shape) for n, z in e.scales.items()} for e in (expert, first))
            if shapes != expected:
                raise TensorError(
                    f"expected expert {expert.name} to scale what {first.name} scales: {expected}, got {shapes}"
                )
        self.base = first.base
        self.names = tuple(self._experts)
        self.components = (*self.names, BASE)
        self._sizes = {name: scales.shape[0] for name, scales in sorted(first.scales.items())}  # files keep no order
        flat = [torch.cat([expert.scales[name] for name in self._sizes]) for expert in experts]
        self._deviations = torch.stack([*flat, torch.ones_like(flat[0])]) - 1  # (K + 1, scales); base deviates nowhere

    def __getitem__(self, name: str) -> ExpertVector:
        if name not in self._experts:
            raise UnknownNameError(f"expected an expert of {', '.join(self.names)}, got {name!r}")
        return self._experts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._experts

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def blend(self, weights: Float[Tensor, "*B components"]) -> Adaptation:
        """The adaptation ``z(w) = 1 + Σ_k w_k (z_k − 1)``.

        Args:
            weights: (K + 1,) for scales that all rows share, or (B, K + 1) for scales of each row; in the dtype that
                the scales shall have.

        Raises:
            TensorError: another number of components, or weights that are not finite.
        """
        if weights.ndim not in (1, 2) or weights.shape[-1] != len(self.components):
            expected = f"({len(self.components)},) or (B, {len(self.components)})"
            raise TensorError(f"expected weights of shape {expected}, got {tuple(weights.shape)}")
        scales = 1 + weights @ self._deviations.to(weights)
        return Adaptation(dict(zip(self._sizes, scales.split(list(self._sizes.values()), dim=-1), strict=True)))

    def check_base(self, model: Backbone) -> None:
        """Raise ``ForeignExpertError`` unless the experts were made for ``model``."""
        if model.fingerprint() != self.base:
            raise ForeignExpertError(
                f"expected experts made for base model {model.fingerprint()}, got ones for {self.base}"
            )

    def save(self, directory: str | Path) -> None:
        """Write one file per expert and ``bank.json``; an existing directory is replaced only when all is written."""
        with write_directory(Path(directory)) as target:
            for expert in self._experts.values():
                tensors = {name: scales.contiguous() for name, scales in expert.scales.items()}
                reserved = {"name": expert.name, "base": expert.base}
                write_tensors(target / f"{expert.name}.safetensors", tensors, {**expert.metadata, **reserved})
            write_json(target / "bank.json", {"base": self.base, "experts": list(self.names)})

    @classmethod
    def load(cls, directory: str | Path) -> "ExpertBank":
        """Read what ``save`` wrote.

        Raises:
            BundleError: a file is missing, truncated or of another format. ForeignExpertError: a file of another base
                model.
        """
        directory = Path(directory)
        index = read_json(directory / "bank.json")
        if not isinstance(index, dict) or not isinstance(index.get("experts"), list) or "base" not in index:
            raise BundleError(
                f"expected a base model and a list of experts in {directory / 'bank.json'}, got {index!r:.80}"
            )
        try:
            bank = cls([_load_expert(directory, str(name)) for name in index["experts"]])
        except (ConfigError, TensorError) as error:
            raise BundleError(f"{directory}: {error}") from None
        if bank.base != index["base"]:
            raise ForeignExpertError(f"expected experts made for base model {index['base']}, got ones for {bank.base}")
        return bank


def _load_expert(directory: Path, name: str) -> ExpertVector:
    path = directory / f"{name}.safetensors"
    scales = read_tensors(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise BundleError(f"expected a whole safetensors file {path}, got: {error}") from None
    if not {"name", "base"} <= metadata.keys() or metadata["name"] != name:
        raise BundleError(f"expected the expert {name!r} and its base model in {path}, got {metadata!r:.80}")
    return ExpertVector(metadata.pop("name"), scales, metadata.pop("base"), metadata)
