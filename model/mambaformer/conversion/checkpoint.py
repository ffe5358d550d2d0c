"""A checkpoint of the transformers library, or a model of it in memory, as a model of ours, and ours as one."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig
from bayes_dispatch.model.mambaformer.conversion.configs import Described, read_config, write_config
from bayes_dispatch.model.mambaformer.conversion.files import (
    WHOLE,
    Readers,
    opened,
    read_optional,
    read_subwords,
    write_subwords,
)
from bayes_dispatch.model.mambaformer.conversion.layout import origins
from bayes_dispatch.model.mambaformer.pretrained import DTYPES, Pretrained
from bayes_dispatch.model.mambaformer.svd.linear import matrices
from bayes_dispatch.model.subwords import SubwordTokenizer
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.storage import EXPORTED_BY, read_saved, save_directory, write_json

__all__ = ["read_checkpoint", "write_checkpoint"]

CLASSES = {
    "bamba": "BambaForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "llama": "LlamaForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}

M = TypeVar("M", bound=Pretrained)


def read_checkpoint(
    build: Callable[[LanguageModelConfig], M],
    source: str | Path | nn.Module,
    dtype: torch.dtype | None,
    tokenizer: SubwordTokenizer | ByteTokenizer | None,
) -> M:
    """What ``build`` makes of the configuration, with the weights: see ``MambaFormerForCausalLM.from_transformers``."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"expected a float dtype, got {dtype}")
    read = partial(_read, build, dtype=dtype, tokenizer=tokenizer)
    return read(source) if isinstance(source, nn.Module) else read_saved(Path(source), "config.json", read)


def write_checkpoint(model: Pretrained, directory: Path, model_type: str | None) -> None:
    """See ``MambaFormerForCausalLM.export_to_transformers``."""
    tensors = model.state_dict()
    conv_bias = any(bool(each.any()) for name, each in tensors.items() if name.endswith(".conv_bias"))
    described, keys = write_config(model.config, conv_bias, model_type)
    tokenizer, table = model.tokenizer, origins(described)
    ends = sorted(tokenizer.ends)
    theirs = {name: each for ours, own in tensors.items() for name, each in table[ours].theirs(own.cpu()).items()}
    with save_directory(directory, "config.json") as new:
        tokens = {
            "bos_token_id": next(iter(tokenizer.tokenize("").ids), None),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": tokenizer.pad_token_id,
        }
        names = {"architectures": [CLASSES[described.kind]], "exported_by": EXPORTED_BY}
        dtype = str(tensors["norm.weight"].dtype).removeprefix("torch.")  # in which nothing is rounded
        write_json(new / "config.json", {**names, **keys, **tokens, "torch_dtype": dtype})
        if isinstance(tokenizer, SubwordTokenizer):
            write_subwords(tokenizer, new)
        save_file(theirs, new / WHOLE, {"format": "pt"})


def _read(
    build: Callable[[LanguageModelConfig], M],
    source: Path | nn.Module,
    dtype: torch.dtype | None,
    tokenizer: SubwordTokenizer | ByteTokenizer | None,
) -> M:
    with ExitStack() as stack:
        if isinstance(source, nn.Module):
            where = f"a {type(source).__name__}"
            if not hasattr(getattr(source, "config", None), "to_dict"):
                raise ConfigError(f"expected a model of the transformers library, got {where}")
            data, theirs = cast(Any, source).config.to_dict(), _of_module(source)
        else:
            where, file = str(source), source / "config.json"
            if not file.is_file():
                raise ConfigError(f"expected a model's directory with a config.json, got {source}")
            data, theirs = read_optional(file), opened(source, stack)
        described = read_config(data)
        with torch.device("meta"):  # no memory yet, and no random numbers
            model = build(described.config)
        state = read_state(described, model.state_dict(), theirs, dtype, where, matrices(model).keys())
    model.load_state_dict(state, assign=True)
    if tokenizer is None:
        if isinstance(source, nn.Module):
            raise ConfigError(f"expected a tokenizer for {where}, got none")
        tokenizer = read_subwords(source, described.config.vocab_size)
    if tokenizer.vocab_size > described.config.vocab_size:
        most = described.config.vocab_size
        raise ConfigError(
            f"expected a tokenizer of at most {most} ids, as the embedding has, got {tokenizer.vocab_size}"
        )
    model.tokenizer = tokenizer
    return model.eval()


def _of_module(module: nn.Module) -> Readers:
    def reading(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor.detach().cpu()

    return {name: reading(tensor) for name, tensor in module.state_dict().items()}


def read_state(
    described: Described,
    wanted: Mapping[str, Tensor],
    theirs: Readers,
    dtype: torch.dtype | None,
    where: str,
    narrow: Collection[str],
) -> dict[str, Tensor]:
    """The tensors of our model, in memory of their own.

    Args:
        described: the checkpoint. wanted: tensors of our model, of which the shapes count. theirs: those of the
            checkpoint, read one after the other. dtype: wanted; ``None`` for that of the embedding. where: for errors.
            narrow: names of what alone may be less precise than float32.

    Raises:
        BundleError: one is missing, of another shape, no float, not finite in this dtype, or of no use.
    """
    left, found = set(theirs), {}
    table = origins(described)

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in theirs:
            raise BundleError(f"expected the tensor {name} in {where}, as its config says, got none")
        left.discard(name)
        tensor = theirs[name]()
        if tuple(tensor.shape) != shape or tensor.dtype not in DTYPES:
            got = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise BundleError(
                f"expected {name} of floats in the shape {shape} in {where}, as its config says, got {got}"
            )
        return tensor

    for name, like in wanted.items():
        origin = table[name]
        parts = [(each, shape) for each, shape in zip(origin.names, origin.shapes(like.shape), strict=False)]
        pieces = [read(*part) for part in parts]  # mapped memory, whose shapes are right before there is any other
        dtype = dtype or pieces[0].dtype  # the embedding is the first of all
        own_dtype = dtype if name in narrow else torch.promote_types(dtype, torch.float32)
        whole = torch.zeros(like.shape, dtype=own_dtype)
        at = 0
        for piece in pieces:
            own = origin.ours(piece)
            whole[at : at + len(own)] = own
            at += len(own)
        if not whole.sum().isfinite() and not whole.isfinite().all():  # a sum is had sooner; it may be infinite alone
            named = " and ".join(origin.names)
            raise BundleError(f"expected finite numbers in {named} in {where} as {dtype}, got NaN or infinite ones")
        found[name] = whole
    if described.config.tie_embeddings and "lm_head.weight" in left:
        head = read("lm_head.weight", tuple(wanted["embedding.weight"].shape))
        if not torch.equal(head.to(found["embedding.weight"]), found["embedding.weight"]):
            raise BundleError(
                f"expected an lm_head.weight that is the embedding in {where}, as tied ones are, got another"
            )
    if unknown := sorted(name for name in left if not name.endswith("rotary_emb.inv_freq")):
        raise BundleError(f"expected tensors that its config speaks of in {where}, got {unknown[0]}, too")
    return found
