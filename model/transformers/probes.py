"""What a transformers model can do, found out by trying: which matrices it multiplies by, and how it reads."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.transformers.parts import ModelParts
from bayes_dispatch.model.transformers.session import TransformersSession

__all__ = ["called_matrices", "ways_of_reading"]

PROBE = 12  # tokens of the check of what a model can do


def called_matrices(model: PreTrainedModel, parts: ModelParts) -> list[str]:
    """Names of matrices that the model multiplies by calling their module once a token: those that a delta reaches."""
    calls: dict[str, int] = {}
    handles = [
        module.register_forward_hook(lambda m, inputs, output, name=name: _count(calls, name, inputs))
        for name, module in parts.matrices.items()
    ]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(3, 2, dtype=torch.long, device=parts.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in parts.matrices if calls.get(name) == 1]


def ways_of_reading(model: PreTrainedModel, parts: ModelParts) -> tuple[bool, bool]:
    """Whether chunks, and whether some of the blocks and then the others, give what the whole model gives: for a row,
    and for a shorter one beside it.

    Raises:
        ConfigError: it gives NaN, looks ahead, or does not read on from what it kept.
    """
    parts.check_length(PROBE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(parts.vocab_size, (1, PROBE), generator=generator).to(parts.device)
    half, less = PROBE // 2, 3
    kind = type(model).__name__

    def opened(rows: int, blocks: range) -> TransformersSession:
        return TransformersSession(parts, rows, PROBE, {}, blocks)

    def logits(row: Tensor) -> Tensor:
        return model(input_ids=row, use_cache=False).logits[0].to(torch.promote_types(model.dtype, torch.float32))

    # what rounding may do: recurrent blocks of that library compute in float32 whatever the model's dtype
    slack = max(300 * torch.finfo(torch.float32).eps, 4 * torch.finfo(model.dtype).eps)

    def apart(one: Tensor, other: Tensor) -> float:
        difference = one.log_softmax(-1) - other.log_softmax(-1)
        return float(difference.abs().max() / (1 + other.abs().max()))

    def near(one: Tensor, other: Tensor) -> bool:
        return apart(one, other) <= slack

    def keeps() -> bool:
        """Whether states are those of a text read at once: in half precision a lost one hides in the logits."""
        at_once, by_pieces = opened(1, range(parts.depth)), opened(1, range(parts.depth))
        at_once.read(ids)
        for piece in ids.split([PROBE - 2, 2], 1):
            by_pieces.read(piece)
        pairs = zip(at_once.kept(), by_pieces.kept(), strict=True)
        return all(bool((one - other).norm() <= slack / 4 * one.norm()) for one, other in pairs)

    def reads(*blocks: range) -> bool:
        sessions = [opened(2, some) for some in blocks]
        short = torch.cat([ids[:, less:half], ids.new_zeros(1, less)], 1)
        for piece, counts in [
            (torch.cat([ids[:, :half], short]), torch.tensor([half, half - less], device=parts.device)),
            (ids[:, half:].expand(2, -1), None),
        ]:
            x = None
            for session in sessions:
                found = session.read(piece, counts, x)
                x = found.hidden
        assert found.after is not None
        return near(found.after[:, -1], expected)

    with torch.inference_mode():
        whole = logits(ids)
        if bool(whole.isnan().any()):
            raise ConfigError(f"expected a model whose logits are numbers, got {kind}, whose are NaN")
        later = torch.cat([ids[:, :half], ids[:, half:].flip(1)], 1)
        if not near(logits(later)[:half], whole[:half]):
            raise ConfigError(f"expected a causal language model, got {kind}, which looks at later tokens")
        rounding = apart(logits(ids[:, :half]), whole[:half])
        if getattr(model, "is_quantized", False):  # kernels of some of these round by the number of tokens
            slack = max(slack, 4 * rounding)
        if rounding > slack:
            raise ConfigError(
                f"expected a model that says the same of a token whatever follows it, got {kind}, which does not"
            )
        expected = torch.stack([whole[-1], logits(ids[:, less:])[-1]])
        parts.continues = keeps() and reads(range(parts.depth))
        if not parts.continues and not reads(range(parts.depth)):
            hidden = parts.run(range(parts.depth), ids, None, use_cache=False)
            if not near(parts.logits(hidden)[0].to(whole), whole):
                raise ConfigError(f"expected a model whose head reads its blocks alone, got {kind}, whose does not")
            raise ConfigError(f"expected a model that reads on from what it kept, got {kind}, which gives other values")
        places = {1, parts.depth // 2, parts.depth - 1} - {0, parts.depth}
        cuts = all(reads(range(cut), range(cut, parts.depth)) for cut in places)
    return parts.continues, cuts and parts.depth > 1


def _count(calls: dict[str, int], name: str, inputs: tuple[Any, ...]) -> None:
    rowwise = bool(inputs) and inputs[0].shape[:2] == (3, 2)  # rows are still there
    calls[name] = calls.get(name, 0) + (1 if rowwise else 2)
