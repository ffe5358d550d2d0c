"""Features and labels of whole rows: pooled over real tokens alone, as the language model's hidden states say,
adapted, trained, compiled, saved. What does not fit a head is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import BundleError, ConfigError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.heads import MambaFormerForFeatureExtraction, MambaFormerForSequenceClassification, pool
from bayes_dispatch.model.mambaformer.config import ClassifierConfig, FeatureExtractorConfig, MambaFormerConfig
from bayes_dispatch.model.subwords import train_subwords
from tests.model.tensors import tokens

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]
SMALL = {"d_model": 16, "n_pairs": 1, "n_heads": 2, "d_state": 4, "head_dim": 8, "chunk_size": 4}
POOLINGS = ["last", "mean", "max"]


def classifier(make_model: MakeModel, pooling: Any = "last", **sizes: Any) -> MambaFormerForSequenceClassification:
    """Three labels, over the blocks of a model of random weights, in float64."""
    backbone = MambaFormerConfig(**SMALL | sizes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = ClassifierConfig(backbone=backbone, vocab_size=258, num_labels=3, pooling=pooling)
        model = MambaFormerForSequenceClassification(config).double()
    model.start_from(make_model(backbone, dtype=torch.float64))
    return model.eval()


def extractor(make_model: MakeModel, pooling: Any = "mean") -> MambaFormerForFeatureExtraction:
    backbone = MambaFormerConfig(**SMALL)
    config = FeatureExtractorConfig(backbone=backbone, vocab_size=258, pooling=pooling)
    model = MambaFormerForFeatureExtraction(config).double()
    model.start_from(make_model(backbone, dtype=torch.float64))
    return model.eval()


def scales(model: Any, *lead: int) -> Adaptation:
    draw = torch.Generator().manual_seed(0)
    return Adaptation(
        {n: (1 + 0.5 * torch.randn(*lead, r, generator=draw)).double() for n, r in model.adaptable().items()}
    )


def pad(rows: list[Tensor], lefts: list[int]) -> tuple[Tensor, Tensor]:
    """Rows in one batch, each with up to ``lefts[b]`` of its padding on its left."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 257), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        left = min(lefts[b], width - len(row))
        ids[b, left : left + len(row)] = row
        mask[b, left : left + len(row)] = 1
    return ids, mask


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    lefts=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    pooling=st.sampled_from(POOLINGS),
    adapted=st.booleans(),
    window=st.none() | st.integers(1, 5),
)
def test_a_ragged_batch_gives_each_row_alone(
    make_model: MakeModel, lengths: list[int], lefts: list[int], pooling: str, adapted: bool, window: int | None
) -> None:
    """In logits, and the loss in its gradients."""
    model = classifier(make_model, pooling, attention_window=window)
    rows = [tokens(b, n) for b, n in enumerate(lengths)]
    labels = torch.arange(len(rows)) % 3
    adaptation = scales(model, len(rows)) if adapted else None
    ids, mask = pad(rows, lefts)
    together = model(ids, attention_mask=mask, adaptation=adaptation, labels=labels)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(together.loss, parameters, materialize_grads=True)
    alone = [
        model(row[None], adaptation=adaptation.select([b]) if adaptation else None, labels=labels[b : b + 1])
        for b, row in enumerate(rows)
    ]
    mean = sum(one.loss for one in alone) / len(rows)
    summed = torch.autograd.grad(mean, parameters, materialize_grads=True)
    for b, (row, one) in enumerate(zip(rows, alone, strict=True)):
        torch.testing.assert_close(together.logits[b], one.logits[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(together.pooled[b], one.pooled[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(together.hidden[b, mask[b].bool()], one.hidden[0], rtol=0, atol=1e-10)
        assert not together.hidden[b, ~mask[b].bool()].any()
        assert len(one.hidden[0]) == len(row)
    for got, expected in zip(gradients, summed, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]])
def test_pooling_is_over_real_tokens(pooling: Any, mask: list[list[int]] | None) -> None:
    hidden = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2
    real = None if mask is None else torch.tensor(mask).bool()
    got = pool(hidden, real, pooling)
    for b in range(4):
        own = hidden[b].numpy() if mask is None else hidden[b].numpy()[np.array(mask[b]) == 1]
        expected = {"last": own[-1], "mean": own.sum(0) / len(own), "max": np.sort(own, axis=0)[-1]}[pooling]
        np.testing.assert_allclose(got[b].numpy(), expected, rtol=1e-12)


def test_features_are_the_language_models_hidden_states(make_model: MakeModel) -> None:
    backbone = MambaFormerConfig(**SMALL)
    language_model = make_model(backbone, dtype=torch.float64)
    model = extractor(make_model)
    assert model.adaptable() == language_model.adaptable()
    adaptation = scales(model)
    with torch.no_grad():
        for given_scales in (None, adaptation):
            features = model(tokens(0, 2, 7), adaptation=given_scales)
            expected = language_model(tokens(0, 2, 7), adaptation=given_scales).hidden
            assert torch.equal(features.hidden, expected)
            torch.testing.assert_close(features.pooled, expected.mean(1))


def test_logits_and_loss_are_what_the_pooled_states_say(make_model: MakeModel) -> None:
    model = classifier(make_model, "max")
    labels = torch.tensor([2, 0])
    out = model(tokens(0, 2, 7), labels=labels)
    torch.testing.assert_close(out.pooled, out.hidden.amax(1))
    torch.testing.assert_close(out.logits, out.pooled @ model.head.weight.T + model.head.bias)
    log_p = out.logits.log_softmax(-1)
    torch.testing.assert_close(out.loss, -(log_p[0, 2] + log_p[1, 0]) / 2)
    torch.testing.assert_close(model(tokens(0, 2, 7), labels=labels.int()).loss, out.loss)
    assert model(tokens(0, 2, 7)).loss is None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("pooling", POOLINGS)
def test_it_learns_which_token_is_frequent(pooling: Any) -> None:
    """Half of each row is 6, or 7: the loss falls to nearly nothing, and new rows are told apart."""
    torch.manual_seed(0)
    backbone = MambaFormerConfig(**SMALL | {"n_pairs": 0})
    config = ClassifierConfig(backbone=backbone, vocab_size=16, num_labels=2, pooling=pooling)
    model = MambaFormerForSequenceClassification(config)
    draw = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.randint(8, 16, (32, 8), generator=draw)
        labels = torch.randint(0, 2, (32,), generator=draw)
        ids = torch.where(torch.rand(32, 8, generator=draw) < 0.5, 6 + labels[:, None], ids)
        mask = (torch.arange(8) < torch.randint(6, 9, (32, 1), generator=draw)).long()
        return ids, mask, labels

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        ids, mask, labels = batch()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert np.mean(losses[-5:]) < 0.2
    ids, mask, labels = batch()
    assert (model(ids, attention_mask=mask).logits.argmax(-1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["classifier", "extractor"])
def test_save_and_load(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    model = classifier(make_model, "mean") if kind == "classifier" else extractor(make_model, "max")
    model = model.float()
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    with torch.no_grad():
        for a, b in zip(again(tokens(0, 2, 5)), model(tokens(0, 2, 5)), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_a_model_of_another_head_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    with pytest.raises(BundleError, match=r"expected the names .* in ClassifierConfig"):
        MambaFormerForSequenceClassification.from_pretrained(tmp_path / "model")


class TestStartFrom:
    def test_it_takes_all_but_the_head(self, make_model: MakeModel) -> None:
        config = ClassifierConfig(backbone=MambaFormerConfig(**SMALL), vocab_size=258, num_labels=258)
        model = MambaFormerForSequenceClassification(config).double()
        head = model.head.weight.clone()
        source = make_model(MambaFormerConfig(**SMALL), dtype=torch.float64, tie_embeddings=False)
        model.start_from(source)
        assert torch.equal(model.head.weight, head)  # of the same shape as the other's
        own, other = model.state_dict(), source.state_dict()
        assert all(torch.equal(own[name], other[name]) for name in own if not name.startswith("head."))
        with torch.no_grad():
            model.norm.weight.add_(1)
        assert not torch.equal(model.norm.weight, source.norm.weight)  # copies

    def test_what_the_embedding_is_of(self, make_model: MakeModel, tmp_path: Path) -> None:
        """The tokenizer is taken, too; in chunks of what size a model scans changes no result."""
        source = make_model(MambaFormerConfig(**SMALL), dtype=torch.float64)
        source.tokenizer = train_subwords(["abab"], 258)
        backbone = MambaFormerConfig(**SMALL | {"chunk_size": 3})
        model = MambaFormerForFeatureExtraction(FeatureExtractorConfig(backbone=backbone, vocab_size=258)).double()
        model.start_from(source)
        model.save_pretrained(tmp_path / "model")
        again = MambaFormerForFeatureExtraction.from_pretrained(tmp_path / "model")
        assert again.tokenizer.tokenize("abab") == source.tokenizer.tokenize("abab")

    def test_another_backbone_or_vocabulary(self, make_model: MakeModel) -> None:
        model = classifier(make_model)
        with pytest.raises(ConfigError, match=r"of backbone .*d_model=16.* got .*d_model=32"):
            model.start_from(make_model())
        config = FeatureExtractorConfig(backbone=MambaFormerConfig(**SMALL), vocab_size=16)
        with pytest.raises(ConfigError, match="of vocab_size 258, got 16"):
            model.start_from(MambaFormerForFeatureExtraction(config))


def test_another_head_is_another_model(make_model: MakeModel) -> None:
    model = classifier(make_model)
    before = model.fingerprint()
    model.head = torch.nn.Linear(16, 5).double()
    assert model.fingerprint() != before


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, "labels in 0 … 2, got 0 … 3"),
        ({"labels": torch.tensor([-100, 2])}, "labels in 0 … 2, got -100 … 2"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels of shape \(2,\), got \(3,\)"),
        ({"labels": torch.tensor([[0, 1]])}, r"labels of shape \(2,\), got \(1, 2\)"),
        ({"labels": torch.tensor([0.0, 1.0])}, "integer labels, got torch.float32"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask of shape \(2, 4\), got \(2, 3\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, "a mask with holes"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])}, "a row of padding"),
        ({"input_ids": torch.full((2, 4), 258)}, "0 … 257, got 258 … 258"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"shape \(B, T\) .* got \(4,\)"),
        ({"adaptation": Adaptation({"head": torch.ones(3)})}, "adaptable matrix .* got 'head'"),
    ],
)
def test_bad_input_is_named(make_model: MakeModel, changed: dict[str, Any], message: str) -> None:
    inputs = {"input_ids": tokens(0, 2, 4), "labels": torch.tensor([0, 1])} | changed
    with pytest.raises(TensorError, match=message):
        classifier(make_model)(**inputs)
    if "labels" not in changed:
        del inputs["labels"]
        with pytest.raises(TensorError, match=message):
            extractor(make_model)(**inputs)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_labels": 0}, "num_labels to be a whole number from 1 to 2147483648, got 0"),
        ({"pooling": "first"}, "pooling to be one of last, mean, max, got 'first'"),
        ({"vocab_size": 1}, "vocab_size to be a whole number from 2 to 2147483648, got 1"),
        ({"backbone": MambaFormerConfig(blocks=("mamba2", "cross_attention"))}, "cross_attention .* decoder only"),
    ],
)
def test_bad_settings(changed: dict[str, Any], message: str) -> None:
    settings = {"backbone": MambaFormerConfig.tiny(), "vocab_size": 258, "num_labels": 2}
    with pytest.raises(ConfigError, match=message):
        ClassifierConfig(**settings | changed)
    if "num_labels" not in changed:
        del settings["num_labels"]
        with pytest.raises(ConfigError, match=message):
            FeatureExtractorConfig(**settings | changed)


