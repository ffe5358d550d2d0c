"""Rivals that route each token in each layer by the adapters' own weights: PEFT's Arrow, and SpectR.

Both read a whole document in one plain forward of the library's model, and need LoRA experts.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import bayes_dispatch as bd
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.peft import write_peft
from bayes_dispatch.model.adaptation import Delta
from bayes_dispatch.model.transformers.backbone import TransformersBackbone

__all__ = ["TOP", "Router", "arrow", "arrow_shares", "spectr"]

TOP = 3  # adapters that a token may have: PEFT's default

Router = Callable[[Tensor], Tensor]  # ids (1, T) to logits (1, T, V)


def arrow(backbone: TransformersBackbone, experts: bd.ExpertBank) -> Router:
    """PEFT's Arrow (Ostapenko and others 2024, arXiv 2405.11157)."""
    model = _arrow_model(backbone, experts)
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def arrow_shares(backbone: TransformersBackbone, experts: bd.ExpertBank) -> Callable[[Tensor], Tensor]:
    """Of prompts (B, T) the shares (B, K) that Arrow gives the adapters: means over tokens and adapted matrices.

    They are those of the blend that it serves: of the ``TOP`` adapters of a token, and none for the others.
    """
    model = _arrow_model(backbone, experts)
    routers = [model.get_base_model().get_submodule(matrix).lora_arrow["arrow_router"] for matrix in experts.adapts]
    found: list[Tensor] = []

    def add(router: Any, inputs: tuple[Any, ...]) -> None:
        like = (inputs[0].to(router.prototypes) @ router.prototypes.T).abs().double()  # (B, T, K); shares sum to 1
        top = like.topk(router.top_k, dim=-1)
        shares = torch.zeros_like(like).scatter(-1, top.indices, (top.values / router.temperature).softmax(-1))
        found.append(shares.mean(1))

    for router in routers:
        router.register_forward_pre_hook(add)

    def read(ids: Tensor) -> Tensor:
        found.clear()
        model.get_base_model().base_model(input_ids=ids, use_cache=False)
        return torch.stack(found).mean(0)

    return read


def _arrow_model(backbone: TransformersBackbone, experts: bd.ExpertBank) -> Any:
    """It takes adapters of one rank that cover every layer: others are filled with zeros, and left out again.

    They have the model's own type, as SpectR's have, and not float32, which is PEFT's default.
    """
    from peft import ArrowConfig, create_arrow_model

    kinds = {matrix.rpartition(".")[2] for matrix in experts.adapts}
    matrices = [matrix for matrix in backbone.linears() if matrix.rpartition(".")[2] in kinds]
    factors = _factors(backbone, experts, matrices)
    with TemporaryDirectory() as scratch:
        for k, name in enumerate(experts):
            deltas = {matrix: Delta(up[k], down[k], up.new_ones(up.shape[2])) for matrix, (up, down) in factors.items()}
            write_peft(Path(scratch) / name, deltas, backbone.name, ())
        paths = [f"{scratch}/{name}" for name in experts]
        config = ArrowConfig(top_k=min(TOP, len(paths)))
        model = create_arrow_model(deepcopy(backbone.model), paths, config, autocast_adapter_dtype=False).eval()
    inner = model.get_base_model()
    for matrix in set(matrices) - set(experts.adapts):
        inner.set_submodule(matrix, inner.get_submodule(matrix).base_layer)
    return model


def spectr(backbone: TransformersBackbone, experts: bd.ExpertBank) -> Router:
    """SpectR (Fleshman and Van Durme 2025, arXiv 2504.03454), as small as it is; there is no code of the authors'.

    With B A = U S Vᵀ of each adapter, A′ = S Vᵀ and B′ = U. For a token x, ‖A′x‖ are the logits of the adapters; the
    ``TOP`` largest go through a softmax, as in Arrow, which has the first right singular vector alone in place of A′.
    """
    factors = _factors(backbone, experts, experts.adapts)
    aligned = {matrix: _aligned(backbone, *own) for matrix, own in factors.items()}

    def added(matrix: str) -> Callable[..., Tensor]:
        def add(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            down, up = aligned[matrix]
            inner = torch.einsum("bti,kri->btkr", inputs[0], down)
            logits, chosen = inner.norm(dim=-1).topk(min(TOP, len(down)), dim=-1)
            shares = torch.zeros_like(inner[..., 0]).scatter(-1, chosen, logits.softmax(-1))
            return output + torch.einsum("btkr,kor->bto", inner * shares[..., None], up)

        return add

    def read(ids: Tensor) -> Tensor:
        with ExitStack() as hooks:
            for matrix in aligned:
                hook = backbone.model.get_submodule(matrix).register_forward_hook(added(matrix))
                hooks.callback(hook.remove)
            return backbone.model(input_ids=ids, use_cache=False).logits

    return read


def _aligned(backbone: TransformersBackbone, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """A′ (K, r, in) and B′ (K, out, r) by small decompositions: B A itself is never made."""
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    inner = torch.linalg.svd(left.R @ right.R.mT)
    routing, rest = inner.S[..., None] * (inner.Vh @ right.Q.mT), left.Q @ inner.U
    return routing.to(backbone.dtype), rest.to(backbone.dtype)


def _factors(
    backbone: TransformersBackbone, experts: bd.ExpertBank, matrices: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """``up`` (K, out, r) and ``down`` (K, r, in) of each matrix, r the largest rank; zeros where there is none."""
    own = [dict(expert.factors) for expert in experts.values() if isinstance(expert, LoraExpert)]
    assert len(own) == len(experts)
    rank = max(len(down) for factors in own for down, _ in factors.values())
    shapes, found = backbone.linears(), {}
    for matrix in matrices:
        out, width = shapes[matrix]
        up, down = (
            torch.zeros(len(own), *shape, dtype=backbone.weights_dtype) for shape in ((out, rank), (rank, width))
        )
        for k, factors in enumerate(own):
            if matrix in factors:
                own_down, own_up = factors[matrix]
                up[k, :, : len(own_down)], down[k, : len(own_down)] = own_up, own_down
        found[matrix] = up, down
    return found
