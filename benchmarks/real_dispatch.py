"""How well a bundle of a real model dispatches prompts of 16 to 128 tokens, beside a classifier and Arrow's routing.

    python benchmarks/real_dispatch.py --bundle runs/lora --work /tmp/evidence    # eight LoRAs: 20 minutes
    python benchmarks/real_dispatch.py --quick    # a smoke test on a tiny model; the numbers mean nothing

LogisticRegression reads the same features of the same training prompts as the dispatcher, where these lie beside the
bundle (``BUNDLE.work``); else sixty fresh ones of each domain. Arrow reads the prompt
through its blend of adapters; a prompt's probabilities are the mean shares that its tokens give the adapters. What was
read of prompts is kept under ``--work``: a run that was stopped goes on. A prompt of 16 tokens may end before its first
translation: then nothing in it tells the language.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.coverage import interval_coverage
from bayes_dispatch.checks.detection import ood_auroc
from bayes_dispatch.checks.reliability import expected_calibration_error
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.experts.domains import BASE_TEXTS, FOREIGN_TEXTS, Domain
from dispatching.methods import Answer, Ours
from real.methods import logistic, takes_routers, training_evidence
from real.parts import real_parts
from real.prompts import mixed_prompts, pure_prompts
from real.reader import Reader
from real.routers import TOP
from real.sets import NEAR

__all__ = ["LENGTHS", "Prompts", "main", "methods", "prompts", "tables"]

LENGTHS = (16, 32, 64, 128)  # tokens
LEVELS = (0.5, 0.9)
MIXTURES = 4  # for each prompt of a domain
RESAMPLES = 200
PURE, BASE, MIXED, FOREIGN = "experts", "base", "mixtures", "foreign"


class Prompts(NamedTuple):
    """Prompts of one length and kind, with the shares (N, K + 1) of the experts' domains, base last; NaN if foreign."""

    texts: list[str]
    shares: np.ndarray


Answers = dict[str, Answer]  # by kind
Ask = Callable[[Sequence[str]], Answer]


def prompts(
    bundle: bd.Bundle, domains: Sequence[Domain], foreign: Sequence[Domain], tokens: int, count: int, seeds: int
) -> dict[str, Prompts]:
    """Held-out prompts of a length, by kind: of each expert's domain, of base's texts, of several domains, and foreign.

    Args:
        domains: of the experts, in order. foreign: have none. count: of each domain and seed.
    """
    corners, found = np.eye(len(domains) + 1), dict[str, list[Prompts]]()
    kinds: tuple[tuple[str, Sequence[Domain], np.ndarray], ...] = (
        (PURE, domains, corners[:-1]),
        (BASE, BASE_TEXTS, np.tile(corners[-1], (len(BASE_TEXTS), 1))),
        (FOREIGN, foreign, np.full((len(foreign), len(corners)), np.nan)),
    )
    for seed in range(seeds):
        for kind, own, shares in kinds:
            texts = [text for each in own for text in pure_prompts(each, tokens, count, bundle.tokenizer, seed)]
            found.setdefault(kind, []).append(Prompts(texts, shares.repeat(count, axis=0)))
        several, mixed = mixed_prompts(domains, tokens, MIXTURES * count, bundle.tokenizer, seed)
        found.setdefault(MIXED, []).append(Prompts(several, np.pad(mixed, ((0, 0), (0, 1)))))
    return {
        kind: Prompts([text for part in parts for text in part.texts], np.concatenate([part.shares for part in parts]))
        for kind, parts in found.items()
    }


def methods(reader: Reader, classify: Callable[[Evidence], np.ndarray]) -> dict[str, Ask]:
    """What answers for prompts of one length, by name; ``classify`` is as ``logistic`` makes it."""
    bundle = reader.bundle
    count, ours = len(bundle.experts), Ours(bundle.dispatcher)

    def point(shares: np.ndarray) -> Answer:
        shares = np.pad(shares, ((0, 0), (0, count + 1 - shares.shape[1])))
        return Answer(shares, shares, 1 - shares[:, :-1].max(1))

    def dispatched(texts: Sequence[str]) -> Answer:
        evidence = reader.evidence(texts)
        answer, gate = ours(evidence), bundle.gate
        return answer if gate is None else replace(answer, foreign=gate.foreignness(bundle.dispatcher, evidence))

    found: dict[str, Ask] = {"ours": dispatched}
    found["LogisticRegression"] = lambda texts: point(classify(reader.evidence(texts)))
    if takes_routers(bundle.experts):
        found["Arrow"] = lambda texts: point(reader.shares(texts))
    return found


