"""The contract of ``Backbone`` and ``Session``: every backbone passes every law here, against the plain model."""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_dispatch.errors import CacheFullError, ConfigError, StaleCacheError, TensorError
from bayes_dispatch.model.adaptation import Adaptation, Delta
from bayes_dispatch.model.backbone import Backbone, Read, Session, Tokenizer
from bayes_dispatch.model.frozen import frozen
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.subwords import train_subwords
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from tests.tiny import KINDS, tiny_backbone, tiny_converted

MakeModel = Callable[..., MambaFormerForCausalLM]

FACTORIES: dict[str, Callable[[MakeModel], Any]] = {
    **{kind: lambda make, kind=kind: tiny_backbone(kind) for kind in KINDS},
    "mambaformer-mamba2": lambda make: make(dtype=torch.float64),
    "mambaformer-mamba1": lambda make: make(replace(MambaFormerConfig.tiny(), mixer="mamba1"), dtype=torch.float64),
    "mambaformer-subwords": lambda make: make(dtype=torch.float64, tokenizer=train_subwords(["the other"] * 9, 262)),
    "mambaformer-bamba": lambda make: tiny_converted("bamba"),  # a hybrid with MLPs, whose heads are half turned
}
# How far log-probabilities may be from the plain model's, in float64. Recurrent blocks of transformers compute their
# states in float32 whatever the dtype of the model; measured: at most 3.1e-7, and 6.7e-6 of Mamba2. Others: 2e-14.
BOUNDS = {"granite": 1e-6, "falconh1": 1e-6, "jamba": 1e-6, "bamba": 1e-6, "mamba2": 2e-5}
WIDTH = 20  # tokens: more than the window of gemma3, and than the chunks of recurrent blocks


# the network of subwords is that of bytes
every_tokenizer = pytest.mark.parametrize("kind", FACTORIES, indirect=True)


@pytest.fixture(scope="module", params=[kind for kind in FACTORIES if kind != "mambaformer-subwords"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def backbone(kind: str, make_model: MakeModel) -> Any:
    return FACTORIES[kind](make_model)


@pytest.fixture(scope="module")
def bound(kind: str) -> float:
    return BOUNDS.get(kind, 1e-9)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def tokens(backbone: Any, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(seed))


def network(backbone: Any) -> Any:
    return getattr(backbone, "model", backbone)


def plain(backbone: Any, ids: Tensor) -> Tensor:
    """Log-probabilities (R, T, V) of the model itself."""
    return network(backbone)(ids).logits.log_softmax(-1)


def blocks(backbone: Any) -> nn.ModuleList:
    lists = (each for each in network(backbone).modules() if isinstance(each, nn.ModuleList))
    return next(each for each in lists if len(each) == backbone.depth)


def scales(backbone: Any, *rows: int, seed: int = 0) -> Adaptation:
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: 1 + 0.5 * torch.randn(*rows, rank, generator=generator, dtype=torch.float64)
        for name, rank in backbone.adaptable().items()
    }
    return Adaptation(drawn)


def deltas(backbone: Any, *rows: int, seed: int = 0, size: float = 1.0) -> Adaptation:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

    factors = {name: (drawn(out, 3), drawn(3, width)) for name, (out, width) in backbone.linears().items()}
    return Adaptation({}, {name: Delta(*both, drawn(*rows, 3) * size) for name, both in factors.items()})


def adaptations(backbone: Any, *rows: int, seed: int = 0) -> list[Adaptation]:
    """Of each sort that the backbone takes."""
    return [scales(backbone, *rows, seed=seed), deltas(backbone, *rows, seed=seed)]


def read(session: Session, ids: Tensor, *pieces: int) -> Read:
    """All tokens, in pieces, and log-probabilities after each of them."""
    parts = [session.read(part, own=True, tail=part.shape[1]) for part in ids.split(list(pieces) or ids.shape[1], 1)]
    return Read(*(torch.cat([part[n] for part in parts], 1) for n in range(3)))  # type: ignore[misc]


def close(one: Tensor | None, other: Tensor | None, bound: float) -> None:
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one, other, rtol=0, atol=bound, equal_nan=True, check_dtype=False)


def same(one: Read, other: Read, bound: float) -> None:
    close(one.own, other.own, bound)
    close(one.after, other.after, bound)


