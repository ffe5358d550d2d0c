"""How well a bundle of a real model dispatches prompts of 16 to 128 tokens, beside classifiers and Arrow's routing.

    python benchmarks/real_dispatch.py --bundle runs/lora --work /tmp/evidence    # eight LoRAs: 20 minutes
    python benchmarks/real_dispatch.py --quick    # a smoke test on a tiny model; the numbers mean nothing

LogisticRegression, and the same with a temperature, read the same features of the same training prompts as the
dispatcher: where these do not lie beside the bundle (``BUNDLE.work``), its recipe makes them anew. Arrow reads the
prompt through its blend of adapters; a prompt's probabilities are the mean shares that its tokens give the adapters.
What was read of prompts is kept under ``--work``: a run that was stopped goes on. Prompts are beginnings of documents,
which are often alike: each distinct text of a domain counts once. One of 16 tokens may end before its first
translation: then nothing in it tells the language.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from bayes_dispatch.checks.reliability import expected_calibration_error, reliability_curve
from bayes_dispatch.experts.domains import BASE_TEXTS, FOREIGN_TEXTS, Domain
from dispatching.classifiers import FITS, Classifier, fit_classifier
from dispatching.methods import Answer, Ours
from real.methods import evidence_of_build, takes_routers
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
CLASSIFIERS = ("LogisticRegression", "temperature-scaled softmax")


class Prompts(NamedTuple):
    """Distinct prompts of one length and kind.

    Attributes:
        texts: N of them. shares: (N, K + 1) of the experts' domains, base last; NaN if foreign.
        sources: (N,) names of the texts that each is from; "" of several domains.
    """

    texts: list[str]
    shares: np.ndarray
    sources: np.ndarray

    @classmethod
    def distinct(cls, drawn: Iterable[tuple[str, np.ndarray, str]]) -> "Prompts":
        """Each text of a source once."""
        found = {(source, text): shares for text, shares, source in drawn}
        return cls([text for _, text in found], np.stack(list(found.values())), np.array([own for own, _ in found]))


Answers = dict[str, Answer]  # by kind
Ask = Callable[[Sequence[str]], Answer]


def prompts(
    bundle: bd.Bundle, domains: Sequence[Domain], foreign: Sequence[Domain], tokens: int, count: int, seeds: int
) -> dict[str, Prompts]:
    """Held-out prompts of a length, by kind: of each expert's domain, of base's texts, of several domains, and foreign.

    Args:
        domains: of the experts, in order. foreign: have none. count: of each domain and seed, before those that are
            alike are one.
    """
    corners, drawn = np.eye(len(domains) + 1), dict[str, list[tuple[str, np.ndarray, str]]]()
    kinds: tuple[tuple[str, Sequence[Domain], np.ndarray], ...] = (
        (PURE, domains, corners[:-1]),
        (BASE, BASE_TEXTS, np.tile(corners[-1], (len(BASE_TEXTS), 1))),
        (FOREIGN, foreign, np.full((len(foreign), len(corners)), np.nan)),
    )
    for seed in range(seeds):
        for kind, own, shares in kinds:
            for each, known in zip(own, shares, strict=True):
                texts = pure_prompts(each, tokens, count, bundle.tokenizer, seed)
                drawn.setdefault(kind, []).extend((text, known, each.name) for text in texts)
        several, mixed = mixed_prompts(domains, tokens, MIXTURES * count, bundle.tokenizer, seed)
        known = np.pad(mixed, ((0, 0), (0, 1)))
        drawn.setdefault(MIXED, []).extend((text, own, "") for text, own in zip(several, known, strict=True))
    return {kind: Prompts.distinct(own) for kind, own in drawn.items()}


def methods(reader: Reader, classifiers: Mapping[str, Classifier]) -> dict[str, Ask]:
    """What answers for prompts of one length, by name."""
    bundle = reader.bundle
    ours = Ours(bundle.dispatcher)

    def routed(texts: Sequence[str]) -> Answer:
        shares = np.pad(reader.shares(texts), ((0, 0), (0, 1)))
        return Answer(shares, shares, 1 - shares.max(1))

    def dispatched(texts: Sequence[str]) -> Answer:
        evidence = reader.evidence(texts)
        answer, gate = ours(evidence), bundle.gate
        return answer if gate is None else replace(answer, foreign=gate.foreignness(bundle.dispatcher, evidence))

    found: dict[str, Ask] = {"ours": dispatched}
    found |= {name: lambda texts, each=each: each(reader.evidence(texts)) for name, each in classifiers.items()}
    if takes_routers(bundle.experts):
        found["Arrow"] = routed
    return found


def tables(
    names: Sequence[str],
    foreign: Sequence[str],
    known: Mapping[int, Mapping[str, Prompts]],
    answers: Mapping[tuple[int, str], Answers],
) -> list[Table]:
    """Prompts of one domain; mixtures and foreign prompts; foreign ones by kind; which of a near pair is taken for the
    other.

    Args:
        names: of the experts. foreign: names of the foreign texts.
        known: prompts by length and kind. answers: by length and method.
    """
    sizes = {
        kind: ", ".join(str(len(own[kind].texts)) for own in known.values()) for kind in (PURE, BASE, MIXED, FOREIGN)
    }
    pure = (
        f"Distinct prompts, by length: {sizes[PURE]}; ± standard errors (of ECE by bootstrap; in brackets what it is by"
        f" chance if the method is calibrated). To base: share of {sizes[BASE]} prompts of base's texts, where a method"
        f" may choose base. Arrow: the top {TOP} of each token."
    )
    several = (
        f"Distinct prompts, by length: {sizes[MIXED]} mixtures; {sizes[FOREIGN]} foreign ones against those of one"
        " domain: ours by the gate's score (where there is none, by the share of base), others by their largest"
        " probability."
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
            "AUROC of foreign prompts, by text", ["text", "method", *map(str, known)], _foreign(foreign, known, answers)
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
    curve, surprise = reliability_curve(best, labels), -np.log(np.maximum(best[truth > 0], 1e-12))
    return [
        _mean(right),
        f"{_number(curve.expected_calibration_error, spread)} ({curve.error_by_chance:.3f})",
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


def _foreign(
    names: Sequence[str], known: Mapping[int, Mapping[str, Prompts]], answers: Mapping[tuple[int, str], Answers]
) -> list[list[str]]:
    """Each text alone against the prompts of one domain; nothing where a single prompt of it is left."""
    rows = []
    for name in names:
        for method in dict.fromkeys(method for _, method in answers):
            cells = []
            for tokens, kinds in known.items():
                given = answers[tokens, method]
                own = given[FOREIGN].foreign[kinds[FOREIGN].sources == name]
                found = ood_auroc(given[PURE].foreign, own) if len(own) > 1 else None
                cells.append("" if found is None else _number(found.value, found.standard_error))
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
    if len(values) < 2:
        return f"{values.mean():.3f}"
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
            from real.quick import SETTINGS, quick_bundle, quick_domains

            count, seeds, bundle, settings = 4, 2, Path(scratch), SETTINGS
            parts = (quick_bundle(bundle), *quick_domains())
        else:
            parts, settings = real_parts(bundle, model, dtype, texts), None
        own, domains = parts[0], list(parts[1].values())
        reader = Reader(own, work or Path(gettempdir()) / "bayes-dispatch-evidence")
        train = evidence_of_build(own, bundle, domains, reader.work, settings)
        asked = methods(reader, {name: fit_classifier(FITS[name], train, 0) for name in CLASSIFIERS})
        known, answers = dict[int, dict[str, Prompts]](), dict[tuple[int, str], Answers]()
        foreign = [*parts[2]["foreign"], *FOREIGN_TEXTS]
        for tokens in tqdm(LENGTHS, "tokens", disable=None):
            known[tokens] = prompts(own, domains, foreign, tokens, count, seeds)
            for name, ask in asked.items():
                answers[tokens, name] = {kind: ask(each.texts) for kind, each in known[tokens].items()}
        for table in tables(list(own.experts), [each.name for each in foreign], known, answers):
            print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
