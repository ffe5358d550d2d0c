"""Decompositions of a model's matrices on disk, beside the model, so that large ones are computed once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from bayes_dispatch.arguments import whole
from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.model.mambaformer.svd.embedding import SVDEmbedding
from bayes_dispatch.model.mambaformer.svd.factors import Factors
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear, SVDMatrix
from bayes_dispatch.storage import read_tensors, write_tensors

__all__ = ["FACTORS_FILE", "Fingerprinted", "load_factors", "save_factors"]

FACTORS_FILE = "factors.safetensors"
LARGEST_ERROR = 0.5  # that a randomised decomposition may state
TOLERANCE = 1e-3  # of what the triples miss of W on a probe, beyond their own error


@runtime_checkable
class Fingerprinted(Protocol):
    """A model that knows a hash of its weights."""

    def fingerprint(self) -> str: ...


def save_factors(
    model: Fingerprinted, directory: str | Path, rank: int | None = None, also: Sequence[str] = ()
) -> dict[str, float]:
    """Decompose every matrix that is adaptable by default, and keep the factors in the model and in ``directory``.

    Args:
        model: whose ``SVDLinear`` matrices are decomposed. directory: of the saved model; ``from_pretrained`` finds the
            factors there. rank: leading triples of each matrix, where it has as many; all by default.
        also: further matrices to decompose: ``("embedding",)``.

    Returns:
        The error of each matrix' triples, as in :class:`bayes_dispatch.model.mambaformer.svd.factors.Factors`.

    Raises:
        ConfigError: a further matrix that the model does not have, or a rank below 1.
    """
    rank = None if rank is None else whole("rank", rank, 1)
    tensors, errors, more = {}, {}, _embeddings(model)
    if unknown := [name for name in also if name not in more]:
        raise ConfigError(f"expected further matrices among {sorted(more)}, got {unknown[0]!r}")
    for name, linear in (_matrices(model) | {name: more[name] for name in also}).items():
        factors = linear.factors(linear.rank if rank is None else min(rank, linear.rank))
        errors[name] = factors.error
        for part in ("U", "s", "Vt"):
            tensors[f"{name}.{part}"] = getattr(factors, part).contiguous()
    metadata = {"base": model.fingerprint(), "errors": json.dumps(errors, sort_keys=True)}
    write_tensors(Path(directory, FACTORS_FILE), tensors, metadata)
    return errors


def load_factors(model: Fingerprinted, directory: str | Path) -> bool:
    """Take the factors that ``save_factors`` left in ``directory``; false where there are none.

    Raises:
        BundleError: the file is truncated, edited, or of another model.
    """
    path = Path(directory, FACTORS_FILE)
    if not path.is_file():
        return False
    tensors, metadata = read_tensors(path)
    try:
        errors = {str(name): float(error) for name, error in json.loads(metadata["errors"]).items()}
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise BundleError(f"expected the errors of decompositions in {path}, got: {error!r:.80}") from None
    if metadata.get("base") != model.fingerprint():
        raise BundleError(f"expected factors of base model {model.fingerprint()} in {path}, got {metadata.get('base')}")
    more = {name: matrix for name, matrix in _embeddings(model).items() if name in errors}
    matrices = _matrices(model) | more
    names = {f"{name}.{part}" for name in matrices for part in ("U", "s", "Vt")}
    if set(tensors) != names or set(errors) != set(matrices):
        odd = sorted(set(tensors) ^ names)[:3] or sorted(set(errors) ^ set(matrices))[:3]
        expected = f"expected factors of {len(matrices)} matrices in {path}"
        raise BundleError(f"{expected}, got others or fewer: {', '.join(odd)}")
    for name, linear in matrices.items():
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        U, s, Vt = (tensors[f"{name}.{part}"].to(linear.weight.device, dtype) for part in ("U", "s", "Vt"))
        factors = Factors(U, s, Vt, errors[name])
        _check(name, linear, factors, path)
        linear.keep_factors(factors)
    return True


def _matrices(model: Fingerprinted) -> dict[str, SVDMatrix]:
    """Those that every file has."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, SVDLinear)}


def _embeddings(model: Fingerprinted) -> dict[str, SVDMatrix]:
    """Those that a file may have."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, SVDEmbedding)}


@torch.no_grad()
def _check(name: str, linear: SVDMatrix, factors: Factors, path: Path) -> None:
    """Refuse triples that are none of this matrix: ``W v`` must be ``s u``, ``Wᵀ u`` be ``s v``, through a probe."""
    U, s, Vt, error = factors
    W = linear.weight.to(s.dtype)
    shapes, rank = (tuple(U.shape), tuple(s.shape), tuple(Vt.shape)), s.numel()
    if shapes != ((W.shape[0], rank), (rank,), (rank, W.shape[1])) or not 1 <= rank <= linear.rank:
        raise BundleError(f"expected factors of {name} for shape {tuple(W.shape)} in {path}, got shapes {shapes}")
    signs = 1.0 - 2.0 * (torch.arange(len(s)) % 2).to(s)
    missed = (W @ (Vt.T @ signs) - U @ (s * signs)).norm() + (W.T @ (U @ signs) - Vt.T @ (s * signs)).norm()
    missed = missed / (s.max() * rank**0.5).clamp(min=1e-30)
    if not 0 <= error <= LARGEST_ERROR or not float(missed) <= TOLERANCE + 2 * error:  # NaN fails too
        raise BundleError(f"expected singular triples of {name} in {path}, got ones off by {float(missed):.2g}")
