"""Evidence of known origin, from documents of the domains: to fit a dispatcher, to judge it, to calibrate a gate."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.errors import UnknownNameError
from bayes_dispatch.experts.domains import Domain, Split, mixed_text
from bayes_dispatch.experts.domains.mixtures import beginning_of, joined_text
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.inference.two_pass.prompts import clipped
from bayes_dispatch.model.backbone import Backbone, Tokens

__all__ = [
    "KnownEvidence",
    "base_evidence",
    "calibration_evidence",
    "evidence_of_texts",
    "foreign_evidence",
    "known_weights",
    "log_uniform",
    "mixed_evidence",
    "prompts_of_several",
    "pure_evidence",
    "token_shares",
]


class KnownEvidence(NamedTuple):
    """Evidence with what is known of its prompts.

    Attributes:
        evidence: N prompts.
        labels: (N,) index of a prompt's only domain, −1 where it has several or none.
        mixtures: (N, K + 1) shares of the domains, base last, of the tokens (:func:`token_shares`); NaN rows where
            they are not known.
    """

    evidence: Evidence
    labels: np.ndarray
    mixtures: np.ndarray

    @property
    def groups(self) -> Int[np.ndarray, " prompt"]:
        """0 for prompts of one domain, 1 for those of several: what a gate is calibrated for, each by itself."""
        return (self.labels < 0).astype(int)

    @property
    def several(self) -> "KnownEvidence":
        """The prompts of several domains."""
        return self.select(np.flatnonzero(self.labels < 0))

    def select(self, rows: Int[np.ndarray, " row"]) -> "KnownEvidence":
        """Some of the prompts."""
        return KnownEvidence(self.evidence.select(rows), self.labels[rows], self.mixtures[rows])

    @classmethod
    def concatenate(cls, parts: Sequence["KnownEvidence"]) -> "KnownEvidence":
        """All prompts of several sets, in order."""
        return cls(
            Evidence.concatenate([part.evidence for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.mixtures for part in parts]),
        )

    def among(self, places: Sequence[int], experts: int) -> "KnownEvidence":
        """The same prompts for ``experts`` experts, of which domain d is that at ``places[d]``."""
        columns = [*places, experts]
        mixtures = np.where(np.isnan(self.mixtures[:, :1]), np.nan, np.zeros((len(self.labels), experts + 1)))
        mixtures[:, columns] = self.mixtures
        return KnownEvidence(self.evidence, np.array([*places, -1])[self.labels], mixtures)


def pure_evidence(
    model: Backbone,
    domains: Sequence[Domain],
    per_domain: int,
    lengths: tuple[int, int],
    split: Split,
    seed: int,
    progress: bool = False,
    cut: int = 0,
) -> KnownEvidence:
    """Prompts of one domain each; their lengths in bytes are log-uniform in ``lengths``, both included.

    ``cut``, here and below, is that of ``first_pass``. No prompt here and below is longer than the model can read.
    """
    rng = np.random.default_rng([seed, 1])
    prompts, labels = [], []
    for label, domain in enumerate(domains):
        for _ in range(per_domain):
            length = log_uniform(rng, lengths)
            text = domain.document(rng, 0, length, split).data[:length].decode(errors="ignore")
            prompts.append(clipped(model.tokenizer, text, model.longest))
            labels.append(label)
    evidence = first_pass(model, model.tokenizer, prompts, progress=progress, cut=cut).evidence
    return KnownEvidence(evidence, np.array(labels), np.full((len(labels), len(domains) + 1), np.nan))


def mixed_evidence(
    model: Backbone,
    domains: Sequence[Domain],
    count: int,
    lengths: tuple[int, int],
    split: Split,
    seed: int,
    progress: bool = False,
    cut: int = 0,
) -> KnownEvidence:
    """Prompts whose lines come from two domains, in a third of them from three.

    Wanted shares of their bytes are uniform on the simplex; what is known of them are the shares of their tokens.
    """
    rng = np.random.default_rng([seed, 2])
    prompts, owned = list[str](), list[np.ndarray]()
    for _ in range(count):
        chosen = rng.choice(len(domains), size=_how_many(rng, len(domains)), replace=False)
        weights = rng.dirichlet(np.ones(len(chosen))).tolist()
        text, owners = mixed_text([domains[i] for i in chosen], weights, rng, log_uniform(rng, lengths), split)
        prompts.append(clipped(model.tokenizer, text, model.longest))
        owned.append(chosen[owners])
    evidence = first_pass(model, model.tokenizer, prompts, progress=progress, cut=cut).evidence
    return KnownEvidence(evidence, np.full(count, -1), _shares(model, prompts, owned, len(domains) + 1))


def evidence_of_texts(
    model: Backbone,
    texts: Sequence[Sequence[str]],
    pure: int,
    mixed: int,
    lengths: tuple[int, int] | None,
    seed: int,
    progress: bool = False,
    cut: int = 0,
) -> KnownEvidence:
    """Prompts that begin one text each, and then those of :func:`prompts_of_several`: of no text two of one kind.

    So prompts of one kind are exchangeable with those of further such texts, as the guarantees of ``Gate.calibrate``
    and ``Dispatcher.calibrate`` need it; several prompts of one text are not.

    Args:
        texts: of each expert. pure: most prompts of each. mixed: most prompts of several.
        lengths: shortest and longest, in bytes; ``None`` for whole texts, and as long as the longest of several.
        model, seed, progress, cut: as in :func:`pure_evidence`.
    """
    rng = np.random.default_rng([seed, 1])
    labelled = [(text, label) for label, own in enumerate(texts) for text in own[:pure]]
    begun = [text if lengths is None else beginning_of(text, log_uniform(rng, lengths)) for text, _ in labelled]
    prompts = [clipped(model.tokenizer, text, model.longest) for text in begun]
    several, shares = prompts_of_several(model, texts, mixed, seed, lengths)
    evidence = first_pass(model, model.tokenizer, prompts + several, progress=progress, cut=cut).evidence
    labels = np.array([label for _, label in labelled] + [-1] * len(several))
    return KnownEvidence(evidence, labels, np.concatenate([np.full((len(prompts), len(texts) + 1), np.nan), shares]))


def prompts_of_several(
    model: Backbone,
    texts: Sequence[Sequence[str]],
    most: int,
    seed: int,
    lengths: tuple[int, int] | None = None,
) -> tuple[list[str], Float[np.ndarray, "prompt component"]]:
    """Prompts that join the beginnings of two experts' texts, in a third of them of three; no text is in two of them.

    Wanted shares of their bytes are uniform on the simplex.

    Args:
        model: to read them. texts: of each expert. most: prompts; fewer where the texts do not suffice.
        seed: of the choice. lengths: shortest and longest, in bytes; by default as long as the longest text of each.

    Returns:
        The prompts, and the shares of their tokens, base last.
    """
    rng = np.random.default_rng([seed, 2])
    left = [[own[place] for place in rng.permutation(len(own))] for own in texts]
    prompts, owned = list[str](), list[np.ndarray]()
    while len(prompts) < most and sum(map(bool, left)) > 1:
        counts = np.array(list(map(len, left)))  # so chosen, all texts run out at about the same time
        size = _how_many(rng, int(np.count_nonzero(counts)))
        chosen = rng.choice(len(left), size=size, replace=False, p=counts / counts.sum())
        own = [left[which].pop() for which in chosen]
        longest = max(len(text.encode()) for text in own) if lengths is None else log_uniform(rng, lengths)
        text, owners = joined_text(own, rng.dirichlet(np.ones(size)).tolist(), longest)
        prompts.append(clipped(model.tokenizer, text, model.longest))
        owned.append(chosen[owners])
    return prompts, _shares(model, prompts, owned, len(texts) + 1)


def _shares(
    model: Backbone, prompts: Sequence[str], owned: Sequence[Int[np.ndarray, " byte"]], components: int
) -> Float[np.ndarray, "prompt component"]:
    """The shares of the tokens of prompts, or of longer texts that they begin, whose bytes' owners are these."""
    texts = (model.tokenizer.tokenize(prompt.encode()) for prompt in prompts)
    shares = [token_shares(text, owners, components) for text, owners in zip(texts, owned, strict=True)]
    return np.array(shares).reshape(len(prompts), components)