@every_tokenizer
def test_it_is_a_backbone_with_a_tokenizer_and_facts(kind: str, backbone: Any) -> None:
    assert isinstance(backbone, Backbone)
    assert isinstance(backbone.tokenizer, Tokenizer)
    assert backbone.tokenizer.vocab_size <= backbone.vocab_size
    if "mambaformer" not in kind:
        assert backbone.adaptable().items() <= {name: min(shape) for name, shape in backbone.linears().items()}.items()
    assert isinstance(backbone.open(1, 1), Session)
    assert backbone.depth == len(blocks(backbone))
    assert backbone.cuts
    assert backbone.continues == (kind != "jamba")  # its library drops the state where several tokens follow at once


@every_tokenizer
@pytest.mark.parametrize("text", ["", "the other\n", " ab é日 😀"])
def test_its_tokenizer_tells_where_tokens_are_and_streams_them(backbone: Any, text: str) -> None:
    tokenizer = backbone.tokenizer
    (*_, (_, stop)) = ((0, 0), *tokenizer.tokenize(text, begin=False).spans)
    assert stop == len(text.encode())
    begun, later = tokenizer.tokenize("a "), tokenizer.tokenize(text, begin=False)
    stream = tokenizer.stream(begun.ids)
    assert "".join(map(stream.add, later.ids)) + stream.end() == text
    assert tokenizer.decode(later.ids) == text
    assert tokenizer.continues.shape == (tokenizer.vocab_size,)
    assert bool(tokenizer.continues[list(later.ids)].all())


@pytest.mark.parametrize("pieces", [(WIDTH,), (1, 7, 1, 5, 6), (1,) * WIDTH, (13, 1, 1, 5)])
def test_reading_in_pieces_is_reading_at_once_is_the_plain_model(
    backbone: Any, bound: float, pieces: tuple[int, ...]
) -> None:
    ids = tokens(backbone, 2, WIDTH)
    full = plain(backbone, ids)
    session = backbone.open(2, WIDTH)
    said = read(session, ids, *pieces)
    close(said.after, full, bound)
    close(session.after(said.hidden[:, 3:5]), full[:, 3:5], bound)
    assert said.own is not None
    assert bool(said.own[:, 0].isnan().all())
    close(said.own[:, 1:], full[:, :-1].gather(2, ids[:, 1:, None])[..., 0], bound)
    assert session.lengths.tolist() == [WIDTH] * 2
    assert session.evaluated == 2 * WIDTH * backbone.depth


