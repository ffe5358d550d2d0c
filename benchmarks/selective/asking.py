"""Questions that held-out documents ask, their answers under each blend, and the file that keeps both."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import (
    CONVENTIONS,
    FOREIGN_TEXTS,
    FOREIGN_TRANSLATIONS,
    TASKS,
    Checked,
    Domain,
    translations,
)
from bayes_dispatch.experts.questions import Question, ask
from bayes_dispatch.inference.two_pass.generation import Generation
from bayes_dispatch.inference.two_pass.system import dispatch
from real.records import add_line, bank_of, whole_lines
from real.sets import PAIRS, DocumentSet, document_sets

__all__ = [
    "FOREIGN",
    "PLAIN",
    "PREDICTIVE",
    "TEMPERATURES",
    "Answer",
    "Asked",
    "Kept",
    "answered",
    "domains_of",
    "questions",
    "sets_of",
    "tempered",
]

PREDICTIVE = "posterior_predictive"
PLAIN = ("base", "best_expert")  # of one row
TEMPERATURES = np.geomspace(1 / 4, 8, 41)
KINDS = ("pure", "in turn", "near pairs in turn", "switching", "short")
MORE_PAIRS = (  # languages and tasks have theirs in ``real.sets``
    ("add", "reversed_add"),
    ("no_carry", "sort"),
    ("reversed_add", "shift"),
    ("reverse", "sort"),
)
AT_ONCE = 8  # questions that are answered together, and kept together
ROOM = 64  # tokens of an answer, at most; one that has not ended by then is wrong
FOREIGN = "foreign"  # the family of prompts that no expert is for: they are given to the gate alone
Sets = Mapping[tuple[str, str], Sequence[DocumentSet]]
"""Family of domains and kind of documents to sets, which are asked in turn."""


class Answer(NamedTuple):
    """One blend's.

    Attributes:
        text: up to its newline. right: whether the domain's own checker says so.
        tokens: log-probability of each, entropy of all that might stand there, and its mutual information with the
            particle, in nats. tempered: log-probability of the whole at each of ``TEMPERATURES``, of blends of one row.
    """

    text: str
    right: bool
    tokens: Sequence[tuple[float, float, float]]
    tempered: Sequence[float] = ()


@dataclass(frozen=True)
class Asked:
    """A question, and its answers.

    Attributes:
        bank: see ``real.records.bank_of``, and bytes. family, kind, seed, number: of the document. domain,
            expected: of the answer. p_value: of the gate, NaN where there is none.
        answers: by blend.
    """

    bank: str
    family: str
    kind: str
    seed: int
    number: int
    domain: str
    expected: str
    p_value: float
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        return self.bank, self.family, self.kind, self.seed, self.number


class Kept(dict[tuple[str, str, str, int, int], Asked]):
    """What was asked by key, kept in a file if there is one."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self.path = path
        for line in whole_lines(path):
            each = Asked(**json.loads(line))
            own = {blend: Answer(*answer) for blend, answer in each.answers.items()}
            self[each.key] = replace(each, answers=own)

    def add(self, each: Asked) -> None:
        """Keep it, in the file as well."""
        self[each.key] = each
        add_line(self.path, asdict(each))


def domains_of(names: Collection[str], texts: Path | None) -> dict[str, dict[str, Checked]]:
    """Family → the domains with answers that there are experts of, by name.

    Args:
        names: of the experts. texts: where the packages of translations are, if not on Python's path.

    Raises:
        ConfigError: no expert is of a domain with answers.
    """
    families: dict[str, Sequence[Checked]] = {
        "conventions": CONVENTIONS,
        "translations": translations(texts),
        "tasks": TASKS,
    }
    found = {family: {each.name: each for each in own if each.name in names} for family, own in families.items()}
    if not any(found.values()):
        known = ", ".join(each.name for own in families.values() for each in own)
        raise ConfigError(f"expected experts of {known}, got {', '.join(names)}")
    return {family: own for family, own in found.items() if own}


def sets_of(domains: Mapping[str, Mapping[str, Checked]], half: int, texts: Path | None) -> Sets:
    """All sets of these domains, by family; the last is of foreign documents.

    Args:
        half: bytes of a prompt that is not short, at least; the question is within about as many that follow.
    """
    found: dict[tuple[str, str], list[DocumentSet]] = {}
    for family, own in domains.items():
        for each in document_sets(own, {}, half, (*PAIRS, *MORE_PAIRS)):
            if each.kind in KINDS:
                short = each.kind == "short"  # one question follows its prompt
                found.setdefault((family, each.kind), []).append(replace(each, scored_bytes=1) if short else each)
    foreign: Sequence[Domain] = FOREIGN_TEXTS
    if "translations" in domains:
        foreign = [replace(domain, directory=texts) for domain in FOREIGN_TRANSLATIONS]
    return found | {(FOREIGN, FOREIGN): [DocumentSet(FOREIGN, FOREIGN, tuple(foreign), "each", half, half)]}


