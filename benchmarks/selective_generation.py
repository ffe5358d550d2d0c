"""How sure is an answer? Scores that tell right answers from wrong ones, calibration, and abstention by the gate.

    python benchmarks/selective_generation.py            # the shipped bundle: four minutes on one core
    python benchmarks/selective_generation.py --bundle runs/smollm2 --bytes 768 --dtype bfloat16
    python benchmarks/selective_generation.py --quick    # a smoke test; the numbers mean nothing

Each held-out document asks one question of its later half, with all that stands before it as the prompt. The answer is
written greedily up to its newline, and is right where the domain's own checker says so. Three tables come out:

- **Rejection**: the prediction–rejection ratio of each score of the predictive's answers, by lm-polygraph's own code
  (``polygraph.py``; left out where it is not installed). 1: wrong answers come last; 0: a random order.
- **Calibration**: the probability of the whole answer as the confidence that it is right. NLL is that of "right" under
  it, in nats. Base and the best expert stand there with their logits divided by a temperature, too: one of
  ``TEMPERATURES`` for all sets, of the least NLL on every other question; all are judged on the rest.
- **Abstention**: what is answered, and what of that is right, where the gate turns prompts down at stated false-alarm
  rates.

Errors are standard errors, of means over answers or of a bootstrap over answers (pairs of scores stay together).
"""

import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.app.bundle import transformers_backbone
from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.reliability import confidence_curve
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import (
    CONVENTIONS,
    FOREIGN_TEXTS,
    FOREIGN_TRANSLATIONS,
    TRANSLATIONS,
    Checked,
    Interleaved,
    translations,
)
from bayes_dispatch.experts.questions import Question, ask
from bayes_dispatch.inference.scoring.evaluation import MIXED_SETS, SWITCHING_SETS
from bayes_dispatch.inference.two_pass.generation import Generation
from bayes_dispatch.inference.two_pass.system import dispatch
from polygraph import FIRST, estimators, rejection_ratios, statistics
from real.sets import NEAR, PAIRS

__all__ = ["Answers", "abstention", "calibration", "judge", "main", "rejection", "run", "temperature", "tempered"]

SHORT = 8  # a short document has an eighth of the bytes of the others
PREDICTIVE = "posterior_predictive(16)"
PLAIN = ("base", "best_expert")  # of one row
TEMPERATURES = np.geomspace(1 / 4, 8, 41)
RATES = (0.01, 0.05, 0.1, 0.2)  # of false alarms
BINS = 10
Answers = Mapping[str, np.ndarray]
"""Numbers of N answers by name: ``right``, ``confidence``, ``p_value`` of the gate, ``tempered`` (N, temperatures)
log-probabilities, and scores by lm-polygraph's names or ours."""


