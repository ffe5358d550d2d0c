"""What fitting finds, and all that is saved: program, globals, projection, guide and temper, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bayes_dispatch.errors import BundleError, EvidenceError, TensorError
from bayes_dispatch.evidence import Evidence
from bayes_dispatch.features import FeatureMap
from bayes_dispatch.fitting import GlobalsPosterior
from bayes_dispatch.generative import CountsView, DispatchModel, HiddenView, Prompts, View
from bayes_dispatch.guides import DirichletMixtures, GuideSettings, MixtureGuide, encode, encoded_width

__all__ = ["FittedDispatcher", "as_prompts"]

VIEWS: dict[str, Callable[[int], View]] = {"hidden": HiddenView, "counts": CountsView}


@dataclass(frozen=True, eq=False)
class FittedDispatcher:
    """The fitted parts of a dispatcher; the guide is evaluated in float64.

    Args:
        model: the generative program.
        globals: its fitted globals.
        feature_map: projection of the hidden view; ``None`` without that view.
        guide: the amortised guide.
        temper: the noise temper τ served with.
        like: lengths, totals and missing views of training prompts, for simulations.
    """

    model: DispatchModel
    globals: GlobalsPosterior
    feature_map: FeatureMap | None
    guide: MixtureGuide
    temper: float
    like: Prompts

    def __post_init__(self) -> None:
        self.guide.double().requires_grad_(False)

    def answer(self, prompts: Prompts) -> DirichletMixtures:
        """The guide's mixtures of Dirichlets for float64 prompts."""
        with torch.inference_mode():
            tempers = torch.full((len(prompts),), self.temper, dtype=torch.float64)
            logits, concentration = self.guide.parameters_of(encode(prompts, tempers))
        return DirichletMixtures(logits.exp().numpy(), concentration.numpy())

    def pack(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What JSON holds, and named arrays."""
        document = {"views": {view.name: view.width for view in self.model.views}, "temper": self.temper}
        arrays = {f"globals.loc.{name}": value.numpy() for name, value in self.globals.locations.items()}
        arrays |= {f"globals.scale.{name}": value.numpy() for name, value in self.globals.scales.items()}
        arrays |= {f"guide.{name}": value.float().numpy() for name, value in self.guide.state_dict().items()}
        if self.feature_map is not None:
            arrays |= {"features.center": self.feature_map.center, "features.projection": self.feature_map.projection}
        arrays |= {"like.lengths": self.like.lengths.numpy(), "like.totals": self.like.totals.numpy()}
        arrays |= {f"like.missing.{name}": mask.numpy() for name, mask in self.like.missing.items()}
        return document, arrays

    @classmethod
    def unpack(
        cls, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray], n_experts: int, settings: GuideSettings
    ) -> FittedDispatcher:
        """The inverse of :meth:`pack`.

        Raises:
            BundleError: arrays are missing or of other shapes.
        """
        try:
            views = tuple(VIEWS[name](width) for name, width in document["views"].items())
            guide = MixtureGuide(encoded_width(document["views"]), n_experts + 1, settings)
            guide.load_state_dict(_under(arrays, "guide."))
            hidden = "features.center" in arrays
            return cls(
                DispatchModel(n_experts, views),
                GlobalsPosterior(_under(arrays, "globals.loc."), _under(arrays, "globals.scale.")),
                FeatureMap(arrays["features.center"], arrays["features.projection"]) if hidden else None,
                guide,
                float(document["temper"]),
                Prompts(
                    torch.from_numpy(arrays["like.lengths"]),
                    torch.from_numpy(arrays["like.totals"]),
                    _under(arrays, "like.missing."),
                ),
            )
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise BundleError(f"expected the arrays of a dispatcher of {n_experts} experts, got {reason}") from None


def as_prompts(model: DispatchModel, evidence: Evidence, projected: np.ndarray | None, dtype: torch.dtype) -> Prompts:
    """Evidence as the program's tensors: projected hidden states, counts, lengths; views that it lacks are missing.

    Args:
        model: the program, whose views are read; others are ignored.
        evidence: of N prompts.
        projected: ``(N, D)`` hidden view, ``None`` where absent.
        dtype: of the tensors.

    Raises:
        EvidenceError: none of the program's views.
        TensorError: a view of another width.
    """
    names = [view.name for view in model.views]
    if not any(name in evidence.views for name in names):
        raise EvidenceError(f"expected at least one of the views {names}, got {sorted(evidence.views)}")
    observed, missing = {}, {}
    for view in model.views:
        values = projected if view.name == "hidden" else evidence.views.get(view.name)
        if values is None:
            values = np.zeros((len(evidence), view.width))
        if values.shape[1] != view.width:
            raise TensorError(f"expected view {view.name!r} of width {view.width}, got {values.shape[1]}")
        absent = torch.tensor(evidence.is_missing(view.name))
        observed[view.name] = torch.tensor(values, dtype=dtype).masked_fill(absent.unsqueeze(-1), 0.0)
        missing[view.name] = absent
    totals = observed["counts"].sum(-1) if "counts" in observed else torch.zeros(len(evidence), dtype=dtype)
    return Prompts(torch.tensor(evidence.known_lengths(), dtype=dtype), totals, missing, observed)


def _under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): torch.from_numpy(a) for name, a in arrays.items() if name.startswith(prefix)}
