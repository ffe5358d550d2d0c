"""The encoder sees both ways, each row by itself, and positions count; the decoder's cross-attention is softmax over
what the encoder read."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.mixers import CrossAttention, Memory, Span
from bayes_dispatch.model.mambaformer.padding import check_padding
from tests.model.seq2seq import close, pad, scales, tokens

if TYPE_CHECKING:
    from bayes_dispatch.model.seq2seq.model import MambaFormerForSeq2Seq

MakeSeq2Seq = Callable[..., "MambaFormerForSeq2Seq"]

sizes = st.fixed_dictionaries(
    {
        "mixer": st.sampled_from(["mamba1", "mamba2"]),
        "n_pairs": st.integers(0, 2),
        "n_kv_heads": st.sampled_from([None, 1]),
        "positions": st.sampled_from(["none", "rotary"]),
        "attention_window": st.sampled_from([None, 2]),
        "blocks": st.sampled_from([None, None, ("attention", "feed_forward")]),
    }
)


@pytest.mark.parametrize("blocks", [None, ("mamba2",), ("mamba1",), ("attention",)])
@pytest.mark.parametrize("padded", [False, True])
def test_every_token_sees_every_other(make_seq2seq: MakeSeq2Seq, blocks: Any, padded: bool) -> None:
    encoder = make_seq2seq(blocks=blocks).encoder

    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 0], [1] * 9]) if padded else None
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    padding = check_padding(mask, x, at_least=1)
    hidden, _ = encoder(x, padding, Adaptation.identity())
    for b in range(2):
        real = torch.ones(9).bool() if mask is None else mask[b].bool()
        for t in range(9):
            (seen,) = torch.autograd.grad(hidden[b, t].pow(2).sum(), x, retain_graph=True)
            assert not seen[1 - b].any()
            assert torch.equal(seen[b].abs().sum(-1) > 0, real & real[t])


@settings(max_examples=8, deadline=None)
@given(
    sizes=sizes,
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    lefts=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    adapted=st.booleans(),
)
def test_a_ragged_batch_gives_each_row_alone(
    make_seq2seq: MakeSeq2Seq, sizes: dict[str, Any], lengths: list[int], lefts: list[int], adapted: bool
) -> None:
    """In values and in gradients, wherever the padding stands, which is zero."""
    model = make_seq2seq(**sizes)
    rows = [tokens(b, n) for b, n in enumerate(lengths)]
    adaptation = scales(model, len(rows)) if adapted else None
    ids, mask = pad(rows, lefts)
    memory = model.encode(ids, mask, adaptation)
    weights = torch.randn(10, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = [model.encode(r[None], None, adaptation.select([b]) if adaptation else None) for b, r in enumerate(rows)]
    total, parts = torch.tensor(0.0).double(), torch.tensor(0.0).double()
    for b, row in enumerate(rows):
        real = mask[b].bool()
        close(memory.hidden[b, real], alone[b].hidden[0])
        assert not memory.hidden[b, ~real].any()
        assert memory.visible is None or torch.equal(memory.visible[b], real)
        total = total + (memory.hidden[b, real] * weights[: len(row)]).sum()
        parts = parts + (alone[b].hidden[0] * weights[: len(row)]).sum()
    parameters = [*model.embedding.parameters(), *model.encoder.parameters()]
    both = (torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in (total, parts))
    for got, expected in zip(*both, strict=True):
        close(got, expected, 1e-9)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_a_mixer_reads_forwards_and_backwards(make_seq2seq: MakeSeq2Seq, mixer: Any) -> None:
    """Each row by hand, cut to its own length."""
    both = make_seq2seq(mixer=mixer).encoder.blocks[0].mixer
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor([6, 1, 4])
    with torch.no_grad():
        got = both(x, Span(lengths), {})
        assert not torch.allclose(both.forwards(x, Span(), {}), both.backwards(x, Span(), {}))
        for b, n in enumerate(lengths.tolist()):
            row = x[b : b + 1, :n]
            reversed_row = torch.stack([row[:, n - 1 - t] for t in range(n)], 1)
            back = both.backwards(reversed_row, Span(), {})
            expected = both.forwards(row, Span(), {}) + torch.stack([back[:, n - 1 - t] for t in range(n)], 1)
            close(got[b, :n], expected[0])
            close(both(row, Span(), {}), expected)


def test_positions_of_attention_count(make_seq2seq: MakeSeq2Seq) -> None:
    model = make_seq2seq(blocks=("attention",), positions="rotary")
    ids = tokens(0, 1, 6)
    with torch.no_grad():
        ahead, back = model.encode(ids).hidden, model.encode(ids.flip(1)).hidden.flip(1)
        assert not torch.allclose(ahead, back, atol=1e-3)
        plain = make_seq2seq(blocks=("attention",))
        close(plain.encode(ids).hidden, plain.encode(ids.flip(1)).hidden.flip(1))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cross_attention_is_softmax_over_the_encoders_tokens(kv_heads: int) -> None:
    config = MambaFormerConfig(d_model=16, n_heads=4, n_kv_heads=kv_heads)
    torch.manual_seed(0)
    mixer = CrossAttention(config).double()
    p = {name: value.detach().numpy() for name, value in mixer.named_parameters()}
    x, hidden = torch.randn(2, 3, 16).double(), torch.randn(2, 5, 16).double()
    visible = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    expected = np.empty((2, 3, 16))
    for b in range(2):
        seen = hidden[b].numpy()[visible[b].numpy()]
        keys, values = np.split(seen @ p["kv_proj.weight"].T, 2, axis=1)
        for t in range(3):
            query = p["q_proj.weight"] @ x[b, t].numpy()
            mixed = []
            for h in range(4):
                group = slice(4 * (h * kv_heads // 4), 4 * (h * kv_heads // 4) + 4)
                logits = keys[:, group] @ query[4 * h : 4 * h + 4] / 2
                weights = np.exp(logits - logits.max())
                mixed.append(weights / weights.sum() @ values[:, group])
            expected[b, t] = p["out_proj.weight"] @ np.concatenate(mixed)
    with torch.no_grad():
        got = mixer(x, {}, Memory(hidden, visible))
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-10)
        close(mixer(x[:1], {}, Memory(hidden[:1])), got[:1])
        state = mixer.init_state(torch.float64)
        close(mixer(x[:, :2], {}, Memory(hidden, visible), state), got[:, :2])
        close(mixer(x[:, 2:], {}, None, state), got[:, 2:])
