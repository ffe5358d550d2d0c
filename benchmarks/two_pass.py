"""What two-pass generation costs beside plain generation, beside two whole passes, and beside separate runs.

    python benchmarks/two_pass.py            # five minutes on one core
    python benchmarks/two_pass.py --quick    # a smoke test; the numbers mean nothing

All works of a table take turns in one run; its ratios are of CPU time of this process, on one thread. "From block b"
are the shipped experts without their scales below block b: what they are worth then is another matter, what they cost
is not. "Naive" is how Transformer² runs (arXiv 2501.06252): a whole first pass, every matrix built anew as
``U diag(s z) Vᵀ``, and a whole second pass. Each work of the last table has a process of its own.
"""

import copy
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import BASE_TEXTS, CONVENTIONS
from bayes_dispatch.experts.vectors import BASE, ExpertVector
from bayes_dispatch.inference.scoring.evaluation import MIXED_SETS
from bayes_dispatch.inference.two_pass.blends import Blend, FixedWeights
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.model.adaptation import block_of
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear
from peers.timing import Rounds, Times, Work, interleaved

__all__ = ["FULL", "QUICK", "Plan", "main"]

PLAIN = "plain base"
FITTED = 6  # prompts of each expert: what a dispatcher costs does not depend on how well it is fitted


@dataclass(frozen=True)
class Plan:
    """Sizes: lengths of the prompts in bytes, new tokens of each, particles, prompts of the throughput, and rounds."""

    lengths: Sequence[int] = (128, 512)
    tokens: int = 33
    particles: Sequence[int] = (1, 4, 16, 64)
    prompts: int = 256
    repeats: int = 7


FULL = Plan()
QUICK = Plan((16,), 3, (1, 4), 3, 1)


def cut(bundle: bd.Bundle, block: int) -> Any:
    """The bundle with experts that leave the blocks below one alone, and a dispatcher that reads what is below."""
    bank = bd.ExpertBank(
        [
            ExpertVector(
                name,
                {m: z for m, z in bundle.experts[name].scales.items() if block_of(m) >= block},
                bundle.experts.base,
            )
            for name in bundle.experts.names
        ]
    )
    model, rng, names = bundle.model, np.random.default_rng(0), bank.names
    labels = np.arange(len(names) * FITTED) % len(names)
    texts = [CONVENTIONS[label % len(CONVENTIONS)].document(rng, 0, 100, "train").text for label in labels]
    evidence = first_pass(model, bundle.tokenizer, texts, cut=block).evidence
    few = SVISettings(steps=20, rounds=1, conditional_steps=0)
    dispatcher = bd.Dispatcher(names, svi=few, program=bundle.dispatcher.program).fit(evidence, labels)
    return SimpleNamespace(model=model, tokenizer=bundle.tokenizer, experts=bank, dispatcher=dispatcher)


class Naive:
    """Two whole passes, and every adapted matrix built from its factors for each prompt."""

    def __init__(self, bundle: bd.Bundle) -> None:
        self._bundle, self._adapted = bundle, copy.deepcopy(bundle.model)
        self._linear = {n: m for n, m in bundle.model.named_modules() if isinstance(m, SVDLinear)}

    @torch.no_grad()
    def __call__(self, prompt: bytes, tokens: int) -> None:
        evidence = bd.first_pass(self._bundle.model, self._bundle.tokenizer, [prompt]).evidence
        mean = self._bundle.dispatcher.posterior(evidence, draws=64, seed=0).mean
        scales = self._bundle.experts.blend(torch.tensor(mean[0], dtype=torch.float32)).scales
        for name, module in self._adapted.named_modules():
            if name in scales:
                U, s, Vt, _ = self._linear[name].factors()
                module.weight.data.copy_(U @ torch.diag(s * scales[name]) @ Vt)
        plain(self._adapted, self._bundle.tokenizer, [prompt], tokens)


def plain(model: bd.MambaFormerForCausalLM, tokenizer: bd.ByteTokenizer, prompts: Sequence[bytes], tokens: int) -> None:
    """One pass with one model."""
    ids, mask = tokenizer.encode_batch(prompts)
    model.generate(ids, attention_mask=mask, max_new_tokens=tokens)


def document(domain: Any, length: int, seed: int) -> bytes:
    """A held-out prompt of exactly ``length`` bytes."""
    made: Document = domain.document(np.random.default_rng([seed, length]), 0, length, "held_out")
    return made.data[:length]


