"""The dispatcher: an estimator that is fitted on evidence and gives posterior draws of the expert weights.

>>> dispatcher = Dispatcher(experts=["sort", "reverse"]).fit(evidence, labels)      # doctest: +SKIP
>>> dispatcher.posterior(evidence, draws=64, seed=0).mean                           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from bayes_dispatch.concatenations import RealPrompts
from bayes_dispatch.errors import BundleError, ConfigError, EvidenceError, NotFittedError, TensorError
from bayes_dispatch.evidence import Evidence
from bayes_dispatch.features import FeatureMap, FeatureSettings, fit_feature_map
from bayes_dispatch.fitted import FittedDispatcher, as_prompts
from bayes_dispatch.fitting import SVISettings, fit_globals, isolated
from bayes_dispatch.generative import CountsView, DispatchModel, HiddenView, View
from bayes_dispatch.guides import DirichletMixtures, GuideSettings
from bayes_dispatch.posterior import DispatchPosterior
from bayes_dispatch.sleep import fit_guide, simulate
from bayes_dispatch.storage import read_directory, write_directory

__all__ = ["Dispatcher"]

KIND = "dispatcher"
VERSION = 1
HELD_OUT = 0.3  # of the known mixtures choose the temper
LIKE = 2_000  # prompts whose lengths and totals are kept for simulations


@dataclass(eq=False)
class Dispatcher:
    """Posterior over the weights of K experts and base, given first-pass evidence.

    Args:
        experts: K names, without base.
        random_state: seed of everything random in ``fit``.
        svi: settings of the globals' fit.
        guide: settings of the guide and its training.
        features: settings of the hidden view's projection.

    Raises:
        ConfigError: fewer than two experts, a name twice, or one called ``"base"``.
    """

    experts: Sequence[str]
    random_state: int = 0
    svi: SVISettings = field(default_factory=SVISettings)
    guide: GuideSettings = field(default_factory=GuideSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    _state: FittedDispatcher | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.experts = tuple(self.experts)
        if len(self.experts) < 2 or len(set(self.experts)) < len(self.experts) or "base" in self.experts:
            raise ConfigError(f'expected at least two distinct expert names, none "base", got {list(self.experts)}')
        if self.random_state < 0:
            raise ConfigError(f"expected random_state ≥ 0, got {self.random_state}")

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` or ``load`` has run."""
        return self._state is not None

    @property
    def state(self) -> FittedDispatcher:
        """The fitted parts.

        Raises:
            NotFittedError: before ``fit``.
        """
        if self._state is None:
            raise NotFittedError("expected a fitted dispatcher, got one before fit() or load()")
        return self._state

    def fit(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        y: Int[np.ndarray, " prompt"] | Sequence[int] | None = None,
        mixtures: Float[np.ndarray, "prompt weight"] | None = None,
        progress: bool = False,
    ) -> Dispatcher:
        """Fit projection, globals and guide.

        Args:
            X: evidence of N prompts, or an array ``(N, F)`` taken as their hidden view.
            y: ``(N,)`` expert index of each prompt, −1 where unknown; ``None`` for no labels.
            mixtures: ``(N, K+1)`` known weights, base last, NaN rows where unknown; they win over labels.
            progress: show progress bars.

        Returns:
            The dispatcher itself.

        Raises:
            EvidenceError: bad evidence, or none of the views that the dispatcher reads.
            TensorError: labels outside −1 … K−1, mixtures off the simplex, or another N.
        """
        evidence = _as_evidence(X)
        labels = self._labels(y, len(evidence))
        known = self._mixtures(mixtures, len(evidence))
        mixed = np.isfinite(known).all(1)
        labels = np.where(mixed, -1, labels)
        targets = known.copy()
        targets[labels >= 0] = np.eye(len(self.experts) + 1)[labels[labels >= 0]]

        # Documents of known mixture are many enough to spare some for choosing the noise temper from 100 on.
        order = np.random.default_rng(self.random_state).permutation(np.flatnonzero(mixed & (known.max(1) < 1)))
        held_out = np.sort(order[: int(HELD_OUT * len(order))] if len(order) >= 100 else order[:0])
        train = np.setdiff1d(np.arange(len(evidence)), held_out)

        feature_map, projected = self._project(evidence, targets, train)
        views: list[View] = [] if projected is None else [HiddenView(projected.shape[1])]
        if "counts" in evidence.views:
            views.append(CountsView(evidence.views["counts"].shape[1]))
        if not views:
            raise EvidenceError(f'expected a view "hidden" or "counts", got {sorted(evidence.views)}')
        model = DispatchModel(len(self.experts), tuple(views))
        every = as_prompts(model, evidence, projected, torch.float32)
        prompts = every.select(torch.as_tensor(train))
        weights = torch.as_tensor(targets, dtype=torch.float32)
        observed = replace(
            prompts,
            labels=torch.as_tensor(labels[train]) if (labels >= 0).any() else None,
            known=torch.as_tensor(known[train], dtype=torch.float32) if mixed.any() else None,
        )
        posterior, _ = fit_globals(model, observed, self.svi, self.random_state, progress)

        like = prompts.select(torch.linspace(0, len(train) - 1, min(len(train), LIKE)).long()).blank()
        guide, temper = fit_guide(
            model,
            posterior,
            like,
            RealPrompts(prompts, weights[torch.as_tensor(train)]),
            (every.select(torch.as_tensor(held_out)), weights[torch.as_tensor(held_out)]),
            self.guide,
            self.random_state + 1,
            progress,
        )
        self._state = FittedDispatcher(model, posterior, feature_map, guide, temper, like)
        return self

    def posterior(
        self, X: Evidence | Shaped[np.ndarray, "prompt feature"], draws: int = 64, seed: int | Sequence[int] = 0
    ) -> DispatchPosterior:
        """Draw from the posterior of the weights, one network call for all prompts.

        Args:
            X: evidence of N prompts, or an array ``(N, F)`` taken as their hidden view.
            draws: independent draws of each prompt.
            seed: one seed (a prompt's generator then also depends on its row), or one for each prompt. A prompt's draws
                depend on its evidence and its generator, never on the other prompts.

        Returns:
            The draws ``(draw, prompt, K+1)``.

        Raises:
            NotFittedError: before ``fit``.
            EvidenceError: bad evidence.
            TensorError: views of other widths than in ``fit``.
            ConfigError: fewer than one draw, or another number of seeds than prompts.
        """
        evidence = _as_evidence(X)
        if draws < 1:
            raise ConfigError(f"expected at least 1 draw, got {draws}")
        generators = _generators(seed, len(evidence))
        return DispatchPosterior(self.mixtures_of(evidence).draw(draws, generators), (*self.experts, "base"))

    def mixtures_of(self, evidence: Evidence) -> DirichletMixtures:
        """The guide's answer itself: a mixture of Dirichlets for each prompt, in float64."""
        state = self.state
        projected = None
        if state.feature_map is not None and "hidden" in evidence.views:
            projected = state.feature_map(evidence.views["hidden"])
        return state.answer(as_prompts(state.model, evidence, projected, torch.float64))

    def predict_proba(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` probability that each expert (base last) has the largest weight; deterministic."""
        return self.mixtures_of(_as_evidence(X)).probability_best()

    def predict(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Shaped[np.ndarray, " prompt"]:
        """``(N,)`` names of the experts most likely to have the largest weight, ``"base"`` among them."""
        return np.array([*self.experts, "base"])[self.predict_proba(X).argmax(axis=1)]

    def simulate(
        self, count: int, draws: int = 256, seed: int = 0, weights: Float[np.ndarray, "prompt weight"] | None = None
    ) -> tuple[Float[np.ndarray, "prompt weight"], DispatchPosterior]:
        """Draw prompts from the fitted program and infer their weights: what calibration is attainable.

        Args:
            count: prompts to draw.
            draws: posterior draws of each.
            seed: of simulation and draws.
            weights: ``(count, K+1)`` to simulate at; drawn from the prior by default.

        Returns:
            The true weights ``(count, K+1)`` and the posterior.
        """
        state = self.state
        given = None if weights is None else torch.as_tensor(np.asarray(weights), dtype=torch.float32)
        tempers = (state.temper, state.temper)
        with isolated(seed):
            drawn = simulate(state.model, state.globals, state.like, count, self.guide, tempers, 0.0, given)
        answer = state.answer(drawn.prompts.to(torch.float64))
        posterior = DispatchPosterior(answer.draw(draws, _generators(seed, count)), (*self.experts, "base"))
        return drawn.weights.numpy().astype(np.float64), posterior

    def save(self, directory: str | Path) -> None:
        """Write ``dispatcher.json`` and ``dispatcher.safetensors`` into a directory, each renamed when whole.

        Raises:
            NotFittedError: before ``fit``.
            BundleError: the path is a file.
        """
        document, arrays = self.state.pack()
        settings = {name: asdict(getattr(self, name)) for name in ("svi", "guide", "features")}
        header = {"version": VERSION, "experts": list(self.experts), "random_state": self.random_state}
        write_directory(Path(directory), KIND, {**header, **settings, **document}, arrays)

    @classmethod
    def load(cls, directory: str | Path) -> Dispatcher:
        """Read a dispatcher that :meth:`save` wrote.

        Raises:
            BundleError: a file is missing, truncated, edited, or of another format.
        """
        document, arrays = read_directory(Path(directory), KIND)
        if document.get("version") != VERSION:
            raise BundleError(f"expected a dispatcher of version {VERSION}, got version {document.get('version')}")
        try:
            dispatcher = cls(
                document["experts"],
                document["random_state"],
                SVISettings(**document["svi"]),
                GuideSettings(**_tuples(document["guide"])),
                FeatureSettings(**_tuples(document["features"])),
            )
        except (AttributeError, KeyError, TypeError, ConfigError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise BundleError(f"expected the settings of a dispatcher in {directory}, got {reason}") from None
        dispatcher._state = FittedDispatcher.unpack(document, arrays, len(dispatcher.experts), dispatcher.guide)
        return dispatcher

    def _project(
        self, evidence: Evidence, targets: np.ndarray, train: np.ndarray
    ) -> tuple[FeatureMap | None, np.ndarray | None]:
        """The hidden view's projection, and its features ``(N, D)``: out-of-fold for the prompts it was fitted on."""
        if "hidden" not in evidence.views:
            return None, None
        hidden = evidence.views["hidden"]
        present = train[~evidence.is_missing("hidden")[train]]
        if len(present) < 2:
            raise EvidenceError(f"expected at least 2 prompts with a hidden view, got {len(present)}")
        feature_map, own = fit_feature_map(hidden[present], targets[present], self.features, self.random_state)
        projected = feature_map(hidden)
        projected[present] = own
        return feature_map, projected

    def _labels(self, y: object, count: int) -> np.ndarray:
        if y is None:
            return np.full(count, -1)
        labels = np.asarray(y)
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
            raise TensorError(f"expected {count} integer labels, got {labels.dtype} of shape {labels.shape}")
        if count and (labels.min() < -1 or labels.max() >= len(self.experts)):
            raise TensorError(
                f"expected labels from -1 to {len(self.experts) - 1}, got {labels.min()} to {labels.max()}"
            )
        return labels.astype(np.int64)

    def _mixtures(self, mixtures: object, count: int) -> np.ndarray:
        width = len(self.experts) + 1
        if mixtures is None:
            return np.full((count, width), np.nan)
        known = np.array(mixtures, dtype=np.float64)
        if known.shape != (count, width):
            raise TensorError(f"expected mixtures of shape {(count, width)}, base last, got {known.shape}")
        rows = known[~np.isnan(known).all(1)]
        if not (np.isfinite(rows).all() and (rows >= 0).all() and np.allclose(rows.sum(1), 1, atol=1e-4)):
            raise TensorError("expected mixtures on the simplex or rows of NaN, got rows that do not sum to 1")
        return known / known.sum(1, keepdims=True)


def _as_evidence(X: Evidence | np.ndarray) -> Evidence:
    return X if isinstance(X, Evidence) else Evidence.from_array(X)


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples, settings no lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _generators(seed: int | Sequence[int], count: int) -> list[np.random.Generator]:
    """One generator for each prompt."""
    given: Any = seed  # NumPy's integers and arrays serve too
    keys = [(int(given), row) for row in range(count)] if np.ndim(given) == 0 else [(int(s),) for s in given]
    if len(keys) != count:
        raise ConfigError(f"expected one seed, or one for each of {count} prompts, got {len(keys)}")
    if any(key[0] < 0 for key in keys):
        raise ConfigError(f"expected seeds ≥ 0, got {min(key[0] for key in keys)}")
    return [np.random.default_rng(key) for key in keys]