def test_configurations_survive_json() -> None:
    backbone = MambaFormerConfig(blocks=("attention", "feed_forward"), positions="rotary")
    for config in (
        ClassifierConfig(backbone=backbone, vocab_size=9, num_labels=4, pooling="max"),
        FeatureExtractorConfig(backbone=backbone, vocab_size=9),
    ):
        assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config


HEADS_COMPILED = """
import torch
from bayes_dispatch.model.heads import MambaFormerForSequenceClassification
from bayes_dispatch.model.mambaformer.config import (
    ClassifierConfig, LanguageModelConfig, MambaFormerConfig, Seq2SeqConfig
)
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.seq2seq.model import MambaFormerForSeq2Seq

torch.manual_seed(0)
backbone, ids = MambaFormerConfig.tiny(), torch.randint(0, 258, (2, 5))
for head, *given in (
    (MambaFormerForSequenceClassification(ClassifierConfig(backbone=backbone, vocab_size=258, num_labels=3)), ids),
    (MambaFormerForCausalLM(LanguageModelConfig(backbone=backbone, vocab_size=258)), ids),
    (MambaFormerForSeq2Seq(Seq2SeqConfig.symmetric(backbone, vocab_size=258, start_token_id=256)), ids, ids),
):
    expected, got = head(*given).logits, torch.compile(head, backend="eager")(*given).logits
    weights = list(head.parameters())
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), weights) for x in (expected, got)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    print("the same")
"""


