"""Scores of documents under blends, and what is made of them: tables, paired differences, arviz data.

Intervals are over documents. Every blend reads the same documents, so blends are compared by paired differences, whose
errors are smaller than those of the two means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from bayes_dispatch.checks.paired import paired_comparison
from bayes_dispatch.checks.reliability import confidence_curve
from bayes_dispatch.dispatcher.arviz_data import to_inference_data
from bayes_dispatch.errors import ConfigError, UnknownNameError
from bayes_dispatch.inference.two_pass.blends import full_name

if TYPE_CHECKING:
    import pandas

__all__ = ["METRICS", "Comparison", "Score", "ScoredTokens", "SystemComparison"]

DOCUMENT_BINS, POOLED_BINS = 5, 15  # of confidence, equally filled: a document has some tens of scored bytes

METRICS = ("nll", "exact_match", "ece", "entropy", "mutual_information", "aleatoric")


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """The scored tokens of one document under one blend, in order; P of them.

    Attributes:
        log_probability: (P,) of the true token, nats.
        confidence: (P,) probability of the most probable token. right: (P,) whether that is the true one.
        entropy: (P,) of the next token, nats. mutual_information: (P,) its epistemic part, nats.
        bytes: of their text.
    """

    log_probability: Float[np.ndarray, " P"]
    confidence: Float[np.ndarray, " P"]
    right: Bool[np.ndarray, " P"]
    entropy: Float[np.ndarray, " P"]
    mutual_information: Float[np.ndarray, " P"]
    bytes: int


@dataclass(frozen=True)
class Score:
    """One document under one blend, given its true bytes.

    Attributes:
        document: its index. blend: the blend's name.
        nll: −log p of the scored tokens, in nats per byte of their text, so that tokenizers can be compared. A token
            that a range divides is scored, all of it, by the range that it begins in.
        exact_match: share of the scored ranges whose every token is the most probable one: what greedy decoding from
            the true beginning would get right.
        entropy: of the scored tokens, in nats per byte; the sum of the next two.
        mutual_information: the epistemic part, from not knowing the weights. aleatoric: the rest.
        ece: expected calibration error of the most probable token, in 5 equally filled bins. With so few of them it is
            above 0 even where calibration is perfect: it is for paired differences, its size is in
            ``Comparison.summary``.
        rows: particles that were run, the cost of the blend in rows of the model.
        scored: byte by byte.
    """

    document: int
    blend: str
    nll: float
    exact_match: float
    entropy: float
    mutual_information: float
    aleatoric: float
    ece: float
    rows: int
    scored: ScoredTokens = field(repr=False, compare=False)

    @classmethod
    def of(cls, document: int, blend: str, scored: ScoredTokens, sizes: Sequence[int], rows: int) -> "Score":
        """From the scored tokens, which belong to ranges of ``sizes`` in order."""
        parts = np.split(scored.right, np.cumsum(sizes)[:-1])
        entropy, information = (float(x.sum() / scored.bytes) for x in (scored.entropy, scored.mutual_information))
        return cls(
            document,
            blend,
            float(-scored.log_probability.sum() / scored.bytes),
            float(np.mean([part.all() for part in parts])),
            entropy,
            information,
            entropy - information,
            confidence_curve(scored.confidence, scored.right, DOCUMENT_BINS).expected_calibration_error,
            rows,
            scored,
        )


@dataclass(frozen=True)
class Comparison:
    """A score for each document and blend.

    Attributes:
        scores: all documents under one blend, then under the next.
    """

    scores: tuple[Score, ...]

    @classmethod
    def concatenate(cls, parts: Sequence["Comparison"]) -> "Comparison":
        """The documents of several comparisons, one after the other, under the blends that all of them have.

        Raises:
            ConfigError: no comparison, or one of other blends.
        """
        blends = [part.blends for part in parts]
        if len(set(blends)) != 1:
            raise ConfigError(f"expected comparisons of the same blends, got {blends or 'none'!r:.200}")
        begins = np.cumsum([0, *(len(part.of(blends[0][0])) for part in parts)]).tolist()
        return cls(
            tuple(
                replace(score, document=begin + score.document)
                for blend in blends[0]
                for begin, part in zip(begins, parts, strict=False)
                for score in part.of(blend)
            )
        )

    @property
    def blends(self) -> tuple[str, ...]:
        """Names of the blends, in order."""
        return tuple(dict.fromkeys(score.blend for score in self.scores))

    def of(self, blend: str) -> tuple[Score, ...]:
        """The scores under one blend, in the order of the documents; a name may leave out default settings.

        Raises:
            UnknownNameError: it was not compared.
        """
        name = self.named(blend)
        return tuple(score for score in self.scores if score.blend == name)

    def named(self, blend: str) -> str:
        """A blend's name in the tables, from any that ``as_blend`` reads.

        Raises:
            UnknownNameError: it was not compared.
        """
        if blend in self.blends:
            return blend
        if (name := full_name(blend)) in self.blends:
            return name
        raise UnknownNameError(f"expected a blend of {', '.join(self.blends)}, got {blend!r}")

    def values(self, blend: str, metric: str) -> Float[np.ndarray, " document"]:
        """One metric under one blend, for each document.

        Raises:
            UnknownNameError: the blend was not compared, or the metric is none of ``METRICS``.
        """
        if metric not in METRICS:
            raise UnknownNameError(f"expected a metric of {', '.join(METRICS)}, got {metric!r}")
        return np.array([getattr(score, metric) for score in self.of(blend)])

    def to_frame(self) -> "pandas.DataFrame":
        """A row per document and blend, with the fields of ``Score`` but the single bytes."""
        import pandas

        rows = [{name: value for name, value in vars(score).items() if name != "scored"} for score in self.scores]
        return pandas.DataFrame(rows)

    def summary(self) -> "pandas.DataFrame":
        """A row per blend: ``blend``, ``documents``, ``rows``, each metric's mean over documents and, as ``…_se``, its
        standard error (NaN for a single document).

        ``ece`` is that of the scored bytes of all documents together, in 15 equally filled bins, and has no error.
        """
        import pandas

        return pandas.DataFrame([self._summary_of(blend) for blend in self.blends])

    def _summary_of(self, blend: str) -> dict[str, Any]:
        scores = self.of(blend)
        row: dict[str, Any] = {"blend": blend, "documents": len(scores), "rows": scores[0].rows}
        for metric in METRICS:
            if metric == "ece":
                confidence = np.concatenate([score.scored.confidence for score in scores])
                right = np.concatenate([score.scored.right for score in scores])
                row["ece"] = confidence_curve(confidence, right, POOLED_BINS).expected_calibration_error
                continue
            values = self.values(blend, metric)
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            row |= {metric: float(values.mean()), f"{metric}_se": float(error)}
        return row

    def differences(
        self, reference: str, metrics: Sequence[str] = ("nll", "exact_match", "ece"), probability: float = 0.95
    ) -> "pandas.DataFrame":
        """Every other blend minus a reference on the same documents.

        Args:
            reference: name of a blend that was compared.
            metrics: of ``METRICS``; ``ece`` is that of each document.
            probability: of the intervals.

        Returns:
            A row per blend and metric: ``blend, metric, difference, standard_error, low, high, documents``.

        Raises:
            UnknownNameError: a blend or metric that there is none of. TensorError: fewer than two documents.
            ConfigError: a probability outside 0 to 1.
        """
        import pandas

        reference, rows = self.named(reference), []
        for blend in self.blends:
            if blend != reference:
                for metric in metrics:
                    pair = self.values(blend, metric), self.values(reference, metric)
                    rows.append({"blend": blend, "metric": metric, **_paired(*pair, probability)})
        return pandas.DataFrame(rows, columns=["blend", "metric", *PAIRED])

    def to_arviz(self) -> Any:
        """The scores with named dimensions, as ``InferenceData`` (arviz 0.x) or ``xarray.DataTree`` (1.x).

        Returns:
            ``scores``: each metric (blend, document), ``log_probability`` (blend, document) of all scored bytes, in
            nats, and ``scored_bytes`` (document). There is no ``log_likelihood``: particles are integrated out, and of
            its single draw ``arviz.loo`` would mean nothing.
        """
        documents = [score.document for score in self.of(self.blends[0])]
        coords = {"document": documents, "blend": list(self.blends)}
        table: dict[str, Any] = {
            metric: (("blend", "document"), np.stack([self.values(blend, metric) for blend in self.blends]))
            for metric in METRICS
        }
        totals = [[float(score.scored.log_probability.sum()) for score in self.of(blend)] for blend in self.blends]
        table["log_probability"] = ("blend", "document"), totals
        table["scored_bytes"] = "document", [score.scored.bytes for score in self.of(self.blends[0])]
        return to_inference_data({"scores": xr.Dataset(table, coords)})


@dataclass(frozen=True)
class SystemComparison:
    """The same documents and blends under several systems (A/B): two dispatchers, say, or two banks.

    Attributes:
        comparisons: name of a system → its comparison.
    """

    comparisons: Mapping[str, Comparison]

    def to_frame(self) -> "pandas.DataFrame":
        """The rows of ``Comparison.to_frame``, after a column ``system``."""
        return self._stacked({name: found.to_frame() for name, found in self.comparisons.items()})

    def summary(self) -> "pandas.DataFrame":
        """The rows of ``Comparison.summary``, after a column ``system``."""
        return self._stacked({name: found.summary() for name, found in self.comparisons.items()})

    def differences(
        self, reference: str, metrics: Sequence[str] = ("nll", "exact_match", "ece"), probability: float = 0.95
    ) -> "pandas.DataFrame":
        """Every other system minus a reference under the same blend, paired by document.

        Args:
            reference: name of a system. metrics, probability: as in ``Comparison.differences``.

        Returns:
            A row per system, blend and metric: ``system``, then the columns of ``Comparison.differences``.

        Raises:
            UnknownNameError: a system or metric that there is none of. TensorError: fewer than two documents.
            ConfigError: a probability outside 0 to 1.
        """
        import pandas

        if reference not in self.comparisons:
            raise UnknownNameError(f"expected a system of {', '.join(self.comparisons)}, got {reference!r}")
        base, rows = self.comparisons[reference], []
        for system, found in self.comparisons.items():
            if system != reference:
                for blend in found.blends:
                    for metric in metrics:
                        pair = found.values(blend, metric), base.values(blend, metric)
                        rows.append({"system": system, "blend": blend, "metric": metric, **_paired(*pair, probability)})
        return pandas.DataFrame(rows, columns=["system", "blend", "metric", *PAIRED])

    @staticmethod
    def _stacked(frames: "Mapping[str, pandas.DataFrame]") -> "pandas.DataFrame":
        import pandas

        if not frames:
            raise ConfigError("expected at least one system, got none")
        return pandas.concat([frame.assign(system=name) for name, frame in frames.items()], ignore_index=True)[
            ["system", *next(iter(frames.values())).columns]
        ]


PAIRED = ("difference", "standard_error", "low", "high", "documents")


def _paired(one: np.ndarray, other: np.ndarray, probability: float) -> dict[str, float]:
    found = paired_comparison(one, other)
    values = (found.difference, found.standard_error, *found.interval(probability), found.count)
    return dict(zip(PAIRED, values, strict=True))