def test_no_more_log_probabilities_of_own_tokens_than_may_be_are_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a MambaFormer with a vocabulary much larger than bytes."""
    vocabulary = 2000
    model = MambaFormerForCausalLM(LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=vocabulary)).eval()
    numbers, logits = list[int](), model.logits

    def counted(hidden: Tensor, adaptation: Adaptation | None = None) -> Tensor:
        found = logits(hidden, adaptation)
        numbers.append(found.numel())
        return found

    monkeypatch.setattr(model, "logits", counted)
    monkeypatch.setattr("bayes_dispatch.model.mambaformer.session.LOGITS_AT_ONCE", 3 * 2 * vocabulary)
    monkeypatch.setattr("bayes_dispatch.model.mambaformer.session.ROWS_AT_ONCE", 1)
    ids = torch.randint(258, (2, 40), generator=torch.Generator().manual_seed(0))
    model.open(2, 40).read(ids, own=True)
    assert (max(numbers), sum(numbers)) == (3 * 2 * vocabulary, 40 * 2 * vocabulary)
    numbers.clear()
    model.score(ids)
    assert (max(numbers), sum(numbers)) == (3 * 2 * vocabulary, 39 * 2 * vocabulary)


@pytest.mark.parametrize("kind", KINDS, indirect=True)  # test_svd_linear.py merges those of a MambaFormer
def test_an_adapted_row_is_the_model_with_its_matrices_merged(backbone: Any, bound: float) -> None:
    ids = tokens(backbone, 1, WIDTH)
    for adaptation in adaptations(backbone):
        merged = deepcopy(backbone.model)
        for name, delta in backbone.deltas(adaptation).items():
            module = merged.get_submodule(name)
            added = delta.up @ torch.diag(delta.c) @ delta.down  # (out, in)
            turned = added.T if module.weight.shape != added.shape or isinstance(module, nn.Embedding) else added
            if type(module).__name__ == "Conv1D":
                turned = added.T
            module.weight = nn.Parameter(module.weight + turned)
        full = merged(ids).logits.log_softmax(-1)
        close(read(backbone.open(1, WIDTH, adaptation), ids, 12, 8).after, full, max(bound, 1e-8))
        assert (full - plain(backbone, ids)).abs().max() > 0.1


def test_rows_of_a_batch_are_what_they_are_alone(backbone: Any, bound: float) -> None:
    ids = tokens(backbone, 3, WIDTH)
    for adaptation in [None, *adaptations(backbone, 3)]:
        whole = read(backbone.open(3, WIDTH, adaptation), ids, 9, 1, 10)
        for row in range(3):
            alone = None if adaptation is None else _shared(adaptation, row)
            said = read(backbone.open(1, WIDTH, alone), ids[row : row + 1], 9, 1, 10)
            same(Read(*(each[row : row + 1] for each in whole[:3])), said, bound)  # type: ignore[index]


def test_rows_of_different_lengths_are_what_they_are_alone(backbone: Any, bound: float) -> None:
    """On the right they are padded; the padding changes nothing, then or later."""
    ids, lengths, later = tokens(backbone, 3, WIDTH), [WIDTH, 11, 2], tokens(backbone, 3, 9, seed=1)
    adaptation = scales(backbone, 3)
    session = backbone.open(3, WIDTH + 9, adaptation)
    first = session.read(ids, torch.tensor(lengths), own=True, tail=2)
    assert session.lengths.tolist() == lengths
    assert session.evaluated == sum(lengths) * backbone.depth
    then = read(session, later, 4, 1, 4)
    for row, length in enumerate(lengths):
        alone = backbone.open(1, WIDTH + 9, _shared(adaptation, row))
        said = alone.read(ids[row : row + 1, :length], own=True, tail=2)
        for one, other in [(first.own, said.own), (first.hidden, said.hidden)]:
            close(one[row : row + 1, :length], other, bound * 10)  # type: ignore[index]
        close(first.after[row : row + 1], said.after, bound)  # type: ignore[index]
        same(Read(*(each[row : row + 1] for each in then[:3])), read(alone, later[row : row + 1]), bound)  # type: ignore[index]


@pytest.mark.parametrize(("rows", "adapted"), [([2, 0, 1], True), ([1, 1, 0, 2, 2], True), ([1], False)])
def test_rows_are_permuted_repeated_and_dropped(backbone: Any, bound: float, rows: list[int], adapted: bool) -> None:
    ids, lengths, later = tokens(backbone, 3, 10), [10, 4, 7], tokens(backbone, len(rows), 8, seed=1)
    adaptation = scales(backbone, 3) if adapted else None
    session, kept = (backbone.open(3, 18, adaptation) for _ in range(2))
    for each in (session, kept):
        each.read(ids, torch.tensor(lengths))
    other = session.select(rows)
    kept.keep(rows)
    assert (other.rows, kept.rows) == (len(rows), len(rows))
    assert other.lengths.tolist() == kept.lengths.tolist() == [lengths[row] for row in rows]
    gone_on = read(other, later, 3, 5)
    same(read(kept, later, 3, 5), gone_on, bound)
    for place, row in enumerate(rows):
        alone = backbone.open(1, 18, None if adaptation is None else _shared(adaptation, row))
        alone.read(ids[row : row + 1, : lengths[row]])
        said = read(alone, later[place : place + 1])
        same(Read(*(each[place : place + 1] for each in gone_on[:3])), said, bound)  # type: ignore[index]


@pytest.mark.parametrize("cut", [False, True])
def test_sessions_that_join_go_on_as_they_would_have_alone(backbone: Any, bound: float, cut: bool) -> None:
    """Of different lengths, adapted, joined one after the other, with rows that leave in between; no slot is wasted."""
    lengths, adaptation = [3, 17, 9, 12], adaptations(backbone, 4)[-1]
    ids, later = tokens(backbone, 4, WIDTH), tokens(backbone, 4, 7, seed=1)
    blocks = range(int(cut), backbone.depth)
    below = backbone.open(4, 32, blocks=range(1)) if cut else None

    def entering(text: Tensor) -> Tensor | None:
        return None if below is None else backbone.open(1, 32, blocks=range(1)).read(text[None]).hidden

    texts = [torch.cat([ids[row, :length], later[row]]) for row, length in enumerate(lengths)]
    whole = [entering(text) for text in texts]

    def read(session: Session, rows: list[int], start: int, stop: int) -> Read:
        places = [slice(lengths[row] + start, lengths[row] + stop) for row in rows]
        x = (
            None
            if below is None
            else torch.cat([whole[row][:, place] for row, place in zip(rows, places, strict=True)])
        )  # type: ignore[index]
        given = torch.stack([texts[row][place] for row, place in zip(rows, places, strict=True)])
        return session.read(given, None, x, own=True)

    def begun(row: int, stop: int) -> Session:
        session = backbone.open(1, 32, _above(backbone, _shared(adaptation, row), cut), blocks)
        x = None if below is None else whole[row][:, : lengths[row]]  # type: ignore[index]
        session.read(texts[row][None, : lengths[row]], None, x)
        for at in range(stop):
            read(session, [row], at, at + 1)
        return session

    alone = [begun(row, 0) for row in range(4)]
    steps = [[read(session, [row], at, at + 1) for at in range(7)] for row, session in enumerate(alone)]

    def goes_on(session: Session, rows: list[int], start: int, stop: int) -> None:
        said = read(session, rows, start, stop)
        for place, row in enumerate(rows):
            own = torch.cat([step.own for step in steps[row][start:stop]], 1)  # type: ignore[misc]
            expected = steps[row][stop - 1]._replace(own=own)
            same(Read(*(each[place : place + 1] for each in said[:3])), expected, bound * 10)  # type: ignore[index]

    batch, late = begun(0, 0), begun(2, 2)
    batch.join(begun(1, 0))
    goes_on(batch, [0, 1], 0, 2)
    batch.join(late)
    assert late.lengths.tolist() == [lengths[2] + 2]
    goes_on(late, [2], 2, 4)
    goes_on(batch, [0, 1, 2], 2, 4)
    batch.keep([0, 2])
    goes_on(batch, [0, 2], 4, 5)
    batch.join(begun(3, 5))
    goes_on(batch, [0, 2, 3], 5, 7)
    assert batch.lengths.tolist() == [lengths[row] + 7 for row in (0, 2, 3)]
    batch.keep([0])
    if isinstance(backbone, TransformersBackbone):
        assert batch.nbytes == alone[0].nbytes


@pytest.mark.parametrize("kind_of", [scales, deltas])
def test_rows_of_base_and_of_other_blocks_join(backbone: Any, bound: float, kind_of: Any) -> None:
    """In any order: a row goes on under what adapts it alone."""
    ids, later, whole = tokens(backbone, 3, 6), tokens(backbone, 3, 3, seed=1), kind_of(backbone)
    upper = _from(backbone, whole, backbone.depth // 2)
    lower = Adaptation(
        {name: z for name, z in whole.scales.items() if name not in upper.scales},
        {name: each for name, each in whole.deltas.items() if name not in upper.deltas},
    )

    def begun(row: int) -> Session:
        session = backbone.open(1, 12, (None, lower, upper)[row])
        session.read(ids[row : row + 1])
        return session  # type: ignore[no-any-return]

    alone = [read(begun(row), later[row : row + 1]) for row in range(3)]
    for order in ([0, 1, 2], [2, 0, 1]):
        session = begun(order[0])
        for row in order[1:]:
            session.join(begun(row))
        said = read(session, later[order], 1, 2)
        for place, row in enumerate(order):
            same(Read(*(each[place : place + 1] for each in said[:3])), alone[row], bound * 10)  # type: ignore[index]


def test_sessions_that_do_not_fit_are_not_joined(backbone: Any, bound: float) -> None:
    ids, later = tokens(backbone, 1, 6), tokens(backbone, 1, 3, seed=1)
    session, twin, half, empty = (
        backbone.open(1, 12),
        backbone.open(1, 12),
        backbone.open(1, 12, blocks=range(1)),
        backbone.open(1, 12),
    )
    for each in (session, twin, half):
        each.read(ids)
    for other in (half, empty):
        with pytest.raises(TensorError, match="expected"):
            session.join(other)
    one, two = (backbone.open(1, 12, deltas(backbone, seed=seed)) for seed in (0, 1))
    for each in (one, two):
        each.read(ids)
    with pytest.raises(TensorError, match="same factors"):
        one.join(two)
    same(read(session, later), read(twin, later), 0)


def test_what_is_selected_goes_on_alone_and_leaves_the_first_as_it_was(backbone: Any) -> None:
    ids, later = tokens(backbone, 2, 10), tokens(backbone, 2, 6, seed=1)
    first, twin = backbone.open(2, 16), backbone.open(2, 16)
    for session in (first, twin):
        session.read(ids)
    other = first.select([0, 1])
    before = first.nbytes
    read(other, tokens(backbone, 2, 6, seed=2), 1, 5)
    assert first.nbytes == before
    expected = read(twin, later, 1, 5)
    same(read(first, later, 1, 5), expected, 0)
    del other
    early = backbone.open(2, 16)  # before anything is read, too
    selected = early.select([1, 0])
    selected.read(ids[[1, 0]])
    early.read(ids)
    same(read(early, later, 1, 5), expected, 0)


def test_rows_that_there_are_not_change_nothing(backbone: Any) -> None:
    ids, later = tokens(backbone, 2, 6), tokens(backbone, 2, 3, seed=1)
    session, twin = backbone.open(2, 9), backbone.open(2, 9)
    for each in (session, twin):
        each.read(ids)
    for rows in ([], [2], [0, -1]):
        for call in (session.keep, session.select):
            with pytest.raises(TensorError, match="expected some rows"):
                call(rows)
    same(read(session, later), read(twin, later), 0)


def test_deltas_of_nothing_are_the_plain_model_to_the_last_bit(backbone: Any) -> None:
    ids = tokens(backbone, 3, WIDTH)
    base = read(backbone.open(3, WIDTH), ids, 15, 5)
    nothing, some = deltas(backbone, size=0.0), deltas(backbone, 3)
    for delta in some.deltas.values():
        delta.c[[0, 2]] = 0.0
    cases = [(nothing, some)]
    if not isinstance(backbone, TransformersBackbone):  # it computes the change that scales make, too
        drawn = scales(backbone, 3).scales.items()
        ones = Adaptation({name: torch.ones_like(z[1]) for name, z in drawn})
        cases.append((ones, Adaptation({n: torch.stack([ones.scales[n], z[1], ones.scales[n]]) for n, z in drawn})))
    rounding = 0.0 if isinstance(backbone, TransformersBackbone) else 1e-12
    for nothing, some in cases:
        same(read(backbone.open(3, WIDTH, nothing), ids, 15, 5), base, 0)
        said = read(backbone.open(3, WIDTH, some), ids, 15, 5)
        same(Read(*(each[[0, 2]] for each in said[:3])), Read(*(each[[0, 2]] for each in base[:3])), rounding)  # type: ignore[index]
        assert said.after is not None
        assert base.after is not None
        assert (said.after[1] - base.after[1]).abs().max() > 0.1


def test_cut_is_uncut_at_every_block(backbone: Any, bound: float) -> None:
    ids, lengths, later = tokens(backbone, 3, WIDTH), torch.tensor([WIDTH, 9, 13]), tokens(backbone, 3, 4, seed=1)
    whole = backbone.open(3, WIDTH + 4)
    first, then = whole.read(ids, lengths, own=True), read(whole, later, 1, 3)
    for cut in range(1, backbone.depth):
        below, above = (
            backbone.open(3, WIDTH + 4, blocks=range(cut)),
            backbone.open(3, WIDTH + 4, blocks=range(cut, backbone.depth)),
        )
        low = below.read(ids, lengths)
        assert low.own is None
        assert low.after is None
        high = above.read(ids, lengths, low.hidden, own=True)
        close(high.after, first.after, bound)
        for row, length in enumerate(lengths):
            close(high.own[row, :length], first.own[row, :length], bound)  # type: ignore[index]
        below, above = below.select([0, 1, 2]), above.select([0, 1, 2])
        parts = [above.read(part, x=below.read(part).hidden, own=True, tail=3) for part in later.split([1, 3], 1)]
        close(torch.cat([part.own for part in parts], 1), then.own, bound)  # type: ignore[misc]
        close(torch.cat([part.after for part in parts], 1), then.after, bound)  # type: ignore[misc]
        assert below.evaluated + above.evaluated == whole.evaluated
        assert 0 < below.nbytes <= whole.nbytes  # an MLP above keeps nothing


def test_states_between_blocks_are_what_the_blocks_below_give(backbone: Any, bound: float) -> None:
    ids, lengths, later = tokens(backbone, 3, WIDTH), torch.tensor([WIDTH, 9, 13]), tokens(backbone, 3, 4, seed=1)
    depths = range(1, backbone.depth + 1)
    whole = backbone.open(3, WIDTH + 8)
    first = whole.read(ids, lengths, depths=depths)
    then = [whole.read(part, depths=depths).states for part in later.split([1, 3], 1)]
    for depth in depths[:-1]:
        below = backbone.open(3, WIDTH + 8, blocks=range(depth))
        low = below.read(ids, lengths, depths=[depth])
        for row, length in enumerate(lengths):
            close(first.states[depth - 1][row, :length], low.hidden[row, :length], bound)
            close(low.states[0][row, :length], low.hidden[row, :length], 0)
        for said, part in zip(then, later.split([1, 3], 1), strict=True):
            close(said[depth - 1], below.read(part).hidden, bound)
        afresh = backbone.open(3, WIDTH + 8, blocks=range(depth))
        with pytest.raises(ConfigError, match=f"expected depths of 1 … {depth}, got {depth + 1}"):
            afresh.read(ids, lengths, depths=[depth + 1])
        close(afresh.read(ids, lengths).hidden, low.hidden, 0)


def test_a_copy_answers_as_the_backbone_does(backbone: Any) -> None:
    twin, ids = copy.deepcopy(backbone), tokens(backbone, 2, WIDTH)
    for adaptation in (None, *adaptations(backbone, 2)):
        said, again = (each.open(2, WIDTH, adaptation).read(ids, own=True, depths=[1]) for each in (backbone, twin))
        same(Read(*said[:3]), Read(*again[:3]), 0)
        close(said.states[0], again.states[0], 0)
    assert twin.fingerprint() == backbone.fingerprint()


def test_the_cut_is_below_all_that_is_adapted(backbone: Any) -> None:
    ids = tokens(backbone, 1, 6)
    base = backbone.open(1, 6, blocks=range(backbone.depth - 1)).read(ids).hidden
    last = [name for name in backbone.adaptable() if backbone.cut([name]) == backbone.depth - 1]
    assert last
    assert backbone.cut(list(backbone.adaptable())) == 0
    for name in last:
        z = torch.full((backbone.adaptable()[name],), 1.5, dtype=torch.float64)
        below = backbone.open(1, 6, Adaptation({name: z}), range(backbone.depth - 1))
        close(below.read(ids).hidden, base, 0)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_what_is_beside_the_blocks_belongs_to_the_nearest(backbone: Any) -> None:
    head = [name for name in backbone.linears() if name not in backbone.adaptable()]
    assert [backbone.cut([name]) for name in head] == [0] * (len(head) - 1) + [backbone.depth - 1]


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_scales_are_of_the_largest_singular_values(backbone: Any, bound: float) -> None:
    ids, given, merged = tokens(backbone, 1, WIDTH), {}, deepcopy(backbone.model)
    for n, (name, rank) in enumerate(backbone.adaptable().items()):
        given[name] = torch.linspace(0.5, 1.5, rank if n % 2 else 3, dtype=torch.float64)
        weight = merged.get_submodule(name).weight
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        values[: len(given[name])] *= given[name]
        weight.copy_(left @ torch.diag(values) @ right)
    close(
        read(backbone.open(1, WIDTH, Adaptation(given)), ids).after,
        merged(ids).logits.log_softmax(-1),
        max(bound, 1e-8),
    )


def test_scores_are_the_log_probabilities_of_the_tokens(backbone: Any, bound: float) -> None:
    ids, lengths = tokens(backbone, 2, WIDTH), torch.tensor([WIDTH, 7])
    adaptation = scales(backbone, 2)
    said = backbone.score(ids, lengths, adaptation)
    own = backbone.open(2, WIDTH, adaptation).read(ids, lengths, own=True).own
    for row, length in enumerate(lengths):
        close(said[row, :length], own[row, :length], bound)


def test_the_fingerprint_tells_weights_apart(kind: str, backbone: Any, make_model: MakeModel) -> None:
    other = FACTORIES[kind](make_model)
    seen = {backbone.fingerprint()}
    assert other.fingerprint() in seen
    for parameter in network(other).parameters():
        parameter.flatten()[-1] += 1e-3
        found = other.fingerprint()
        assert found not in seen
        seen.add(found)


def test_an_interrupted_read_leaves_a_session_that_refuses(backbone: Any) -> None:
    ids = tokens(backbone, 2, 6)
    session = backbone.open(2, 20)
    session.read(ids)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    hook = blocks(backbone)[-1].register_forward_pre_hook(broken)
    try:
        with pytest.raises(KeyboardInterrupt):
            session.read(ids)
    finally:
        hook.remove()
    for call in (lambda: session.read(ids), lambda: session.keep([0]), lambda: session.select([0])):
        with pytest.raises(StaleCacheError):
            call()


@pytest.mark.parametrize("change", ["keep", "join"])
def test_an_interrupted_change_is_none_or_whole_or_marked(backbone: Any, change: str) -> None:
    """Wherever it comes: the session is as before it, or as after it, or refuses."""
    ids = tokens(backbone, 3, 6)

    def session(rows: slice) -> Session:
        opened = backbone.open(len(ids[rows]), 20)
        opened.read(ids[rows, :4])
        return opened  # type: ignore[no-any-return]

    def changed(whole: Session) -> None:
        whole.keep([1]) if change == "keep" else whole.join(third)

    untouched, done, third = session(slice(2)), session(slice(2)), session(slice(2, 3))
    lines = interrupted(partial(changed, done), None)
    expected = {each.rows: read(each, ids[: each.rows, 4:]).after for each in (untouched, done)}
    for line in np.linspace(1, lines, 8, dtype=int).tolist():
        each = session(slice(2))
        interrupted(partial(changed, each), line)
        with suppress(StaleCacheError):
            torch.testing.assert_close(read(each, ids[: each.rows, 4:]).after, expected[each.rows])


def interrupted(call: Callable[[], object], at: int | None) -> int:
    """Interrupt a call at its n-th line of this package's model; how many there are, where it is not."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if f"{os.sep}model{os.sep}" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        assert at is not None
    finally:
        sys.settrace(before)
    return count