@pytest.mark.slow
def test_compiled_by_torch_each_head_gives_the_same() -> None:
    """In values and gradients; in a process without the tests' type checks, which torch.compile cannot read."""
    done = subprocess.run([sys.executable, "-c", HEADS_COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n").count("the same") == 3, done.stderr


DEPTHS_COMPILED = """
import torch
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

def graphs(n_pairs):
    made = []
    torch.manual_seed(0)
    torch._dynamo.reset()
    backbone = MambaFormerConfig(d_model=16, n_pairs=n_pairs, n_heads=2, d_state=4, head_dim=8, chunk_size=4)
    model = MambaFormerForCausalLM(LanguageModelConfig(backbone=backbone, vocab_size=258))
    compiled = torch.compile(model, backend=lambda graph, _: made.append(graph) or graph.forward)
    for _ in range(2):
        scales = Adaptation({name: 1 + 0.3 * torch.rand(rank) for name, rank in model.adaptable().items()})
        given = {"input_ids": torch.randint(0, 258, (2, 5)), "adaptation": scales}
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
        with torch.no_grad():
            model.blocks[0].mixer.in_proj.weight.mul_(1.5)
    return len(made)

print(graphs(1) == graphs(2))
"""


@pytest.mark.slow
def test_compiled_by_torch_an_adapted_model_has_as_many_graphs_as_kinds_of_blocks() -> None:
    """However many blocks there are: scales and weights are arguments of a graph."""
    done = subprocess.run([sys.executable, "-c", DEPTHS_COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