def questions(sets: Sequence[DocumentSet], seed: int, numbers: Sequence[int]) -> list[tuple[str, Question]]:
    """Held-out questions after the prompts of documents, and the name of the domain that each is of."""
    found = []
    for number in numbers:
        case = sets[number % len(sets)].case(seed, number // len(sets))
        asked = ask(case.document, np.random.default_rng([seed, 16, number]), 1)
        starts = [start for start, _ in case.document.ranges]
        place = int(np.searchsorted(starts, len(asked.context), side="right")) - 1
        found.append((case.owners[place], asked))
    return found


def answered(
    bundle: bd.Bundle, sets: Sets, half: int, texts: Path | None, count: int, seeds: Sequence[int], kept: Kept
) -> Iterator[Asked]:
    """``count`` questions of each set and seed with their answers; those that are not kept are asked now."""
    domains = {name: each for own in domains_of(bundle.experts.names, texts).values() for name, each in own.items()}
    bank = f"{bank_of(bundle)} {half}"
    work = [(key, seed, start) for key in sets for seed in seeds for start in range(0, count, AT_ONCE)]
    for (family, kind), seed, start in tqdm(work, "questions", disable=None):
        keys = {n: (bank, family, kind, seed, n) for n in range(start, min(start + AT_ONCE, count))}
        lacking = [n for n, key in keys.items() if key not in kept]
        asked = questions(sets[family, kind], seed, lacking)
        prompts = [question.context for _, question in asked]
        made = {} if family == FOREIGN or not asked else answers_to(bundle, domains, asked, seed)
        for i, (n, p_value) in enumerate(zip(lacking, p_values(bundle, prompts, seed), strict=True)):
            own = {blend: answers[i] for blend, answers in made.items()}
            kept.add(Asked(*keys[n], asked[i][0], asked[i][1].expected, p_value, own))
        yield from (kept[key] for key in keys.values())


def answers_to(
    bundle: bd.Bundle, domains: Mapping[str, Checked], asked: Sequence[tuple[str, Question]], seed: int
) -> dict[str, list[Answer]]:
    """Blend → its greedy answers, in the order of the questions."""
    generator, found = bd.TwoPassGenerator(bundle), {}
    for blend in (*PLAIN, PREDICTIVE):
        prompts = [question.context for _, question in asked]
        made = generator.generate(prompts, blend=blend, max_new_tokens=ROOM, stop="\n", seed=seed)
        numbers = np.stack([made.log_probabilities, made.predictive_entropy, made.mutual_information], axis=-1)
        logs = tempered(bundle, made).tolist() if blend in PLAIN else [()] * len(asked)
        found[blend] = []
        for n, (domain, question) in enumerate(asked):
            text, tokens = made.texts[n].removesuffix("\n"), numbers[n, : made.lengths[n]]
            right = domains[domain].reward(question.text, question.expected, text) >= 1
            found[blend].append(Answer(text, right, tokens.tolist(), logs[n]))
    return found


@torch.no_grad()
def tempered(bundle: bd.Bundle, made: Generation) -> np.ndarray:
    """(N, temperatures) log-probabilities of answers that were written under one row of weights, at each temperature of
    the model's logits; they are read once more."""
    model, found = bundle.model, np.empty((len(made.prompts), len(TEMPERATURES)))
    for n, (prompt, length) in enumerate(zip(made.prompts, made.lengths, strict=True)):
        ids = torch.tensor([[*bundle.tokenizer.tokenize(prompt).ids, *made.token_ids[n, :length].tolist()]])
        blended = bundle.experts.blend(torch.from_numpy(made.weights[n]).to(model.weights_dtype))
        session = model.open(1, ids.shape[1], blended)
        after = session.read(ids[:, :-1].to(model.device), tail=int(length)).after
        assert after is not None
        logs, said = after[0].float().cpu(), ids[0, -int(length) :, None]
        for t, each in enumerate(TEMPERATURES):
            scaled = logs / each
            found[n, t] = float((scaled.gather(1, said)[:, 0] - scaled.logsumexp(-1)).sum())
    return found


def p_values(bundle: bd.Bundle, prompts: Sequence[str | bytes], seed: int) -> list[float]:
    """(N,) of the gate; NaN where the bundle has none."""
    if bundle.gate is None or not prompts:
        return [float("nan")] * len(prompts)
    found: list[float] = bundle.gate.p_values(bundle.dispatcher, dispatch(bundle, prompts, seed)[1]).tolist()
    return found
