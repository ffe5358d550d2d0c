"""An adapted embedding is the dense one rebuilt: in the lookup, in a tied head, in whole models, cached, cut and
generating. Its gradients are right, and other scales are refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import BundleError, ConfigError, StaleCacheError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.heads import MambaFormerForSequenceClassification
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.config import ClassifierConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.svd.embedding import EMBEDDING, SVDEmbedding
from bayes_dispatch.model.mambaformer.svd.files import load_factors, save_factors
from tests.model.tensors import normal, tokens

LINEAR = "bayes_dispatch.model.mambaformer.svd.linear"

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]
MIXERS = {name: MambaFormerConfig(d_model=32, n_heads=2, mixer=name, chunk_size=8) for name in ("mamba1", "mamba2")}


def dense(weight: Tensor, z: Tensor) -> Tensor:
    """E(z) by numpy's decomposition; fewer scales than the rank leave the other singular values."""
    U, s, Vt = np.linalg.svd(weight.detach().numpy(), full_matrices=False)
    s[: len(z)] *= z.detach().numpy()
    return torch.from_numpy(U @ np.diag(s) @ Vt)


def embedding_of(vocab: int, width: int, seed: int = 0) -> SVDEmbedding:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SVDEmbedding(vocab, width).double()


def scales(model: "MambaFormerForCausalLM", *lead: int, rank: int | None = None, seed: int = 0) -> Adaptation:
    """Random scales of every matrix, the embedding's among them."""
    draw = torch.Generator().manual_seed(seed)
    every = model.adaptable() | model.adaptable_on_request()
    drawn = {n: 1 + 0.4 * torch.randn(*lead, min(r, rank or r), generator=draw) for n, r in every.items()}
    return Adaptation({name: z.to(model.dtype) for name, z in drawn.items()})


def rebuilt(model: "MambaFormerForCausalLM", adaptation: Adaptation, row: int) -> "MambaFormerForCausalLM":
    """A copy whose stored weights are those that a row is adapted to."""
    made = copy.deepcopy(model)
    for name, z in adaptation.scales.items():
        module = made.get_submodule(name)
        module.weight.data = dense(module.weight, z if z.ndim == 1 else z[row])
    return made


