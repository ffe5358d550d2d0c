"""Sequence to sequence: generation is the same with and without a cache, beams find the best output, adapted it is
the model whose weights were replaced. It learns, gradients reach every weight, disk is the identity."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig, Seq2SeqConfig
from bayes_dispatch.model.seq2seq.model import MambaFormerForSeq2Seq
from tests.model.seq2seq import tokens

MakeSeq2Seq = Callable[..., MambaFormerForSeq2Seq]

fast = pytest.mark.usefixtures("unchecked")  # the other tests here check the shapes
WAYS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "seed": 3, "temperature": 2.0, "top_k": 20},
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 0.5, "repetition_penalty": 1.5},
]


def scales(model: MambaFormerForSeq2Seq, *lead: int) -> Adaptation:
    draw = torch.Generator().manual_seed(0)
    return Adaptation(
        {n: (1 + 0.4 * torch.randn(*lead, r, generator=draw)).to(model.dtype) for n, r in model.adaptable().items()}
    )


def pad(rows: list[Tensor], lefts: list[int]) -> tuple[Tensor, Tensor]:
    """Rows in one batch, each with up to ``lefts[b]`` of its padding on its left."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        left = min(lefts[b % len(lefts)], width - len(row))
        ids[b, left : left + len(row)] = row
        mask[b, left : left + len(row)] = 1
    return ids, mask


@fast
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {
            "mixer": st.sampled_from(["mamba1", "mamba2"]),
            "n_pairs": st.integers(0, 2),
            "n_kv_heads": st.sampled_from([None, 1]),
            "attention_window": st.sampled_from([None, 3]),
        }
    ),
    seed=st.integers(0, 99),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    lefts=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    way=st.sampled_from(WAYS),
    adapted=st.sampled_from([None, "shared", "rows"]),
    ends=st.booleans(),
)
def test_cached_is_uncached_is_one_by_one(
    make_seq2seq: MakeSeq2Seq,
    sizes: dict[str, Any],
    seed: int,
    lengths: list[int],
    lefts: list[int],
    way: dict[str, Any],
    adapted: str | None,
    ends: bool,
) -> None:
    model = make_seq2seq(seed, tie_embeddings=bool(seed % 2), **sizes)
    rows = [tokens(seed + b, n) for b, n in enumerate(lengths)]
    lead = (len(rows),) if adapted == "rows" else ()
    adaptation = scales(model, *lead) if adapted else None
    ids, mask = pad(rows, lefts)
    settings = {"max_new_tokens": 5, **way}
    if ends:
        free = model.generate(ids, attention_mask=mask, adaptation=adaptation, **settings)
        settings |= {"eos_token_id": free[0, :2].tolist(), "min_new_tokens": 1}
    given = {"attention_mask": mask, "adaptation": adaptation, **settings}
    cached = model.generate(ids, **given)
    assert torch.equal(cached, model.generate(ids, **given, use_cache=False))
    for b, row in enumerate(rows):
        own = adaptation.select([b]) if adaptation else None
        alone = model.generate(row[None], adaptation=own, **settings)[0]
        assert torch.equal(cached[b, : len(alone)], alone)
        assert (cached[b, len(alone) :] == settings.get("eos_token_id", [-1])[0]).all()


def test_greedy_takes_the_best_logit_each_time(make_seq2seq: MakeSeq2Seq) -> None:
    model, ids = make_seq2seq(), tokens(0, 1, 6)
    new = model.generate(ids, max_new_tokens=8)
    sequence = torch.tensor([[1]])
    for token in new[0]:
        with torch.no_grad():
            assert int(model(ids, sequence).logits[0, -1].argmax()) == int(token)
        sequence = torch.cat([sequence, token.view(1, 1)], 1)
    assert len(new[0].unique()) > 2  # or the test would say little
    assert not torch.equal(new, model.generate(tokens(1, 1, 6), max_new_tokens=8))  # the input counts


@fast
def test_enough_beams_find_the_most_probable_output(make_seq2seq: MakeSeq2Seq) -> None:
    config = Seq2SeqConfig.symmetric(make_seq2seq(n_pairs=0).config.encoder, vocab_size=4)
    torch.manual_seed(0)
    model = MambaFormerForSeq2Seq(config).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    ids = torch.tensor([[1, 3, 2], [3, 3, 0]])
    found = model.generate_with_log_probabilities(ids, max_new_tokens=3, num_beams=64)
    outputs = torch.tensor(list(itertools.product(range(4), repeat=3)))
    for b in range(2):
        with torch.no_grad():
            logits = model(ids[b : b + 1].expand(64, -1), model.shift_right(outputs)).logits
        totals = logits.log_softmax(-1).gather(-1, outputs[..., None]).sum((1, 2))
        assert torch.equal(found.ids[b], outputs[totals.argmax()])
        torch.testing.assert_close(found.log_probabilities[b].sum(), totals.max())


