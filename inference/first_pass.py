"""The first pass: the unadapted model reads the prompts and yields evidence about which experts would serve them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from bayes_dispatch.evidence import Evidence
from bayes_dispatch.inference.likelihood import mean_log_likelihood
from bayes_dispatch.inference.prompts import check_prompts
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["TOKEN_CLASSES", "FirstPass", "first_pass", "token_counts"]

# Classes of bytes whose counts are evidence; a byte belongs to the first class that holds it, others to "other".
TOKEN_CLASSES: dict[str, bytes] = {
    "digit": b"0123456789",
    "a-p": b"abcdefghijklmnop",
    "q-z": b"qrstuvwxyz",
    "upper": b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "space": b" \t",
    "newline": b"\r\n",
    "arrow": b">",
    "plus": b"+",
    "equals": b"=",
    "quote": b"\"'`",
    "bracket": b"()[]{}",
    "stop": b".,:;",
}
_CLASS_OF = np.full(256, len(TOKEN_CLASSES))
for _index, _members in enumerate(TOKEN_CLASSES.values()):
    _CLASS_OF[list(_members)] = _index

RESIDUAL_FLOOR = 0.01  # of the mean squared hidden state: the residual of one byte is 0, which has no logarithm


@dataclass(frozen=True, eq=False)
class FirstPass:
    """What the first pass found.

    Attributes:
        prompts: the prompts' bytes.
        evidence: the views ``hidden`` (prompt, D), the mean of the last hidden states over the prompt's bytes;
            ``counts`` (prompt, C), how many of its bytes fall into each token class; and ``surprise`` (prompt, 2), the
            mean negative log-likelihood per byte in nats, and the log of the mean squared distance between the hidden
            states of the bytes and their mean.
    """

    prompts: tuple[bytes, ...]
    evidence: Evidence


@torch.no_grad()
def first_pass(
    model: Backbone,
    tokenizer: ByteTokenizer,
    prompts: Sequence[str | bytes],
    batch_size: int = 32,
    progress: bool = False,
) -> FirstPass:
    """Read prompts of any lengths with the unadapted model.

    Args:
        model, tokenizer: of a bundle. prompts: 1 to 4,096 bytes of UTF-8 each.
        batch_size: prompts that run at once; it does not change the result. progress: show a progress bar.

    Raises:
        PromptError: see ``check_prompts``.
    """
    checked = check_prompts(prompts)
    order = sorted(range(len(checked)), key=lambda i: len(checked[i]))  # similar lengths run together
    pooled: dict[int, Tensor] = {}
    surprise: dict[int, Tensor] = {}
    for start in tqdm(range(0, len(order), batch_size), "first pass", disable=not progress):
        batch = order[start : start + batch_size]
        ids, mask = tokenizer.pad([[tokenizer.bos_token_id, *checked[i]] for i in batch])
        output = model(ids, attention_mask=mask)
        hidden = output.hidden[:, 1:]  # (B, T, D) of the bytes
        real = mask[:, 1:, None].to(hidden)
        means = (hidden * real).sum(1) / real.sum(1)
        pooled.update(zip(batch, means, strict=True))
        nll = -mean_log_likelihood(output.logits, ids, mask)
        pairs = torch.stack([nll, _log_residual(hidden, means, real).double()], -1)
        surprise.update(zip(batch, pairs, strict=True))
    views = {
        "hidden": torch.stack([pooled[i] for i in range(len(checked))]).double().cpu().numpy(),
        "counts": np.stack([token_counts(data) for data in checked]),
        "surprise": torch.stack([surprise[i] for i in range(len(checked))]).cpu().numpy(),
    }
    lengths = np.array([len(data) for data in checked], dtype=float)
    return FirstPass(tuple(checked), Evidence(views, lengths))


def token_counts(data: bytes) -> np.ndarray:
    """(C,) how many bytes fall into each class of ``TOKEN_CLASSES``, then the others."""
    classes = _CLASS_OF[np.frombuffer(data, dtype=np.uint8)]
    return np.bincount(classes, minlength=len(TOKEN_CLASSES) + 1).astype(float)


def _log_residual(
    hidden: Float[Tensor, "B T D"], means: Float[Tensor, "B D"], real: Float[Tensor, "B T 1"]
) -> Float[Tensor, " B"]:
    """Log of the mean squared distance of a row's hidden states from their mean, no less than the floor's."""
    count = real.sum((1, 2))
    squared = ((hidden - means[:, None]) * real).square().sum((1, 2)) / count
    length = (hidden * real).square().sum((1, 2)) / count
    return torch.maximum(squared, RESIDUAL_FLOOR * length).log()
