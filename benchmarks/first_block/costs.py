"""What two passes cost by the first adapted block: counted, and timed beside plain generation with the base model."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import bayes_dispatch as bd
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.inference.two_pass.blends import Blend
from bayes_dispatch.inference.two_pass.system import System
from peers.timing import Rounds, Work, interleaved
from two_pass import document, plain

__all__ = ["BLENDS", "PROMPT_BYTES", "Cost", "costs"]

PROMPT_BYTES = 512
BLENDS: Mapping[str, Blend] = {"mean": bd.PosteriorMean(), "predictive": bd.PosteriorPredictive(16)}
PLAIN = "plain base"


@dataclass(frozen=True)
class Cost:
    """To the first new byte of a prompt.

    Attributes:
        evaluations: of a block on a token of one row, per token of the prompt, first pass included.
        seconds: median time on the CPU. ratio: of that time to one plain pass of the base model, median and spread.
    """

    evaluations: float
    seconds: float
    ratio: tuple[float, float]


def costs(systems: Mapping[int, System], repeats: int) -> dict[int, dict[str, Cost]]:
    """First block → name of a blend → its cost; all systems take turns, round by round.

    Args:
        systems: first block → system. repeats: rounds.
    """
    prompt = document(CONVENTIONS[0], PROMPT_BYTES, 1)
    base = next(iter(systems.values()))
    works = {PLAIN: Work(lambda _: plain(base.model, base.tokenizer, [prompt], 1))}
    evaluations = {}
    for block, bundle in systems.items():
        generator = bd.TwoPassGenerator(bundle)
        for name, blend in BLENDS.items():

            def run(_: object, generator: bd.TwoPassGenerator = generator, blend: Blend = blend) -> bd.Generation:
                return generator.generate([prompt], blend=blend, max_new_tokens=1, seed=0)

            cost = run(None).cost
            evaluations[block, name] = (cost.first_pass + cost.prefill) / cost.prompt_tokens
            works[f"{block} {name}"] = Work(run)
    times = interleaved(works, "cost", Rounds(repeats, 240.0, time.process_time))
    return {
        block: {
            name: Cost(evaluations[block, name], times.median(f"{block} {name}"), times.ratio(f"{block} {name}", PLAIN))
            for name in BLENDS
        }
        for block in systems
    }
