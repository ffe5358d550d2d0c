"""The dispatcher's answer: posterior draws of the expert weights of each prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped

from bayes_dispatch.arguments import fraction, several, whole
from bayes_dispatch.dispatcher.arrays import Frozen, as_numbers, as_rows
from bayes_dispatch.dispatcher.conformal import ConformalIntervals
from bayes_dispatch.errors import NotFittedError, TensorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas
    import xarray

__all__ = ["DispatchPosterior"]


@dataclass(frozen=True, eq=False, repr=False)
class DispatchPosterior(Frozen):
    """Independent posterior draws of the weights ``w`` of N prompts over K experts and base.

    A dispatcher's is given the features of each prompt: what the prompt is made of. ``mean``, ``interval`` and all the
    rest are of these draws. Which blend predicts a prompt's next token, given its tokens, is ``Generation.weights``.

    Args:
        weights: ``(draw, prompt, K+1)``, each row on the simplex, base last.
        experts: the K+1 names in order; the last is ``"base"``.
        k_hat: ``(prompt,)`` Pareto shape of the importance weights behind the draws, ``None`` where there were none.
            Above .7 the draws of the prompt are not to be trusted.
        log_evidence: ``(prompt,)`` log density of the evidence under this posterior's prior, nats, or ``None``.
            For drift there is ``Dispatcher.log_evidence``, which no feedback moves.
        prior: ``(prompt, K+1)`` mean of the weights before the prompt was read. ``None`` where the posterior owes
            nothing to the prompt itself: then the prompt's tokens are new to it.
        log_ratios: ``(draw, prompt)`` log density of each draw under the prior over that under the posterior that it
            was drawn from, to a constant for each prompt; with ``prior``, and without.
        calibrated: what ``calibrated_interval`` gives of these prompts; ``None`` without ``Dispatcher.calibrate``.
        chains: that the draws are of, one after the other; independent draws are one.

    Raises:
        TensorError: another shape, a name twice, rows off the simplex, or draws that are no whole chains.
        ConfigError: no list of names, or no whole number of chains.

    Example:
        >>> DispatchPosterior(np.tile([0.75, 0.25], (64, 1, 1)), ("sort", "base"))
        DispatchPosterior(64 draws, 1 prompt: sort .75, base .25)
    """

    weights: np.ndarray
    experts: tuple[str, ...]
    k_hat: np.ndarray | None = None
    log_evidence: np.ndarray | None = None
    chains: int = field(default=1, kw_only=True)
    prior: np.ndarray | None = field(default=None, kw_only=True)
    log_ratios: np.ndarray | None = field(default=None, kw_only=True)
    calibrated: ConformalIntervals | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        weights, experts = as_numbers(self.weights, "weights"), several("experts", self.experts)
        if weights.ndim != 3 or weights.shape[0] == 0 or weights.shape[2] != len(experts):
            raise TensorError(f"expected weights (draw, prompt, {len(experts)}), got shape {weights.shape}")
        if len(set(experts)) < len(experts):
            raise TensorError(f"expected distinct names of experts, got {experts}")
        if weights.size and not (weights.min() >= 0 and np.abs(weights.sum(-1) - 1).max() <= 1e-6):  # NaN fails both
            raise TensorError("expected weights on the simplex, got rows that are negative or do not sum to 1")
        if len(weights) % whole("chains", self.chains, 1):
            raise TensorError(f"expected as many draws of each of {self.chains} chains, got {len(weights)} of all")
        for name, shape in self._shapes(weights).items():
            if (given := getattr(self, name)) is not None:
                array = as_numbers(given, name)
                if array.shape != shape:
                    raise TensorError(f"expected {name} of shape {shape}, got shape {array.shape}")
                object.__setattr__(self, name, array)
        if (self.prior is None) != (self.log_ratios is None):
            raise TensorError("expected prior and log_ratios together, got one without the other")
        if self.calibrated is not None and len(self.calibrated) != weights.shape[1]:
            raise TensorError(f"expected calibrated of {weights.shape[1]} prompts, got {len(self.calibrated)}")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "experts", tuple(experts))
        super().__post_init__()

    def __len__(self) -> int:
        return self.weights.shape[1]

    def __repr__(self) -> str:
        mean = self.mean if len(self) else np.zeros((1, len(self.experts)))
        largest = np.argsort(-mean[0])[:3]
        shown = ", ".join(f"{self.experts[k]} {mean[0, k]:.2f}".replace(" 0.", " .") for k in largest)
        shown = shown if len(self) == 1 else f"weights of {self.experts[0]}, …, {self.experts[-1]}"
        return f"{type(self).__name__}({len(self.weights)} draws, {len(self)} prompt{'s' * (len(self) != 1)}: {shown})"

    @property
    def mean(self) -> Float[np.ndarray, "prompt expert"]:
        """``(prompt, K+1)`` posterior mean E[w]: the expected fraction of each expert."""
        return self.weights.mean(axis=0)

    @property
    def probability_best(self) -> Float[np.ndarray, "prompt expert"]:
        """``(prompt, K+1)`` share of draws in which each expert has the largest weight."""
        best = self.weights.argmax(axis=-1)  # (draw, prompt)
        return (best[..., None] == np.arange(len(self.experts))).mean(axis=0)

    @property
    def entropy(self) -> Float[np.ndarray, " prompt"]:
        """``(prompt,)`` entropy of the posterior mean, in nats."""
        mean = self.mean
        return -(mean * np.log(np.maximum(mean, 1e-300))).sum(axis=-1)

    def interval(self, probability: float = 0.9) -> Float[np.ndarray, "2 prompt expert"]:
        """Equal-tailed intervals ``(2, prompt, K+1)``: lower and upper ends of the given posterior probability.

        They hold the truth as often as the program is right; :meth:`calibrated_interval` has a guarantee.

        Raises:
            ConfigError: a probability outside 0 to 1.
        """
        probability = fraction("a probability", probability)
        return np.quantile(self.weights, [(1 - probability) / 2, (1 + probability) / 2], axis=0)

    def calibrated_interval(self, probability: float = 0.9) -> Float[np.ndarray, "2 prompt expert"]:
        """Intervals ``(2, prompt, K+1)`` as ``Dispatcher.calibrate`` corrected them: right even if the program is not.

        For a new prompt exchangeable with the n of calibration, the interval of an expert that is taken at random from
        those that are counted holds the true share with at least this probability, and at most 1/(n + 1) more where
        scores do not tie; n is that of the prompt's bin of lengths (``dispatcher.conformal``). Counted are experts of a
        mean of .05 or more, or else the largest. Mean and ends are of the dispatcher's answer under the prior of
        calibration, not of ``weights``: gates and feedback do not move them.

        Raises:
            NotFittedError: no posterior of a calibrated dispatcher.
            ConfigError: a probability outside 0 to 1, or one that takes more calibration prompts.
        """
        if self.calibrated is None:
            raise NotFittedError("expected a posterior of a calibrated dispatcher, got one without calibrate()")
        return self.calibrated(probability)[0]

    def select(self, indices: Shaped[np.ndarray, " selected"] | Sequence[int] | slice) -> DispatchPosterior:
        """The posterior of the prompts at ``indices``, in that order.

        Raises:
            TensorError: an index outside the prompts.
        """
        indices = as_rows(indices, len(self))
        found = {
            name: values[:, indices]
            for name in ("weights", "log_ratios")
            if (values := getattr(self, name)) is not None
        }
        found |= {
            name: values[indices]
            for name in ("k_hat", "log_evidence", "prior")
            if (values := getattr(self, name)) is not None
        }
        calibrated = None if self.calibrated is None else self.calibrated.select(indices)
        return replace(self, **found, calibrated=calibrated)

    @classmethod
    def concatenate(cls, parts: Sequence[DispatchPosterior]) -> DispatchPosterior:
        """All prompts of posteriors over the same experts, of as many draws; what some of them lack all of them do.

        Raises:
            TensorError: no posteriors, or not all of this class, with the same experts, draws and chains.
        """
        for part in parts:
            kind = (type(part).__name__, part.experts, len(part.weights), part.chains)
            if kind != (wanted := (cls.__name__, parts[0].experts, len(parts[0].weights), parts[0].chains)):
                raise TensorError(f"expected posteriors of one class, experts, draws and chains {wanted}, got {kind}")
        if not parts:
            raise TensorError("expected at least 1 posterior, got none")

        def joined(name: str, axis: int = 0) -> np.ndarray | None:
            given = [values for part in parts if (values := getattr(part, name)) is not None]
            return np.concatenate(given, axis) if len(given) == len(parts) else None

        names = ("k_hat", "log_evidence", "prior")
        return replace(
            parts[0],
            weights=np.concatenate([part.weights for part in parts], axis=1),
            log_ratios=joined("log_ratios", 1),
            calibrated=ConformalIntervals.concatenate([part.calibrated for part in parts]),
            **{name: joined(name) for name in names},  # type: ignore[arg-type]  # fields of one type
        )

    @staticmethod
    def _shapes(weights: np.ndarray) -> dict[str, tuple[int, ...]]:
        draws, prompts, _ = weights.shape
        of_prompts = {"k_hat": (prompts,), "log_evidence": (prompts,)}
        return {**of_prompts, "prior": weights.shape[1:], "log_ratios": (draws, prompts)}

    def to_frame(self, prompts: Sequence[str] | None = None, probability: float = 0.9) -> pandas.DataFrame:
        """Every weight as a row, prompt by prompt and expert by expert.

        Args:
            prompts: a unique name of each prompt; its number by default.
            probability: of the equal-tailed interval.

        Returns:
            Columns ``mean``, ``sd``, ``low`` and ``high`` (ends of the interval) and ``probability_best``, indexed by
            ``prompt`` and ``expert``.

        Raises:
            TensorError: another number of names than prompts, or one of them twice.
            ConfigError: a probability outside 0 to 1.
        """
        import pandas  # heavy, and used here alone

        from bayes_dispatch.dispatcher.arviz_data import prompt_names

        low, high = self.interval(probability)
        found = {"mean": self.mean, "sd": self.weights.std(axis=0), "low": low, "high": high}
        found |= {"probability_best": self.probability_best}
        rows = [prompt_names(prompts, len(self)), self.experts]
        index = pandas.MultiIndex.from_product(rows, names=["prompt", "expert"])
        return pandas.DataFrame({name: values.ravel() for name, values in found.items()}, index)

    def summary(self, prompts: Sequence[str] | None = None, probability: float = 0.9) -> pandas.DataFrame:
        """A row for each prompt: the expert that most probably has the largest weight, and how sure that is.

        Args, raises: as :meth:`to_frame`.

        Returns:
            ``best``, its ``probability_best``, ``mean``, ``sd``, ``low`` and ``high``, the ``entropy`` of the prompt's
            mean in nats, and ``k_hat`` where there is one; indexed by ``prompt``.
        """
        frame = self.to_frame(prompts, probability).reset_index("expert")
        best = self.probability_best.argmax(axis=1)
        table = frame.iloc[np.arange(len(self)) * len(self.experts) + best].rename(columns={"expert": "best"})
        table = table[["best", "probability_best", "mean", "sd", "low", "high"]].assign(entropy=self.entropy)
        return table if self.k_hat is None else table.assign(k_hat=self.k_hat)

    def groups(self, prompts: Sequence[str] | None = None) -> dict[str, xarray.Dataset]:
        """What :meth:`to_arviz` holds, as datasets by the name of their group."""
        from bayes_dispatch.dispatcher.arviz_data import weight_groups

        found = {"k_hat": self.k_hat, "log_evidence": self.log_evidence}
        return weight_groups(self.weights, self.experts, prompts, self.chains, found)

    def to_arviz(self, prompts: Sequence[str] | None = None) -> Any:
        """The draws as arviz data: ``posterior["weights"]`` with dims chain, draw, prompt, expert.

        Where the posterior has ``k_hat`` and ``log_evidence``, they are in ``sample_stats``. The rest of what a fitted
        program knows comes from ``Dispatcher.to_arviz``.

        Args:
            prompts: a unique name of each prompt; its number by default.

        Returns:
            ``arviz.InferenceData`` on arviz 0.x, ``xarray.DataTree`` from 1.0 on.

        Raises:
            TensorError: another number of names than prompts, or one of them twice.
        """
        from bayes_dispatch.dispatcher.arviz_data import to_inference_data

        return to_inference_data(self.groups(prompts))

    def to_netcdf(self, path: str | Path, prompts: Sequence[str] | None = None) -> Path:
        """Write :meth:`to_arviz` to a NetCDF file, under a temporary name until it is whole."""
        from bayes_dispatch.dispatcher.arviz_data import write_netcdf

        return write_netcdf(self.groups(prompts), Path(path))
