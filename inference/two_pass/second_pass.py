"""The second pass over many prompts: in groups of similar length, each read once, dispatched, and generated for."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from bayes_dispatch.arguments import seed, truth
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.two_pass.blends import Blend, Particles
from bayes_dispatch.inference.two_pass.events import tell
from bayes_dispatch.inference.two_pass.first_pass import (
    Prefix,
    evidence_of,
    first_pass,
    read_prefix,
    together,
)
from bayes_dispatch.inference.two_pass.generation import Cost
from bayes_dispatch.inference.two_pass.particles import Decoding, Token, settle
from bayes_dispatch.inference.two_pass.prompts import Writing, Written, check_prompts, tokenized
from bayes_dispatch.inference.two_pass.readers import CachedReader, ParticleReader, UncachedReader, straight
from bayes_dispatch.inference.two_pass.system import POSTERIOR_DRAWS, Strategy, System, as_strategy, check_gate, gate_of
from bayes_dispatch.model.generation.sampling import row_generators, row_seeds

__all__ = ["GenerationRequest", "SecondPass", "on_base"]

logger = logging.getLogger(__name__)

READ_OFF_THE_MODEL = {"hidden", "surprise"}  # views; others are those of the text alone
Step = tuple[Token, np.ndarray, np.ndarray, list[str]]

ROWS_AT_ONCE = 64  # rows (prompts times particles) of one batch; prompts whose first pass runs together
TOKENS_AT_ONCE = 65536  # of prompts whose first pass runs together: it bounds what is kept of them


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked of all prompts: see ``TwoPassGenerator.generate``.

    Attributes:
        seed: ``None`` becomes a fresh one.

    Raises:
        ConfigError: a seed or strategy that is none, or a rate at which to abstain is missing.
    """

    blend: Blend
    writing: Writing
    seed: int | None
    own_evidence: bool = True
    strategy: Strategy | None = None
    false_alarm_rate: float | None = None
    abstain: bool = False
    use_cache: bool = True

    def __post_init__(self) -> None:
        given = int(np.random.SeedSequence().generate_state(1)[0]) if self.seed is None else seed(self.seed)
        object.__setattr__(self, "seed", given)
        as_strategy(self.strategy)
        for name in ("own_evidence", "abstain", "use_cache"):
            truth(name, getattr(self, name))
        if self.abstain and self.false_alarm_rate is None:
            raise ConfigError("expected a false_alarm_rate to abstain at, got None")


