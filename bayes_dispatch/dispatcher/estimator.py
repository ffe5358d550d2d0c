"""The dispatcher: an estimator that is fitted on evidence and gives posterior draws of the expert weights.

>>> dispatcher = Dispatcher(experts=["sort", "reverse"]).fit(evidence, labels)      # doctest: +SKIP
>>> dispatcher.posterior(evidence, draws=64, seed=0).mean                           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped

from bayes_dispatch.arguments import real, several, shown, simplex, whole
from bayes_dispatch.arguments import seed as a_seed
from bayes_dispatch.dispatcher.arrays import as_numbers
from bayes_dispatch.dispatcher.conformal import Answer, Conformal, ConformalIntervals
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.exact.cells import Cells, prompt_generators
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher
from bayes_dispatch.dispatcher.fitting.flat import Dirichlets, FlatProgram
from bayes_dispatch.dispatcher.fitting.pipeline import TrainingSet, fit_parts, refit_parts
from bayes_dispatch.dispatcher.fitting.simulation import simulate
from bayes_dispatch.dispatcher.fitting.svi import FitReport, SVISettings, isolated
from bayes_dispatch.dispatcher.fitting.temper import KnownPrompts, choose_temper
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.prior.file import LOCK, update_prior, write_prior
from bayes_dispatch.dispatcher.prior.online import (
    PriorState,
    evidence_likelihood,
    feedback_likelihood,
    label_likelihood,
    observe,
    prior_state,
)
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.errors import BundleError, ConfigError, NotFittedError, TensorError
from bayes_dispatch.storage import read_directory, write_directory

__all__ = ["Dispatcher"]

KIND = "dispatcher"
VERSION = 3
RETEMPERED = 300  # prompts of each kind that choose the temper anew, at most
PROGRAM, FLAT = "admixture", "flat"  # what there is, as files name it


@dataclass(eq=False)
class Dispatcher:
    """Posterior over the weights of K experts and base, given first-pass evidence.

    Args:
        experts: K names, without base.
        random_state: seed of everything random in ``fit``.
        svi: settings of the globals' fit.
        features: settings of the projection of vectors.
        program: the generative program: views, families of experts, prior.

    Raises:
        ConfigError: fewer than two experts, a name twice, one called ``"base"``, or a program for other experts.
    """

    experts: Sequence[str]
    random_state: int = 0
    svi: SVISettings = field(default_factory=SVISettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    program: Admixture = field(default_factory=Admixture)
    _state: FittedDispatcher | FlatProgram | None = field(default=None, init=False, repr=False)
    _report: FitReport | None = field(default=None, init=False, repr=False)
    _prior: PriorState | None = field(default=None, init=False, repr=False)
    _prior_file: Path | None = field(default=None, init=False, repr=False)
    _conformal: Conformal | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.experts = tuple(several("experts", self.experts))
        if other := [name for name in self.experts if not isinstance(name, str)]:
            raise ConfigError(f"expected names of experts, got {shown(other[0])}")
        if len(self.experts) < 2 or len(set(self.experts)) < len(self.experts) or "base" in self.experts:
            raise ConfigError(f'expected at least two distinct expert names, none "base", got {list(self.experts)}')
        self.random_state = a_seed(self.random_state, "random_state")
        self.program.check_experts(self.experts)

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps a prior of its own: that of the file counts the events of one dispatcher alone."""
        return vars(self) | {"_prior_file": None}

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` or ``load`` has run."""
        return self._state is not None

    @property
    def state(self) -> FittedDispatcher:
        """The fitted parts.

        Raises:
            NotFittedError: before ``fit``, or of a flat dispatcher, which has none.
        """
        if isinstance(self._known, FlatProgram):
            raise NotFittedError("expected a dispatcher that was fitted on examples, got a flat one")
        return self._known

    @property
    def _known(self) -> FittedDispatcher | FlatProgram:
        if self._state is None:
            raise NotFittedError("expected a fitted dispatcher, got one before fit() or load()")
        return self._state

    @property
    def fingerprint(self) -> str:
        """A digest of what is known of the experts: gates, chats and priors on disk belong to it.

        Raises:
            NotFittedError: before ``fit``.
        """
        return self._known.fingerprint

    @property
    def views(self) -> tuple[str, ...]:
        """The views of evidence that are read.

        Raises:
            NotFittedError: before ``fit``.
        """
        known = self._known
        return () if isinstance(known, FlatProgram) else tuple(view.name for view in known.model.views)

    @classmethod
    def flat(cls, experts: Sequence[str], concentration: float = 1.0) -> Dispatcher:
        """A dispatcher for experts without examples. It needs no ``fit``, and reads no evidence.

        Its posterior is the same Dirichlet for every prompt; what a prompt needs is told by the prompt's tokens alone,
        as they filter the particles of ``PosteriorPredictive``: that costs a row of the model for each particle while
        the prompt is read. Labels and feedback move the prior as usual.

        Args:
            experts: K names, without base. concentration: of each component; with 1 all mixtures are equally likely.

        Raises:
            ConfigError: names that are no experts', or a concentration that is not positive.
        """
        dispatcher = cls(experts)
        dispatcher._state = FlatProgram(dispatcher.experts, real("concentration", concentration, 0, above=True))
        dispatcher._prior = dispatcher._initial_prior()
        return dispatcher

    def fit(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        y: Int[np.ndarray, " prompt"] | Sequence[int] | None = None,
        mixtures: Float[np.ndarray, "prompt weight"] | None = None,
        progress: bool = False,
    ) -> Dispatcher:
        """Fit projection, globals and noise temper.

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
        data = TrainingSet.of(_as_evidence(X), y, mixtures, len(self.experts))
        settings = (self.svi, self.features)
        parts = fit_parts(self.experts, self.program, data, *settings, self.random_state, progress)
        self._conformal, (self._state, self._report) = None, parts
        self._prior, self._prior_file = self._initial_prior(), None
        return self

    def recalibrate(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        y: Int[np.ndarray, " prompt"] | Sequence[int] | None = None,
        mixtures: Float[np.ndarray, "prompt weight"] | None = None,
        progress: bool = False,
    ) -> Dispatcher:
        """A new dispatcher for evidence that has drifted: globals and temper fitted to it, from where they are.

        The projections stay, so a few hundred prompts will do, labelled or not; the serving prior stays too. What
        :meth:`calibrate` has found does not. This dispatcher does not change.

        Args:
            X, y, mixtures, progress: as in :meth:`fit`.

        Raises:
            NotFittedError: before ``fit``.
            EvidenceError, TensorError: as in :meth:`fit`.
        """
        data = TrainingSet.of(_as_evidence(X), y, mixtures, len(self.experts))
        return self._of(*refit_parts(self.state, self.program, data, self.svi, self.random_state, progress))

    def retempered(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        y: Int[np.ndarray, " prompt"] | Sequence[int] | None = None,
        mixtures: Float[np.ndarray, "prompt weight"] | None = None,
        seed: int = 0,
    ) -> Dispatcher:
        """A new dispatcher whose noise temper is chosen by prompts that :meth:`fit` has not seen.

        ``fit`` chooses it by its own prompts, which it explains better than those to come: new documents, other
        authors. What :meth:`calibrate` has found does not stay: give it other prompts than these.

        Args:
            X: evidence; the more prompts the better, up to 300 of one expert and 300 mixed ones. Without mixed ones,
                concatenations of the others stand for them.
            y, mixtures: as in :meth:`fit`.
            seed: of the choice among prompts.

        Raises:
            NotFittedError: before :meth:`fit`.
            ConfigError: the program has a temper of its own, or no prompt is of known weights.
            EvidenceError, TensorError: as in :meth:`fit`.
        """
        data, state = TrainingSet.of(_as_evidence(X), y, mixtures, len(self.experts)), self.state
        if self.program.temper is not None:
            raise ConfigError(f"expected a program without a temper, got one with {self.program.temper:g}")
        if not np.isfinite(data.targets).all(1).any():
            raise ConfigError("expected prompts of known weights, got none")
        known = KnownPrompts(state.prompts(data.evidence), data.targets)
        random = np.random.default_rng(a_seed(seed))
        temper = choose_temper(state.quadrature, known, state.shares, random, RETEMPERED)
        return self._of(replace(state, temper=temper), self._report)

    def calibrate(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        y: Int[np.ndarray, " prompt"] | Sequence[int] | None = None,
        mixtures: Float[np.ndarray, "prompt weight"] | None = None,
        seed: int = 0,
    ) -> Dispatcher:
        """Find, on prompts that ``fit`` has not seen, how wide an interval and how large a set it takes to hold truth.

        That gives :meth:`predict_set`, and ``calibrated_interval`` of posteriors, their guarantee: split conformal, for
        prompts that are exchangeable with these, whether or not the program is right. The posterior itself, and
        ``predict_proba``, stay as they are. Both keep to the serving prior of this moment, so the guarantee outlives
        :meth:`update` and :meth:`feedback`, whose news they do not use: calibrate again to use it. ``fit`` forgets it.

        Args:
            X: evidence of n prompts, such as those to come; a probability p takes n ≥ p / (1 − p) of them.
            y, mixtures: as in :meth:`fit`; every prompt must have one of them.
            seed: of the choice of the expert that each prompt's interval is judged by.

        Returns:
            The dispatcher itself.

        Raises:
            NotFittedError: before ``fit``.
            ConfigError: no prompts, or one whose mixture is not known.
            EvidenceError, TensorError: as in :meth:`fit`.
        """
        data, shares = TrainingSet.of(_as_evidence(X), y, mixtures, len(self.experts)), self.prior.mean
        answer, lengths = self._answer(data.evidence, shares), data.evidence.known_lengths()
        self._conformal = Conformal.of(answer, data.targets, shares, lengths, a_seed(seed))
        return self

    @property
    def report(self) -> FitReport:
        """How the fit of the globals went.

        Raises:
            NotFittedError: before ``fit``, or after ``load``: it is not saved.
        """
        if self._report is None:
            raise NotFittedError("expected a dispatcher that was fitted here, got one before fit() or from load()")
        return self._report

    def posterior(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        draws: int = 64,
        seed: int | Sequence[int] = 0,
    ) -> DispatchPosterior:
        """Draw from the posterior of the weights under the fitted program.

        Args:
            X: evidence of N prompts, or an array ``(N, F)`` taken as their hidden view.
            draws: independent draws of each prompt.
            seed: one seed (a prompt's draws then also depend on its row), or one for each prompt. A prompt's draws
                depend on its evidence and its seed, never on the other prompts.

        Returns:
            The draws ``(draw, prompt, K+1)``.

        Raises:
            NotFittedError: before ``fit``.
            EvidenceError: bad evidence.
            TensorError: views of other widths than in ``fit``.
            ConfigError: fewer than one draw, or another number of seeds than prompts.
        """
        evidence = _as_evidence(X)
        draws, generators = whole("draws", draws, 1), prompt_generators(seed, len(evidence))
        if isinstance(self._known, FlatProgram):
            intervals = self._intervals(partial(self._answer, evidence), evidence.known_lengths())
            weights = self._known.answer(evidence, self.prior.mean).draw(draws, generators)
            return DispatchPosterior(weights, (*self.experts, "base"), calibrated=intervals)
        return self._posterior(self.state.prompts(evidence), draws, generators)

    def mean(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` posterior mean of the weights: of the distribution itself, not of draws."""
        return self._answer(_as_evidence(X), self.prior.mean).mean

    def log_evidence(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Float[np.ndarray, " prompt"]:
        """``(N,)`` log density of each prompt's evidence under the fitted program, nats: what tells drift.

        >>> monitor = drift_monitor(dispatcher.log_evidence(held_out))              # doctest: +SKIP
        >>> monitor, report = watch(monitor, dispatcher.log_evidence(arriving))     # doctest: +SKIP
        """
        return self.state.answer(self.state.prompts(_as_evidence(X)), self.prior.mean).log_evidence

    @property
    def prior(self) -> PriorState:
        """The prior of ``pi`` that prompts are served under: the program's own until :meth:`update` and
        :meth:`feedback` have changed it. What ``fit`` learns of ``pi`` says how its training set was put together, and
        nothing of the prompts to come.

        Raises:
            NotFittedError: before ``fit``.
        """
        if self._prior is None:
            raise NotFittedError("expected a fitted dispatcher, got one before fit() or load()")
        return self._prior

    @prior.setter
    def prior(self, prior: PriorState) -> None:
        names = (*self.experts, "base")
        if prior.names != names:
            raise ConfigError(f"expected a prior over {list(names)}, got one over {list(prior.names)}")
        with LOCK:
            if self._prior_file is not None:
                write_prior(self._prior_file, prior, self.fingerprint)
            self._prior = prior

    def update(self, labels: Int[np.ndarray, " event"] | Sequence[int], forgetting: float = 1.0) -> PriorState:
        """Take in the labels of served prompts; the next prompts are served under the new prior at once.

        Threads may call it at the same time, and processes that keep the prior in one file: every event counts once.

        Args:
            labels: ``(E,)`` component of each event in order, K for base.
            forgetting: what remains of earlier events at each new one; 1 for all.

        Returns:
            The new prior.

        Raises:
            NotFittedError: before ``fit``.
            TensorError, ConfigError: labels outside 0 … K, or a forgetting outside (0, 1].
        """
        width = len(self.experts) + 1
        return self._take_in(label_likelihood(as_numbers(labels, "labels", None), width), forgetting)

    def feedback(
        self,
        served: str | Sequence[str] | Float[np.ndarray, "event weight"],
        reward: float | Sequence[float] | Float[np.ndarray, " event"],
        X: Evidence | Shaped[np.ndarray, "prompt feature"] | None = None,
        reliability: float = 0.95,
        forgetting: float = 1.0,
    ) -> PriorState:
        """Take in rewards for the experts, or the blends of them, that served prompts.

        Args:
            served: the expert of each event (or of the only one), ``"base"`` too; or ``(E, K+1)`` the weights of the
                blend that served each.
            reward: from 0, surely wrong, to 1, surely right.
            X: evidence of these prompts. Give it whenever the choice of the expert depended on the prompt: without it
                the prior drifts towards what is served well.
            reliability: chance that a reward tells the truth.
            forgetting: as in :meth:`update`.

        Returns:
            The new prior.

        Raises:
            NotFittedError: before ``fit``.
            ConfigError: an unknown expert, or a number outside its range.
            TensorError, EvidenceError: rewards or evidence of other prompts than were served, or weights off the
                simplex.
        """
        names = [*self.experts, "base"]
        if isinstance(served, np.ndarray) and served.ndim == 2:
            rows = served
        else:
            experts = [served] if isinstance(served, str) else several("served", served)
            if unknown := [name for name in experts if name not in names]:
                raise ConfigError(f"expected experts among {names}, got {shown(unknown)}")
            rows = np.array([names.index(name) for name in experts], dtype=np.int64)
        rewards = np.atleast_1d(as_numbers(reward, "rewards"))
        likelihoods = feedback_likelihood(rows, rewards, len(names), reliability)
        if X is not None:
            pi = self.prior.mean  # the same for both uses, whatever other threads observe meanwhile
            mean = self._answer(_as_evidence(X), pi).mean
            if len(mean) != len(rewards):
                raise TensorError(f"expected evidence of {len(rewards)} prompts, got {len(mean)}")
            likelihoods = likelihoods * evidence_likelihood(mean, self._prior_mean(pi), floor=0.0)
        return self._take_in(likelihoods, forgetting)

    def keep_prior(self, path: str | Path) -> PriorState:
        """Keep the prior in a file from now on, written whole after every event or batch of events; no crash loses it.

        Several processes may keep theirs in one file: each of their events is added to what the file has by then.

        Args:
            path: where it is read from, if it exists, and else begun.

        Returns:
            The prior, as the file has it.

        Raises:
            NotFittedError: before ``fit``.
            BundleError: the file is of another dispatcher, truncated, edited, or no such file.
        """
        with LOCK:
            self._prior = update_prior(path, self.prior, self.fingerprint, lambda prior: prior)
            self._prior_file = Path(path).absolute()
            return self._prior

    def predict_proba(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` probability that each expert (base last) has the largest weight; deterministic."""
        return self._answer(_as_evidence(X), self.prior.mean).probability_best()

    def predict_set(
        self, X: Evidence | Shaped[np.ndarray, "prompt feature"], probability: float = 0.9
    ) -> Bool[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` the experts (base last), at least one for each prompt, among which the one with the largest true
        share is with at least this probability, for prompts exchangeable with those of :meth:`calibrate`.

        Raises:
            NotFittedError: before :meth:`calibrate`.
            ConfigError: a probability outside 0 to 1, or one that takes more calibration prompts.
        """
        if (known := self._conformal) is None:
            raise NotFittedError("expected a calibrated dispatcher, got one before calibrate()")
        evidence = _as_evidence(X)
        return known.sets(self._answer(evidence, known.shares), evidence.known_lengths(), probability)

    def predict(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Shaped[np.ndarray, " prompt"]:
        """``(N,)`` names of the experts most likely to have the largest weight, ``"base"`` among them."""
        return np.array([*self.experts, "base"])[self.predict_proba(X).argmax(axis=1)]

    def simulate(
        self,
        count: int,
        draws: int = 256,
        seed: int = 0,
        weights: Float[np.ndarray, "prompt weight"] | None = None,
    ) -> tuple[Float[np.ndarray, "prompt weight"], DispatchPosterior]:
        """Draw prompts from the fitted program and infer their weights: for calibration by simulation.

        Args:
            count: prompts to draw.
            draws: posterior draws of each.
            seed: of simulation and draws.
            weights: ``(count, K+1)`` to simulate at; drawn from the prior by default.

        Returns:
            The true weights ``(count, K+1)`` and the posterior.

        Raises:
            NotFittedError: before ``fit``.
            ConfigError: fewer than one prompt or draw, or weights off the simplex.
            TensorError: weights of another shape.
        """
        state, count = self.state, whole("count", count, 1)
        if weights is None:
            prior = state.quadrature.prior(state.labels(self.prior.mean))
            truth = prior.draw(count, np.random.default_rng([a_seed(seed), 1]))
        else:
            truth = simplex("weights", weights)
            if truth.shape != (wanted := (count, len(self.experts) + 1)):
                raise TensorError(f"expected weights of shape {wanted}, got {truth.shape}")
        with isolated(a_seed(seed)):
            given = torch.tensor(truth, dtype=torch.float32)
            prompts = simulate(state.model, state.globals.to(torch.float32), state.like, given, state.temper)
        posterior = self._posterior(prompts.to(torch.float64), whole("draws", draws, 1), prompt_generators(seed, count))
        return truth, posterior

    def save(self, directory: str | Path) -> None:
        """Write ``dispatcher.json`` and ``dispatcher.safetensors`` into a directory, in the place of an earlier save.

        Raises:
            NotFittedError: before ``fit``.
            BundleError: the directory is a link, or holds anything else.
        """
        document: dict[str, Any]
        arrays: dict[str, np.ndarray]
        if isinstance(known := self._known, FlatProgram):
            kind, document, arrays = FLAT, {"concentration": known.concentration}, {}
        else:
            kind, (document, arrays) = PROGRAM, known.pack()
        arrays |= {"prior.mean": self.prior.mean, "prior.covariance": self.prior.covariance}
        arrays |= {"prior.initial": self.prior.initial}
        if self._conformal is not None:
            arrays |= {f"conformal.{name}": values for name, values in vars(self._conformal).items()}
        settings = {name: asdict(getattr(self, name)) for name in ("svi", "features", "program")}
        header = {
            "version": VERSION,
            "experts": list(self.experts),
            "random_state": self.random_state,
            "events": self.prior.events,
            "kind": kind,
        }
        write_directory(Path(directory), KIND, {**header, **settings, **document}, arrays)

    @classmethod
    def load(cls, directory: str | Path) -> Dispatcher:
        """Read a dispatcher that :meth:`save` wrote.

        Raises:
            BundleError: a file is missing, truncated, edited, or of another format.
        """
        document, arrays = read_directory(Path(directory), KIND)
        version, kind = document.get("version"), document.get("kind")
        if version != VERSION or kind not in (PROGRAM, FLAT):
            raise BundleError(f"expected a dispatcher of version {VERSION}, {PROGRAM} or {FLAT}, got {(version, kind)}")
        try:
            dispatcher = cls(
                document["experts"],
                document["random_state"],
                SVISettings(**document["svi"]),
                FeatureSettings(**_tuples(document["features"])),
                Admixture(**_tuples(document["program"])),
            )
        except (AttributeError, KeyError, TypeError, ConfigError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise BundleError(f"expected the settings of a dispatcher in {directory}, got {reason}") from None
        experts, program = dispatcher.experts, dispatcher.program
        if kind == FLAT:
            try:
                dispatcher._state = cls.flat(experts, document["concentration"])._state
            except (KeyError, ConfigError) as error:
                raise BundleError(
                    f"expected the concentration of a flat dispatcher in {directory}, got {error}"
                ) from None
        else:
            dispatcher._state = FittedDispatcher.unpack(document, arrays, lambda views: program.model(experts, views))
        try:
            mean, covariance, initial = (arrays[f"prior.{name}"] for name in ("mean", "covariance", "initial"))
            dispatcher._prior = PriorState(mean, covariance, initial, (*experts, "base"), document["events"])
        except (KeyError, ConfigError) as error:
            raise BundleError(f"expected a serving prior in {directory}, got {error}") from None
        if found := {name: values for name, values in arrays.items() if name.startswith("conformal.")}:
            try:
                dispatcher._conformal = Conformal(*(found[f"conformal.{each.name}"] for each in fields(Conformal)))
                several("shares", dispatcher._conformal.shares, len(mean))
            except (KeyError, ConfigError) as error:
                raise BundleError(f"expected a calibration in {directory}, got {error}") from None
        return dispatcher

    def to_arviz(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        draws: int = 64,
        seed: int = 0,
        prompts: Sequence[str] | None = None,
    ) -> Any:
        """Prior, posterior, predictive draws and evidence of prompts as arviz data.

        Args:
            X, draws, seed: as in :meth:`posterior`, whose draws these are.
            prompts: names of the prompts for plots; numbers by default.

        Returns:
            The groups of ``arviz_groups.fitted_groups``, ``arviz.InferenceData`` on arviz 0.x,
            ``xarray.DataTree`` from 1.0 on.
        """
        from bayes_dispatch.dispatcher.arviz_data import to_inference_data
        from bayes_dispatch.dispatcher.arviz_groups import fitted_groups

        evidence = _as_evidence(X)
        posterior = self.posterior(evidence, draws, seed)
        return to_inference_data(fitted_groups(self.state, evidence, posterior, self._report, prompts, seed))

    def _of(self, state: FittedDispatcher, report: FitReport | None) -> Dispatcher:
        """One with other fitted parts, and the same serving prior."""
        new = replace(self)
        new._state, new._report, new._prior = state, report, self.prior
        return new

    def _take_in(self, likelihoods: Float[np.ndarray, "event component"], forgetting: float) -> PriorState:
        """The prior after events; to read the one before and to put this one in its place is a single step."""
        after = partial(observe, likelihoods=likelihoods, forgetting=forgetting)
        with LOCK:
            before, file = self.prior, self._prior_file
            if file is None:
                self._prior = after(before)
            else:
                self._prior = update_prior(file, before, self.fingerprint, after)
            return self._prior

    def _initial_prior(self) -> PriorState:
        known, names = self._known, (*self.experts, "base")
        if isinstance(known, FlatProgram):
            return prior_state(np.full(len(names), known.concentration), names)
        return prior_state(known.model.prior_of_shares().double().numpy(), names)

    def _answer(self, evidence: Evidence, pi: Float[np.ndarray, " component"]) -> Cells | Dirichlets:
        known = self._known
        return (
            known.answer(evidence, pi) if isinstance(known, FlatProgram) else known.answer(known.prompts(evidence), pi)
        )

    def _prior_mean(self, pi: Float[np.ndarray, " component"]) -> Float[np.ndarray, " component"]:
        """Of the weights, before a prompt is read."""
        known = self._known
        return pi if isinstance(known, FlatProgram) else known.quadrature.prior(known.labels(pi)).mean

    def _posterior(self, prompts: Prompts, draws: int, generators: Sequence[np.random.Generator]) -> DispatchPosterior:
        state, pi = self.state, self.prior.mean
        answer = state.answer(prompts, pi)

        def under(shares: Float[np.ndarray, " component"]) -> Cells:  # computed once where it can be
            return answer if np.array_equal(shares, pi) else state.answer(prompts, shares)

        weights, log_ratios = answer.draw(draws, generators)
        return DispatchPosterior(
            weights,
            (*self.experts, "base"),
            log_evidence=answer.log_evidence,
            prior=np.tile(self._prior_mean(pi), (len(prompts), 1)),
            log_ratios=log_ratios,
            calibrated=self._intervals(under, prompts.lengths.numpy()),
        )

    def _intervals(
        self,
        answer: Callable[[Float[np.ndarray, " component"]], Answer],
        lengths: Float[np.ndarray, " prompt"],
    ) -> ConformalIntervals | None:
        """Calibrated ones of prompts that have this answer under shares."""
        if (known := self._conformal) is None:
            return None
        return ConformalIntervals(known, lengths, answer(known.shares))


def _as_evidence(X: Evidence | np.ndarray) -> Evidence:
    return X if isinstance(X, Evidence) else Evidence.from_array(X)


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples, settings no lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
