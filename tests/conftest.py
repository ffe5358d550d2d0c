"""Shared fixtures: a tiny model with weights that are not trivial, experts of random scales, a small fitted dispatcher.

The package is imported inside the fixtures: tests that need no model start without it.
"""

from __future__ import annotations

import gc
import os
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jaxtyping
import numpy as np
import pytest

from tests.type_checks import install

if TYPE_CHECKING:
    import torch

    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
    from bayes_dispatch.model.subwords import SubwordTokenizer

EXPERTS = ("reverse", "sort", "add")

install("bayes_dispatch")


def pytest_collection() -> None:
    """Millions of objects are made while tests are imported and found, and none is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """They stay: each collection would go through them again. Later ones come seldom: most garbage is in no cycle."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def pytest_runtest_setup() -> None:
    """What a test draws without a seed is the same in every run, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors run fastest, and most repeatably, on one thread; so do processes that run beside other tests."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the tests' own type checks: what a user meets who passes a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def in_threads() -> Iterator[Callable[[int, Callable[[], Any]], list[Any]]]:
    """What a function gives in each of so many threads that begin at once and take turns as often as they can."""
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    def run(count: int, function: Callable[[], Any]) -> list[Any]:
        barrier = Barrier(count)

        def begin() -> Any:
            barrier.wait()
            return function()

        with ThreadPoolExecutor(count) as pool:
            return [job.result() for job in [pool.submit(begin) for _ in range(count)]]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield run
    sys.setswitchinterval(before)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], None]:
    """Have something happen just before the next call of a function, which is given by its full name."""

    def arrange(name: str, act: Callable[[], object]) -> None:
        really = pkgutil.resolve_name(name)

        def called(*arguments: Any, **given: Any) -> Any:
            monkeypatch.setattr(name, really)
            act()
            return really(*arguments, **given)

        monkeypatch.setattr(name, called)

    return arrange


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MambaFormerForCausalLM]:
    """A model of random weights: no bias, decay, skip or norm at its initial value, and logits that spread by units."""
    import torch

    from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

    def make(
        backbone: MambaFormerConfig | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        tie_embeddings: bool = True,
        tokenizer: SubwordTokenizer | None = None,
    ) -> MambaFormerForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LanguageModelConfig(
                backbone=backbone or MambaFormerConfig.tiny(),
                vocab_size=258 if tokenizer is None else tokenizer.vocab_size,
                tie_embeddings=tie_embeddings,
            )
            model = MambaFormerForCausalLM(config, tokenizer)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.3 * torch.randn_like(parameter))
                model.embedding.weight.mul_(20)
                for block in model.blocks:
                    block.mixer.out_proj.weight.mul_(2)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., MambaFormerForCausalLM]) -> MambaFormerForCausalLM:
    """The tiny model; not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def model64(make_model: Callable[..., MambaFormerForCausalLM]) -> MambaFormerForCausalLM:
    """The same model in float64."""
    import torch

    return make_model(dtype=torch.float64)


@pytest.fixture(scope="session")
def make_bank() -> Callable[..., ExpertBank]:
    """Experts of random scales for a model."""
    import torch

    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.vectors import ExpertVector

    def make(model: MambaFormerForCausalLM, names: tuple[str, ...] = EXPERTS, seed: int = 1) -> ExpertBank:
        generator = torch.Generator().manual_seed(seed)
        return ExpertBank(
            [
                ExpertVector(
                    name,
                    {m: 1 + 0.5 * torch.randn(rank, generator=generator) for m, rank in model.adaptable().items()},
                    model.fingerprint(),
                    {"domain": name, "steps": "0"},
                )
                for name in names
            ]
        )

    return make


@pytest.fixture(scope="session")
def bank(make_bank: Callable[..., ExpertBank], model: MambaFormerForCausalLM) -> ExpertBank:
    return make_bank(model)


@pytest.fixture(scope="session")
def bundle(model: MambaFormerForCausalLM, bank: ExpertBank) -> Bundle:
    """A whole system whose dispatcher was fitted, coarsely, on the tiny model's own evidence."""
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
    from bayes_dispatch.dispatcher.fitting.svi import SVISettings
    from bayes_dispatch.experts.domains import CONVENTIONS
    from bayes_dispatch.inference.two_pass.first_pass import first_pass
    from bayes_dispatch.model.tokenizer import ByteTokenizer

    rng = np.random.default_rng(0)
    domains = [convention for name in EXPERTS for convention in CONVENTIONS if convention.name == name]
    labels = np.arange(60) % len(EXPERTS)
    texts = [domains[label].document(rng, 0, 48, "train").text for label in labels]
    dispatcher = Dispatcher(
        EXPERTS,
        svi=SVISettings(steps=40, rounds=1),
        features=FeatureSettings(dimensions=4, folds=2),
    )
    dispatcher.fit(first_pass(model, ByteTokenizer(), texts).evidence, labels)
    return Bundle(model, bank, dispatcher, {"note": "tiny"})


@pytest.fixture(scope="session")
def bundle64(bundle: Bundle, model64: MambaFormerForCausalLM) -> Bundle:
    """The same system with the model in float64."""
    from bayes_dispatch.app.bundle import Bundle

    return Bundle(model64, bundle.experts, bundle.dispatcher)


@pytest.fixture(scope="session")
def cut64(bundle64: "Bundle", model64: "MambaFormerForCausalLM") -> "Bundle":
    """A system whose experts adapt from block 1 on, its dispatcher fitted to what comes out of block 0."""
    import torch

    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.vectors import ExpertVector
    from bayes_dispatch.model.tokenizer import ByteTokenizer
    from tests.tiny import dispatcher_of

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
    import torch

    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.lora import LoraExpert
    from tests.tiny import dispatcher_of, tiny_backbone

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
def hybrid64() -> SimpleNamespace:
    """The same of a MambaFormer that a hybrid of the transformers library was converted to: SVF and LoRA experts."""
    import torch

    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.lora import LoraExpert
    from bayes_dispatch.experts.vectors import ExpertVector
    from tests.tiny import dispatcher_of, tiny_converted

    model, draw = tiny_converted("bamba"), torch.Generator().manual_seed(4)
    base, upper = model.fingerprint(), [name for name in model.adaptable() if model.cut([name])]

    def drawn(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=draw, dtype=torch.double)

    shapes = {name: shape for name, shape in model.linears().items() if name in upper}
    scales = {name: 1 + drawn(min(shape)) for name, shape in shapes.items()}
    lora = [{name: (drawn(2, inner), drawn(outer, 2)) for name, (outer, inner) in shapes.items()} for _ in range(2)]
    experts = [LoraExpert(name, factors, base) for name, factors in zip(EXPERTS[:2], lora, strict=True)]
    bank = ExpertBank([*experts, ExpertVector(EXPERTS[2], scales, base)])
    dispatcher = dispatcher_of(EXPERTS, model, model.tokenizer)
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
    import torch

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