def token_shares(text: Tokens, owners: Int[np.ndarray, " byte"], components: int) -> Float[np.ndarray, " component"]:
    """What share of a text's tokens each component has: those that the mean hidden state is of, all but the first.

    Args:
        text: the text in tokens; one is of the component of its first byte.
        owners: the component of each byte of the text. components: how many there are.
    """
    starts = np.array([start for start, _ in text.spans[1:] or text.spans])
    found = np.bincount(owners[np.minimum(starts, len(owners) - 1)], minlength=components)
    return found / found.sum()


def base_evidence(
    model: Backbone,
    domains: Sequence[Domain],
    experts: int,
    per_domain: int,
    lengths: tuple[int, int],
    split: Split,
    seed: int,
    cut: int = 0,
) -> KnownEvidence:
    """Prompts of domains that base itself serves best: all their weight is on it, beside ``experts`` experts."""
    found = pure_evidence(model, domains, per_domain, lengths, split, seed, cut=cut)
    count = len(found.labels)
    return KnownEvidence(found.evidence, np.full(count, -1), np.tile(np.eye(experts + 1)[-1], (count, 1)))


def known_weights(
    names: Sequence[str | None], components: Sequence[str]
) -> tuple[Int[np.ndarray, " prompt"], Float[np.ndarray, "prompt component"]]:
    """Labels and mixtures, as in :class:`KnownEvidence`, of prompts that one component each serves best.

    Args:
        names: of the component of each prompt, base among them; ``None`` where nobody knows. components: base last.

    Raises:
        UnknownNameError: a name of none of them.
    """
    if unknown := [name for name in names if name not in (None, *components)]:
        raise UnknownNameError(f"expected prompts of {', '.join(components)}, got one of {unknown[0]}")
    experts = list(components[:-1])
    labels = np.array([experts.index(name) if name in experts else -1 for name in names])
    mixtures = np.full((len(names), len(components)), np.nan)
    mixtures[[name == components[-1] for name in names]] = np.eye(len(components))[-1]
    return labels, mixtures


