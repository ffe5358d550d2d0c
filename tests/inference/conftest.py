"""The slow way, one particle at a time through the whole model and the filter written out; and a system with a cut."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM


@pytest.fixture(scope="session")
def explicit_filter() -> Callable[..., SimpleNamespace]:
    """Predictive distributions along a text under weighted particles: no batches, padding or caches."""

    def run(
        model: Any,
        bank: "ExpertBank",
        data: bytes,
        weights: np.ndarray,
        mass: np.ndarray,
        switching: tuple[float, ...] = (0.0,),
        target: np.ndarray | None = None,
        prompt: int = 0,
    ) -> SimpleNamespace:
        """For T bytes: log-probabilities (T + 1, V), entropy and information (T + 1,), filtered masses (T + 1, S).

        A switch leads to ``mass`` within as many bytes as ``prompt`` has, and then to ``target``, if there is one.
        """
        ids = torch.tensor([[256, *data]])
        with torch.no_grad():
            each = np.stack(
                [
                    model(ids, adaptation=bank.blend(torch.tensor(w).to(model.dtype)))
                    .logits[0]
                    .double()
                    .softmax(-1)
                    .numpy()
                    for w in weights
                ]
            )  # (S, 1 + T, V)
        rates = np.array(switching)[:, None]
        joint = np.tile(mass, (len(rates), 1)) / len(rates)  # of rate and particle
        masses, mixtures, information = [], [], []
        for t in range(len(data) + 1):
            v = joint.sum(0)
            mixture = v @ each[:, t]
            masses.append(v)
            mixtures.append(mixture)
            ratio = np.log(each[:, t] / mixture)
            information.append(float((v[:, None] * each[:, t] * ratio).sum()))
            if t < len(data):
                joint = joint * each[:, t, data[t]]
                joint /= joint.sum()
                aim = mass if target is None or t < prompt else target
                joint = (1 - rates) * joint + rates * joint.sum(1, keepdims=True) * aim
        p = np.stack(mixtures)
        return SimpleNamespace(
            log_p=np.log(p), entropy=-(p * np.log(p)).sum(1), information=np.array(information), masses=np.stack(masses)
        )

    return run


def dispatcher_of(names: tuple[str, ...], model: Any, tokenizer: Any) -> "Dispatcher":
    """One that is fitted, coarsely, to what comes out of the first block."""
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
    from bayes_dispatch.dispatcher.fitting.svi import SVISettings
    from bayes_dispatch.inference.two_pass.first_pass import first_pass

    labels = np.arange(30) % 3
    texts = [("ab>ba\n", "ba>ab\n", "1+2=3\n")[label] * (1 + i % 4) for i, label in enumerate(labels)]
    evidence = first_pass(model, tokenizer, texts, block=1).evidence
    features = FeatureSettings(dimensions=4, folds=2)
    return Dispatcher(names, svi=SVISettings(steps=40), features=features).fit(evidence, labels)


@pytest.fixture(scope="session")
def cut64(bundle64: "Bundle", model64: "MambaFormerForCausalLM") -> "Bundle":
    """A system whose experts adapt from block 1 on, its dispatcher fitted to what comes out of block 0."""
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.vectors import ExpertVector
    from bayes_dispatch.model.tokenizer import ByteTokenizer

    draw = torch.Generator().manual_seed(3)
    ranks = {name: rank for name, rank in model64.adaptable().items() if not name.startswith("blocks.0.")}
    names, base = bundle64.experts.names, model64.fingerprint()
    bank = ExpertBank(
        [ExpertVector(n, {m: 1 + 0.5 * torch.randn(r, generator=draw) for m, r in ranks.items()}, base) for n in names]
    )
    return Bundle(model64, bank, dispatcher_of(names, model64, ByteTokenizer()))


@pytest.fixture(scope="session")
def llama64() -> SimpleNamespace:
    """The same of a tiny random Llama, whose tokens are pieces of words, with LoRA experts."""
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.lora import LoraExpert
    from tests.tiny import tiny_backbone

    model, draw, names = tiny_backbone("llama"), torch.Generator().manual_seed(4), ("reverse", "sort", "add")
    matrices = {name: shape for name, shape in model.linears().items() if ".layers." in name and ".0." not in name}

    def factor(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=draw, dtype=torch.double)

    bank = ExpertBank(
        [
            LoraExpert(n, {m: (factor(2, inner), factor(outer, 2)) for m, (outer, inner) in matrices.items()}, base)
            for n, base in zip(names, [model.fingerprint()] * 3, strict=True)
        ]
    )
    dispatcher = dispatcher_of(names, model, model.tokenizer)
    return SimpleNamespace(model=model, tokenizer=model.tokenizer, experts=bank, dispatcher=dispatcher)


@pytest.fixture(scope="session")
def headless64(llama64: SimpleNamespace) -> SimpleNamespace:
    """The same, with nothing that begins a text."""
    from bayes_dispatch.model.transformers.tokenizer import TransformersTokenizer
    from tests.tiny import tiny_tokenizer

    inner = tiny_tokenizer()
    inner._tokenizer.post_processor = None
    tokenizer = TransformersTokenizer(inner, llama64.model.vocab_size, [2])
    assert tokenizer.tokenize("a") == tokenizer.tokenize("a", begin=False)
    return SimpleNamespace(**{**vars(llama64), "tokenizer": tokenizer})


@pytest.fixture(scope="session")
def embedded64(bundle64: "Bundle", model64: "MambaFormerForCausalLM") -> "Bundle":
    """A system whose experts adapt the embedding, too: nothing of a prompt is the same for all of them."""
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.vectors import ExpertVector

    draw = torch.Generator().manual_seed(6)
    ranks = model64.adaptable() | model64.adaptable_on_request()
    names, base = bundle64.experts.names, model64.fingerprint()
    bank = ExpertBank(
        [ExpertVector(n, {m: 1 + 0.5 * torch.randn(r, generator=draw) for m, r in ranks.items()}, base) for n in names]
    )
    return Bundle(model64, bank, bundle64.dispatcher)
