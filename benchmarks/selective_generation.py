"""How sure is an answer? Scores that tell good answers from bad ones, calibration, and abstention by the gate.

    python benchmarks/selective_generation.py            # the shipped bundle: four minutes on one core
    python benchmarks/selective_generation.py --bundle smollm2 --dtype bfloat16 --bytes 400 --json build/answers.jsonl
    python benchmarks/selective_generation.py --json build/answers.jsonl --only tables    # of what was asked so far
    python benchmarks/selective_generation.py --quick    # a smoke test; the numbers mean nothing

What a file of answers has is not asked again: a run that was stopped goes on, and one of more documents adds to it.
Each held-out document asks one question after its prompt, with all that stands before it as context. The answer is
written greedily up to its newline, and is right where the domain's own checker says so. For each family of domains
(conventions, translations, tasks), of whose experts there are any, three kinds of tables come out:

- **Rejection**: the prediction–rejection ratio of each score of the predictive's answers, by lm-polygraph's own code
  (``selective/polygraph.py``; left out where it is not installed). 1: the worst answers come last; 0: a random order.
  An answer is as good as it is right; a translation is as good as its chrF, since of several good translations the
  catalogue has one, and a small model rarely hits it. The last two rows are of −log p (surprise) or entropy, without
  and with mutual information added; which, how much of it, and whether summed or averaged, is chosen for each set by
  the ratios on the family's other sets. Their difference is what mutual information is worth.
- **Calibration**: the probability of the whole answer as the confidence that it is right. NLL is that of "right" under
  it, in nats. Base and the best expert stand there with their logits divided by a temperature, too: one of
  ``TEMPERATURES`` for all sets, of the least NLL on a random half of the questions; all are judged on the rest.
- **Abstention**: what is answered, and what of that is right, where the gate turns prompts down at stated false-alarm
  rates; of foreign prompts, what is answered.

Errors are standard errors, of means over answers or of a bootstrap over answers (pairs of scores stay together).
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import bayes_dispatch as bd
from bayes_dispatch.app.bundle import transformers_backbone
from bayes_dispatch.app.tables import Table
from bayes_dispatch.errors import ConfigError
from selective.asking import FOREIGN, PLAIN, PREDICTIVE, Asked, Kept, answered, domains_of, sets_of
from selective.polygraph import estimators
from selective.tables import abstention, answers_of, calibration, rejection

__all__ = ["main", "tables"]


def tables(asked: Iterable[Asked], resamples: int) -> list[Table]:
    """All tables of each family; ``resamples`` of the bootstrap."""
    scores: Sequence[Any] = ()
    try:
        scores = estimators()
    except ConfigError as error:
        print(error, file=sys.stderr)
    families: dict[str, dict[str, list[Asked]]] = {}
    for each in asked:
        families.setdefault(each.family, {}).setdefault(each.kind, []).append(each)
    foreign = families.pop(FOREIGN, {})
    found: list[Table] = []
    for family, kinds in families.items():
        numbers = {
            kind: {blend: answers_of(own, blend, scores) for blend in (*PLAIN, PREDICTIVE)}
            for kind, own in (kinds | foreign).items()
        }
        predictive = {kind: own[PREDICTIVE] for kind, own in numbers.items()}
        own = [calibration({kind: numbers[kind] for kind in kinds})]
        if all(np.isfinite(each["p_value"]).all() for each in predictive.values()):
            own.append(abstention(predictive))
        if scores:
            own = [*rejection({kind: predictive[kind] for kind in kinds}, resamples, 0), *own]
        found += [replace(each, title=f"{family.capitalize()}: {each.title}") for each in own]
    return found


def main(
    bundle: Annotated[Path | None, typer.Option(help="A bundle's directory; that of the package by default.")] = None,
    model: Annotated[str | None, typer.Option(help="Its base model, where that lies elsewhere by now.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights of a model of transformers.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="Of each kind and seed; each asks one question.")] = 128,
    total: Annotated[int, typer.Option("--bytes", min=64, help="Of a document that is not short.")] = 256,
    seeds: Annotated[int, typer.Option(min=1, help="Of documents and draws, from 0.")] = 3,
    resamples: Annotated[int, typer.Option(min=2, help="Of the bootstrap.")] = 100,
    texts: Annotated[Path | None, typer.Option(help="Where pip put packages of translations; Python's path.")] = None,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Lines of answers, kept and added to.")] = None,
    only: Annotated[str, typer.Option(help="tables of what --json has.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: two documents of one seed.")] = False,
) -> None:
    """Print Markdown tables."""
    if only not in ("", "tables"):
        raise typer.BadParameter(f"expected tables, got {only!r}")
    torch.set_num_threads(1)
    if quick:
        documents, seeds, resamples = 2, 1, 2
    kept = Kept(json)
    asked: Iterable[Asked] = kept.values()
    if only and len(banks := {each.bank for each in asked}) != 1:
        raise typer.BadParameter(f"expected answers of one bundle in --json, got those of {len(banks)}")
    if not only:
        base = None if model is None else transformers_backbone(model, device="cpu", dtype="float32", cast=dtype)
        system = bd.load_bundle(bundle, model=base, dtype=None if base else dtype)
        sets = sets_of(domains_of(system.experts.names, texts), total // 2, texts)
        asked = answered(system, sets, total // 2, texts, documents, range(seeds), kept)
    for each in tables(list(asked), resamples):
        print(f"{each.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
