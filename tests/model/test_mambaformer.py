"""The model is causal and sees each row alone; adapted, it is the model whose weights were replaced, matrix by matrix
and row by row. Equal weights have one fingerprint; bad input is refused."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.adaptation import Adaptation, Delta
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from tests.model.tensors import tokens

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]


def scales(model: "MambaFormerForCausalLM", *lead: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: (1 + 0.5 * torch.randn(*lead, r, generator=draw)).to(model.dtype) for n, r in model.adaptable().items()}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("position", [0, 7, 8, 19])
def test_future_tokens_do_not_alter_past_logits(make_model: MakeModel, window: int | None, position: int) -> None:
    model = make_model(
        MambaFormerConfig(d_model=32, n_heads=2, attention_window=window, chunk_size=8), dtype=torch.float64
    )
    ids = tokens(0, 2, 20)
    changed = ids.clone()
    changed[:, position:] = (ids[:, position:] + 1) % 258
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-12)
    assert not torch.isclose(after[:, position:], before[:, position:]).all(-1).any()


def test_blocks_are_residual_and_run_in_order(model64: "MambaFormerForCausalLM") -> None:
    """The whole model is what its parts say: embedding, x + mixer(norm(x)) for each block, norm, head."""
    from bayes_dispatch.model.mambaformer.mixers import Span

    ids = tokens(1, 2, 9)
    span = Span()
    with torch.no_grad():
        x = model64.embedding.weight[ids]
        for block in model64.blocks:
            rms = x / (x.square().mean(-1, keepdim=True) + block.norm.eps).sqrt() * block.norm.weight
            x = x + block.mixer(rms, span, {})
        x = x / (x.square().mean(-1, keepdim=True) + model64.norm.eps).sqrt() * model64.norm.weight
        out = model64(ids)
    torch.testing.assert_close(out.hidden, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.logits, x @ model64.embedding.weight.T, rtol=1e-12, atol=1e-12)


def test_an_untied_head_is_its_own_matrix(make_model: MakeModel) -> None:
    model = make_model(dtype=torch.float64, tie_embeddings=False)
    with torch.no_grad():
        out = model(tokens(1, 1, 5))
        torch.testing.assert_close(out.logits, out.hidden @ model.head.weight.T)
        assert not torch.allclose(out.logits, out.hidden @ model.embedding.weight.T)


def test_rows_do_not_see_each_other(model64: "MambaFormerForCausalLM") -> None:
    ids = tokens(2, 3, 12)
    with torch.no_grad():
        batch = model64(ids).logits
        for b in range(3):
            torch.testing.assert_close(batch[b], model64(ids[b : b + 1]).logits[0], rtol=0, atol=1e-11)


def test_it_is_a_backbone(model: "MambaFormerForCausalLM") -> None:
    assert isinstance(model, Backbone)


class TestAdaptation:
    def test_equals_a_model_whose_weights_were_replaced(self, model64: "MambaFormerForCausalLM") -> None:
        z, ids = scales(model64), tokens(3, 2, 10)
        replaced = copy.deepcopy(model64)
        for name, module in replaced.named_modules():
            if name in z:
                U, s, Vt = np.linalg.svd(module.weight.detach().numpy(), full_matrices=False)
                module.weight.data = torch.from_numpy(U * (s * z[name].numpy()) @ Vt)
        with torch.no_grad():
            expected = replaced(ids).logits
            adapted = model64(ids, adaptation=Adaptation(z)).logits
            assert not torch.allclose(model64(ids).logits, expected, atol=0.1)
        torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-10)

    def test_deltas_are_added_to_the_weights(self, model64: "MambaFormerForCausalLM") -> None:
        """Of every matrix, the embedding and with it the tied head among them; shared, and one for each row."""
        draw, ids = torch.Generator().manual_seed(0), tokens(3, 2, 10)

        def drawn(*shape: int) -> Tensor:
            return 0.3 * torch.randn(*shape, generator=draw).double()

        deltas = {n: Delta(drawn(o, 2), drawn(2, i), drawn(2, 2)) for n, (o, i) in model64.linears().items()}
        z = scales(model64, 2)
        with torch.no_grad():
            batch = model64(ids, adaptation=Adaptation(z, deltas)).logits
            for row in range(2):
                own = {name: delta._replace(c=delta.c[row]) for name, delta in deltas.items()}
                replaced = copy.deepcopy(model64)
                for name, (up, down, c) in own.items():
                    weight = replaced.get_submodule(name).weight
                    if name in z:
                        weight.copy_(model64.get_submodule(name).folded(z[name][row]))
                    weight.add_((up * c) @ down)
                expected = replaced(ids[row : row + 1]).logits[0]
                assert not torch.allclose(model64(ids[row : row + 1]).logits[0], expected, atol=0.1)
                torch.testing.assert_close(batch[row], expected, rtol=0, atol=1e-9)
                shared = Adaptation({name: each[row] for name, each in z.items()}, own)
                cache = model64.init_cache(1, 10)
                pieces = ids[row : row + 1].split((6, 1, 3), 1)
                cached = torch.cat([model64(each, cache=cache, adaptation=shared).logits for each in pieces], 1)
                torch.testing.assert_close(cached[0], expected, rtol=0, atol=1e-9)

    def test_each_matrix_counts(self, model64: "MambaFormerForCausalLM") -> None:
        ids = tokens(3, 1, 10)
        with torch.no_grad():
            plain = model64(ids).logits
            for name, z in scales(model64).items():
                assert not torch.allclose(model64(ids, adaptation=Adaptation({name: z})).logits, plain, atol=1e-3), name

    def test_identity_is_none_and_ones_are_close(self, model64: "MambaFormerForCausalLM") -> None:
        ids = tokens(4, 2, 10)
        ones = Adaptation({name: torch.ones(rank).double() for name, rank in model64.adaptable().items()})
        with torch.no_grad():
            plain = model64(ids).logits
            assert torch.equal(model64(ids, adaptation=Adaptation.identity()).logits, plain)
            torch.testing.assert_close(model64(ids, adaptation=ones).logits, plain, rtol=0, atol=1e-10)

    def test_rows_have_their_own(self, model64: "MambaFormerForCausalLM") -> None:
        ids, adaptation = tokens(5, 3, 10), Adaptation(scales(model64, 3))
        with torch.no_grad():
            batch = model64(ids, adaptation=adaptation).logits
            for b in range(3):
                shared = Adaptation({name: z[b] for name, z in adaptation.scales.items()})
                alone = model64(ids[b : b + 1], adaptation=shared).logits[0]
                torch.testing.assert_close(batch[b], alone, rtol=0, atol=1e-10)

    def test_names_are_the_matrices_of_all_blocks(self, model: "MambaFormerForCausalLM") -> None:
        assert model.adaptable() == {
            "blocks.0.mixer.in_proj": 32,
            "blocks.0.mixer.out_proj": 32,
            "blocks.1.mixer.qkv": 32,
            "blocks.1.mixer.out_proj": 32,
            "blocks.2.mixer.in_proj": 32,
            "blocks.2.mixer.out_proj": 32,
        }

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"blocks.0.norm": torch.ones(32)}, "blocks.0.norm"),
            ({"head": torch.ones(32)}, "head"),
            ({"embedding": torch.ones(33)}, "expected 1 to 32 scales for embedding, got 33"),
            ({"blocks.9.mixer.qkv": torch.ones(32)}, "blocks.9.mixer.qkv"),
            ({"blocks.1.mixer.qkv": torch.ones(33)}, "expected 1 to 32 scales .* got 33"),
            ({"blocks.1.mixer.qkv": torch.ones(3, 32)}, "expected scales for 2 rows, got 3"),
            ({"blocks.1.mixer.qkv": torch.ones(32).double()}, "expected scales of torch.float32 .* got torch.float64"),
        ],
    )
    def test_scales_that_do_not_fit(self, model: "MambaFormerForCausalLM", given: Any, message: str) -> None:
        with pytest.raises(TensorError, match=message):
            model(tokens(0, 2, 3), adaptation=Adaptation(given))

    @pytest.mark.parametrize(
        ("name", "delta", "message"),
        [
            ("head", ((5, 2), (2, 32), 2), "adaptable matrix .* got 'head'"),
            ("blocks.1.mixer.qkv", ((5, 2), (2, 32), 2), r"\(96, 2\) and \(2, 32\) of the delta of blocks.1.mixer.qkv"),
            ("blocks.1.mixer.qkv", ((96, 3), (2, 32), 2), r"got \(\(96, 3\), \(2, 32\)\)"),
            ("blocks.1.mixer.qkv", ((96, 3), (3, 32), 1), r"expected factors \(96, 1\) and \(1, 32\)"),
            ("blocks.1.mixer.qkv", ((96, 2), (2,), 2), r"got \(\(96, 2\), \(2,\)\)"),
        ],
    )
    def test_deltas_that_do_not_fit(
        self, model: "MambaFormerForCausalLM", name: str, delta: tuple[Any, Any, int], message: str
    ) -> None:
        up, down, rank = delta
        given = Delta(torch.ones(up), torch.ones(down), torch.ones(rank))
        with pytest.raises(TensorError, match=message):
            model(tokens(0, 2, 3), adaptation=Adaptation({}, {name: given}))

    def test_deltas_are_of_floats(self, model: "MambaFormerForCausalLM") -> None:
        given = Delta(torch.ones(96, 2).int(), torch.ones(2, 32), torch.ones(2))
        with pytest.raises(TensorError, match=r"expected a delta of floats for blocks\.1\.mixer\.qkv"):
            model(tokens(0, 2, 3), adaptation=Adaptation({}, {"blocks.1.mixer.qkv": given}))


class TestFingerprint:
    def test_equal_weights_have_one(self, make_model: MakeModel) -> None:
        prints = {make_model().fingerprint(), make_model().fingerprint(), make_model(dtype=torch.float64).fingerprint()}
        assert len(prints) == 1

    def test_every_weight_counts(self, make_model: MakeModel) -> None:
        model = make_model()
        prints = [model.fingerprint()]
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.view(-1)[-1] += 0.01
            prints.append(model.fingerprint())
        assert len(set(prints)) == len(prints)


HOLES = torch.tensor([[1, 0, 1], [1, 1, 1]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(3, dtype=torch.long), None, r"shape \(B, T\) .* got \(3,\)"),
        (torch.zeros(0, 3, dtype=torch.long), None, r"got \(0, 3\)"),
        (torch.zeros(2, 0, dtype=torch.long), None, r"got \(2, 0\)"),
        (torch.zeros(2, 3), None, "integer input_ids, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.bool), None, "integer input_ids, got torch.bool"),
        (torch.full((2, 3), 258), None, r"0 … 257, got 258 … 258"),
        (torch.full((2, 3), -1), None, r"0 … 257, got -1 … -1"),
        (tokens(0, 2, 3), torch.ones(2, 4), r"attention_mask of shape \(2, 3\), got \(2, 4\)"),
        (tokens(0, 2, 3), HOLES, "a mask with holes"),
        (tokens(0, 2, 3), torch.tensor([[0.0, 0.0, -9.0]] * 2), "of truth values or whole numbers, got torch.float32"),
        (tokens(0, 2, 3), torch.tensor([[1, 1, 2]] * 2), "of zeros and ones, got 1 … 2"),
        (tokens(0, 2, 3), torch.ones(2, 3, device="meta"), "on cpu, as what it is of, got one on meta"),
        (tokens(0, 2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), "got a row of padding"),
    ],
)
def test_bad_input_is_named(model: "MambaFormerForCausalLM", ids: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(TensorError, match=message):
        model(ids, attention_mask=mask)
    if mask is not HOLES:
        with pytest.raises(TensorError, match=message):
            model.generate(ids, attention_mask=mask, max_new_tokens=1)