def test_there_is_room_for_so_many_tokens(backbone: Any) -> None:
    ids = tokens(backbone, 2, 6)
    session = backbone.open(2, 8)
    session.read(ids)
    with pytest.raises(CacheFullError, match="8"):
        session.read(ids)
    session.reserve(12)
    assert read(session, ids).after.shape[:2] == (2, 6)  # type: ignore[union-attr]


def test_shapes_that_do_not_fit_are_refused_and_change_nothing(backbone: Any, unchecked: None) -> None:
    ids = tokens(backbone, 2, 6)
    session, twin = backbone.open(2, 12), backbone.open(2, 12)
    for each in (session, twin):
        each.read(ids)
    wrong: list[Callable[[], object]] = [
        lambda: session.read(ids[:1]),
        lambda: session.read(ids[:, :0]),
        lambda: session.read(torch.full((2, 1), backbone.vocab_size)),
        lambda: session.read(ids - 300),
        lambda: backbone.score(ids - 300),
        lambda: session.read(ids, torch.tensor([6, 0])),
        lambda: session.read(ids, torch.tensor([6, 7])),
        lambda: session.read(ids, torch.tensor([6])),
        lambda: backbone.open(2, 6, scales(backbone, 3)),
        lambda: backbone.open(2, 6, Adaptation({"nothing": torch.ones(3)})),
        lambda: backbone.open(2, 6, blocks=range(backbone.depth + 1)),
        lambda: backbone.open(2, 6, blocks=range(2, 2)),
        lambda: backbone.open(0, 6),
        lambda: backbone.open(1.5, 6),
        lambda: backbone.open(2, 0),
        lambda: backbone.open(2, "6"),
        lambda: session.read(ids, tail=0),
        lambda: session.read(ids, tail=-1),
        lambda: backbone.score(ids, torch.tensor([6, 7])),
        lambda: backbone.score(ids, torch.tensor([6])),
        lambda: backbone.open(2, 6, blocks=range(1, backbone.depth)).read(ids),
    ]
    for call in wrong:
        with pytest.raises((TensorError, ConfigError), match="expected"):
            call()
    same(read(session, ids), read(twin, ids), 0)