def sets_of(names: Collection[str], total: int, texts: Path | None) -> dict[str, tuple[tuple[Checked, ...], int]]:
    """Name → domains with answers, and the bytes of their documents.

    Args:
        names: of the experts. total: bytes. texts: where the packages of translations are, if not on Python's path.

    Raises:
        ConfigError: no expert is of a domain with answers.
    """
    known = {domain.name: domain for domain in (*CONVENTIONS, *translations(texts))}
    pure = tuple(known[name] for name in names if name in known)
    if not pure:
        raise ConfigError(f"expected experts of {', '.join(known)}, got {', '.join(names)}")
    pairs = [(known[one], known[other]) for one, other in (*PAIRS, *NEAR)]
    turn = (*MIXED_SETS.values(), *(Interleaved(f"{a.name} & {b.name}", (a, b)) for a, b in pairs))
    switch = (*SWITCHING_SETS.values(), *(Interleaved(f"{a.name} then {b.name}", (a, b), "switch") for a, b in pairs))
    made = {"pure": (pure, total), "in turn": (turn, total), "switching": (switch, total)}
    fitting = {
        kind: (tuple(each for each in own if {part.name for part in getattr(each, "kinds", ())} <= set(names)), size)
        for kind, (own, size) in made.items()
    }
    return {kind: own for kind, own in fitting.items() if own[0]} | {"short": (pure, total // SHORT)}


def foreign_answers(bundle: bd.Bundle, total: int, count: int, texts: Path | None) -> Answers:
    """The predictive's answers to prompts that no expert is for: translations where experts translate, else texts, of
    which there are p-values alone, since no byte of them is an answer."""
    if any(domain.name in bundle.experts for domain in TRANSLATIONS):
        languages = [replace(domain, directory=texts) for domain in FOREIGN_TRANSLATIONS]
        return judge(bundle, questions(languages, total, count, 0), (), 0, [PREDICTIVE])[PREDICTIVE]
    rng = np.random.default_rng([0, 17, total])
    foreign = [domain for domain in FOREIGN_TEXTS for _ in range(count)]
    prompts = [domain.document(rng, total // 2, total, "held_out").prompt for domain in foreign]
    return {"p_value": p_values(bundle, prompts, 0)}


def questions(domains: Sequence[Checked], total: int, count: int, seed: int) -> list[tuple[Checked, Question]]:
    """``count`` held-out questions of each domain, and who checks their answers."""
    rng, found = np.random.default_rng([seed, 16, total]), []
    for domain in domains:
        for _ in range(count):
            size = total
            while not (document := domain.document(rng, total // 2, size, "held_out")).ranges:
                size *= 2  # its first item is longer than it should be: there must be another, to ask for
            found.append((domain, ask(document, rng, 1)))
    return found


def judge(
    bundle: bd.Bundle,
    asked: Sequence[tuple[Checked, Question]],
    scores: Sequence[Any],
    seed: int,
    blends: Sequence[str],
) -> dict[str, dict[str, np.ndarray]]:
    """Blend → its greedy answers, those of the predictive with ``scores``, which are ``estimators`` or none."""
    generator, prompts = bd.TwoPassGenerator(bundle), [question.context for _, question in asked]
    expected = [bundle.tokenizer.tokenize(f"{question.expected}\n", begin=False).ids for _, question in asked]
    room = 4 + max(map(len, expected))
    found: dict[str, dict[str, np.ndarray]] = {}
    for blend in blends:
        made = generator.generate(prompts, blend=blend, max_new_tokens=room, stop="\n", seed=seed)
        right = [
            domain.reward(question.text, question.expected, text.removesuffix("\n")) >= 1
            for (domain, question), text in zip(asked, made.texts, strict=True)
        ]
        confidence = np.exp(np.nansum(made.log_probabilities, axis=1)).clip(0, 1)
        found[blend] = {"right": np.array(right), "confidence": confidence}
        if blend in PLAIN:
            found[blend]["tempered"] = tempered(bundle, made)
        else:
            found[blend] |= {str(each): each(statistics(made)) for each in scores}
            found[blend]["p_value"] = p_values(bundle, prompts, seed)
    return found


@torch.no_grad()
def tempered(bundle: bd.Bundle, made: Generation) -> np.ndarray:
    """(N, temperatures) log-probabilities of answers that were written under one row of weights, at each temperature of
    the model's logits; they are read once more."""
    model, found = bundle.model, np.empty((len(made.prompts), len(TEMPERATURES)))
    for n, (prompt, length) in enumerate(zip(made.prompts, made.lengths, strict=True)):
        ids = torch.tensor([[*bundle.tokenizer.tokenize(prompt).ids, *made.token_ids[n, :length].tolist()]])
        blended = bundle.experts.blend(torch.from_numpy(made.weights[n]).to(model.weights_dtype))
        session = model.open(1, ids.shape[1], blended)
        after = session.read(ids[:, :-1].to(model.device), tail=int(length)).after
        assert after is not None
        logs, said = after[0].double().cpu(), ids[0, -int(length) :, None]
        for t, each in enumerate(TEMPERATURES):
            found[n, t] = float((logs / each).log_softmax(-1).gather(1, said).sum())
    return found


def p_values(bundle: bd.Bundle, prompts: Sequence[str | bytes], seed: int) -> np.ndarray:
    """(N,) of the gate; NaN where the bundle has none."""
    if bundle.gate is None:
        return np.full(len(prompts), np.nan)
    return bundle.gate.p_values(bundle.dispatcher, dispatch(bundle, prompts, seed)[1])


def rejection(found: Mapping[str, Answers], scores: Sequence[Any], resamples: int, seed: int) -> list[Table]:
    """Prediction–rejection ratios of each set, and what each score gains over lm-polygraph's first."""
    rng, names = np.random.default_rng(seed), [str(each) for each in scores]
    ratios, gains = ([[name] for name in names] for _ in range(2))
    for answers in found.values():
        count = len(answers["right"])
        resampled = [np.arange(count), *rng.integers(count, size=(resamples, count))]
        drawn = np.array([_ratios(answers, names, chosen) for chosen in resampled])
        gained = drawn - drawn[:, names.index(FIRST), None]
        for k in range(len(names)):
            ratios[k].append(_number(drawn[0, k], drawn[1:, k]))
            gains[k].append(_number(gained[0, k], gained[1:, k], signed=True))
    heads = [f"{kind}: {len(own['right'])}, {own['right'].mean():.0%} right" for kind, own in found.items()]
    title = f"Prediction–rejection ratio of the answers of {PREDICTIVE}"
    gains = [row for row in gains if row[0] != FIRST]
    return [Table(title, ["score", *heads], ratios), Table(f"The same minus that of {FIRST}", ["score", *found], gains)]


def _ratios(answers: Answers, names: Sequence[str], chosen: np.ndarray) -> list[float]:
    return list(rejection_ratios({name: answers[name][chosen] for name in names}, answers["right"][chosen]).values())


def temperature(right: np.ndarray, logs: np.ndarray) -> int:
    """Which of ``TEMPERATURES`` gives "right" (N,) the least NLL under log-probabilities (N, temperatures)."""
    return int(_nll(right[:, None], np.exp(logs)).mean(0).argmin())


def calibration(found: Mapping[str, Mapping[str, Answers]]) -> Table:
    """Share of right answers, ECE and NLL, by set and blend; temperatures are of all sets together."""
    chosen = {}
    for blend in PLAIN:
        fitted = (np.concatenate([own[blend][key][::2] for own in found.values()]) for key in ("right", "tempered"))
        chosen[blend] = temperature(*fitted)
    rows = []
    for kind, own in found.items():
        ways = {blend: (own[blend]["right"], own[blend]["confidence"]) for blend in (*PLAIN, PREDICTIVE)}
        for blend, t in chosen.items():
            name = f"{blend}, temperature {TEMPERATURES[t]:.2f}"
            ways[name] = own[blend]["right"], np.exp(own[blend]["tempered"][:, t]).clip(0, 1)
        for name in sorted(ways):
            right, confidence = (values[1::2] for values in ways[name])
            error = confidence_curve(confidence, right, BINS).expected_calibration_error
            rows.append([kind, name, _mean(right), f"{error:.3f}", _mean(_nll(right, confidence))])
    heads = ["questions", "blend", "right", "ECE", "NLL"]
    note = f"ECE in {BINS} equally filled bins. One half of the questions fitted the temperatures; this is the other."
    return Table("The probability of an answer as its confidence", heads, rows, note)


def abstention(found: Mapping[str, Answers], least: float) -> Table:
    """What is answered of each set, and what of that is right, at each false-alarm rate from ``least``."""
    rows = []
    for rate in (0.0, *(rate for rate in RATES if rate >= least)):
        cells = [f"{rate:g}" if rate else "none asked"]
        for own in found.values():
            answered = own["p_value"] > rate
            cells.append(_mean(answered))
            cells.append(_mean(own["right"][answered]) if "right" in own and answered.any() else "–")
        rows.append(cells)
    heads = ["false-alarm rate", *(head for kind in found for head in (f"{kind}: answered", "right of it"))]
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


def run(
    bundle: bd.Bundle, total: int, count: int, seeds: Iterable[int], resamples: int, texts: Path | None = None
) -> tuple[list[Table], dict[str, dict[str, Answers]]]:
    """All tables, and the answers that they are of, by set and blend; the options of ``main`` are told there."""
    scores: Sequence[Any] = ()
    try:
        scores = estimators()
    except ConfigError as error:
        print(error, file=sys.stderr)
    found: dict[str, dict[str, Answers]] = {}
    for kind, (domains, size) in tqdm(sets_of(bundle.experts.names, total, texts).items(), "sets", disable=None):
        parts = [
            judge(bundle, questions(domains, size, count, seed), scores, seed, [*PLAIN, PREDICTIVE]) for seed in seeds
        ]
        found[kind] = {
            blend: {key: np.concatenate([part[blend][key] for part in parts]) for key in own}
            for blend, own in parts[0].items()
        }
    predictive = {kind: own[PREDICTIVE] for kind, own in found.items()}
    tables = [*rejection(predictive, scores, resamples, 0), calibration(found)] if scores else [calibration(found)]
    if bundle.gate is not None:
        found["foreign"] = {PREDICTIVE: foreign_answers(bundle, total, count, texts)}
        tables.append(abstention(predictive | {"foreign": found["foreign"][PREDICTIVE]}, bundle.gate.least_rate))
    return tables, found


def main(
    bundle: Annotated[Path | None, typer.Option(help="A bundle's directory; that of the package by default.")] = None,
    model: Annotated[Path | None, typer.Option(help="Its base model, where that lies elsewhere by now.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights of a model of transformers.")] = None,
    documents: Annotated[int, typer.Option(min=2, help="Of each domain and seed; each asks one question.")] = 32,
    total: Annotated[int, typer.Option("--bytes", min=64, help=f"Of a document; short ones have 1/{SHORT}.")] = 256,
    seeds: Annotated[int, typer.Option(min=1, help="Of documents and draws, from 0.")] = 3,
    resamples: Annotated[int, typer.Option(min=2, help="Of the bootstrap.")] = 100,
    texts: Annotated[Path | None, typer.Option(help="Where pip put packages of translations; Python's path.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: two documents of one seed.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", dir_okay=False, help="A file for all numbers.")] = None,
) -> None:
    """Print Markdown tables."""
    if json_file is not None and not json_file.parent.is_dir():
        raise typer.BadParameter(f"expected a file in a directory that exists, got {json_file}")
    torch.set_num_threads(1)
    if quick:
        documents, seeds, resamples = 2, 1, 2
    base = None if model is None else transformers_backbone(str(model), device="cpu", dtype="auto", cast=dtype)
    system = bd.load_bundle(bundle, model=base, dtype=None if base else dtype)
    tables, found = run(system, total, documents, range(seeds), resamples, texts)
    for each in tables:
        print(f"{each.to_markdown()}\n", flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(found, default=np.ndarray.tolist) + "\n")


if __name__ == "__main__":
    typer.run(main)
