"""The MambaFormer (arXiv 2402.04248): a Mamba block, then pairs of attention and Mamba blocks, as a language model."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bayes_dispatch.errors import BundleError, ConfigError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.backbone import CausalLMOutput
from bayes_dispatch.model.cache import Cache
from bayes_dispatch.model.config import LanguageModelConfig
from bayes_dispatch.model.files import read_json, read_tensors, write_directory
from bayes_dispatch.model.mixers import Mamba2Mixer, SelfAttention, Span
from bayes_dispatch.model.sampling import Sampling, row_generators
from bayes_dispatch.model.svd_linear import SVDLinear

__all__ = ["Block", "MambaFormerForCausalLM"]


class Block(nn.Module):
    """A residual block: ``x + mixer(norm(x))``."""

    def __init__(self, mixer: Mamba2Mixer | SelfAttention, d_model: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = mixer

    def forward(self, x: Tensor, span: Span, scales: Mapping[str, Tensor], cache: Cache | None, index: int) -> Tensor:
        state = None if cache is None else cache.states[index]
        return x + self.mixer(self.norm(x), span, scales, state)


class MambaFormerForCausalLM(nn.Module):
    """Next-token prediction with explicit cache and adaptation.

    Example:
        >>> config = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)
        >>> MambaFormerForCausalLM(config)(torch.tensor([[256, 104, 105]])).logits.shape
        torch.Size([1, 3, 258])
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        backbone = config.backbone
        self.embedding = nn.Embedding(config.vocab_size, backbone.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(SelfAttention(backbone) if i % 2 else Mamba2Mixer(backbone), backbone.d_model)
            for i in range(backbone.n_blocks)
        )
        self.norm = nn.RMSNorm(backbone.d_model, eps=1e-5)
        self.head = None if config.tie_embeddings else nn.Linear(backbone.d_model, config.vocab_size, bias=False)
        for block in self.blocks:  # residual branches start small, so that depth does not blow up the stream
            cast(Block, block).mixer.out_proj.weight.data.mul_(backbone.n_blocks**-0.5)
        self._fingerprint: tuple[tuple[object, ...], str] | None = None

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        adaptation: Adaptation | None = None,
    ) -> CausalLMOutput:
        """Logits for the token after each given one.

        Args:
            input_ids: tokens that follow those in ``cache``.
            attention_mask: 1 for tokens, 0 for padding, on the left or on the right of a row; outputs at padding have
                no meaning, and padding enters no state.
            cache: states to continue from, filled in place; a row may then have no new tokens at all.
            adaptation: scales for some matrices; the stored weights where ``None``.

        Raises:
            TensorError: ids or mask of the wrong shape, dtype or range, or a mask with holes.
            CacheFullError: the cache has no room. StaleCacheError: the cache is another model's or adaptation's.
        """
        adaptation = adaptation or Adaptation.identity()
        self._check_ids(input_ids)
        self._check_adaptation(adaptation, input_ids.shape[0])
        tokens, shift = _padding(attention_mask, input_ids, at_least=1 if cache is None else 0)
        if shift is not None:
            input_ids = input_ids.gather(1, shift)
        span = self._span(tokens, input_ids, cache)
        x = self.embedding(input_ids)  # (B, T, D)
        x = self.run_blocks(x, span, 0, len(self.blocks), cache=cache, adaptation=adaptation)
        if cache is not None:
            cache.advance(torch.tensor(input_ids.shape[1]) if tokens is None else tokens)
        x = self.norm(x)
        if shift is not None:
            back = shift.argsort(dim=1)
            x = x.gather(1, back[..., None].expand_as(x))
        return CausalLMOutput(self.logits(x), x, cache)

    def run_blocks(
        self,
        x: Float[Tensor, "B T D"],
        span: Span,
        start: int,
        stop: int,
        *,
        cache: Cache | None,
        adaptation: Adaptation,
    ) -> Float[Tensor, "B T D"]:
        """Run blocks ``start`` to ``stop`` − 1 over right-padded hidden states."""
        scales: list[dict[str, Tensor]] = [{} for _ in self.blocks]
        for name, z in adaptation.scales.items():
            _, block, _, matrix = name.split(".")
            scales[int(block)][matrix] = z
        if cache is not None:  # before any block changes its state
            for index in range(start, stop):
                cache.check_block(index, adaptation.digest(f"blocks.{index}."))
        for index in range(start, stop):
            x = self.blocks[index](x, span, scales[index], cache, index)
        return x

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of hidden states, logits and cached states."""
        return self.embedding.weight.dtype

    def logits(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """The next-token head."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache in the model's dtype, with room for ``max_length`` tokens in each of ``batch_size`` rows.

        Raises:
            ConfigError: a size below 1.
        """
        if batch_size < 1 or max_length < 1:
            raise ConfigError(f"expected a batch and a length of at least 1, got {batch_size} and {max_length}")
        states = [cast(Block, block).mixer.init_state(batch_size, max_length) for block in self.blocks]
        return Cache(states, batch_size, max_length, self._maker())

    def adaptable(self) -> dict[str, int]:
        """Name and rank of each matrix that can be adapted: in, out, qkv and o of every block."""
        return {name: module.rank for name, module in self.named_modules() if isinstance(module, SVDLinear)}

    def fingerprint(self) -> str:
        """A hash of the weights in float32, which is the same for a float64 copy of the model."""
        parameters = list(self.named_parameters())
        key = tuple((p._version, p.data_ptr(), p.dtype) for _, p in parameters)
        if self._fingerprint is None or self._fingerprint[0] != key:
            digest = hashlib.blake2b(digest_size=16)
            for name, parameter in parameters:
                digest.update(f"{name}{tuple(parameter.shape)}".encode())
                digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
            self._fingerprint = (key, digest.hexdigest())
        return self._fingerprint[1]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        use_cache: bool = True,
        adaptation: Adaptation | None = None,
        seed: int | None = None,
    ) -> Int[Tensor, "B T_new"]:
        """Continue each row, greedily or by sampling.

        Args:
            input_ids, attention_mask: prompts, padded on either side.
            max_new_tokens: tokens to add. do_sample, temperature, top_k, top_p: see ``Sampling``.
            eos_token_id: a row that yields it is finished and is filled with it from there on.
            use_cache: ``False`` recomputes the whole sequence for each token; the result is the same.
            adaptation: shared or per-row scales.
            seed: each row draws from a stream of its own, made of the seed and its prompt; ``None`` for a fresh one.

        Returns:
            The new tokens only, (B, up to max_new_tokens).

        Raises:
            TensorError, ConfigError: see ``forward`` and ``Sampling``.
        """
        sampling = Sampling(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p)
        if max_new_tokens < 1:
            raise ConfigError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        self._check_ids(input_ids)
        input_ids = input_ids.long()
        tokens, shift = _padding(attention_mask, input_ids, at_least=1)
        ids = input_ids if shift is None else input_ids.gather(1, shift)  # right-padded from here on
        batch, length = ids.shape
        lengths = torch.full((batch,), length) if tokens is None else tokens
        rows = [ids[b, :n].cpu().numpy().tobytes() for b, n in enumerate(lengths.tolist())]
        generators = row_generators(seed, rows)
        cache = self.init_cache(batch, length + max_new_tokens) if use_cache else None
        sequence = torch.cat([ids, ids.new_zeros(batch, max_new_tokens)], dim=1)
        each = torch.arange(batch)
        finished = torch.zeros(batch, dtype=torch.bool)
        new: list[Tensor] = []
        for _ in range(max_new_tokens):
            if cache is not None and new:
                logits = self(new[-1][:, None], cache=cache, adaptation=adaptation).logits[:, 0]
            else:
                width = int(lengths.max())
                mask = (torch.arange(width) < lengths[:, None]).long()
                out = self(sequence[:, :width], attention_mask=mask, cache=cache, adaptation=adaptation)
                logits = out.logits[each, lengths - 1]
            token = sampling.choose(logits, generators)
            if eos_token_id is not None:
                token = torch.where(finished, eos_token_id, token)
                finished |= token == eos_token_id
            new.append(token)
            sequence[each, lengths] = token
            lengths = lengths + 1
            if bool(finished.all()):
                break
        return torch.stack(new, dim=1)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; an existing directory is replaced once all is written."""
        with write_directory(Path(directory)) as target:
            (target / "config.json").write_text(json.dumps(self.config.to_json(), indent=2) + "\n")
            tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
            safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "MambaFormerForCausalLM":
        """Read what ``save_pretrained`` wrote; nothing is unpickled or executed.

        Raises:
            BundleError: a file is missing or truncated, or a tensor has another shape or dtype than the configuration
                says.
        """
        directory = Path(directory)
        try:
            config = LanguageModelConfig.from_json(read_json(directory / "config.json"))
        except ConfigError as error:
            raise BundleError(f"{directory / 'config.json'}: {error}") from None
        model = cls(config)
        expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
        model.load_state_dict(read_tensors(directory / "model.safetensors", expected))
        return model.eval()

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
            raise TensorError(f"expected input_ids of shape (B, T) with B, T >= 1, got {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TensorError(f"expected integer input_ids, got {input_ids.dtype}")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise TensorError(f"expected input_ids in 0 … {self.config.vocab_size - 1}, got {low} … {high}")

    def _check_adaptation(self, adaptation: Adaptation, batch: int) -> None:
        ranks = self.adaptable() if adaptation.scales else {}
        for name, scales in adaptation.scales.items():
            if name not in ranks:
                raise TensorError(f"expected scales of an adaptable matrix ({next(iter(ranks))}, …), got {name!r}")
            if scales.shape[-1] != ranks[name]:
                raise TensorError(f"expected {ranks[name]} scales for {name}, got {scales.shape[-1]}")
            if scales.dtype != self.dtype:
                raise TensorError(f"expected scales of {self.dtype} for {name}, got {scales.dtype}")
        if adaptation.rows not in (None, batch):
            raise TensorError(f"expected scales for {batch} rows, got {adaptation.rows}")

    def _maker(self) -> str:
        """What a cache remembers of the model that made it."""
        return f"{self.fingerprint()} in {self.dtype}"

    def _span(self, tokens: Tensor | None, input_ids: Tensor, cache: Cache | None) -> Span:
        batch, length = input_ids.shape
        if cache is None:
            return Span(tokens, torch.zeros(batch, dtype=torch.long), aligned=tokens is None)
        cache.check_model(self._maker())
        cache.check_room(batch, torch.tensor(length) if tokens is None else tokens)
        aligned = tokens is None and bool((cache.lengths == cache.lengths[0]).all())
        return Span(tokens, cache.lengths, aligned)


def _padding(mask: Tensor | None, input_ids: Tensor, at_least: int) -> tuple[Tensor | None, Tensor | None]:
    """Tokens of each row (``None``: all), and the gather index that moves left padding right (``None``: none)."""
    if mask is None:
        return None, None
    if mask.shape != input_ids.shape:
        raise TensorError(f"expected an attention_mask of shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
    real = mask.bool()
    if bool(real.all()):
        return None, None
    tokens = real.sum(1)
    if int(tokens.min()) < at_least:
        raise TensorError("expected at least one token in each row of attention_mask, got a row of padding")
    length = real.shape[1]
    first = real.long().argmax(1)
    place = torch.arange(length)
    if not bool((real == ((place >= first[:, None]) & (place < (first + tokens)[:, None]))).all()):
        raise TensorError("expected padding at the ends of each row of attention_mask, got a mask with holes")
    if not bool(first.any()):
        return tokens, None
    return tokens, (place + first[:, None]) % length