def test_hidden_states_that_do_not_fit_are_refused_and_change_nothing(backbone: Any, unchecked: None) -> None:
    ids = tokens(backbone, 2, 6)
    x = backbone.open(2, 6, blocks=range(1)).read(ids).hidden
    session, twin = (backbone.open(2, 12, blocks=range(1, backbone.depth)) for _ in range(2))
    wrong = [None, x[:, :5], x[:1], x[0]]
    if not isinstance(backbone, TransformersBackbone):
        wrong += [x[..., :5], x.float(), x.long()]
    for each in wrong:
        with pytest.raises(TensorError, match="expected hidden states"):
            session.read(ids, x=each)
    with pytest.raises(TensorError, match="expected input_ids in"):
        session.read(ids - 300, x=x)
    first, second = (each.read(ids, x=x, own=True) for each in (session, twin))
    same(first, second, 0)


def test_ids_of_32_bits_are_ids(backbone: Any) -> None:
    ids, counts = tokens(backbone, 2, 6), torch.tensor([6, 4])
    close(backbone.score(ids.int(), counts.int()), backbone.score(ids, counts), 0)
    for given in (None, counts):
        said = [backbone.open(2, 6).read(each, given, own=True) for each in (ids.int(), ids)]
        same(*said, 0)


def test_threads_with_different_adaptations_share_a_model(
    backbone: Any, in_threads: Callable[[int, Callable[[], Any]], list[Any]]
) -> None:
    ids = tokens(backbone, 2, WIDTH)
    made = [each for seed in range(4) for each in adaptations(backbone, seed=seed)][:4]
    cut = backbone.depth // 2
    if not isinstance(backbone, TransformersBackbone):  # a MambaFormer takes no scales of blocks that do not run
        made = [_from(backbone, each, cut) for each in made]

    def run(adaptation: Adaptation) -> Read:
        with torch.no_grad():
            below, above = (
                backbone.open(2, WIDTH, None, range(cut)),
                backbone.open(2, WIDTH, adaptation, range(cut, backbone.depth)),
            )
            above.read(ids[:, :15], x=below.read(ids[:, :15]).hidden)
            return above.read(ids[:, 15:], x=below.read(ids[:, 15:]).hidden, own=True, tail=5)

    alone, jobs = [run(adaptation) for adaptation in made], iter(made)
    found = in_threads(4, lambda: (lambda mine: (mine, run(mine)))(next(jobs)))
    for adaptation, said in found:
        same(said, alone[next(n for n, each in enumerate(made) if each is adaptation)], 0)


