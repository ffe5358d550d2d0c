"""The gate of the shipped bundle: how often it sends prompts to base that it should not, and those that it should.

    python benchmarks/gate.py              # five minutes on one core
    python benchmarks/gate.py --quick

A gate is calibrated *anew* for each seed on held-out prompts, and judged on others of 32, 64 and 128 bytes: of one
domain, of several, of base's own text (which may go to base), and foreign ones, of which *products* look like sums
(``37+58=2146``) and are not in the mean.

*Shipped* is the gate that comes with the package, which was calibrated on longer prompts too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from tqdm import tqdm

from bayes_dispatch.app.bundle import Bundle, load_bundle
from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.detection import ood_auroc
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.experts.domains import BASE_TEXTS, EXPERT_DOMAINS, Domain
from bayes_dispatch.inference.scoring.evidence_sets import calibration_evidence, mixed_evidence, pure_evidence
from dispatching.foreign import DISGUISED, FOREIGN_KINDS

__all__ = ["main"]

LENGTHS = (32, 64, 128)
SPREAD = (16, 256)  # bytes of the prompts of calibration
INSIDE = ("one domain", "several domains")
BASE = "text of base"
RATE = 0.05


@dataclass(frozen=True)
class Sizes:
    """How many prompts.

    Attributes:
        pure, mixed: for calibration, of each domain and of several. judged: of each kind inside, at each length.
        foreign: of each foreign kind, at each length.
    """

    pure: int = 200
    mixed: int = 1600
    judged: int = 400
    foreign: int = 100


FULL, QUICK = Sizes(), Sizes(pure=20, mixed=160, judged=16, foreign=4)


class Judged(NamedTuple):
    """One gate at one length: by kind of prompts the share sent to base, and AUROC against both kinds inside."""

    sent: dict[str, float]
    auroc: dict[str, float]


def held_out(bundle: Bundle, length: int, sizes: Sizes, seed: int) -> dict[str, Evidence]:
    """Fresh prompts of a length, by kind."""
    both, split = (length, length), "held_out"

    def of(domains: Sequence[Domain], count: int) -> Evidence:
        return pure_evidence(bundle.model, domains, count // len(domains), both, split, seed).evidence

    several = mixed_evidence(bundle.model, EXPERT_DOMAINS, sizes.judged, both, split, seed).evidence
    kinds = {INSIDE[0]: of(EXPERT_DOMAINS, sizes.judged), INSIDE[1]: several, BASE: of(BASE_TEXTS, sizes.foreign)}
    return kinds | {domain.name: of([domain], sizes.foreign) for domain in (*FOREIGN_KINDS, DISGUISED)}


def judge(gate: Gate, dispatcher: Dispatcher, kinds: Mapping[str, Evidence]) -> Judged:
    """A gate on prompts of one length."""
    scores = {name: gate.foreignness(dispatcher, evidence) for name, evidence in kinds.items()}
    inside = np.concatenate([scores[name] for name in INSIDE])
    sent = {name: float(gate.decide(dispatcher, evidence, RATE).foreign.mean()) for name, evidence in kinds.items()}
    auroc = {name: ood_auroc(inside, values).value for name, values in scores.items() if name not in INSIDE}
    foreign = [domain.name for domain in FOREIGN_KINDS]
    for of_kind in (sent, auroc):
        of_kind["foreign, mean"] = float(np.mean([of_kind[name] for name in foreign]))
    return Judged(sent, auroc)


def compare(bundle: Bundle, sizes: Sizes, seed: int) -> dict[tuple[str, int], Judged]:
    """All gates at all lengths, of one seed."""
    known = calibration_evidence(bundle.model, EXPERT_DOMAINS, sizes.pure, sizes.mixed, SPREAD, 100 + seed)
    gates = {"anew": Gate.calibrate(bundle.dispatcher, known.evidence, known.groups, seed=seed)}
    if bundle.gate is not None:
        gates = {"shipped": bundle.gate} | gates
    found = {}
    for length in LENGTHS:
        kinds = held_out(bundle, length, sizes, 200 + seed)
        found |= {(name, length): judge(gate, bundle.dispatcher, kinds) for name, gate in gates.items()}
    return found


def table(title: str, values: Sequence[Mapping[tuple[str, int], Mapping[str, float]]], note: str) -> Table:
    """Mean ± standard error over seeds, a row for each kind and length."""
    first = values[0]
    names = list(dict.fromkeys(name for name, _ in first))
    rows = []
    for kind in first[names[0], LENGTHS[0]]:
        for length in LENGTHS:
            cells = [_number([found[name, length][kind] for found in values]) for name in names]
            rows.append([kind, str(length), *cells])
    return Table(title, ["prompts", "bytes", *names], rows, note)


def _number(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def main(
    seeds: Annotated[int, typer.Option(help="seeds, from 0")] = 3,
    quick: Annotated[bool, typer.Option(help="a smoke test: one seed, few prompts")] = False,
) -> None:
    """Calibrate, judge and print Markdown tables."""
    torch.set_num_threads(1)
    bundle, sizes = load_bundle(), QUICK if quick else FULL
    found = [compare(bundle, sizes, seed) for seed in tqdm(range(1 if quick else seeds), "seeds", disable=None)]
    sent = [{key: each.sent for key, each in one.items()} for one in found]
    auroc = [{key: each.auroc for key, each in one.items()} for one in found]
    note = (
        f"Of {sizes.judged} prompts inside of each kind and length, and {sizes.foreign} of each other kind, each seed."
    )
    for shown in (
        table(f"Share of prompts sent to base at a false-alarm rate of {RATE:g}", sent, note),
        table("AUROC against prompts of one and of several domains", auroc, note),
    ):
        print(f"{shown.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