@settings(max_examples=40, deadline=None)
@given(
    vocab=st.integers(1, 14),
    width=st.integers(1, 9),
    batch=st.integers(1, 3),
    length=st.integers(1, 12),
    rank=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_lookup_and_head_are_of_the_dense_embedding(
    vocab: int, width: int, batch: int, length: int, rank: int, seed: int
) -> None:
    """However many tokens there are to a row of E, all scales or the first few."""
    embedding = embedding_of(vocab, width, seed)
    ids = torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    h, z = normal(batch, length, width, seed=seed + 1), 1 + normal(batch, min(rank, embedding.rank), seed=seed + 2)
    each = [dense(embedding.weight, own) for own in z]
    lookup = torch.stack([F.embedding(ids[b], each[b]) for b in range(batch)])
    logits = torch.stack([F.linear(h[b], each[b]) for b in range(batch)])
    torch.testing.assert_close(embedding(ids, z), lookup, rtol=0, atol=1e-12)
    torch.testing.assert_close(embedding.product(h, z), logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(embedding(ids, z[0]), F.embedding(ids, each[0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(embedding.product(h, z[0]), F.linear(h, each[0]), rtol=0, atol=1e-11)


def test_without_scales_it_is_the_stored_matrix_itself() -> None:
    embedding, ids = embedding_of(9, 7), torch.tensor([[0, 8, 3]])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    torch.testing.assert_close(embedding(ids, torch.ones(7).double()), embedding(ids), rtol=0, atol=1e-14)


def test_new_ones_are_as_those_of_torch() -> None:
    """The same random numbers make the same model as before the embedding could be adapted."""
    torch.manual_seed(3)
    ours, next_ours = SVDEmbedding(11, 5), torch.rand(4)
    torch.manual_seed(3)
    theirs = torch.nn.Embedding(11, 5)
    torch.nn.init.normal_(theirs.weight, std=0.02)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(next_ours, torch.rand(4))


def test_gradients_reach_shared_and_single_scales() -> None:
    """As finite differences have them, for z in the lookup and in the head."""
    embedding, ids, h = embedding_of(5, 4), torch.tensor([[0, 4, 1], [2, 2, 3]]), normal(2, 3, 4)
    embedding.weight.requires_grad_(False)
    for lead in ((), (2,)):
        for rank in (4, 2):
            z = (1 + 0.3 * normal(*lead, rank)).requires_grad_()
            assert torch.autograd.gradcheck(lambda z: (embedding(ids, z), embedding.product(h, z)), z)


@pytest.mark.parametrize("shape", [(0,), (8,), (2, 8), (3, 7), (1, 7), (2, 5, 7)])
def test_scales_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorError, match=r"expected scales of shape \(7,\) or \(2, 7\) or fewer of them, got"):
        embedding_of(9, 7)(torch.tensor([[1], [2]]), torch.ones(shape, dtype=torch.float64))


@settings(max_examples=10, deadline=None)
@given(
    tied=st.booleans(),
    mixer=st.sampled_from(list(MIXERS)),
    rows=st.sampled_from([None, 1, 3]),
    rank=st.sampled_from([None, 5]),
    lengths=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    splits=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_models_equal_ones_whose_weights_were_replaced(
    make_model: MakeModel,
    tied: bool,
    mixer: str,
    rows: int | None,
    rank: int | None,
    lengths: list[int],
    splits: list[int],
) -> None:
    """Every matrix adapted: the whole text at once, and read in parts and steps after ragged prompts."""
    model = make_model(MIXERS[mixer], dtype=torch.float64, tie_embeddings=tied)
    batch = rows or 2
    adaptation = scales(model, *(() if rows is None else (rows,)), rank=rank)
    counts = torch.tensor(lengths[:batch]) + 1
    width, more = int(counts.max()), sum(splits)
    ids = tokens(len(splits), batch, width + more)
    mask = (torch.arange(width) < counts[:, None]).long()
    cache = model.init_cache(batch, width + more)
    with torch.no_grad():
        model(ids[:, :width], attention_mask=mask, cache=cache, adaptation=adaptation)
        parts = [model(part, cache=cache, adaptation=adaptation).logits for part in ids[:, width:].split(splits, 1)]
        got = torch.cat(parts, 1)
        for row in range(batch):
            text = torch.cat([ids[row, : counts[row]], ids[row, width:]])[None]
            expected = rebuilt(model, adaptation, row)(text).logits
            torch.testing.assert_close(got[row], expected[0, counts[row] :], rtol=0, atol=1e-10)
            alone = model(text, adaptation=adaptation.select([row])).logits
            torch.testing.assert_close(alone, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tied", [True, False])
def test_what_the_scales_of_the_embedding_reach(make_model: MakeModel, tied: bool) -> None:
    """Alone they change what is read, and the head where it is tied, as a model with that input or head has it."""
    model, ids = make_model(dtype=torch.float64, tie_embeddings=tied), tokens(0, 1, 7)
    z = 1 + 0.4 * normal(32)
    changed = copy.deepcopy(model)
    changed.embedding.weight.data = dense(model.embedding.weight, z)
    with torch.no_grad():
        out = model(ids, adaptation=Adaptation({EMBEDDING: z}))
        torch.testing.assert_close(out.hidden, changed(ids).hidden, rtol=0, atol=1e-10)
        head = changed.embedding.weight if tied else model.head.weight
        torch.testing.assert_close(out.logits, F.linear(out.hidden, head), rtol=0, atol=1e-10)


def test_laws(make_model: MakeModel) -> None:
    """Ones are the identity but for rounding; E(Σ w z) = Σ w E(z)."""
    model, ids = make_model(dtype=torch.float64), tokens(1, 2, 6)
    with torch.no_grad():
        ones = model(ids, adaptation=Adaptation({EMBEDDING: torch.ones(32).double()})).logits
        torch.testing.assert_close(ones, model(ids).logits, rtol=0, atol=1e-10)
        zs, w = 1 + 0.5 * normal(3, 32), torch.tensor([0.5, 0.2, 0.3]).double()
        blended = model.embedding(ids, w @ zs)
        mixed = sum(w[k] * model.embedding(ids, zs[k]) for k in range(3))
    torch.testing.assert_close(blended, mixed, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tied", "rank"), [(True, 5), (False, None)])
def test_generation_with_and_without_cache(make_model: MakeModel, tied: bool, rank: int | None) -> None:
    """Rows that end, beams and steps of one token: each row as a model with its weights generates alone."""
    model, ids = make_model(dtype=torch.float64, tie_embeddings=tied), tokens(2, 3, 5)
    adaptation = scales(model, 3, rank=rank)
    for given_too in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 1, "temperature": 2.0}):
        given: dict[str, Any] = {"max_new_tokens": 6, **given_too}
        found = model.generate(ids, adaptation=adaptation, **given)
        assert torch.equal(found, model.generate(ids, adaptation=adaptation, use_cache=False, **given))
        for row in range(3):
            alone = rebuilt(model, adaptation, row).generate(ids[row : row + 1], **given)
            assert torch.equal(found[row : row + 1], alone)


def test_compiled_steps_in_float32(make_model: MakeModel) -> None:
    """Few rows decode in compiled blocks, between an adapted lookup and an adapted head."""
    model, ids = make_model(), tokens(3, 2, 9)
    adaptation, cache = scales(model, 2), model.init_cache(2, 9)
    with torch.no_grad():
        steps = [model(ids[:, t : t + 1], cache=cache, adaptation=adaptation).logits for t in range(9)]
        whole = model(ids, adaptation=adaptation).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=5e-5)


class TestStaleCaches:
    """What was read under one embedding is not gone on from under another."""

    def filled(self, model: "MambaFormerForCausalLM", adaptation: Adaptation) -> Cache:
        cache = model.init_cache(2, 8)
        with torch.no_grad():
            model(tokens(4, 2, 3), cache=cache, adaptation=adaptation)
        return cache

    def test_other_scales_are_refused(self, model64: "MambaFormerForCausalLM") -> None:
        z, others = 1 + 0.4 * normal(32), 1 + 0.4 * normal(2, 32, seed=2)
        one, none = Adaptation({EMBEDDING: z}), Adaptation.identity()
        rows = Adaptation({EMBEDDING: others})
        for made, got in ((one, none), (none, one), (one, rows), (rows, rows.select([1, 0])), (rows, one)):
            cache = self.filled(model64, made)
            before = [t.clone() for state in cache.states for t in state.tensors().values()]
            with pytest.raises(StaleCacheError, match="expected the scales that filled block 0"), torch.no_grad():
                model64(tokens(5, 2, 1), cache=cache, adaptation=got)
            after = [t for state in cache.states for t in state.tensors().values()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_equal_scales_go_on_and_rows_may_change_places(
        self, model64: "MambaFormerForCausalLM", tmp_path: Path
    ) -> None:
        rows = scales(model64, 2)
        cache = self.filled(model64, rows).reorder([1, 0, 1])
        cache.save(tmp_path / "cache")
        again = Adaptation({name: z[torch.tensor([1, 0, 1])].clone() for name, z in rows.scales.items()})
        following, ids = tokens(6, 3, 1), tokens(4, 2, 3)[[1, 0, 1]]
        with torch.no_grad():
            whole = model64(torch.cat([ids, following], 1), adaptation=again).logits[:, -1:]
            for each in (cache, Cache.load(tmp_path / "cache")):
                got = model64(following, cache=each, adaptation=again).logits
                torch.testing.assert_close(got, whole, rtol=0, atol=1e-10)

    def test_digests_of_models_without_such_scales_are_as_before(self) -> None:
        z = torch.linspace(0, 1, 4)
        plain = Adaptation({"blocks.0.mixer.in_proj": z})
        assert plain.digest(0) != Adaptation({EMBEDDING: z, **plain.scales}).digest(0) != ""


def test_a_cut_leaves_nothing_below(make_model: MakeModel) -> None:
    """Before the first block the parts read tokens; after it no embedding can be adapted any more."""
    model = make_model(dtype=torch.float64)
    ids, adaptation = tokens(7, 2, 6), scales(model, 2)
    assert model.cut(adaptation.scales) == 0
    with torch.no_grad():
        whole = model(ids, adaptation=adaptation).hidden
        torch.testing.assert_close(model.upper(0, ids, adaptation=adaptation), whole, rtol=0, atol=1e-12)
        plain = model.upper(0, model.below(0, ids), adaptation=Adaptation.identity())
        torch.testing.assert_close(plain, model(ids).hidden, rtol=0, atol=1e-12)
    only = Adaptation({EMBEDDING: torch.ones(32).double()})
    with pytest.raises(TensorError, match="expected scales of block 1 and above alone"):
        model.upper(1, model.below(1, ids), adaptation=only)
    with pytest.raises(TensorError, match=r"expected tokens, whose embedding is adapted, got torch\.float64"):
        model.upper(0, model.below(0, ids), adaptation=only)
    with pytest.raises(TensorError, match=r"expected input_ids in 0 … 257, got 300 … 300"):
        model.upper(0, torch.tensor([[300]]))


def test_a_classifier_reads_under_it() -> None:
    config = ClassifierConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258, num_labels=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MambaFormerForSequenceClassification(config).double()
    z, ids = 1 + 0.4 * normal(2, 32), tokens(8, 2, 5)
    with torch.no_grad():
        got = model(ids, adaptation=Adaptation({EMBEDDING: z})).logits
        for row in range(2):
            changed = copy.deepcopy(model)
            changed.embedding.weight.data = dense(model.embedding.weight, z[row])
            torch.testing.assert_close(got[row], changed(ids[row : row + 1]).logits[0], rtol=0, atol=1e-10)


def test_decompositions_of_it_are_kept_on_request(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file has it where that was asked for; files without it are whole, too."""
    model, other = make_model(), make_model()
    assert EMBEDDING not in save_factors(model, tmp_path)
    assert load_factors(other, tmp_path)
    assert save_factors(model, tmp_path, 3, also=(EMBEDDING,))[EMBEDDING] < 1e-5
    assert load_factors(other, tmp_path)
    monkeypatch.setattr(f"{LINEAR}.decompose", lambda *_: pytest.fail("decomposed again"))
    assert torch.equal(other.embedding.factors(3).U, model.embedding.factors(3).U)
    with pytest.raises(ConfigError, match=r"expected further matrices among \['embedding'\], got 'head'"):
        save_factors(model, tmp_path, also=("head",))
    with pytest.raises(BundleError, match="expected factors of base model"):
        load_factors(make_model(seed=3), tmp_path)