def two_pass(system: Any, blend: Blend, prompts: Sequence[bytes], tokens: int) -> Work:
    generator = bd.TwoPassGenerator(system)
    return Work(lambda _: generator.generate(prompts, blend=blend, max_new_tokens=tokens, seed=0))


def first_token(bundle: bd.Bundle, plan: Plan, rounds: Rounds) -> list[Table]:
    """From a prompt to its first new byte."""
    tables = []
    depth = 1 + max(map(block_of, bundle.model.adaptable()))
    for length in plan.lengths:
        prompt = document(CONVENTIONS[0], length, 1)
        naive = Naive(bundle)
        works = {
            PLAIN: Work(lambda _, p=prompt: plain(bundle.model, bundle.tokenizer, [p], 1)),
            "naive two passes": Work(lambda _, p=prompt, run=naive: run(p, 1)),
        }
        for block in range(depth):
            works[f"posterior mean, from block {block}"] = two_pass(cut(bundle, block), bd.PosteriorMean(), [prompt], 1)
        for block in (0, 1):
            works[f"predictive of 16, from block {block}"] = two_pass(
                cut(bundle, block), bd.PosteriorPredictive(16, merge=0.0), [prompt], 1
            )
        times = interleaved(works, f"first token, {length} bytes", rounds)
        tables.append(
            _ratios(f"Time to the first new byte, {length} bytes of prompt", times, PLAIN, "naive two passes")
        )
    return tables


def each_token(bundle: bd.Bundle, plan: Plan, rounds: Rounds) -> list[Table]:
    """Per generated byte, prompts read before; the predictive without merging beside separate runs of its particles."""
    prompt = document(CONVENTIONS[0], plan.lengths[0], 2)
    mean = "posterior mean"

    def work(blend: Blend, tokens: int) -> Work:
        return two_pass(bundle, blend, [prompt], tokens)

    def separate(count: int, tokens: int) -> Work:
        generator = bd.TwoPassGenerator(bundle)
        particles = bd.PosteriorPredictive(count).particles(
            generator.generate([prompt], blend=bd.PosteriorMean(), max_new_tokens=1, seed=0).posterior
        )
        blends = [FixedWeights(tuple(row)) for row in particles.weights[0].tolist()]

        def run(_: Any) -> None:
            for blend in blends:
                generator.generate([prompt], blend=blend, max_new_tokens=tokens, seed=0)

        return Work(run)

    makers: dict[str, Callable[[int], Work]] = {mean: lambda tokens: work(bd.PosteriorMean(), tokens)}
    for count in plan.particles:
        makers[f"predictive of {count}"] = lambda tokens, s=count: work(bd.PosteriorPredictive(s, merge=0.0), tokens)
    for count in [count for count in plan.particles if 1 < count <= 16]:
        makers[f"{count} separate runs"] = lambda tokens, s=count: separate(s, tokens)
    times = _per_token(makers, plan, rounds, "each token")
    tables = [_ratios("Time for each generated byte, no particles merged", times, mean)]
    mixed = next(iter(MIXED_SETS.values()))
    for title, domain, count in (
        ("one convention, 1 prompt", CONVENTIONS[1], 1),
        ("one convention, 4 prompts", CONVENTIONS[1], 4),
        ("two conventions in turn, 4 prompts", mixed, 4),
    ):
        prompts = [document(domain, plan.lengths[0], seed) for seed in range(count)]
        makers = {
            name: lambda tokens, b=blend, p=prompts: two_pass(bundle, b, p, tokens)
            for name, blend in {mean: bd.PosteriorMean(), "predictive of 16": bd.PosteriorPredictive(16)}.items()
        }
        times = _per_token(makers, plan, rounds, title)
        cost = (
            bd.TwoPassGenerator(bundle)
            .generate(prompts, blend=bd.PosteriorPredictive(16), max_new_tokens=plan.tokens, seed=0)
            .cost
        )
        table = _ratios(f"Time for each generated byte, particles merged: {title}", times, mean)
        tables.append(Table(table.title, table.columns, table.rows, f"{cost.rows:.1f} rows are left of 16."))
    return tables