def tables(
    names: Sequence[str],
    foreign: Sequence[str],
    count: int,
    known: Mapping[int, Mapping[str, Prompts]],
    answers: Mapping[tuple[int, str], Answers],
) -> list[Table]:
    """Prompts of one domain; mixtures and foreign prompts; foreign ones by kind; which of a near pair is taken for the
    other.

    Args:
        names: of the experts. foreign: names of the foreign texts. count: prompts of each text and seed.
        known: prompts by length and kind. answers: by length and method.
    """
    sizes = {kind: len(own.texts) for kind, own in next(iter(known.values())).items()}
    pure = (
        f"{sizes[PURE]} prompts of each length, ± standard errors (of ECE by bootstrap). To base: share of"
        f" {sizes[BASE]} prompts of base's texts, where a method may choose base. Arrow: the top {TOP} of each token."
    )
    several = (
        f"{sizes[MIXED]} mixtures of each length; {sizes[FOREIGN]} foreign prompts against those of one domain: ours by"
        " the gate's score (where there is none, by the share of base), others by their largest probability."
    )
    heads = {
        "Prompts of one expert's domain": ["accuracy", "ECE", "log loss", "Brier", "to base"],
        "Known mixtures, and foreign prompts": ["Brier", *(f"{level:.0%} covers" for level in LEVELS), "AUROC"],
    }
    made = [
        Table(
            title,
            ["tokens", "method", *own],
            [[str(key[0]), key[1], *row(known[key[0]], answers[key])] for key in answers],
            note,
        )
        for (title, own), row, note in zip(heads.items(), (_pure, _several), (pure, several), strict=True)
    ]
    return [
        *made,
        Table(
            "AUROC of foreign prompts, by text", ["text", "method", *map(str, known)], _foreign(foreign, count, answers)
        ),
        Table(
            "Near pairs", ["held-out prompts", "method", *map(str, known)], _near(names, known, answers), "By tokens."
        ),
    ]


def _pure(known: Mapping[str, Prompts], answers: Answers) -> list[str]:
    best, truth, base = answers[PURE].best, known[PURE].shares, answers[BASE].best
    labels = truth.argmax(1)
    right = best.argmax(1) == labels
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(labels), size=(RESAMPLES, len(labels)))
    spread = np.std([expected_calibration_error(best[rows], labels[rows]) for rows in drawn])
    surprise = -np.log(np.maximum(best[truth > 0], 1e-12))
    return [
        _mean(right),
        _number(expected_calibration_error(best, labels), spread),
        _mean(surprise),
        _mean(((best - truth) ** 2).sum(1)),
        _mean(base.argmax(1) == base.shape[1] - 1) if base[:, -1].any() else "",
    ]


def _several(known: Mapping[str, Prompts], answers: Answers) -> list[str]:
    given, truth = answers[MIXED], known[MIXED].shares
    posterior = given.posterior
    covers = ["" if posterior is None else _number(*interval_coverage(posterior, truth, level)[:2]) for level in LEVELS]
    found = ood_auroc(answers[PURE].foreign, answers[FOREIGN].foreign)
    return [_mean(((given.shares - truth) ** 2).sum(1)), *covers, _number(found.value, found.standard_error)]


def _foreign(names: Sequence[str], count: int, answers: Mapping[tuple[int, str], Answers]) -> list[list[str]]:
    """Each text alone, ``count`` prompts of a seed, against the prompts of one domain."""
    rows = []
    for place, name in enumerate(names):
        for method in dict.fromkeys(method for _, method in answers):
            cells = []
            for (_, own), given in answers.items():
                if own == method:
                    scores = given[FOREIGN].foreign
                    kinds = np.arange(len(scores)) // count % len(names)  # by seed, and then by text
                    found = ood_auroc(given[PURE].foreign, scores[kinds == place])
                    cells.append(_number(found.value, found.standard_error))
            rows.append([name, method, *cells])
    return rows


def _near(
    names: Sequence[str], known: Mapping[int, Mapping[str, Prompts]], answers: Mapping[tuple[int, str], Answers]
) -> list[list[str]]:
    """Shares of the prompts of one that go to the other."""
    pairs = [own for pair in NEAR if set(pair) <= set(names) for own in (pair, pair[::-1])]
    rows = []
    for one, other in pairs:
        for method in dict.fromkeys(method for _, method in answers):
            shares = []
            for tokens, kinds in known.items():
                own = kinds[PURE].shares[:, names.index(one)] == 1
                shares.append(_mean(answers[tokens, method][PURE].best[own].argmax(1) == names.index(other)))
            rows.append([f"{one} taken for {other}", method, *shares])
    return rows


def _mean(values: np.ndarray) -> str:
    return _number(values.mean(), values.std(ddof=1) / len(values) ** 0.5)


def _number(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def main(
    bundle: Annotated[Path, typer.Option(help="Its experts are named after their domains.")] = Path("smollm2"),
    model: Annotated[str | None, typer.Option(help="Its base model, where it lies elsewhere by now.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Where pip put the packages of the texts.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where what was read of prompts is kept.")] = None,
    count: Annotated[int, typer.Option("--prompts", min=2, help="Of each domain, length and seed.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Of the model's weights; as the bundle was made.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test on a tiny model.")] = False,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(threads)
    with TemporaryDirectory() as scratch:
        if quick:
            from real.quick import quick_bundle, quick_domains

            count, seeds, parts, bundle = 4, 2, (quick_bundle(Path(scratch)), *quick_domains()), Path(scratch)
        else:
            parts = real_parts(bundle, model, dtype, texts)
        own, domains = parts[0], list(parts[1].values())
        reader = Reader(own, work or Path(gettempdir()) / "bayes-dispatch-evidence")
        asked = methods(reader, logistic(training_evidence(own, bundle, domains)))
        known, answers = dict[int, dict[str, Prompts]](), dict[tuple[int, str], Answers]()
        foreign = [*parts[2]["foreign"], *FOREIGN_TEXTS]
        for tokens in tqdm(LENGTHS, "tokens", disable=None):
            known[tokens] = prompts(own, domains, foreign, tokens, count, seeds)
            for name, ask in asked.items():
                answers[tokens, name] = {kind: ask(each.texts) for kind, each in known[tokens].items()}
        for table in tables(list(own.experts), [each.name for each in foreign], count, known, answers):
            print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
