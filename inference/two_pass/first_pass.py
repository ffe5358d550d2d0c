"""The first pass: the unadapted model reads the prompts and yields evidence about which experts would serve them.

What it has read below the first adapted block, the second pass uses again (``Prefix``; DESIGN §5).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.inference.two_pass.likelihood import mean_log_likelihood
from bayes_dispatch.inference.two_pass.prompts import check_prompts
from bayes_dispatch.model.backbone import Backbone, CausalLMOutput
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.parts import CutModel
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = [
    "TOKEN_CLASSES",
    "FirstPass",
    "Prefix",
    "byte_means",
    "class_counts",
    "evidence_of",
    "first_pass",
    "read_prefix",
]

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
            states of the bytes and their mean. Where only some blocks ran, ``hidden`` is of what comes out of them, and
            there is no ``surprise``, which needs them all.
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
    block: int = 0,
) -> FirstPass:
    """Read prompts of any lengths with the unadapted model.

    Args:
        model, tokenizer: of a bundle. prompts: 1 to 4,096 bytes of UTF-8 each.
        batch_size: prompts that run at once; it does not change the result. progress: show a progress bar.
        block: the first adapted one: only the blocks before it run, as the second pass goes on from there. With 0 all
            do.

    Raises:
        PromptError: see ``check_prompts``. ConfigError: the model has no such block, or cannot be cut there.
    """
    checked = check_prompts(prompts)
    cut = CutModel(model, block)
    order = sorted(range(len(checked)), key=lambda i: len(checked[i]))  # similar lengths run together
    rows: dict[int, dict[str, np.ndarray]] = {}
    for start in tqdm(range(0, len(order), batch_size), "first pass", disable=None if progress else True):
        batch = order[start : start + batch_size]
        ids, mask = tokenizer.pad([[tokenizer.bos_token_id, *checked[i]] for i in batch])
        if block:
            pooled = {"hidden": byte_means(cut.below(ids, mask, None), mask.sum(1))}
        else:
            pooled = _pool_output(model(ids, attention_mask=mask), ids, mask)
        for row, i in enumerate(batch):
            rows[i] = {name: values[row] for name, values in pooled.items()}
    views = {name: np.stack([rows[i][name] for i in range(len(checked))]) for name in rows[0]}
    return FirstPass(tuple(checked), evidence_of(checked, views))


@dataclass(frozen=True, eq=False)
class Prefix:
    """U prompts below the cut of a model.

    Attributes:
        ids: (U, T) tokens, right-padded: the beginning token and the prompt's bytes. tokens: (U,), real ones.
        x: (U, T, D), or the tokens themselves: what the blocks above the cut read.
        cache: of the blocks below, which have read them; ``None`` where there are none.
    """

    ids: Int[Tensor, "U T"]
    tokens: Int[Tensor, " U"]
    x: Int[Tensor, "U T"] | Float[Tensor, "U T D"]
    cache: Cache | None

    def select(self, rows: Sequence[int]) -> "Prefix":
        """Some rows, in that order."""
        if list(rows) == list(range(len(self.tokens))):
            return self
        index = torch.tensor(rows)
        tokens = self.tokens[index]
        width = int(tokens.max())
        cache = None if self.cache is None else self.cache.select(index)
        return Prefix(self.ids[index, :width], tokens, self.x[index, :width], cache)


def read_prefix(cut: CutModel, tokenizer: ByteTokenizer, prompts: Sequence[bytes], capacity: int) -> Prefix:
    """Read prompts below the cut.

    Args:
        capacity: tokens that the states have room for, those of the prompts included.
    """
    ids, mask = tokenizer.pad([[tokenizer.bos_token_id, *prompt] for prompt in prompts])
    cache = cut.cache_below(len(prompts), capacity)
    return Prefix(ids, mask.sum(1), cut.below(ids, mask, cache), cache)


def evidence_of(prompts: Sequence[bytes], views: Mapping[str, np.ndarray]) -> Evidence:
    """Evidence of what was pooled over prompts, their bytes and their lengths."""
    counts = np.stack([class_counts(data) for data in prompts])
    lengths = np.array([len(data) for data in prompts], dtype=float)
    return Evidence({"hidden": views["hidden"], "counts": counts} | dict(views), lengths)


def byte_means(hidden: Float[Tensor, "B T D"], tokens: Int[Tensor, " B"]) -> Float[np.ndarray, "B D"]:
    """Means of right-padded hidden states over the bytes of each row: all real tokens (B,) but the first."""
    real = (torch.arange(1, hidden.shape[1]) < tokens[:, None])[..., None].to(hidden)
    return ((hidden[:, 1:] * real).sum(1) / real.sum(1)).double().cpu().numpy()


def _pool_output(output: CausalLMOutput, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> dict[str, np.ndarray]:
    """The views ``hidden`` and ``surprise``."""
    hidden = output.hidden[:, 1:]  # (B, T, D) of the bytes
    real = mask[:, 1:, None].to(hidden)
    means = (hidden * real).sum(1) / real.sum(1)
    nll = -mean_log_likelihood(output.logits, ids, mask)
    pairs = torch.stack([nll, _log_residual(hidden, means, real).double()], -1)
    return {"hidden": means.double().cpu().numpy(), "surprise": pairs.cpu().numpy()}


def class_counts(data: bytes) -> np.ndarray:
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
