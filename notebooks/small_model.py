"""A small Llama of the transformers library and three LoRA adapters for it, made here within a minute, as files.

They stand for a model and adapters of your own: ``base/`` is what ``save_pretrained`` writes, ``reverse/``, ``sort/``
and ``add/`` are directories of PEFT's format.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import CONVENTIONS, Domain, Interleaved
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.model.adaptation import Adaptation, Delta
from bayes_dispatch.model.frozen import frozen
from bayes_dispatch.model.transformers.backbone import TransformersBackbone

__all__ = ["DOMAINS", "make_files"]

DOMAINS = {domain.name: domain for domain in CONVENTIONS if domain.name in ("reverse", "sort", "add")}
MIX = Interleaved("mix", tuple(DOMAINS[name] for name in ("reverse", "reverse", "sort", "sort", "add")), "random")
LENGTH, RANK = 112, 8


def make_files(directory: Path, steps: int = 360, adapter_steps: int = 50) -> None:
    """Train the base model on lines whose convention changes from one to the next, and an adapter on each."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = _bytes()
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **special))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    backbone = TransformersBackbone(model, tokenizer, str(directory / "base"))
    for _ in range(steps):
        loss = _loss(backbone, MIX, 12, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    backbone = TransformersBackbone.load(directory / "base")
    for name, domain in DOMAINS.items():
        expert = _lora(backbone, domain, adapter_steps, rng)
        ExpertBank([expert]).export([1.0, 0.0], directory / name, backbone)


def _lora(backbone: TransformersBackbone, domain: Domain, steps: int, rng: np.random.Generator) -> LoraExpert:
    """An adapter of all matrices of the blocks; only its factors are trained."""
    downs, ups = {}, {}
    for matrix in backbone.adaptable():
        out, inner = backbone.linears()[matrix]
        downs[matrix] = (torch.randn(RANK, inner) / inner**0.5).requires_grad_()
        ups[matrix] = torch.zeros(out, RANK, requires_grad=True)
    optimizer = torch.optim.Adam([*downs.values(), *ups.values()], lr=1e-2)
    with frozen(backbone.model):
        for _ in range(steps):
            deltas = {matrix: Delta(ups[matrix], downs[matrix], torch.ones(RANK)) for matrix in ups}
            loss = _loss(backbone, domain, 8, rng, Adaptation({}, deltas))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return LoraExpert(domain.name, {m: (downs[m], ups[m]) for m in ups}, backbone.fingerprint())


def _loss(
    backbone: TransformersBackbone,
    domain: Domain,
    count: int,
    rng: np.random.Generator,
    adaptation: Adaptation | None = None,
) -> torch.Tensor:
    """Of documents; the bytes of questions, which are random letters and digits, count less than those of answers."""
    documents = [domain.document(rng, 0, LENGTH, "train").cut(LENGTH) for _ in range(count)]
    rows = [backbone.tokenizer.tokenize(document.text).ids for document in documents]
    length = min(map(len, rows))
    said = backbone.score(torch.tensor([row[:length] for row in rows]), adaptation=adaptation)[:, 1:]
    weights = torch.tensor([document.byte_weights(0.1)[: length - 1] for document in documents])
    return -(said * weights).sum() / weights.sum()


def _bytes() -> PreTrainedTokenizerFast:
    """A token for each byte, and one with which each text begins."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
