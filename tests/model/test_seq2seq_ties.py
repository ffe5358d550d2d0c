"""A decoder's cache belongs to the model, the scales and the input that filled it; bad input is named."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from bayes_dispatch.errors import BayesDispatchError, CacheFullError, StaleCacheError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.mixers import Memory
from tests.model.seq2seq import close, pad, scales, tokens

if TYPE_CHECKING:
    from bayes_dispatch.model.seq2seq.model import MambaFormerForSeq2Seq

MakeSeq2Seq = Callable[..., "MambaFormerForSeq2Seq"]


@pytest.fixture(scope="module")
def model(make_seq2seq: MakeSeq2Seq) -> "MambaFormerForSeq2Seq":
    """Not to be changed."""
    return make_seq2seq()


class TestTies:
    """A cache belongs to the model, the scales and the input that filled it; a refusal changes nothing."""

    @pytest.fixture
    def cache(self, model: "MambaFormerForSeq2Seq") -> Cache:
        """Half full, under scales of both halves."""
        cache = model.init_cache(2, 8)
        with torch.no_grad():
            model(tokens(0, 2, 5), tokens(1, 2, 4), cache=cache, adaptation=scales(model))
        return cache

    def refused(
        self,
        model: "MambaFormerForSeq2Seq",
        cache: Cache,
        error: type[BayesDispatchError],
        text: str,
        **changed: Any,
    ) -> None:
        given = {"input_ids": None, "decoder_input_ids": tokens(2, 2, 2), "adaptation": scales(model)} | changed
        before = [t.clone() for state in cache.states for t in state.tensors().values()]
        with pytest.raises(error, match=text) as raised, torch.no_grad():
            model(**given, cache=cache)
        assert "\n" not in str(raised.value)
        after = [t for state in cache.states for t in state.tensors().values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert cache.lengths.tolist() == [4, 4]

    @pytest.mark.parametrize("given", ["nothing", "short integers", "padded", "memory", "scales of each row"])
    def test_the_same_in_other_objects_continues(
        self, model: "MambaFormerForSeq2Seq", cache: Cache, given: str
    ) -> None:
        ids, mask = pad([*tokens(0, 2, 5), tokens(0, 6)], [1])
        adaptation = scales(model)
        if given == "scales of each row":
            adaptation = Adaptation({name: torch.stack([z, z]) for name, z in adaptation.scales.items()})
        again: dict[str, Any] = {
            "short integers": {"input_ids": tokens(0, 2, 5).int()},
            "padded": {"input_ids": ids[:2], "attention_mask": mask[:2]},
            "memory": {"memory": model.encode(tokens(0, 2, 5), adaptation=scales(model))},
        }.get(given, {})
        with torch.no_grad():
            got = model(
                **{"input_ids": None} | again, decoder_input_ids=tokens(2, 2, 2), cache=cache, adaptation=adaptation
            )
            both = torch.cat([tokens(1, 2, 4), tokens(2, 2, 2)], 1)
            close(got.logits, model(tokens(0, 2, 5), both, adaptation=scales(model)).logits[:, 4:])

    @pytest.mark.parametrize("half", ["encoder", "decoder"])
    def test_other_scales_of_one_half(self, model: "MambaFormerForSeq2Seq", cache: Cache, half: str) -> None:
        text = {"encoder": "encoder under the scales .* of row 0", "decoder": "scales that filled block 0"}[half]
        other = {**scales(model).scales, **scales(model, seed=1, only=half).scales}
        self.refused(model, cache, StaleCacheError, text, adaptation=Adaptation(other))
        less = {name: z for name, z in scales(model).scales.items() if not name.startswith(half)}
        self.refused(model, cache, StaleCacheError, text, adaptation=Adaptation(less))
        one = {**scales(model).scales, f"{half}.blocks.1.mixer.qkv": torch.ones(16).double()}
        self.refused(model, cache, StaleCacheError, "the scales that", adaptation=Adaptation(one))

    def test_other_scales_of_one_row(self, model: "MambaFormerForSeq2Seq", cache: Cache) -> None:
        rows = {name: torch.stack([z, z]) for name, z in scales(model).scales.items()}
        rows["encoder.blocks.0.mixer.backwards.in_proj"][1, 0] += 1e-9
        self.refused(model, cache, StaleCacheError, "scales .* of row 1", adaptation=Adaptation(rows))

    def test_another_input(self, model: "MambaFormerForSeq2Seq", cache: Cache) -> None:
        other = tokens(0, 2, 5)
        other[1, 4] = (other[1, 4] + 1) % 40
        text = "the input that made the encoder's output of row 1, got another"
        self.refused(model, cache, StaleCacheError, text, input_ids=other)
        memory = model.encode(other, adaptation=scales(model))
        self.refused(model, cache, StaleCacheError, text, memory=memory)
        shorter = torch.tensor([[1] * 5, [1] * 4 + [0]])
        self.refused(model, cache, StaleCacheError, text, input_ids=tokens(0, 2, 5), attention_mask=shorter)
        unknown = Memory(memory.hidden)
        self.refused(model, cache, TensorError, "a cache of unknown input", memory=unknown)

    def test_a_memory_of_other_scales_or_another_model(
        self, model: "MambaFormerForSeq2Seq", make_seq2seq: MakeSeq2Seq, cache: Cache
    ) -> None:
        ids, text = tokens(0, 2, 5), "the encoder under the scales"
        for memory in (model.encode(ids), make_seq2seq(5).encode(ids, adaptation=scales(model))):
            self.refused(model, cache, StaleCacheError, text, memory=memory)
            with pytest.raises(StaleCacheError, match=text):
                model(None, ids, memory=memory, adaptation=scales(model))

    def test_another_model(self, model: "MambaFormerForSeq2Seq", make_seq2seq: MakeSeq2Seq, cache: Cache) -> None:
        self.refused(make_seq2seq(5), cache, StaleCacheError, "expected a cache of model")
        self.refused(make_seq2seq(dtype=torch.float32), cache, StaleCacheError, r"torch.float32.*torch.float64")
        other = make_seq2seq()  # of the same decoder
        other.fingerprint()  # from here on a token only glances at the weights
        with torch.no_grad():
            other.encoder.norm.weight[0] += 1
        self.refused(other, cache, StaleCacheError, "expected a cache of model")

    def test_no_room_or_another_batch(self, model: "MambaFormerForSeq2Seq", cache: Cache) -> None:
        given = {"decoder_input_ids": tokens(4, 2, 5)}
        self.refused(model, cache, CacheFullError, "at most 8 tokens .* got 9", **given)
        given = {"decoder_input_ids": tokens(4, 3, 2)}
        self.refused(model, cache, TensorError, "batch of 2 rows for this cache, got 3", **given)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": None}, "expected input_ids, memory, or a cache that has read them, got none"),
        ({"input_ids": tokens(0, 3, 4)}, "input_ids of 2 rows, as in decoder_input_ids, got 3"),
        ({"input_ids": tokens(0, 2, 4) + 40}, "input_ids in 0 … 39"),
        ({"input_ids": tokens(0, 2, 0)}, r"input_ids of shape \(B, T\) .* got \(2, 0\)"),
        ({"decoder_input_ids": tokens(0, 2, 3) - 40}, "input_ids in 0 … 39"),
        ({"decoder_input_ids": torch.ones(2, 3)}, "integer input_ids, got torch.float32"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask of shape \(2, 4\), got \(2, 3\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, "a mask with holes"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])}, "a row of padding"),
        ({"decoder_attention_mask": torch.ones(2, 4)}, r"attention_mask of shape \(2, 3\), got \(2, 4\)"),
        ({"decoder_attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "a row of padding"),
        ({"input_ids": None, "attention_mask": torch.ones(2, 4)}, "or memory; got parts of both"),
        ({"memory": Memory(torch.zeros(2, 4, 16).double())}, "or memory; got parts of both"),
        ({"adaptation": Adaptation({"blocks.0.mixer.in_proj": torch.ones(16)})}, "adaptable matrix .encoder.blocks.0"),
        ({"adaptation": Adaptation({"decoder.blocks.0.mixer.in_proj": torch.ones(3, 16).double()})}, "2 rows, got 3"),
    ],
)
def test_bad_input_is_named(make_seq2seq: MakeSeq2Seq, changed: dict[str, Any], message: str) -> None:
    model = make_seq2seq()
    given = {"input_ids": tokens(0, 2, 4), "decoder_input_ids": tokens(1, 2, 3)} | changed
    with pytest.raises(TensorError, match=message):
        model(**given)
    if changed.keys() <= {"input_ids", "attention_mask"} and given["input_ids"] is not None and "rows" not in message:
        with pytest.raises(TensorError, match=message):
            model.encode(given["input_ids"], given.get("attention_mask"))
        with pytest.raises(TensorError, match=message):
            model.generate(given["input_ids"], attention_mask=given.get("attention_mask"), max_new_tokens=2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ((torch.zeros(3, 4, 16).double(),), r"memory of shape \(2, S, 16\) .* got \(3, 4, 16\)"),
        ((torch.zeros(2, 4, 8).double(),), r"memory of shape \(2, S, 16\) .* got \(2, 4, 8\)"),
        ((torch.zeros(2, 0, 16).double(),), r"with S >= 1, got \(2, 0, 16\)"),
        ((torch.zeros(2, 16).double(),), r"got \(2, 16\)"),
        ((torch.zeros(2, 4, 16),), "memory of torch.float64, got torch.float32"),
        ((torch.zeros(2, 4, 16).double(), torch.ones(2, 3).bool()), r"of shape \(2, 4\), got \(2, 3\)"),
        ((torch.zeros(2, 4, 16).double(), torch.zeros(2, 4).bool()), "got a row of padding"),
    ],
)
def test_a_bad_memory_is_named(make_seq2seq: MakeSeq2Seq, memory: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(TensorError, match=message):
        make_seq2seq()(None, tokens(1, 2, 3), memory=Memory(*memory))