def test_rows_that_have_ended_leave(make_seq2seq: MakeSeq2Seq) -> None:
    model, ids = make_seq2seq(), tokens(0, 3, 5)
    free = model.generate(ids, max_new_tokens=6)
    eos = int(free[1, 1])
    ends = [int((row == eos).nonzero()[0]) + 1 if eos in row else 6 for row in free]
    assert min(ends) < max(ends)
    batches: list[int] = []
    model.embedding.register_forward_hook(lambda _module, _given, out: batches.append(len(out)))
    model.generate(ids, max_new_tokens=6, eos_token_id=eos)
    assert batches == [3, *(sum(end > t for end in ends) for t in range(max(ends)))]  # the encoder's, then steps


def test_stream_and_log_probabilities(make_seq2seq: MakeSeq2Seq) -> None:
    model, ids = make_seq2seq(), tokens(0, 2, 5)
    scored = model.generate_with_log_probabilities(ids, max_new_tokens=4)
    steps = list(model.stream(ids, max_new_tokens=4))
    assert torch.equal(torch.stack([step.tokens for step in steps], 1), scored.ids)
    with torch.no_grad():
        log_p = model(ids, model.shift_right(scored.ids)).logits.log_softmax(-1)
    torch.testing.assert_close(scored.log_probabilities, log_p.gather(-1, scored.ids[..., None])[..., 0])


class TestAdaptation:
    def test_equals_a_model_whose_weights_were_replaced(self, make_seq2seq: MakeSeq2Seq) -> None:
        model, ids, decoder_ids = make_seq2seq(), tokens(0, 2, 5), tokens(1, 2, 4)
        z = scales(model).scales
        replaced = copy.deepcopy(model)
        for name, module in replaced.named_modules():
            if name in z:
                U, s, Vt = np.linalg.svd(module.weight.detach().numpy(), full_matrices=False)
                module.weight.data = torch.from_numpy(U * (s * z[name].numpy()) @ Vt)
        with torch.no_grad():
            expected = replaced(ids, decoder_ids).logits
            got = model(ids, decoder_ids, adaptation=Adaptation(z)).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
    def test_each_matrix_counts_and_has_a_gradient(self, make_seq2seq: MakeSeq2Seq, mixer: Any) -> None:
        model, ids, decoder_ids = make_seq2seq(mixer=mixer), tokens(0, 1, 5), tokens(1, 1, 4)
        names = {"encoder.blocks.0.mixer.forwards.in_proj", "encoder.blocks.0.mixer.backwards.out_proj"}
        names |= {"encoder.blocks.1.mixer.qkv", "decoder.blocks.0.mixer.in_proj", "decoder.blocks.2.mixer.kv_proj"}
        assert names <= model.adaptable().keys()
        assert all(model.get_submodule(name).rank == rank for name, rank in model.adaptable().items())
        z = {name: scale.requires_grad_() for name, scale in scales(model).scales.items()}
        model(ids, decoder_ids, adaptation=Adaptation(z)).logits.pow(2).sum().backward()
        assert all(scale.grad is not None and scale.grad.abs().sum() > 0 for scale in z.values())


