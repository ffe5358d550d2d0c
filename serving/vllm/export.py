"""A bank of LoRA experts as adapters of PEFT's format, which vLLM loads."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.peft import write_peft
from bayes_dispatch.inference.two_pass.system import System
from bayes_dispatch.model.adaptation import Delta
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.serving.vllm.format import BANK, FORMAT, INDEX, RANKS, Index, Probe, told, tolerance
from bayes_dispatch.storage import save_directory, write_json

__all__ = ["check_lora", "export_bank", "probes_of", "whole_bank"]

TEXT = "It was the best of times. 12 + 7 = 19; def f(x): return x\nÜber den Dächern: où est la gare?"
TOKENS = 48  # of it, at most: a server reads them for each probe
DRAWN = 3  # probes of several experts, beside one of each and of base


def export_bank(system: System, directory: str | Path) -> Index:
    """Write a bank for vLLM, in the place of an earlier one.

    ``bank/`` is one adapter of all experts, side by side (PEFT's ``cat``, all weights 1); ``experts/NAME/`` is each on
    its own. ``vllm.json`` tells which columns are whose, and what blends must say of some tokens.

    Raises:
        ConfigError: experts that vLLM cannot be given (see ``check_lora``), or too much alike to be told apart.
        ForeignExpertError: of another model.
        BundleError: the directory is a link, or holds anything else.
    """
    bank, model = system.experts, system.model
    check_lora(bank, model)
    bank.check_base(model)
    ranks, deltas = whole_bank(bank)
    tokens, probes = probes_of(system)
    try:
        tolerance(probes)  # with which a server will be tested
    except ValueError as error:
        raise ConfigError(str(error)) from None
    name, embeddings = str(getattr(model, "name", "")), getattr(model, "embeddings", ())
    with save_directory(Path(directory), INDEX) as target:
        write_peft(target / BANK, deltas, name, embeddings)
        for expert in bank.values():
            write_peft(target / "experts" / expert.name, expert.adaptation().deltas, name, embeddings)
        document = {"format": FORMAT, "ranks": dict(ranks), "tokens": tokens, "probes": [p._asdict() for p in probes]}
        write_json(target / INDEX, document)
    try:
        return Index.read(Path(directory))
    except ValueError as error:
        raise BundleError(str(error)) from None


def check_lora(bank: ExpertBank, model: Backbone) -> None:
    """Refuse experts that vLLM cannot be given.

    Raises:
        ConfigError: singular-value scales, updates of embeddings or of the head, or ranks of too large a sum.
    """
    inside = model.adaptable()
    for expert in bank.values():
        if not isinstance(expert, LoraExpert):
            raise ConfigError(f"expected LoRA experts for vLLM, got singular-value scales of {expert.name}")
        if other := [matrix for matrix in expert.matrices if matrix not in inside]:
            raise ConfigError(
                f"expected experts of layers within the model's blocks for vLLM, got {other[0]} of {expert.name}"
            )
    total = sum(max(expert.matrices.values()) for expert in bank.values())
    if total > RANKS[-1]:
        raise ConfigError(f"expected experts whose ranks sum to at most {RANKS[-1]} for vLLM, got {total}")


def whole_bank(bank: ExpertBank) -> tuple[Mapping[str, int], Mapping[str, Delta]]:
    """All experts side by side: how many columns are each one's, and the update of each matrix.

    An expert has the same columns in all matrices, zeros where its rank is lower: vLLM then weights all matrices alike.
    """
    experts = [expert for expert in bank.values() if isinstance(expert, LoraExpert)]
    ranks = {expert.name: max(expert.matrices.values()) for expert in experts}
    deltas = {}
    for matrix in bank.adapts:
        own = {expert.name: expert.factors[matrix] for expert in experts if matrix in expert.factors}
        like_down, like_up = next(iter(own.values()))
        blank = like_down.new_zeros(0, like_down.shape[1]), like_up.new_zeros(like_up.shape[0], 0)
        padded = [_padded(*own.get(name, blank), rank) for name, rank in ranks.items()]
        down, up = torch.cat([down for down, _ in padded]), torch.cat([up for _, up in padded], 1)
        deltas[matrix] = Delta(up, down, up.new_ones(len(down)))
    return ranks, deltas


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - len(down)
    return torch.cat([down, down.new_zeros(more, down.shape[1])]), torch.cat([up, up.new_zeros(len(up), more)], 1)


def probes_of(system: System) -> tuple[tuple[int, ...], tuple[Probe, ...]]:
    """Some tokens, and what the blends must say after them: each component alone, and some at once."""
    bank, model = system.experts, system.model
    tokens = system.tokenizer.tokenize(TEXT).ids[:TOKENS]
    asked = list(dict.fromkeys(tokens))
    count = len(bank.components)
    drawn = np.random.default_rng(0).dirichlet(np.ones(count), DRAWN)
    probes = []
    for row in np.concatenate([np.eye(count), drawn]):
        adaptation = bank.blend(torch.tensor(row).to(model.weights_dtype))
        with torch.no_grad():
            after = model.open(1, len(tokens), adaptation).read(torch.tensor([tokens])).after
        assert after is not None
        probes.append(Probe(told(row, bank.components), tuple(after[0, -1, asked].tolist())))
    return tokens, tuple(probes)
