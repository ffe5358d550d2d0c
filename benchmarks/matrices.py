"""Which matrices an expert scales: those of the blocks, the embedding with its tied head too, or that alone.

    python benchmarks/matrices.py                                    # every domain, two seeds: an hour on one core
    python benchmarks/matrices.py --domain reverse --domain json     # a quarter of it
    python benchmarks/matrices.py --cost                             # what decoding costs alone: a minute
    python benchmarks/matrices.py --quick                            # a smoke test; the numbers mean nothing

The shipped base model, the bundle's own recipe, the same documents in the same order; judged by held-out documents of
128 prompt bytes and as many after them. NLL in nats per byte that counts. Harm: NLL added on the other domains.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.paired import paired_comparison
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import CONVENTIONS, EXPERT_TEXTS, Domain
from bayes_dispatch.experts.training import ExpertSettings, train_expert
from bayes_dispatch.inference.scoring.compare import score_together
from bayes_dispatch.inference.scoring.evaluation import held_out_documents
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from peers.timing import Rounds, Times, Work, interleaved

__all__ = ["CHOICES", "Budget", "Outcome", "main", "run", "serving", "tables"]

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in (*CONVENTIONS, *EXPERT_TEXTS)}
BLOCKS = ("in_proj", "out_proj", "qkv")
CHOICES: dict[str, tuple[str, ...] | None] = {
    "blocks": None,  # the default, with which the others are compared
    "blocks, embedding": (*BLOCKS, "embedding"),
    "embedding": ("embedding",),
}


@dataclass(frozen=True)
class Budget:
    """Steps of training, and documents that judge: of the expert's own domain, and of each other."""

    steps: int
    own: int
    others: int


FULL, QUICK = Budget(80, 32, 8), Budget(1, 2, 2)


@dataclass(frozen=True, eq=False)
class Outcome:
    """One expert beside the base model.

    Attributes:
        base, nll: (documents,) NLL of both on the own domain. exact: exact match. harm: NLL that it adds on the others.
        scales: how many it has. seconds: of training.
    """

    base: np.ndarray
    nll: np.ndarray
    exact: float
    harm: float
    scales: int
    seconds: float


def run(
    model: MambaFormerForCausalLM, domain: Domain, matrices: tuple[str, ...] | None, seed: int, budget: Budget
) -> Outcome:
    """Train an expert and judge it."""
    begun = time.process_time()
    settings = ExpertSettings(steps=budget.steps, seed=seed, matrices=matrices)
    expert = train_expert(model, domain, settings, progress=False)
    seconds = time.process_time() - begun
    bank = ExpertBank([expert])
    base, nll, exact = _judge(model, bank, domain, budget.own, seed)
    others = [_judge(model, bank, other, budget.others, seed) for other in DOMAINS.values() if other is not domain]
    harm = float(np.mean([after.mean() - before.mean() for before, after, _ in others]))
    return Outcome(base, nll, exact, harm, sum(bank.matrices.values()), seconds)