class TestTraining:
    @fast
    def test_it_learns_to_reverse(self) -> None:
        """Teacher forcing on ragged batches; then generation gives what was learned."""
        torch.manual_seed(0)
        backbone = MambaFormerConfig(d_model=16, n_heads=2, d_state=4, head_dim=16, blocks=("mamba2", "attention"))
        model = MambaFormerForSeq2Seq(Seq2SeqConfig.symmetric(backbone, vocab_size=8))
        draw = torch.Generator().manual_seed(0)

        def batch() -> tuple[Tensor, Tensor, Tensor]:
            """Words of tokens 2 … 6; their reversals, which end with 1."""
            words = [torch.randint(2, 7, (n,), generator=draw) for n in torch.randint(1, 4, (32,), generator=draw)]
            targets, mask = pad([torch.cat([word.flip(0), torch.tensor([1])]) for word in words], [0])
            ids, _ = pad([torch.cat([word, torch.tensor([1])]) for word in words], [0])
            return ids, targets, mask

        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        for _ in range(60):
            ids, targets, mask = batch()
            out = model(ids, model.shift_right(targets), attention_mask=mask, decoder_attention_mask=mask)
            loss = F.cross_entropy(out.logits[mask.bool()], targets[mask.bool()])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        ids, targets, mask = batch()
        got = model.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=1)
        right = [torch.equal(got[b, : int(mask[b].sum())], targets[b, mask[b].bool()]) for b in range(32)]
        assert np.mean(right) > 0.8

    @pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
    def test_gradients_reach_every_weight_and_checkpointing_keeps_them(
        self, make_seq2seq: MakeSeq2Seq, mixer: Any
    ) -> None:
        model = make_seq2seq(mixer=mixer, tie_embeddings=False).train()
        ids, mask = pad([tokens(0, 6), tokens(1, 3)], [1])
        gradients = []
        for checkpointing in (False, True):
            model.gradient_checkpointing = checkpointing
            assert model.gradient_checkpointing == checkpointing
            runs: list[int] = []
            hook = model.encoder.blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
            loss = model(ids, tokens(2, 2, 4), attention_mask=mask).logits.log_softmax(-1)[..., 0].sum()
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
            hook.remove()
            assert len(runs) == 1 + checkpointing
        for plain, saved in zip(*gradients, strict=True):
            assert plain.abs().sum() > 0
            torch.testing.assert_close(saved, plain, rtol=0, atol=1e-10)

    def test_the_shift(self, make_seq2seq: MakeSeq2Seq) -> None:
        shift = make_seq2seq().shift_right
        assert shift(torch.tensor([[5, 6, 7]])).tolist() == [[1, 5, 6]]
        targets = torch.tensor([[9, 9, 5, 6], [5, 6, 9, 9], [9, 5, 9, 9]])
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]])
        shifted = shift(targets, mask)
        assert [row[real.bool()].tolist() for row, real in zip(shifted, mask, strict=True)] == [[1, 5], [1, 5], [1]]
        with pytest.raises(TensorError, match="a mask with holes"):
            shift(targets, 1 - mask)


def test_save_and_load(make_seq2seq: MakeSeq2Seq, tmp_path: Path) -> None:
    for tied in (True, False):
        model = make_seq2seq(dtype=torch.float32, tie_embeddings=tied, attention_window=3)
        model.save_pretrained(tmp_path / "model")
        again = MambaFormerForSeq2Seq.from_pretrained(tmp_path / "model")
        assert again.config == model.config
        assert again.fingerprint() == model.fingerprint()
        cache = model.init_cache(1, 4)
        with torch.no_grad():
            model(tokens(0, 1, 5), tokens(1, 1, 2), cache=cache)
            got = again(None, tokens(2, 1, 2), cache=cache).logits  # of the same model
            full = model(tokens(0, 1, 5), torch.cat([tokens(1, 1, 2), tokens(2, 1, 2)], 1)).logits
        torch.testing.assert_close(got, full[:, 2:], rtol=0, atol=2e-5)


class TestConfiguration:
    def test_symmetric(self) -> None:
        config = Seq2SeqConfig.symmetric(MambaFormerConfig(n_pairs=2, attention_window=9), vocab_size=5)
        assert config.encoder.block_kinds == ("mamba2", "attention", "mamba2", "attention", "mamba2")
        assert config.encoder.attention_window is None
        pair = ("attention", "cross_attention", "mamba2")
        assert config.decoder.block_kinds == ("mamba2", *pair, *pair)
        assert config.decoder.attention_window == 9
        assert Seq2SeqConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
        pure = Seq2SeqConfig.symmetric(MambaFormerConfig(blocks=("mamba1", "feed_forward")), vocab_size=5)
        assert pure.decoder.block_kinds == ("mamba1", "cross_attention", "feed_forward")

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"vocab_size": 1}, "vocab_size to be a whole number from 2 to 2147483648, got 1"),
            ({"tie_embeddings": "no"}, "tie_embeddings to be true or false, got 'no'"),
            ({"start_token_id": -1}, "start_token_id to be a whole number from 0 to 2147483648, got -1"),
            ({"start_token_id": 5}, "start_token_id in 0 … 4, got 5"),
            ({"encoder": MambaFormerConfig(attention_window=3)}, "encoder without attention_window, got 3"),
            ({"encoder": MambaFormerConfig(blocks=("cross_attention",))}, "blocks of a decoder only"),
            ({"decoder": MambaFormerConfig()}, "cross_attention among the decoder's blocks, got"),
            ({"encoder": MambaFormerConfig(d_model=64)}, "of one d_model, got 64 and 128"),
        ],
    )
    def test_what_does_not_fit(self, changed: dict[str, Any], message: str) -> None:
        good = Seq2SeqConfig.symmetric(MambaFormerConfig(), vocab_size=5)
        with pytest.raises(ConfigError, match=message):
            Seq2SeqConfig(**{name: getattr(good, name) for name in good.to_json()} | changed)
