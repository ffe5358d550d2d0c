"""Beam search: the continuations of highest probability, as far as a few hypotheses at a time can find them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_dispatch.model.generation.continuation import Beginning
from bayes_dispatch.model.generation.decoding import Generated, check_numbers, log_probabilities, seen_tokens
from bayes_dispatch.model.generation.sampling import penalise_repetition
from bayes_dispatch.model.generation.settings import GenerationSettings

__all__ = ["beam_search"]


def beam_search(prompts: Beginning, settings: GenerationSettings) -> Generated:
    """The best hypothesis that beam search finds for each row.

    At each step the ``num_beams`` most probable hypotheses of a prompt that have not ended are kept. One that ends is
    set aside if it is among the ``num_beams`` most probable of that step, ended or not. A prompt is done when
    ``num_beams`` have been set aside and no hypothesis that goes on scores higher, at its present length, than the
    worst of those; or after ``max_new_tokens``, where those that go on are set aside too. This is the rule of
    transformers' ``early_stopping=False``; the score of a hypothesis is its log-probability / length **
    length_penalty. Penalties of repetition change the log-probabilities of tokens, not their logits, as they do there.

    Each prompt is read once; there are ``num_beams`` rows for it from the step on at which that many continuations
    exist.
    """
    with torch.inference_mode():
        search = _Search(prompts, settings)
        while search.running:
            search.advance()
        best = [done[0] for done in search.done]
        lengths = torch.tensor([hypothesis.tokens.numel() for hypothesis in best])
        width = int(lengths.max())
        ids = prompts.ids.new_full((len(best), width), settings.fill)
        scores = best[0].log_probabilities.new_zeros(len(best), width)
        for row, hypothesis in enumerate(best):
            ids[row, : lengths[row]] = hypothesis.tokens
            scores[row, : lengths[row]] = hypothesis.log_probabilities
    return Generated(ids.clone(), scores.clone(), lengths.clone().to(ids.device))


@dataclass(frozen=True, eq=False)
class _Hypothesis:
    score: float
    tokens: Tensor  # (T_new,)
    log_probabilities: Tensor  # (T_new,), the model's own


class _Search:
    """Hypotheses of the P prompts that are not done, W for each: prompt p has the rows p * W … (p + 1) * W − 1.

    Attributes:
        running: which P of the batch these are. done: hypotheses set aside for each prompt of the batch, best first.
    """

    def __init__(self, prompts: Beginning, settings: GenerationSettings) -> None:
        batch = prompts.ids.shape[0]
        self.running = list(range(batch))
        self.done: list[list[_Hypothesis]] = [[] for _ in range(batch)]
        self._settings = settings
        self._continuation = prompts.continuation
        logits = self._continuation.start()
        self._logits = logits  # (P W, V)
        self._tokens = prompts.ids.new_empty(batch, 0)  # (P W, t), the new ones
        self._log_probabilities = log_probabilities(logits[:, :0])  # (P W, t), of those
        self._totals = logits.new_zeros(batch, 1, dtype=torch.double)  # (P, W), ranked by; −∞ where there are fewer
        penalised = settings.penalty != 1
        self._seen = seen_tokens(prompts, logits.shape[1]) if penalised else None  # (P W, V)

    def advance(self) -> None:
        """Extend the hypotheses by one token, and see which prompts are done."""
        settings, beams = self._settings, self._settings.num_beams
        check_numbers(self._logits)
        own = log_probabilities(self._logits)
        ranked = own
        if self._seen is not None:
            ranked = penalise_repetition(own, self._seen, settings.penalty)
        if settings.ends and self._tokens.shape[1] < settings.min_new_tokens:
            ranked = ranked.index_fill(1, torch.tensor(settings.ends, device=ranked.device), -torch.inf)
        prompts, vocab = len(self.running), own.shape[1]
        totals = (self._totals.view(-1, 1) + ranked).view(prompts, -1)  # (P, W V), of all extensions
        count, length = min(beams, totals.shape[1]), self._tokens.shape[1] + 1
        first = torch.arange(prompts, device=totals.device)[:, None] * self._totals.shape[1]

        def extensions(values: Tensor, indices: Tensor) -> "_Extensions":
            return _Extensions(values, first + indices // vocab, indices % vocab)

        ends = self._ends(vocab)
        kept = extensions(*totals.topk(count))
        if ends is not None:
            self._set_aside(kept, ends[kept.parents, kept.tokens], own)
            kept = extensions(*totals.masked_fill(ends.view(prompts, -1), -torch.inf).topk(count))
        if length == settings.max_new_tokens:
            self._set_aside(kept, torch.ones_like(kept.totals, dtype=torch.bool), own)
            self.running = []
            return
        hopes = (kept.totals[:, 0] / length**settings.length_penalty).tolist()
        going = [p for p, hope in enumerate(hopes) if self._may_improve(self.done[self.running[p]], hope)]
        if len(going) < prompts:
            self.running = [self.running[p] for p in going]
            kept = _Extensions(*(part[going] for part in kept))
        if self.running:
            self._follow(kept, own)

    def _follow(self, kept: "_Extensions", own: Tensor) -> None:
        """Make the kept extensions the hypotheses."""
        parents, tokens = kept.parents.flatten(), kept.tokens.flatten()
        rows = parents.tolist()
        if rows != list(range(own.shape[0])):
            self._continuation.reorder(rows)
        self._totals = kept.totals
        self._tokens = torch.cat([self._tokens[parents], tokens[:, None]], dim=1)
        added = own[parents, tokens][:, None]
        self._log_probabilities = torch.cat([self._log_probabilities[parents], added], dim=1)
        if self._seen is not None:
            self._seen = self._seen[parents].scatter_(1, tokens[:, None], True)
        self._logits = self._continuation.step(tokens)

    def _set_aside(self, kept: "_Extensions", chosen: Tensor, own: Tensor) -> None:
        """Add the ``chosen`` extensions (P, W) to those that are done, of which each prompt has as many as beams."""
        for p, w in (chosen & kept.totals.isfinite()).nonzero().tolist():
            parent, token = kept.parents[p, w], kept.tokens[p, w]
            tokens = torch.cat([self._tokens[parent], token[None]])
            added = torch.cat([self._log_probabilities[parent], own[parent, token][None]])
            score = float(kept.totals[p, w]) / tokens.numel() ** self._settings.length_penalty
            done = self.done[self.running[p]]
            done.append(_Hypothesis(score, tokens, added))
            done.sort(key=lambda hypothesis: -hypothesis.score)
            del done[self._settings.num_beams :]

    def _may_improve(self, done: list[_Hypothesis], hope: float) -> bool:
        """Whether a hypothesis that goes on and scores ``hope`` would be among the best."""
        return hope > (done[-1].score if len(done) == self._settings.num_beams else -torch.inf)

    def _ends(self, vocab: int) -> Tensor | None:
        """(P W, V), true where a token would end a hypothesis; ``None`` where none can."""
        eos, stops, tokens = self._settings.ends, self._settings.stops, self._tokens
        if not (eos or stops) or tokens.shape[1] + 1 < self._settings.min_new_tokens:
            return None
        ends = torch.zeros(tokens.shape[0], vocab, dtype=torch.bool, device=tokens.device)
        ends[:, list(eos)] = True
        for *head, last in stops:
            if len(head) <= tokens.shape[1]:
                recent = tokens[:, tokens.shape[1] - len(head) :]
                ends[:, last] |= (recent == tokens.new_tensor(head)).all(1)
        return ends


class _Extensions(NamedTuple):
    """Hypotheses with one more token, (P, W) each: their totals, best first, their rows before, and the tokens."""

    totals: Tensor
    parents: Tensor
    tokens: Tensor
