"""Ways to count the evidence of a prompt, whose tokens make its features and filter the particles, too.

    python benchmarks/evidence_once.py --documents 8     # the shipped bundle, ten minutes on one core
    python benchmarks/evidence_once.py --bundle runs/smollm2 --model models/smollm2 --texts packages --bytes 1024
    python benchmarks/evidence_once.py --quick           # a smoke test; the numbers mean nothing

- *state and target*: the default of ``PosteriorPredictive``. Tokens tell where a document is, features where it goes.
- *twice*: features tell the first masses, and the same tokens filter them.
- *prefix*: features tell the masses at the end of the prompt; only later tokens filter.
- *importance*: features place the particles; their masses, now and after a switch, are those of the prior.
- *flat*: no features; vertices and draws from a flat Dirichlet, which all tokens filter.

The prompt is half of a document, an eighth of that of a short one, and three quarters of one that changes within it.
The Brier score is that of the mean weights at the end of the prompt, against the shares of its tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.app.bundle import transformers_backbone
from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.paired import paired_comparison
from bayes_dispatch.checks.reliability import confidence_curve
from bayes_dispatch.inference.scoring.compare import score_together
from bayes_dispatch.inference.scoring.document_reader import TokenDocument, read_documents
from bayes_dispatch.inference.scoring.evidence_sets import token_shares
from bayes_dispatch.inference.scoring.scores import Score
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.filtering import ParticleFilter
from bayes_dispatch.inference.two_pass.system import dispatch
from selective_generation import SHORT, sets_of

__all__ = ["main", "ways"]

REFERENCE = "twice"


def ways(posterior: bd.DispatchPosterior, seed: int) -> dict[str, Particles]:
    """Particles of sixteen rows for each way; those of ``prefix`` are not to be filtered before its end."""
    ours = bd.PosteriorPredictive(16).particles(posterior)
    prompts, _, components = ours.weights.shape
    anywhere = np.random.default_rng(seed).dirichlet(np.ones(components), (64, prompts))
    flat = bd.PosteriorPredictive(16).particles(bd.DispatchPosterior(anywhere, posterior.experts))
    twice = replace(ours, mass=ours.target, target=None)
    found = {"state and target": ours, REFERENCE: twice, "prefix": twice}
    return found | {"importance": replace(ours, target=None), "flat": flat}


def prompt_weights(
    bundle: bd.Bundle, documents: Sequence[bd.Document], particles: Mapping[str, Particles]
) -> dict[str, np.ndarray]:
    """Way → (N, K + 1) mean weights at the end of each prompt."""
    texts = [TokenDocument.of(bd.Document(each.prompt, 1), bundle.tokenizer) for each in documents]
    rows = np.concatenate([particles[way].weights for way in (REFERENCE, "flat")], axis=1)
    count, found = particles[REFERENCE].weights.shape[1], dict[str, list[np.ndarray]]()
    for n, read in enumerate(read_documents(bundle.model, bundle.experts, texts, list(rows))):
        for way, each in particles.items():
            own, weights = read.own[count:] if way == "flat" else read.own[:count], each.select(slice(n, n + 1))
            masses = ParticleFilter(weights)
            masses.update(own[None, :, : 0 if way == "prefix" else None])
            found.setdefault(way, []).append(masses.mean()[0])
    return {way: np.stack(means) for way, means in found.items()}


def judge(
    bundle: bd.Bundle, domains: Sequence[Any], prompt: int, total: int, count: int, seed: int
) -> dict[str, tuple[list[Score], np.ndarray]]:
    """Way → the scores of ``count`` documents of each domain, and the Brier scores of their weights."""
    rng, documents, shares = np.random.default_rng([seed, 3]), [], []
    components = bundle.experts.components
    for domain in domains:
        for _ in range(count):
            places = [components.index(part.name) for part in getattr(domain, "kinds", [domain])]
            if isinstance(domain, bd.experts.domains.Interleaved):
                document, owners = domain.with_owners(rng, prompt, total, "held_out")
            else:
                document = domain.document(rng, prompt, total, "held_out")
                owners = np.zeros(document.prompt_bytes, dtype=int)
            documents.append(document)
            text = bundle.model.tokenizer.tokenize(document.prompt.encode())
            shares.append(token_shares(text, np.array(places)[owners], len(components)))
    posterior, _ = dispatch(bundle, [each.prompt for each in documents], seed)
    particles = ways(posterior, seed)
    late = {"prefix": [each.prompt_bytes for each in documents]}
    scores = score_together(bundle.model, bundle.experts, documents, particles, filtered_from=late)
    means = prompt_weights(bundle, documents, particles)
    return {way: (scores[way], np.square(means[way] - np.stack(shares)).sum(1)) for way in particles}


def table(kind: str, found: Mapping[str, tuple[list[Score], np.ndarray]]) -> Table:
    """A row for each way."""
    rows, nll = [], {way: np.array([score.nll for score in scores]) for way, (scores, _) in found.items()}
    for way, (scores, brier) in found.items():
        lost = paired_comparison(nll[way], nll[REFERENCE])
        confidence, right, known = (
            np.concatenate([getattr(score.scored, name) for score in scores])
            for name in ("confidence", "right", "mutual_information")
        )
        rows.append(
            [
                way,
                f"{nll[way].mean():.3f}",
                "" if way == REFERENCE else f"{lost.difference:+.3f} ± {lost.standard_error:.3f}",
                f"{confidence_curve(confidence, right).expected_calibration_error:.3f}",
                f"{roc_auc_score(~right, known):.3f}" if 0 < right.mean() < 1 else "",
                f"{brier.mean():.3f} ± {brier.std() / len(brier) ** 0.5:.3f}",
            ]
        )
    heads = ["", "NLL", f"minus {REFERENCE}", "ECE", "AUROC of mutual information", "Brier score of weights"]
    return Table(f"{kind}, {len(nll[REFERENCE])} documents", heads, rows, "Nats per byte, paired, ± standard errors.")


def main(
    bundle: Annotated[Path | None, typer.Option(help="A bundle's directory; that of the package by default.")] = None,
    model: Annotated[Path | None, typer.Option(help="Its base model, where that lies elsewhere by now.")] = None,
    documents: Annotated[int, typer.Option(min=2, help="Of each domain and seed.")] = 12,
    total: Annotated[int, typer.Option("--bytes", min=64, help="Of a document.")] = 256,
    seeds: Annotated[int, typer.Option(min=1, help="Of documents and draws, from 0.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of a base model of the transformers library.")] = "bfloat16",
    texts: Annotated[Path | None, typer.Option(help="Where pip put packages of translations; Python's path.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: two documents of one seed.")] = False,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    if quick:
        documents, seeds = 2, 1
    base = None if model is None else transformers_backbone(str(model), device="cpu", dtype=dtype)
    system = bd.load_bundle(bundle, model=base)
    long = {
        kind: domains for kind, (domains, _) in sets_of(system.experts.names, total, texts).items() if kind != "short"
    }
    sets = {kind: (domains, total // 2, total) for kind, domains in long.items()}
    short = total // 2 // SHORT
    sets |= {f"{kind}, short prompts": (domains, short, short + total // 2) for kind, domains in long.items()}
    sets["switching within the prompt"] = long["switching"], total * 3 // 4, total
    for kind, (domains, prompt, size) in tqdm(sets.items(), "sets", disable=None):
        parts = [judge(system, domains, prompt, size, documents, seed) for seed in range(seeds)]
        joined = {
            way: ([score for part in parts for score in part[way][0]], np.concatenate([part[way][1] for part in parts]))
            for way in parts[0]
        }
        print(f"{table(kind, joined).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
