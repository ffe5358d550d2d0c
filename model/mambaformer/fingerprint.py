"""A hash of a model's weights, kept until one of them changes."""

import hashlib

import torch
from torch import Tensor, nn

__all__ = ["Fingerprint"]


class Fingerprint:
    """The hash of all parameters of a module, in float32, so that a float64 copy of a model has the same.

    Changes are seen by the tensors' version counters and places in memory; edits through ``.data``, or
    of tensors that were made in inference mode, are not.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._value = ""
        self._slots: list[tuple[dict[str, nn.Parameter | None], str]] = []
        self._parts: list[tuple[dict[str, nn.Module | None], tuple[nn.Module | None, ...]]] = []

    def __deepcopy__(self, memo: dict[int, object]) -> "Fingerprint":
        return Fingerprint()  # of another module

    @property
    def key(self) -> tuple[object, ...]:
        """The versions and places of the weights that were hashed last: the same object until they change."""
        return self._key

    def of(self, module: nn.Module) -> str:
        """The hash; always of the same module."""
        if not self._slots or any(tuple(now.values()) != then for now, then in self._parts):
            # walking the modules takes longer than a cached step should: only if one was replaced
            self._slots = [(part._parameters, name) for part in module.modules() for name in part._parameters]
            self._parts = [(part._modules, tuple(part._modules.values())) for part in module.modules() if part._modules]
        parameters = [parameter for slot, name in self._slots if (parameter := slot[name]) is not None]
        places = [parameter.data_ptr() for parameter in parameters]
        key = (parameters[0].dtype, *places, *_versions(parameters))
        if self._key != key:
            self._value = _hash(dict(module.named_parameters()))
            self._key = key
        return self._value


def _versions(parameters: list[nn.Parameter]) -> list[int]:
    """Counts of changes in place; tensors made in inference mode have none."""
    try:
        return [parameter._version for parameter in parameters]
    except RuntimeError:
        return [-1 if parameter.is_inference() else parameter._version for parameter in parameters]


def _hash(parameters: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters.items():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
