"""What running particles as one row saves, and what it costs: ``PosteriorPredictive(16)`` by tolerance of ``merge``.

    python benchmarks/merging.py            # some minutes for each seed, on one core
    python benchmarks/merging.py --quick    # a smoke test; the numbers mean nothing

Held-out documents have 128 bytes of prompt. The true continuation of each is read byte by byte, as if it were being
generated, by particles that were merged once the prompt was read: its NLL less that under unmerged particles tells what
is lost where a text goes on as it pleases. A model that goes on by itself seldom changes the convention: the same
prompts are continued greedily, too, and the texts are compared. Errors are standard errors over documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.inference.scoring.evaluation import held_out_documents
from bayes_dispatch.inference.scoring.held_out import KINDS
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.first_pass import read_prefix
from bayes_dispatch.inference.two_pass.particles import Decoding
from bayes_dispatch.inference.two_pass.readers import CachedReader, straight
from bayes_dispatch.inference.two_pass.system import Dispatched, cut_of
from bayes_dispatch.model.generation.sampling import Sampling

__all__ = ["Continued", "main", "read_on", "table"]

TOLERANCES = (0.0, 0.0003, 0.001, 0.003, 0.01)  # nats a byte; the first merges nothing
GENERATED = 32  # bytes


@dataclass(frozen=True, eq=False)
class Continued:
    """N documents under one tolerance.

    Attributes:
        rows: (N,) that are left. nll: (N,) of the bytes after the prompt, in nats a byte. texts: what is generated.
    """

    rows: np.ndarray
    nll: np.ndarray
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Told(Sampling):
    """Chooses the ``ids`` (N,) that it was given."""

    ids: Tensor

    def choose(self, logits: Tensor, generators: Sequence[np.random.Generator]) -> Tensor:
        return self.ids


@torch.no_grad()
def read_on(
    bundle: bd.Bundle, documents: Sequence[bd.Document], particles: Particles, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows left (N,), and NLL of the bytes after the prompt (N,), of as many as all documents have."""
    cut, prompts = cut_of(bundle), [document.data[: document.prompt_bytes] for document in documents]
    following = [document.data[document.prompt_bytes :] for document in documents]
    after = torch.tensor([list(data[: min(map(len, following))]) for data in following])
    capacity, tokenizer = 1 + max(map(len, prompts)) + after.shape[1], bundle.tokenizer
    texts = [tokenizer.tokenize(prompt).ids for prompt in prompts]
    prefix = read_prefix(bundle.model, cut, texts, tokenizer.pad_token_id, capacity)
    rows = list(range(len(prompts)))
    reader = CachedReader(bundle.model, bundle.experts, particles, prefix, rows, capacity)
    decoding = Decoding(reader, particles, tokenizer.continues, prefix.ids, prefix.tokens)
    kl = straight(decoding.read_prompts(measured=tolerance > 0))
    left = [particles.mass.shape[1]] * len(prompts)
    if kl is not None:
        left = [len(kept) for kept in decoding.merge(kl, tolerance)]
    nll, generator = np.zeros(len(prompts)), np.random.default_rng(0)  # nothing is drawn
    for t, ids in enumerate(after.unbind(1)):
        token = decoding.choose([Told(ids=ids)] * len(left), [generator] * len(left))
        nll -= token.log_probabilities / after.shape[1]
        decoding.append(token.ids, last=t + 1 == after.shape[1])
    return np.array(left), nll


def judge(bundle: bd.Bundle, documents: Sequence[bd.Document], seed: int) -> list[Continued]:
    """The documents under every tolerance."""
    prompts = [document.prompt for document in documents]
    posterior = Dispatched().posterior(bundle, prompts, seed)
    generator, found = bd.TwoPassGenerator(bundle), []
    for tolerance in TOLERANCES:
        blend = bd.PosteriorPredictive(16, merge=tolerance)
        rows, nll = read_on(bundle, documents, blend.particles(posterior), tolerance)
        generated = generator.generate(prompts, blend=blend, max_new_tokens=GENERATED, seed=seed)
        found.append(Continued(rows, nll, generated.texts))
    return found


def table(found: dict[str, list[list[Continued]]]) -> Table:
    """One row for each kind of documents and tolerance.

    Args:
        found: by kind, for each set and seed, what ``judge`` gives.
    """
    rows = []
    for kind, sets in found.items():
        unmerged = np.concatenate([each[0].nll for each in sets])
        texts = [text for each in sets for text in each[0].texts]
        for i, tolerance in enumerate(TOLERANCES):
            left = np.concatenate([each[i].rows for each in sets])
            lost = np.concatenate([each[i].nll for each in sets]) - unmerged
            error = lost.std(ddof=1) / np.sqrt(len(lost))
            same = np.mean([a == b for a, b in zip((t for each in sets for t in each[i].texts), texts, strict=True)])
            cells = [f"{left.mean():.1f}", f"{lost.mean():+.4f} ± {error:.4f}", f"{same:.3f}"]
            rows.append([kind if i == 0 else "", f"{tolerance:g}", *cells])
    heads = ["documents", "tolerance", "rows of 16", "NLL less that of all rows", f"same {GENERATED} greedy bytes"]
    return Table("Particles that run as one row", heads, rows)


def main(
    documents: Annotated[int, typer.Option(min=2, help="of each set and seed")] = 16,
    first_seed: Annotated[int, typer.Option(min=0, help="of documents and draws")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="how many, from the first")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke test: a set of each kind, two documents")] = False,
) -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    if quick:
        documents, seeds = 2, 1
    bundle, found = bd.load_bundle(), {}
    for kind, domains in KINDS.items():
        found[kind] = [
            judge(bundle, held_out_documents(domain, documents, seed), seed)
            for domain in (domains[:1] if quick else domains)
            for seed in range(first_seed, first_seed + seeds)
        ]
    print(table(found).to_markdown())


if __name__ == "__main__":
    typer.run(main)