def _judge(
    model: MambaFormerForCausalLM, bank: ExpertBank, domain: Domain, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """NLL of each document under base and under the expert, and the expert's exact match."""
    documents = held_out_documents(domain, count, seed + 1)
    alone = {
        name: Particles(np.tile(weights, (count, 1, 1)), np.ones((count, 1)))
        for name, weights in zip(("expert", "base"), np.eye(2), strict=True)
    }
    scores = score_together(model, bank, documents, alone)
    base, nll = (np.array([score.nll for score in scores[name]]) for name in ("base", "expert"))
    return base, nll, float(np.mean([score.exact_match for score in scores["expert"]]))


def tables(found: Mapping[str, Mapping[str, Sequence[Outcome]]]) -> list[Table]:
    """For each domain and choice its outcomes, one for each seed."""
    rows, costs = [], []
    seeds = len(next(iter(next(iter(found.values())).values())))
    for domain, outcomes in found.items():
        reference = _joined(outcomes["blocks"])
        experts = np.repeat(np.arange(seeds), [len(outcome.nll) for outcome in outcomes["blocks"]])
        for choice, each in outcomes.items():
            nll = _joined(each)
            against = paired_comparison(nll, reference, experts if seeds > 1 else None)
            difference = "" if choice == "blocks" else f"{against.difference:+.3f} ± {against.standard_error:.3f}"
            base = np.concatenate([outcome.base for outcome in each])
            exact, harm = (np.mean([getattr(outcome, name) for outcome in each]) for name in ("exact", "harm"))
            numbers = [f"{value:.3f}" for value in (base.mean(), nll.mean())]
            matched = f"{exact:.3f}" if DOMAINS[domain] in CONVENTIONS else ""  # texts have no answers
            rows.append([domain, choice, *numbers, difference, matched, f"{harm:.3f}"])
            seconds = float(np.mean([outcome.seconds for outcome in each]))
            costs.append([domain, choice, f"{each[0].scales:,}", f"{seconds:.0f}"])
    heads = ["domain", "scales of", "base NLL", "NLL", "less that of blocks", "exact match", "harm to other domains"]
    note = f"{seeds} seed(s); ± over {'the experts of each seed' if seeds > 1 else 'documents'}, paired."
    return [
        Table("Held-out documents of the expert's own domain", heads, rows, note),
        Table("Cost", ["domain", "scales of", "scales", "CPU seconds of training"], costs),
    ]


def serving(model: MambaFormerForCausalLM, quick: bool) -> Table:
    """CPU time of reading 128 bytes, and of decoding 64 more, each row with random scales of its own."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (16, 128), generator=draw)
    ranks = ExpertSettings(matrices=CHOICES["blocks, embedding"]).adapted(
        model.adaptable(), model.adaptable_on_request()
    )
    scales = {name: 1 + 0.05 * torch.randn(16, rank, generator=draw) for name, rank in ranks.items()}
    adapted = {
        "base": Adaptation.identity(),
        "blocks": Adaptation({name: z for name, z in scales.items() if name != "embedding"}),
        "blocks, embedding": Adaptation(scales),
        "embedding": Adaptation({"embedding": scales["embedding"]}),
    }
    most, rows = 9 if quick else 65, []
    for rows_at_once in (1, 16):
        works = {
            f"{name}|{tokens}": Work(
                partial(model.generate, max_new_tokens=tokens, adaptation=each.select(range(rows_at_once))),
                partial(ids.narrow, 0, 0, rows_at_once),
            )
            for name, each in adapted.items()
            for tokens in (1, most)
        }
        both = interleaved(works, "serving", Rounds(3 if quick else 15, clock=time.process_time)).seconds
        reading = Times({name: both[f"{name}|1"] for name in adapted})
        decoding = Times(
            {name: np.subtract(both[f"{name}|{most}"], reading.seconds[name]).tolist() for name in adapted}
        )
        for title, times in (("reading", reading), ("decoding", decoding)):
            ratios = [
                f"{times.ratio(name, 'blocks')[0]:.2f} ± {times.ratio(name, 'blocks')[1]:.2f}" for name in adapted
            ]
            rows.append([f"{title}, {rows_at_once} row(s)", f"{1e3 * times.median('blocks'):.1f}", *ratios])
    return Table(
        "CPU time, times that of blocks", ["", "blocks, ms", *adapted], rows, "Medians ± half quartile ranges."
    )


def _joined(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.concatenate([outcome.nll for outcome in outcomes])


def main(
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds")] = 2,
    domain: Annotated[list[str] | None, typer.Option(help="only this domain; may be repeated")] = None,
    cost: Annotated[bool, typer.Option("--cost", help="train nothing; time the model")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke test: one step, two documents")] = False,
) -> None:
    """Train, judge and print Markdown tables, after each domain those of all so far."""
    torch.set_num_threads(1)
    if unknown := [name for name in domain or () if name not in DOMAINS]:
        raise typer.BadParameter(f"expected domains of {', '.join(DOMAINS)}, got {unknown[0]!r}")
    model, budget = load_bundle().model, QUICK if quick else FULL
    if cost:
        print(serving(model, quick).to_markdown())
        return
    found: dict[str, dict[str, list[Outcome]]] = {}
    for name in domain or DOMAINS:
        found[name] = {choice: [] for choice in CHOICES}
        for seed in tqdm(range(seeds), name, disable=None):
            for choice, matrices in CHOICES.items():
                found[name][choice].append(run(model, DOMAINS[name], matrices, seed, budget))
        for table in tables(found):
            print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
