"""The dispatcher: an estimator that is fitted on evidence and gives posterior draws of the expert weights.

>>> dispatcher = Dispatcher(experts=["sort", "reverse"]).fit(evidence, labels)      # doctest: +SKIP
>>> dispatcher.posterior(evidence, draws=64, seed=0).mean                           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

from bayes_dispatch.arguments import seed as a_seed
from bayes_dispatch.arguments import several, shown, simplex, whole
from bayes_dispatch.dispatcher.arrays import as_codes, as_numbers, as_points
from bayes_dispatch.dispatcher.conformal import Answer, Conformal, ConformalIntervals
from bayes_dispatch.dispatcher.evidence.evidence import Evidence, as_evidence
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.exact.cells import prompt_generators
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher
from bayes_dispatch.dispatcher.fitting.flat import FlatProgram
from bayes_dispatch.dispatcher.fitting.pipeline import TrainingSet, fit_parts, refit_parts
from bayes_dispatch.dispatcher.fitting.simulation import simulate
from bayes_dispatch.dispatcher.fitting.svi import FitReport, SVISettings, isolated
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.prior.online import (
    STATE_ARRAYS,
    PriorState,
    evidence_likelihood,
    feedback_likelihood,
    label_likelihood,
    prior_state,
)
from bayes_dispatch.dispatcher.prior.serving import ServingPrior
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.errors import BundleError, ConfigError, NotFittedError, TensorError
from bayes_dispatch.storage import expecting, read_directory, write_directory

__all__ = ["Dispatcher"]

KIND = "dispatcher"
VERSION = 3
Labels = Shaped[np.ndarray, " prompt"] | Sequence[int | str | None]  # numbers or names
SETTINGS = {"svi": SVISettings, "features": FeatureSettings, "program": Admixture}
PROGRAMS = {each.kind: each for each in (FittedDispatcher, FlatProgram)}  # what can be known of experts, as files say


@dataclass(eq=False)
class _Served:
    """What one ``fit`` or ``load`` gave, and what was found for it since.

    A call takes it once, whatever other threads fit: what is known, the prior and the calibration belong together.
    """

    known: FittedDispatcher | FlatProgram
    prior: ServingPrior
    report: FitReport | None = None
    conformal: Conformal | None = None

    @property
    def fitted(self) -> FittedDispatcher:
        """What is known, of examples."""
        if isinstance(self.known, FlatProgram):
            raise NotFittedError("expected a dispatcher that was fitted on examples, got a flat one")
        return self.known

    @property
    def labels(self) -> Float[np.ndarray, " component"]:
        """Label shares under the prior of this moment."""
        return self.known.labels(self.prior.state.mean)

    def of_each(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        asked: Callable[[Answer], Shaped[np.ndarray, "prompt weight"]],
        pi: Float[np.ndarray, " component"] | None = None,
    ) -> Shaped[np.ndarray, "prompt weight"]:
        """What is asked of the answer, which is not kept; under the prior of this moment by default."""
        labels = self.labels if pi is None else self.known.labels(pi)
        pieces = self.known.prompts(as_evidence(X)).pieces()
        return np.concatenate([asked(self.known.answer(some, labels)) for some in pieces])


@dataclass(eq=False)
class Dispatcher:
    """Posterior over the weights of K experts and base, given first-pass evidence.

    Threads may share one: an answer is of one moment, whatever another thread fits or calibrates meanwhile.

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
    _now: _Served | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.experts = tuple(several("experts", self.experts))
        if other := [name for name in self.experts if not isinstance(name, str)]:
            raise ConfigError(f"expected names of experts, got {shown(other[0])}")
        if len(self.experts) < 2 or len(set(self.experts)) < len(self.experts) or "base" in self.experts:
            raise ConfigError(f'expected at least two distinct expert names, none "base", got {list(self.experts)}')
        self.random_state = a_seed(self.random_state, "random_state")
        self.program.check_experts(self.experts)

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps a prior of its own."""
        now = self._now
        return vars(self) | {"_now": now and replace(now, prior=copy(now.prior))}

    def __sklearn_clone__(self) -> Dispatcher:
        """For ``sklearn.base.clone``: one of the same settings that is not fitted."""
        return replace(self)

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` or ``load`` has run."""
        return self._now is not None

    @property
    def state(self) -> FittedDispatcher:
        """The fitted parts.

        Raises:
            NotFittedError: before ``fit``, or of a flat dispatcher, which has none.
        """
        return self._served.fitted

    @property
    def fingerprint(self) -> str:
        """A digest of what is known of the experts: gates and chats belong to it.

        Raises:
            NotFittedError: before ``fit``.
        """
        return self._served.known.fingerprint

    @property
    def views(self) -> tuple[str, ...]:
        """The views of evidence that are read.

        Raises:
            NotFittedError: before ``fit``.
        """
        return self._served.known.views

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
        dispatcher._know(FlatProgram(dispatcher.experts, concentration))
        return dispatcher

    def fit(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        y: Labels | None = None,
        mixtures: Float[np.ndarray, "prompt weight"] | None = None,
        progress: bool = False,
    ) -> Dispatcher:
        """Fit projection, globals and noise temper.

        Args:
            X: evidence of N prompts, or an array ``(N, F)`` taken as their hidden view.
            y: ``(N,)`` the expert of each prompt: its name, as :meth:`predict` has it (``"base"`` too), and ``None`` or
                NaN where unknown; or its index, K for base, and −1 where unknown. ``None`` for no labels at all.
            mixtures: ``(N, K+1)`` known weights, base last, NaN rows where unknown; they win over labels.
            progress: show progress bars.

        Returns:
            The dispatcher itself.

        Raises:
            EvidenceError: bad evidence, none of the views that the dispatcher reads, or one that next to no prompt has.
            TensorError: labels outside −1 … K, or of other names; mixtures off the simplex, or another N.
        """
        data = TrainingSet.of(X, y, mixtures, self.experts)
        settings = (self.svi, self.features)
        state, report = fit_parts(self.experts, self.program, data, *settings, self.random_state, progress)
        self._know(state, report=report)
        return self

    def recalibrate(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        y: Labels | None = None,
        mixtures: Float[np.ndarray, "prompt weight"] | None = None,
        progress: bool = False,
    ) -> Dispatcher:
        """A new dispatcher for evidence that has drifted: globals fitted to it, the temper if thirty weights are known.

        What is known of the globals is their prior, so experts and views that these prompts do not show stay what they
        were. It is wide for the experts that some prompts are known to be of: these are followed however far they have
        moved, and a hundred labels will do. The others are followed by a little, as prompts without labels do not tell
        an expert that has moved from another one. The projections and the serving prior stay. What :meth:`calibrate`
        has found does not. This dispatcher does not change.

        Args:
            X, y, mixtures, progress: as in :meth:`fit`.

        Raises:
            NotFittedError: before ``fit``.
            EvidenceError, TensorError: as in :meth:`fit`, or no prompts.
        """
        data = TrainingSet.of(X, y, mixtures, self.experts)
        now = self._served
        return self._of(now, *refit_parts(now.fitted, self.program, data, self.svi, self.random_state, progress))

    def calibrate(
        self,
        X: Evidence | Shaped[np.ndarray, "prompt feature"],
        y: Labels | None = None,
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
        data, now = TrainingSet.of(X, y, mixtures, self.experts), self._served
        known, pi, lengths = now.known, now.prior.state.mean, data.evidence.known_lengths()
        labels, pieces = known.labels(pi), known.prompts(data.evidence).pieces()
        answers = (known.answer(some, labels) for some in pieces)
        now.conformal = Conformal.of(answers, data.targets, pi, lengths, a_seed(seed))
        return self

    @property
    def report(self) -> FitReport:
        """How the fit of the globals went.

        Raises:
            NotFittedError: before ``fit``, or after ``load``: it is not saved.
        """
        if self._now is None or (report := self._now.report) is None:
            raise NotFittedError("expected a dispatcher that was fitted here, got one before fit() or from load()")
        return report

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
        evidence, now = as_evidence(X), self._served
        return self._posterior(now, now.labels, now.known.prompts(evidence), draws, seed)

    def mean(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` posterior mean of the weights: of the distribution itself, not of draws."""
        return self._served.of_each(X, lambda answer: answer.mean)

    def log_evidence(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Float[np.ndarray, " prompt"]:
        """``(N,)`` log density of each prompt's evidence under the fitted program, nats: what tells drift.

        The prior is the program's own: :meth:`update` and :meth:`feedback` move no score, so those of held-out prompts
        and of later ones can be ranked together.

        >>> monitor = drift_monitor(dispatcher.log_evidence(held_out))              # doctest: +SKIP
        >>> monitor, report = watch(monitor, dispatcher.log_evidence(arriving))     # doctest: +SKIP
        """
        state = self.state
        return state.log_evidence(as_evidence(X), state.shares)

    @property
    def prior(self) -> PriorState:
        """The prior of ``pi`` that prompts are served under: the program's own until :meth:`update` and
        :meth:`feedback` have changed it. What ``fit`` learns of ``pi`` says how its training set was put together, and
        nothing of the prompts to come.

        Raises:
            NotFittedError: before ``fit``.
        """
        return self._served.prior.state

    @prior.setter
    def prior(self, prior: PriorState) -> None:
        self._served.prior.state = prior

    def update(self, labels: Labels, forgetting: float = 1.0) -> PriorState:
        """Take in the labels of served prompts; the next prompts are served under the new prior at once.

        Threads may call it at the same time, and processes that keep the prior in one file: every event counts once.

        Args:
            labels: ``(E,)`` component of each event in order: its name, or its index, K for base.
            forgetting: what remains of earlier events at each new one; 1 for all.

        Returns:
            The new prior.

        Raises:
            NotFittedError: before ``fit``.
            TensorError, ConfigError: labels outside 0 … K, or of other names; or a forgetting outside (0, 1].
            BundleError, OSError: the file of :meth:`keep_prior` cannot be read or written; the prior is as before.
        """
        likelihoods = label_likelihood(as_codes(labels, None, self._components), len(self._components))
        return self._served.prior.take_in(likelihoods, forgetting)

    def feedback(
        self,
        served: str | Sequence[str] | Sequence[Sequence[float]] | Float[np.ndarray, "event weight"],
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
            BundleError, OSError: as :meth:`update`.
        """
        names = self._components
        if isinstance(served, Mapping):  # its names would count as events
            raise ConfigError(f"expected names of experts, or rows of {len(names)} weights, got {shown(served)}")
        experts = [served] if isinstance(served, str) else several("served", served)
        if experts and not isinstance(experts[0], str):
            rows = as_points(served, "served")
        else:
            if unknown := [name for name in experts if not isinstance(name, str) or name not in names]:
                raise ConfigError(f"expected experts among {list(names)}, got {shown(unknown)}")
            rows = np.array([names.index(name) for name in experts], dtype=np.int64)
        rewards = np.atleast_1d(as_numbers(reward, "rewards"))
        likelihoods = feedback_likelihood(rows, rewards, len(names), reliability)
        now = self._served
        if X is not None:
            pi = now.prior.state.mean  # the same for both uses, whatever other threads observe meanwhile
            mean = now.of_each(X, lambda answer: answer.mean, pi)
            if len(mean) != len(rewards):
                raise TensorError(f"expected evidence of {len(rewards)} prompts, got {len(mean)}")
            before = now.known.prior_mean(now.known.labels(pi))
            likelihoods = likelihoods * evidence_likelihood(mean, before, floor=0.0)
        return now.prior.take_in(likelihoods, forgetting)

    def keep_prior(self, path: str | Path) -> PriorState:
        """Keep the prior in a file from now on, replaced at once after every event or batch of them: no crash loses it.

        Several processes may keep theirs in one file: each of their events is added to what the file has by then. What
        :meth:`recalibrate` gives goes on with it; :meth:`fit` begins anew, without a file.

        Args:
            path: where it is read from, if it exists, and else begun.

        Returns:
            The prior, as the file has it.

        Raises:
            NotFittedError: before ``fit``.
            BundleError: the file is of other experts, truncated, edited, or no such file; or it could only be
                overwritten where it is: it is somebody else's, or its directory takes no new files.
            OSError: the disk is full, refuses, or has no locks.
        """
        return self._served.prior.keep(path)

    def predict_proba(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` probability that each expert (base last) has the largest weight; deterministic."""
        return self._served.of_each(X, lambda answer: answer.probability_best())

    def predict_set(
        self, X: Evidence | Shaped[np.ndarray, "prompt feature"], probability: float = 0.9
    ) -> Bool[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` the experts (base last), at least one for each prompt, among which the one with the largest true
        share is with at least this probability, for prompts exchangeable with those of :meth:`calibrate`.

        Raises:
            NotFittedError: before :meth:`calibrate`.
            ConfigError: a probability outside 0 to 1, or one that takes more calibration prompts.
        """
        now = self._now
        if now is None or (calibration := now.conformal) is None:
            raise NotFittedError("expected a calibrated dispatcher, got one before calibrate()")
        evidence = as_evidence(X)
        best = now.of_each(evidence, lambda answer: answer.probability_best(), calibration.shares)
        return calibration.sets(best, evidence.known_lengths(), probability)

    def predict(self, X: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Shaped[np.ndarray, " prompt"]:
        """``(N,)`` names of the experts most likely to have the largest weight, ``"base"`` among them."""
        return np.array(self._components)[self.predict_proba(X).argmax(axis=1)]

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
        now, count = self._served, whole("count", count, 1)
        state, labels = now.fitted, now.labels
        if weights is None:
            prior = state.quadrature.prior(labels)
            truth = prior.draw(count, np.random.default_rng([a_seed(seed), 1]))
        else:
            truth = simplex("weights", weights)
            if truth.shape != (wanted := (count, len(self._components))):
                raise TensorError(f"expected weights of shape {wanted}, got {truth.shape}")
        with isolated(a_seed(seed)):
            given = torch.tensor(truth, dtype=torch.float32)
            prompts = simulate(state.model, state.globals.to(torch.float32), state.like, given, state.temper)
        return truth, self._posterior(now, labels, prompts.to(torch.float64), draws, seed)

    def save(self, directory: str | Path) -> None:
        """Write ``dispatcher.json`` and ``dispatcher.safetensors`` into a directory, in the place of an earlier save.

        Raises:
            NotFittedError: before ``fit``.
            BundleError: the directory is a link, or holds anything else.
        """
        now = self._served
        (document, arrays), prior, calibration = now.known.pack(), now.prior.state, now.conformal
        arrays |= {f"prior.{name}": getattr(prior, name) for name in STATE_ARRAYS}
        if calibration is not None:
            arrays |= {f"conformal.{name}": values for name, values in vars(calibration).items()}
        header = {
            "version": VERSION,
            "experts": list(self.experts),
            "random_state": self.random_state,
            "events": prior.events,
            "kind": now.known.kind,
        }
        settings = {name: asdict(getattr(self, name)) for name in SETTINGS}
        write_directory(Path(directory), KIND, {**header, **settings, **document}, arrays)

    @classmethod
    def load(cls, directory: str | Path) -> Dispatcher:
        """Read a dispatcher that :meth:`save` wrote.

        Raises:
            BundleError: a file is missing, truncated, edited, or of another format.
        """
        document, arrays = read_directory(Path(directory), KIND)
        version, kind = document.get("version"), document.get("kind")
        if version != VERSION or kind not in list(PROGRAMS):
            wanted = f"expected a dispatcher of version {VERSION}, {' or '.join(PROGRAMS)}"
            raise BundleError(f"{wanted}, in {directory}, got {(version, kind)}")
        with expecting(f"the settings of a dispatcher in {directory}"):
            settings = {name: make(**_tuples(document[name])) for name, make in SETTINGS.items()}
            dispatcher = cls(document["experts"], document["random_state"], **settings)
        with expecting(f"what a dispatcher knows of its experts in {directory}"):
            state = PROGRAMS[kind].unpack(document, arrays, dispatcher.experts, dispatcher.program)
        with expecting(f"a serving prior in {directory}"):
            found = {name: arrays[f"prior.{name}"] for name in STATE_ARRAYS}
            prior = PriorState(**found, names=dispatcher._components, events=document["events"])
            served = dispatcher._know(state, prior)
        if any(name.startswith("conformal.") for name in arrays):
            with expecting(f"a calibration in {directory}"):
                served.conformal = Conformal(*(arrays[f"conformal.{each.name}"] for each in fields(Conformal)))
                several("shares", served.conformal.shares, len(dispatcher._components))
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

        evidence, now = as_evidence(X), self._served
        state, labels = now.fitted, now.labels
        posterior = self._posterior(now, labels, state.prompts(evidence), draws, seed)
        return to_inference_data(fitted_groups(state, evidence, posterior, labels, now.report, prompts, seed))

    @property
    def _components(self) -> tuple[str, ...]:
        return (*self.experts, "base")

    @property
    def _served(self) -> _Served:
        if self._now is None:
            raise NotFittedError("expected a fitted dispatcher, got one before fit() or load()")
        return self._now

    def _know(
        self, known: FittedDispatcher | FlatProgram, prior: PriorState | None = None, report: FitReport | None = None
    ) -> _Served:
        """Serve by other parts from now on, under a prior that no file keeps: by default the parts' own."""
        prior = prior_state(known.initial, self._components) if prior is None else prior
        self._now = served = _Served(known, ServingPrior(prior), report)
        return served

    def _of(self, now: _Served, state: FittedDispatcher, report: FitReport | None) -> Dispatcher:
        """One with other fitted parts, and the same serving prior, in the same file."""
        new = replace(self)
        new._now = _Served(state, now.prior.handed_on(), report)
        return new

    def _posterior(
        self,
        now: _Served,
        labels: Float[np.ndarray, " component"],
        prompts: Prompts,
        draws: int,
        seed: int | Sequence[int],
    ) -> DispatchPosterior:
        """Piece by piece, under label shares."""
        draws, turn = whole("draws", draws, 1), iter(prompt_generators(seed, len(prompts)))
        known, parts = now.known, []
        for some in prompts.pieces():
            answer = known.answer(some, labels)
            weights, log_ratios = answer.draw(draws, list(islice(turn, len(some))))
            prior = None if log_ratios is None else np.tile(known.prior_mean(labels), (len(some), 1))
            parts.append(
                DispatchPosterior(
                    weights, self._components, log_evidence=answer.log_evidence, prior=prior, log_ratios=log_ratios
                )
            )
        found, calibration = DispatchPosterior.concatenate(parts), now.conformal
        if calibration is None:
            return found
        return replace(found, calibrated=ConformalIntervals(calibration, known, prompts))


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples, settings no lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
