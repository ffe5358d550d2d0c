"""What fitting finds, and all that is saved: program, globals, projections and temper, as arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.arguments import SLACK, real
from bayes_dispatch.dispatcher.arrays import on_simplex
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.evidence.projection import FeatureMap
from bayes_dispatch.dispatcher.exact.cells import Cells
from bayes_dispatch.dispatcher.exact.densities import ViewDensity
from bayes_dispatch.dispatcher.exact.quadrature import Quadrature
from bayes_dispatch.dispatcher.fitting.svi import GlobalsPosterior, isolated
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.dispatcher.program.views import KINDS, View, off_zero
from bayes_dispatch.errors import EvidenceError, TensorError

__all__ = ["FittedDispatcher", "as_prompts"]

GLOBAL_DRAWS = 40  # of the globals, that serving takes means of
LARGEST_COUNT = 2**24  # of a class, that float32 counts exactly


@dataclass(frozen=True, eq=False)
class FittedDispatcher:
    """The fitted parts of a dispatcher; everything is evaluated in float64.

    Args:
        model: the generative program.
        globals: its fitted globals.
        feature_maps: by view the affine map of its raw values; views without one are read as they are.
        temper: the noise temper τ served with.
        like: lengths, totals and missing views of training prompts, for simulations.
    """

    model: DispatchModel
    globals: GlobalsPosterior
    feature_maps: Mapping[str, FeatureMap]
    temper: float
    like: Prompts
    kind: ClassVar[str] = "admixture"

    def __getstate__(self) -> dict[str, Any]:
        """What is computed from the parts is computed anew where they are sent to."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def fingerprint(self) -> str:
        """A digest of everything that answers are computed from."""
        document, arrays = self.pack()
        document |= {"sizes": self.model.sizes, "families": self.model.families, "prior": self.model.prior}
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
        for name, values in sorted(arrays.items()):
            digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    @cached_property
    def quadrature(self) -> Quadrature:
        """What sums out the weights, under draws of the globals that are always the same."""
        generator = torch.Generator().manual_seed(0)
        draws = [self.globals.draw(generator) for _ in range(GLOBAL_DRAWS)]
        densities = ViewDensity.of_views(self.model.views, draws, self.temper)
        return Quadrature(densities, self.model.sizes, self.model.tree)

    @property
    def views(self) -> tuple[str, ...]:
        """The views of evidence that are read."""
        return tuple(view.name for view in self.model.views)

    @property
    def initial(self) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` concentration of the serving prior before any event: the program's own."""
        return self.model.prior_of_shares().double().numpy()

    @property
    def shares(self) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` label shares of the program's own prior."""
        return self.labels(on_simplex(self.initial))

    def labels(self, pi: Float[np.ndarray, " weight"]) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` label shares under ``pi``: these with a floor."""
        return on_simplex(np.asarray(self.model.label_shares(pi), dtype=np.float64))

    def prior_mean(self, labels: Float[np.ndarray, " weight"]) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` mean of the weights before a prompt is read, under label shares."""
        return self.quadrature.prior(labels).mean

    def prompts(self, evidence: Evidence) -> Prompts:
        """Evidence as the program's tensors, float64.

        Raises:
            EvidenceError: none of the program's views.
            TensorError: a view of another width.
        """
        mapped = {
            name: each(evidence.views[name]) for name, each in self.feature_maps.items() if name in evidence.views
        }
        return as_prompts(self.model, evidence, mapped, torch.float64)

    def answer(self, prompts: Prompts, labels: Float[np.ndarray, " weight"]) -> Cells:
        """The posterior of float64 prompts under label shares ``(K+1,)``."""
        return self.quadrature(prompts, labels)

    def log_evidence(self, evidence: Evidence, labels: Float[np.ndarray, " weight"]) -> Float[np.ndarray, " prompt"]:
        """``(N,)`` log density of prompts under label shares ``(K+1,)``, nats; raises as ``prompts``."""
        return np.concatenate([self.answer(some, labels).log_evidence for some in self.prompts(evidence).pieces()])

    def pack(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What JSON holds, and named arrays."""
        views = [{"name": view.name, "kind": view.kind, "width": view.width} for view in self.model.views]
        document = {"views": views, "temper": self.temper}
        arrays = {f"globals.loc.{name}": value.numpy() for name, value in self.globals.locations.items()}
        arrays |= {f"globals.scale.{name}": value.numpy() for name, value in self.globals.scales.items()}
        for name, each in self.feature_maps.items():
            arrays |= {f"features.{name}.center": each.center, f"features.{name}.projection": each.projection}
        arrays |= {"like.lengths": self.like.lengths.numpy()}
        arrays |= {f"like.totals.{name}": values.numpy() for name, values in self.like.totals.items()}
        arrays |= {f"like.missing.{name}": mask.numpy() for name, mask in self.like.missing.items()}
        return document, arrays

    @classmethod
    def unpack(
        cls, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray], experts: Sequence[str], program: Admixture
    ) -> FittedDispatcher:
        """The inverse of :meth:`pack`, for the experts and the program that were fitted.

        What is missing, or of another shape, raises whatever its use does.
        """
        views = tuple(KINDS[view["kind"]](view["width"], view["name"]) for view in document["views"])
        model = program.model(experts, views)
        globals_ = GlobalsPosterior(_under(arrays, "globals.loc."), _under(arrays, "globals.scale."))
        with isolated(0):
            shapes = {name: value.shape for name, value in model.sample_globals().items()}
        _expect("globals", shapes, {name: value.shape for name, value in globals_.center().items()})
        _expect("scales", _shapes(globals_.locations), _shapes(globals_.scales))
        maps = {
            name: FeatureMap(arrays[f"features.{name}.center"], arrays[f"features.{name}.projection"])
            for name in (view.name for view in views)
            if f"features.{name}.center" in arrays
        }
        like = Prompts(
            torch.from_numpy(arrays["like.lengths"]),
            _under(arrays, "like.totals."),
            _under(arrays, "like.missing."),
        )
        mapped = {name: each.projection.shape[1:] for name, each in maps.items()}
        _expect("projections", {view.name: (view.width,) for view in views if view.name in maps}, mapped)
        rows = like.lengths.shape
        _expect("totals", {view.name: rows for view in views if view.kind == "counts"}, _shapes(like.totals))
        _expect("missing views", {view.name: rows for view in views}, _shapes(like.missing))
        return cls(model, globals_, maps, real("temper", document["temper"], 0, above=True), like)


