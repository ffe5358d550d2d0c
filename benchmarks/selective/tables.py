"""Tables of answers: how well scores rank them, how well they are calibrated, and what the gate lets through."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.reliability import confidence_curve
from selective.asking import PLAIN, PREDICTIVE, TEMPERATURES, Asked
from selective.polygraph import BOTH, FIRST, chrf, estimators, rejection_ratios, statistics

__all__ = ["APART", "Answers", "abstention", "answers_of", "calibration", "combined", "rejection", "temperature"]

RATES = (0.01, 0.05, 0.1, 0.2)  # of false alarms
BINS = 10
APART = "surprise or entropy, chosen on the other sets"
TOGETHER = "with mutual information, chosen on the other sets"
Answers = Mapping[str, np.ndarray]
"""Numbers of N answers by name: ``right``, ``confidence``, ``p_value`` of the gate, ``tempered`` (N, temperatures)
log-probabilities; ``quality`` (0 … 1) and scores by lm-polygraph's names or ours, where that is there."""


def answers_of(asked: Sequence[Asked], blend: str, scores: Sequence[Any]) -> dict[str, np.ndarray]:
    """Numbers of a blend's answers, those of the predictive with ``scores``, which are ``estimators`` or none."""
    found = {"p_value": np.array([each.p_value for each in asked])}
    if blend not in asked[0].answers:
        return found
    own = [each.answers[blend] for each in asked]
    found["right"] = np.array([answer.right for answer in own])
    tokens = [np.array(answer.tokens) for answer in own]
    found["confidence"] = np.exp([each[:, 0].sum() for each in tokens]).clip(0, 1)
    if blend in PLAIN:
        found["tempered"] = np.array([answer.tempered for answer in own])
    elif scores:
        graded = asked[0].family == "translations"
        pairs = zip(own, asked, strict=True)
        found["quality"] = (
            np.array([chrf(answer.text, each.expected) for answer, each in pairs]) if graded else 1.0 * found["right"]
        )
        found |= {str(each): each(statistics(tokens)) for each in scores}
    return found


def rejection(found: Mapping[str, Answers], resamples: int, seed: int) -> list[Table]:
    """Prediction–rejection ratios of each set, and what each score gains over lm-polygraph's first, and over the best
    that knows no mutual information."""
    names = [str(each) for each in estimators() if str(each) not in BOTH]
    without, chosen = combined(found, [name for name in names if "mutual" not in name]), combined(found, [*BOTH])
    shown = [*names, APART, TOGETHER]
    rng, ratios, gains = np.random.default_rng(seed), [[name] for name in shown], dict[tuple[str, str], list[str]]()
    for kind, answers in found.items():
        scores, count = [answers[name] for name in (*names, without[kind], chosen[kind])], len(answers["right"])
        resampled = [np.arange(count), *rng.integers(count, size=(resamples, count))]
        drawn = np.array(
            [rejection_ratios([own[rows] for own in scores], answers["quality"][rows]) for rows in resampled]
        )
        for row, own in zip(ratios, drawn.T, strict=True):
            row.append(_number(own[0], own[1:]))
        for less in (FIRST, APART):
            gained = (drawn - drawn[:, shown.index(less), None]).T
            for name, own in zip(shown, gained, strict=True):
                gains.setdefault((less, name), [name]).append(_number(own[0], own[1:], signed=True))
    heads = [f"{kind}: {len(own['right'])} of quality {own['quality'].mean():.2f}" for kind, own in found.items()]
    title = f"Prediction–rejection ratio of the answers of {PREDICTIVE}"
    note = "Chosen: " + "; ".join(f"{kind}: {without[kind]}, and {chosen[kind]}" for kind in found) + "."
    return [
        Table(title, ["score", *heads], ratios, note),
        *(
            Table(f"The same minus that of {less}", ["score", *found], [gains[less, n] for n in shown if n != less])
            for less in (FIRST, APART)
        ),
    ]


def combined(found: Mapping[str, Answers], names: Sequence[str]) -> dict[str, str]:
    """Which of the scores ``names`` has the greatest mean ratio on all *other* sets, for each set."""
    ratios = {
        kind: np.nan_to_num(rejection_ratios([own[name] for name in names], own["quality"]))
        for kind, own in found.items()
    }
    total = np.sum([*ratios.values()], axis=0)
    return {kind: names[int((total - own).argmax())] for kind, own in ratios.items()}


def temperature(right: np.ndarray, logs: np.ndarray) -> int:
    """Which of ``TEMPERATURES`` gives "right" (N,) the least NLL under log-probabilities (N, temperatures)."""
    return int(_nll(right[:, None], np.exp(logs)).mean(0).argmin())


def calibration(found: Mapping[str, Mapping[str, Answers]]) -> Table:
    """Share of right answers, ECE and NLL, by set and blend; temperatures are of all sets together."""
    chosen = {}
    halves = {
        kind: np.random.default_rng(0).permutation(len(own["base"]["right"])) % 2 > 0 for kind, own in found.items()
    }
    for blend in PLAIN:
        fitted = (
            np.concatenate([own[blend][key][~halves[kind]] for kind, own in found.items()])
            for key in ("right", "tempered")
        )
        chosen[blend] = temperature(*fitted)
    rows = []
    for kind, own in found.items():
        ways = {blend: (own[blend]["right"], own[blend]["confidence"]) for blend in (*PLAIN, PREDICTIVE)}
        for blend, t in chosen.items():
            name = f"{blend}, temperature {TEMPERATURES[t]:.2f}"
            ways[name] = own[blend]["right"], np.exp(own[blend]["tempered"][:, t]).clip(0, 1)
        for name in sorted(ways):
            right, confidence = (values[halves[kind]] for values in ways[name])
            error = confidence_curve(confidence, right, BINS).expected_calibration_error
            rows.append([kind, name, _mean(right), f"{error:.3f}", _mean(_nll(right, confidence))])
    heads = ["questions", "blend", "right", "ECE", "NLL"]
    note = (
        f"ECE in {BINS} equally filled bins. A random half of the questions fitted the temperatures; this is the other."
    )
    return Table("The probability of an answer as its confidence", heads, rows, note)


def abstention(found: Mapping[str, Answers]) -> Table:
    """What is answered of each set, and what of that is right, at each false-alarm rate."""
    heads, rates = ["false-alarm rate"], (0.0, *RATES)
    rows = [[f"{rate:g}" if rate else "none asked"] for rate in rates]
    for kind, own in found.items():
        heads += [f"{kind}: answered", *(["right of it"] if "right" in own else [])]
        for rate, cells in zip(rates, rows, strict=True):
            passed = own["p_value"] > rate
            cells.append(_mean(passed))
            if "right" in own:
                cells.append(_mean(own["right"][passed]) if passed.any() else "–")
    return Table(f"Abstention by the gate, answers of {PREDICTIVE}", heads, rows)


def _nll(right: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Nats of "right" or "wrong"; of no answer more than 20."""
    return -np.log(np.where(right, confidence, 1 - confidence).clip(np.exp(-20), 1))


def _mean(values: np.ndarray) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values) / len(values) ** 0.5:.3f}"


def _number(value: float, resampled: np.ndarray, signed: bool = False) -> str:
    known = resampled[np.isfinite(resampled)]
    if np.isnan(value) or not len(known):
        return "–"
    return f"{value:{'+' if signed else ''}.3f} ± {known.std():.3f}"
