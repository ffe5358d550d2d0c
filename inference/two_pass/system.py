"""The parts that two-pass inference works with, and ways from prompts to a posterior."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from bayes_dispatch.arguments import shown
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.inference.two_pass.prompts import check_prompts
from bayes_dispatch.model.backbone import Backbone, Tokenizer
from bayes_dispatch.model.generation.sampling import row_seeds

__all__ = [
    "POSTERIOR_DRAWS",
    "Dispatched",
    "Strategy",
    "System",
    "as_strategy",
    "check_gate",
    "check_system",
    "cut_of",
    "dispatch",
    "gate_of",
]

POSTERIOR_DRAWS = 64


@runtime_checkable
class System(Protocol):
    """The parts that work together; a ``Bundle`` has them."""

    @property
    def model(self) -> Backbone: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def experts(self) -> ExpertBank: ...
    @property
    def dispatcher(self) -> Dispatcher: ...


def check_system(system: System) -> None:
    """Whether the system's parts fit together.

    Raises:
        ForeignExpertError: the experts were made for another model.
        ConfigError: it is no system, or the dispatcher was made for other experts.
    """
    if not isinstance(system, System):
        raise ConfigError(f"expected a bundle, as load_bundle gives one, got {shown(system)}")
    system.experts.check_base(system.model)
    if tuple(system.dispatcher.experts) != system.experts.names:
        raise ConfigError(
            f"expected a dispatcher over {system.experts.names}, got one over {system.dispatcher.experts}"
        )


def gate_of(system: System) -> Gate:
    """The system's gate.

    Raises:
        ConfigError: it has none.
    """
    gate: Gate | None = getattr(system, "gate", None)  # not every system knows of gates
    if gate is None:
        raise ConfigError("expected a bundle with a gate for a false-alarm rate, got one without: see calibrate-gate")
    return gate


def check_gate(system: System, rate: float) -> None:
    """Whether the system's gate can be asked at a false-alarm rate.

    Raises:
        ConfigError: it has none, it is of another dispatcher, or the rate is out of range.
    """
    gate = gate_of(system)
    gate.check_rate(rate)
    gate.check_dispatcher(system.dispatcher)


def cut_of(system: System) -> int:
    """How many blocks of the system's model run the same under all blends of its experts."""
    return system.model.cut(system.experts.adapts)


def dispatch(system: System, prompts: Sequence[str | bytes], seed: int | None) -> tuple[DispatchPosterior, Evidence]:
    """First pass and posterior; a prompt's draws depend on the seed and the prompt alone, and copies share them.

    Raises:
        PromptError: see ``first_pass``.
    """
    checked = check_prompts(prompts)
    place = {prompt: n for n, prompt in enumerate(dict.fromkeys(checked))}
    evidence = first_pass(system.model, system.tokenizer, list(place), cut=cut_of(system)).evidence
    posterior = system.dispatcher.posterior(evidence, draws=POSTERIOR_DRAWS, seed=row_seeds(seed, list(place)))
    rows = [place[prompt] for prompt in checked]
    return posterior.select(rows), evidence.select(np.array(rows))


@runtime_checkable
class Strategy(Protocol):
    """A way from prompts to a posterior over the weights of K experts and base."""

    @property
    def name(self) -> str: ...

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        """Draws for each prompt; the same for copies of one.

        Raises:
            PromptError: see ``check_prompts``.
        """
        ...


@dataclass(frozen=True)
class Dispatched:
    """The system's own dispatcher."""

    name = "dispatcher"

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        return dispatch(system, prompts, seed)[0]


def as_strategy(strategy: Strategy | None) -> Strategy:
    """A strategy as it is, the system's dispatcher for none.

    Raises:
        ConfigError: it is no strategy.
    """
    found = Dispatched() if strategy is None else strategy
    if isinstance(found, type) or not isinstance(found, Strategy):
        raise ConfigError(f"expected a strategy such as Dispatched(), or None, got {strategy!r:.60}")
    return found