def as_prompts(
    model: DispatchModel, evidence: Evidence, mapped: Mapping[str, np.ndarray], dtype: torch.dtype
) -> Prompts:
    """Evidence as the program's tensors; views that it lacks are missing.

    Args:
        model: the program, whose views are read; others are ignored.
        evidence: of N prompts.
        mapped: by view ``(N, D)`` values that take the place of raw ones.
        dtype: of the tensors.

    Raises:
        EvidenceError: none of the program's views.
        TensorError: a view of another width.
    """
    names = [view.name for view in model.views]
    if not any(name in evidence.views for name in names):
        raise EvidenceError(f"expected at least one of the views {names}, got {sorted(evidence.views)}")
    observed, missing, totals = {}, {}, {}
    for view in model.views:
        values = mapped.get(view.name, evidence.views.get(view.name))
        if values is None:
            values = np.zeros((len(evidence), view.width))
        if values.shape[1] != view.width:
            raise TensorError(f"expected view {view.name!r} of width {view.width}, got {values.shape[1]}")
        absent = evidence.is_missing(view.name)
        if absent.any():  # masked everywhere, but a density must exist
            values = np.where(absent[:, None], 1.0 / view.width if view.kind == "probabilities" else 0.0, values)
        observed[view.name] = _tensor(values, dtype)
        missing[view.name] = _tensor(absent, torch.bool)
        if view.kind == "counts":
            good = (values >= 0) & (values <= LARGEST_COUNT) & (values == np.round(values))
            _check_kind(view, values, ~absent, f"whole numbers from 0 to {LARGEST_COUNT}", good)
            totals[view.name] = observed[view.name].sum(-1)
        elif view.kind == "probabilities":
            near = np.abs(values.sum(1, keepdims=True) - 1) < SLACK
            _check_kind(view, values, ~absent, "probabilities that sum to 1", (values >= 0) & near)
            observed[view.name] = off_zero(observed[view.name])
    return Prompts(_tensor(evidence.known_lengths(), dtype), totals, missing, observed)


def _shapes(values: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.shape for name, value in values.items()}


def _expect(what: str, shapes: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse arrays of other names or shapes, by the first that differs."""
    for name in sorted(shapes.keys() | given.keys()):
        wanted, found = (None if name not in each else tuple(each[name]) for each in (shapes, given))
        if wanted != found:
            raise TypeError(f"{what} {name!r} of shape {found} in the place of {wanted}")


def _tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(values)).to(dtype)  # a copy: evidence is read-only, which torch warns of


def _check_kind(view: View, values: np.ndarray, present: np.ndarray, expected: str, good: np.ndarray) -> None:
    wrong = present & ~good.all(1)
    if wrong.any():
        row = int(wrong.argmax())
        raise EvidenceError(f"expected {expected} in view {view.name!r}, got {values[row]} for prompt {row}")


def _under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): torch.from_numpy(a) for name, a in arrays.items() if name.startswith(prefix)}