def test_what_is_kept_grows_and_is_counted(backbone: Any) -> None:
    ids = tokens(backbone, 2, WIDTH)
    session = backbone.open(2, 2 * WIDTH)
    session.read(ids)
    once = session.nbytes
    below = backbone.open(2, 2 * WIDTH, blocks=range(backbone.depth - 1))  # which predicts nothing
    below.read(ids)
    assert once - below.nbytes >= 2 * backbone.vocab_size * 4
    assert session.select([0]).nbytes < once
    session.keep([0, 1, 0, 1])
    assert session.nbytes > once


def _above(backbone: Any, adaptation: Adaptation, cut: bool) -> Adaptation:
    """What of it is above the first block, where only that is run."""
    return (
        _from(backbone, adaptation, int(cut)) if cut and not isinstance(backbone, TransformersBackbone) else adaptation
    )


def _from(backbone: Any, adaptation: Adaptation, block: int) -> Adaptation:
    """What of it is in this block or above."""

    def own(named: Any) -> dict[str, Any]:
        return {name: each for name, each in named.items() if backbone.cut([name]) >= block}

    return Adaptation(own(adaptation.scales), own(adaptation.deltas))


def _entering(backbone: Any, ids: Tensor, cut: bool) -> Tensor | None:
    """What comes into the second block."""
    return backbone.open(1, ids.shape[1], blocks=range(1)).read(ids).hidden if cut else None


def _shared(adaptation: Adaptation, row: int) -> Adaptation:
    deltas = {name: delta._replace(c=delta.c[row]) for name, delta in adaptation.deltas.items()}
    return Adaptation({name: z[row] for name, z in adaptation.scales.items()}, deltas)


class Repeated(TorchDispatchMode):
    """Matrices of so many rows that a product takes once for each prompt, as if each had its own: torch copies them."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.found += [tuple(each.shape) for each in args if each.stride(0) == 0 and self.rows in each.shape]
        return func(*args, **(kwargs or {}))


def test_no_row_has_a_copy_of_a_matrix(backbone: Any) -> None:
    ids = tokens(backbone, 3, WIDTH)
    learnt = Adaptation({name: z.requires_grad_() for name, z in scales(backbone).scales.items()})
    with frozen(network(backbone)), Repeated(backbone.vocab_size) as repeated:
        backbone.score(ids, adaptation=learnt)[:, 1:].sum().backward()
        with torch.no_grad():
            backbone.score(ids)
            backbone.open(3, WIDTH).read(ids, own=True, tail=2)
    assert not repeated.found