def throughput(bundle: bd.Bundle, plan: Plan, rounds: Rounds) -> list[Table]:
    """Prompts of mixed lengths and kinds."""
    rng = np.random.default_rng(0)
    domains = [*CONVENTIONS, *MIXED_SETS.values(), *BASE_TEXTS]
    lengths = np.exp(rng.uniform(np.log(16), np.log(max(plan.lengths)), plan.prompts)).astype(int)
    prompts = [document(domains[i % len(domains)], int(n), i) for i, n in enumerate(lengths)]
    base = FixedWeights.vertex(bundle.experts.components, BASE)
    works = {PLAIN: Work(lambda _: plain(bundle.model, bundle.tokenizer, prompts, 16))}
    for name, blend in {
        "two passes, base alone": base,
        "posterior mean": bd.PosteriorMean(),
        "predictive of 16": bd.PosteriorPredictive(16),
    }.items():
        works[name] = two_pass(bundle, blend, prompts, 16)
    times = interleaved(works, "throughput", Rounds(min(3, rounds.repeats), 240.0, time.process_time))
    table = _ratios(f"{plan.prompts} prompts of 16–{max(plan.lengths)} bytes, 16 new bytes each", times, PLAIN)
    rows = [[*row, f"{plan.prompts / times.median(str(row[0])):.1f}"] for row in table.rows]
    return [Table(table.title, [*table.columns, "prompts a second"], rows, "Plain: one batch, padded to the longest.")]


def memory(bundle: bd.Bundle, plan: Plan, rounds: Rounds) -> list[Table]:
    """Most memory of a process, beyond what it had before it generated."""
    rows = []
    for name in ("plain", "posterior mean", "predictive of 16"):
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            rows.append([name, f"{pool.apply(_peak, (name, max(plan.lengths), plan.tokens)):.0f} MiB"])
    return [Table(f"Peak memory of one prompt of {max(plan.lengths)} bytes", ["what", "more than before"], rows)]


def _peak(name: str, length: int, tokens: int) -> float:
    torch.set_num_threads(1)
    bundle = bd.load_bundle()
    generator = bd.TwoPassGenerator(bundle)
    blend = bd.PosteriorPredictive(16, merge=0.0) if name.startswith("predictive") else bd.PosteriorMean()

    def run(size: int) -> None:
        prompt = document(CONVENTIONS[0], size, 3)
        if name == "plain":
            plain(bundle.model, bundle.tokenizer, [prompt], tokens)
        else:
            generator.generate([prompt], blend=blend, max_new_tokens=tokens, seed=0)

    run(length)  # compiles, loads and keeps factors
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on: proc(5), of Linux alone
    before = _status("VmRSS")
    run(length)
    return _status("VmHWM") - before


def _status(field: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _per_token(makers: dict[str, Callable[[int], Work]], plan: Plan, rounds: Rounds, title: str) -> Times:
    """Times of all tokens but the first, by difference."""
    works = {f"{name}|{tokens}": make(tokens) for name, make in makers.items() for tokens in (1, plan.tokens)}
    times = interleaved(works, title, rounds)
    return Times(
        {
            name: [
                max(many - one, 1e-9) / (plan.tokens - 1)
                for one, many in zip(times.seconds[f"{name}|1"], times.seconds[f"{name}|{plan.tokens}"], strict=True)
            ]
            for name in makers
        }
    )


def _ratios(title: str, times: Times, *references: str) -> Table:
    """Median milliseconds, and ratios to each reference."""
    rows = []
    for name in times.seconds:
        ratios = (times.ratio(name, reference) for reference in references)
        cells = [f"{ratio:.2f} ± {spread / max(ratio, 1e-9):.0%}" for ratio, spread in ratios]
        rows.append([name, f"{1e3 * times.median(name):.2f}", *cells])
    return Table(title, ["what", "ms", *(f"ratio to {reference}" for reference in references)], rows)


WORKS = {"first": first_token, "each": each_token, "throughput": throughput, "memory": memory}


def main(
    only: Annotated[str | None, typer.Option(help=f"one of {', '.join(WORKS)}; all by default")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke test")] = False,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    if only not in (None, *WORKS):
        raise typer.BadParameter(f"expected one of {', '.join(WORKS)}, got {only!r}")
    plan, bundle = QUICK if quick else FULL, bd.load_bundle()
    rounds = Rounds(plan.repeats, 120.0, time.process_time)
    for name in [only] if only else WORKS:
        for table in WORKS[name](bundle, plan, rounds):
            print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
