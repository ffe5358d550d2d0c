"""Training of SVF experts by maximum likelihood: only the singular-value scales move, from z = 1."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from bayes_dispatch.experts.domains.domain import Domain
from bayes_dispatch.experts.provenance import provenance
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer import MambaFormerForCausalLM
from bayes_dispatch.model.pretraining import next_token_loss, pack_rows, schedule
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["ExpertSettings", "train_expert"]


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """The recipe. Longer or faster training sharpens an expert, but then its blends with others hedge worse.

    Attributes:
        steps: optimiser steps. batch_size: documents in a step. length: bytes of a document.
        learning_rate: of Adam, with a short warm-up and a cosine to 0.
        question_weight: loss weight of bytes that are not scored; above 0, so that every byte is evidence later.
        decay: L2 penalty on z − 1. seed: of the documents.
    """

    steps: int = 80
    batch_size: int = 8
    length: int = 256
    learning_rate: float = 2e-2
    question_weight: float = 0.5
    decay: float = 0.0
    seed: int = 0


def train_expert(
    model: MambaFormerForCausalLM, domain: Domain, settings: ExpertSettings, progress: bool = True
) -> ExpertVector:
    """An expert for the training split of ``domain``; the model's weights stay as they are."""
    device = next(model.parameters()).device
    scales = {name: torch.ones(rank, device=device, requires_grad=True) for name, rank in model.adaptable().items()}
    optimizer = torch.optim.Adam(scales.values(), lr=settings.learning_rate)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    try:
        for step in tqdm(range(settings.steps), f"expert {domain.name}", disable=not progress):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(step, settings.steps, warmup=10, flat=0.1)
            rows = []
            for row in range(settings.batch_size):
                rng = np.random.default_rng([settings.seed, step, row])
                document = domain.document(rng, 0, settings.length, "train").cut(settings.length)
                rows.append((document.data, document.byte_weights(settings.question_weight)))
            ids, weights = pack_rows(rows, ByteTokenizer())
            loss = next_token_loss(model(ids, adaptation=Adaptation(scales)).logits, ids, weights) / weights.sum()
            if settings.decay:
                loss = loss + settings.decay * sum((z - 1).square().sum() for z in scales.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
    return ExpertVector(
        name=domain.name,
        scales={name: z.detach() for name, z in scales.items()},
        base=model.fingerprint(),
        metadata={
            "domain": domain.name,
            "steps": str(settings.steps),
            "objective": "likelihood",
            **provenance(),
        },
    )
