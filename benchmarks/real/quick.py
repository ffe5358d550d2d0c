"""A tiny random model with random adapters and invented languages, for a smoke test."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import bayes_dispatch as bd
from bayes_dispatch.app.training.build import BuildSettings, build_bundle
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.experts.domains import Domain, Split
from bayes_dispatch.experts.domains.own import OwnText

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.tiny import tiny_adapter, tiny_backbone

__all__ = ["SETTINGS", "Invented", "quick_bundle", "quick_domains"]

LETTERS = {"de": "abcde", "fr": "fghij", "pt": "klmno", "pt_BR": "klmnp"}
SETTINGS = BuildSettings(
    prompt_lengths=(12, 60),
    pure_prompts=8,
    mixed_prompts=8,
    gate_prompts=0,
    svi=SVISettings(steps=20, rounds=1),
)


@dataclass(frozen=True)
class Invented:
    """Words of some letters, each after a number."""

    name: str
    letters: str

    def items(self, rng: np.random.Generator, split: Split) -> Iterator[tuple[str, str]]:
        while True:
            yield f"EN: {rng.integers(100)}\nTR:", " " + "".join(rng.choice(list(self.letters), 4))

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> bd.Document:
        """Items as they come; all after the prompt is scored."""
        text, items = "", self.items(rng, split)
        while len(text) < total_bytes:
            text += "{}{}\n".format(*next(items))
        return bd.Document(text, prompt_bytes)


def quick_domains() -> tuple[dict[str, Domain], dict[str, list[Domain]]]:
    """Those of experts by name, and others by kind."""
    experts: dict[str, Domain] = {name: Invented(name, letters) for name, letters in LETTERS.items()}
    both = [
        domain.document(np.random.default_rng(0), 0, 900, "train").text for domain in (experts["de"], experts["fr"])
    ]
    return experts, {"natural": [OwnText("both", "".join(both))], "foreign": [Invented("xx", "xyz")]}


def quick_bundle(directory: Path) -> bd.Bundle:
    """Adapters of the upper half of the layers, and a dispatcher that is hardly fitted; it is not saved."""
    backbone, domains = tiny_backbone(), quick_domains()[0]
    for seed, name in enumerate(domains):
        tiny_adapter(directory / name, seed=seed, layers_to_transform=[2, 3])
    bank = bd.ExpertBank.from_peft(backbone, {name: directory / name for name in domains})
    examples = {
        name: [domain.document(np.random.default_rng(n), 0, 80, "train").text for n in range(10)]
        for name, domain in domains.items()
    }
    return build_bundle(backbone, bank, examples, settings=SETTINGS)