class SecondPass:
    """One call of ``generate``: a lazy stream of tokens, and what is known of the prompts so far.

    Args:
        system: model, tokenizer, experts and dispatcher. cut: blocks of its model that no expert adapts.
        prompts, request: what is asked.

    Attributes:
        weights: by prompt (K + 1,), filtered means when it had been read. paths: by prompt (tokens − 1, K + 1), before
            each of its tokens but the first. rows: by prompt, of the model, for what follows it. texts: by prompt, what
            has been written. cost: so far.
        foreign: the prompts that the gate sent to base. p_values: by prompt, of the gate, where it was asked.

    Raises:
        PromptError: see ``check_prompts``. ConfigError: the system has no gate for a false-alarm rate, or not for it.
    """

    def __init__(
        self,
        system: System,
        cut: int,
        prompts: Sequence[str | bytes],
        request: GenerationRequest,
    ) -> None:
        self.prompts = tuple(check_prompts(prompts))
        self.weights: dict[int, np.ndarray] = {}
        self.paths: dict[int, np.ndarray] = {}
        self.rows: dict[int, int] = {}
        self.texts: dict[int, str] = {}
        self.foreign: set[int] = set()
        self.p_values: dict[int, float] = {}
        self._texts = tokenized(system.tokenizer, self.prompts, system.model.longest, request.writing.max_new_tokens)
        self.cost = Cost(system.model.depth)
        self._system, self._cut, self._request = system, cut, request
        if request.false_alarm_rate is not None:
            check_gate(system, request.false_alarm_rate)
        asked = request.strategy
        self._given = None if asked is None else asked.posterior(system, prompts, request.seed)
        self._draws: dict[int, DispatchPosterior] = {}
        assert request.seed is not None
        self._seeds = row_seeds(request.seed, self.prompts)
        self._generators = row_generators(request.seed + 1, self.prompts)

    def posterior(self, prompts: Sequence[int]) -> DispatchPosterior:
        """The posterior of some prompts that have been dispatched."""
        return DispatchPosterior.concatenate([self._draws[n] for n in prompts])

    def tokens(self) -> Iterator[Step]:
        """Each next token of some prompts, the indices (n,) of these, whether each has ended, and the text it adds."""
        try:
            for group in self._groups():
                yield from self._generate(group)
        except GeneratorExit:  # the reader of a stream wants no more
            self._tell(ended=False)
            raise
        self._tell(ended=True)

    def _tell(self, ended: bool) -> None:
        facts = {"prompts": len(self.prompts), "blend": self._request.blend.name, "ended": ended}
        tell(logger, logging.INFO, "generated", lambda: facts | asdict(self.cost))

    def _groups(self) -> Iterator[list[int]]:
        """Prompts whose first pass runs together; copies of one are neighbours."""
        lengths = [len(text.ids) for text in self._texts]
        order = sorted(range(len(self.prompts)), key=lambda n: (lengths[n], self.prompts[n]))
        return together(order, lengths, ROWS_AT_ONCE, TOKENS_AT_ONCE)

    def _generate(self, group: list[int]) -> Iterator[Step]:
        first = {self.prompts[n]: n for n in reversed(group)}  # of equal prompts
        distinct = list(dict.fromkeys(first[self.prompts[n]] for n in group))
        rows = [distinct.index(first[self.prompts[n]]) for n in group]
        texts = [self._texts[n].ids for n in distinct]
        capacity = max(map(len, texts)) + self._request.writing.max_new_tokens
        with torch.no_grad():
            pad = self._system.tokenizer.pad_token_id
            prefix = read_prefix(self._system.model, self._cut, texts, pad, capacity, means=True)
            own = sum(len(self._texts[n].ids) for n in group)
            self._count(prompt_tokens=own, prefill=int(prefix.tokens.sum()) * self._cut)
            posterior = self._dispatch(group, distinct, rows, prefix)
        for place, n in enumerate(group):
            self._draws[n] = posterior.select([place])
        tell(logger, logging.DEBUG, "prefix read", lambda: _of_prefix(prefix, len(group), self._cut))
        tell(logger, logging.DEBUG, "dispatched", lambda: _of_posterior(group, posterior, self.foreign))
        foreign = np.array([n in self.foreign for n in group])
        particles = on_base(self._request.blend.particles(posterior), foreign)
        if self._request.abstain and foreign.any():
            for n in np.array(group)[foreign]:
                self.weights[n] = np.eye(particles.weights.shape[2])[-1]
                self.paths[n] = np.tile(self.weights[n], (len(self._texts[n].ids) - 1, 1))
            left = np.flatnonzero(~foreign)
            group, rows, particles = [group[i] for i in left], [rows[i] for i in left], particles.select(left)
        at_once = max(1, ROWS_AT_ONCE // particles.mass.shape[1])
        for start in range(0, len(group), at_once):
            chosen = slice(start, start + at_once)
            yield from self._decode(group[chosen], prefix, rows[chosen], particles.select(chosen))

    def _dispatch(self, group: list[int], distinct: list[int], rows: list[int], prefix: Prefix) -> DispatchPosterior:
        rate = self._request.false_alarm_rate
        if self._given is not None and rate is None:
            return self._given.select(group)
        prompts = [self.prompts[n] for n in distinct]
        if prefix.x is None and READ_OFF_THE_MODEL & set(self._system.dispatcher.views):
            found = first_pass(self._system.model, self._system.tokenizer, prompts).evidence
            self._count(first_pass=int(prefix.tokens.sum()) * self._system.model.depth)
        else:
            views = {} if prefix.means is None else {"hidden": prefix.means}
            found = evidence_of(prompts, [self._texts[n] for n in distinct], views)
        evidence = found.select(np.array(rows))
        if rate is not None:
            decision = gate_of(self._system).decide(self._system.dispatcher, evidence, rate)
            self.p_values.update(zip(group, decision.p_values.tolist(), strict=True))
            self.foreign.update(np.array(group)[decision.foreign].tolist())
        if self._given is not None:
            return self._given.select(group)
        seeds = [self._seeds[n] for n in group]
        return self._system.dispatcher.posterior(evidence, draws=POSTERIOR_DRAWS, seed=seeds)

    def _decode(self, group: list[int], prefix: Prefix, rows: list[int], particles: Particles) -> Iterator[Step]:
        writing = self._request.writing
        own = sorted(set(rows))
        prefix, rows = prefix.select(own), [own.index(row) for row in rows]
        with torch.no_grad():
            settled = straight(settle(partial(self._begin, prefix, rows), particles))
        decoding, reader = settled.decoding, settled.decoding.reader
        self._count(prefill=settled.evaluated)
        for place, n in enumerate(group):
            self.weights[n], self.rows[n] = settled.weights[place], decoding.counts[place]
            self.paths[n] = settled.path[: len(self._texts[n].ids) - 1, place]
        tell(
            logger,
            logging.DEBUG,
            "prompts read",
            lambda: {"prompts": group, "rows": reader.rows, "of": particles.mass.size},
        )
        live = np.array(group)
        written = {n: Written(self._system.tokenizer, self._texts[n].ids, writing) for n in group}
        while len(live):
            with torch.no_grad():
                token = decoding.choose([writing.sampling] * len(live), [self._generators[n] for n in live])
            ended = np.array([written[n].add(int(each)) for n, each in zip(live, token.ids, strict=True)])
            self.texts.update((int(n), written[n].text) for n in live)
            pieces = [written[n].piece for n in live]
            going = np.flatnonzero(~ended)
            if len(going):
                with torch.no_grad():
                    before = reader.evaluated
                    if len(going) < len(live):
                        decoding.keep(going.tolist())
                    decoding.append(token.ids[going], self._request.own_evidence)
                    self._count(decode=reader.evaluated - before, new_tokens=len(going))
            if ended.any():
                tell(logger, logging.DEBUG, "ended", partial(_of_ended, live[ended], going))
            yield token, live, ended, pieces
            live = live[going]

    def _begin(self, prefix: Prefix, rows: list[int], particles: Particles) -> Decoding:
        """Of the ``rows`` of ``prefix`` under particles."""
        system = self._system
        whole = rows == list(range(len(prefix.ids)))
        ids, lengths = (prefix.ids, prefix.tokens) if whole else (prefix.ids[rows], prefix.tokens[rows])
        reader: ParticleReader
        if self._request.use_cache:
            capacity = ids.shape[1] + self._request.writing.max_new_tokens
            reader = CachedReader(system.model, system.experts, particles, prefix, rows, capacity)
        else:
            reader = UncachedReader(system.model, system.experts, particles, ids, lengths)
        return Decoding(reader, particles, system.tokenizer.continues, ids, lengths)

    def _count(self, **evaluations: int) -> None:
        self.cost = self.cost + Cost(self._system.model.depth, **evaluations)


def on_base(particles: Particles, foreign: Bool[np.ndarray, " N"]) -> Particles:
    """All particles of foreign prompts at base."""
    if not foreign.any():
        return particles
    base = np.eye(particles.weights.shape[2])[-1]
    layers = None if particles.layers is None else np.where(foreign[:, None, None, None], base, particles.layers)
    return replace(particles, weights=np.where(foreign[:, None, None], base, particles.weights), layers=layers)


def _of_prefix(prefix: Prefix, prompts: int, cut: int) -> dict[str, Any]:
    held = 0 if prefix.below is None else prefix.below.nbytes
    return {"prompts": prompts, "distinct": len(prefix.tokens), "below_block": cut, "cache_bytes": held}


def _of_ended(prompts: np.ndarray, going: np.ndarray) -> dict[str, Any]:
    return {"prompts": prompts.tolist(), "going": len(going)}


def _of_posterior(prompts: list[int], posterior: DispatchPosterior, foreign: set[int]) -> dict[str, Any]:
    means = [dict(zip(posterior.experts, np.round(row, 4).tolist(), strict=True)) for row in posterior.mean]
    entropy = np.round(posterior.entropy, 4).tolist()
    return {"prompts": prompts, "mean": means, "entropy": entropy, "foreign": [n for n in prompts if n in foreign]}