def foreign_evidence(
    model: Backbone,
    domains: Sequence[Domain],
    experts: int,
    per_domain: int,
    lengths: tuple[int, int],
    seed: int,
    cut: int = 0,
) -> KnownEvidence:
    """Prompts of domains without an expert, held out: nothing is known of their weights over ``experts`` experts."""
    found = pure_evidence(model, domains, per_domain, lengths, "held_out", seed, cut=cut)
    count = len(found.labels)
    return KnownEvidence(found.evidence, np.full(count, -1), np.full((count, experts + 1), np.nan))


def calibration_evidence(
    model: Backbone,
    domains: Sequence[Domain],
    pure: int,
    mixed: int,
    lengths: tuple[int, int],
    seed: int,
    progress: bool = False,
    cut: int = 0,
) -> KnownEvidence:
    """Held-out prompts of one domain and then of several, for ``Gate.calibrate`` and ``Dispatcher.calibrate``.

    Args:
        model: the base model. domains: of the experts. pure: prompts of each. mixed: prompts of several.
        lengths: shortest and longest, in bytes. seed: of the prompts. progress: show progress bars.
        cut: that of ``first_pass``.
    """
    known = pure_evidence(model, domains, pure, lengths, "held_out", seed, progress, cut)
    several = mixed_evidence(model, domains, mixed, lengths, "held_out", seed, progress, cut)
    return KnownEvidence.concatenate([known, several])


def _how_many(rng: np.random.Generator, most: int) -> int:
    """Domains that share a prompt: two, in a third of the prompts three."""
    return min(3 if rng.random() < 1 / 3 else 2, most)


def log_uniform(rng: np.random.Generator, lengths: tuple[int, int]) -> int:
    """A length, the shortest and the longest included."""
    low, high = lengths
    return min(int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))), high)
