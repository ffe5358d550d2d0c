"""What is learnt from answers: a label or a reward for one moves the serving prior, in its file.

A prompt counts once, whatever was written to it: a reward and another one for the same prompt are not independent.
What is kept of an answer are its prompts' evidence, not their text, and the weights that wrote it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bayes_dispatch.arguments import whole
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.prior.online import PriorState
from bayes_dispatch.errors import BundleError
from bayes_dispatch.inference.two_pass.events import tell
from bayes_dispatch.serving.web.choices import Choice
from bayes_dispatch.serving.web.fields import FeedbackAsked
from bayes_dispatch.serving.web.refusals import RefusedError

__all__ = ["REMEMBERED", "Learner", "feedback_answer"]

logger = logging.getLogger(__name__)

REMEMBERED = 4096  # choices: some 5 KB each of a model of width 576


@dataclass(frozen=True, eq=False)
class _Given:
    """An answer that was given.

    Attributes:
        prompts: the number of each choice's prompt. evidence: by that number.
        weights: ``(1, K+1)`` of each choice, the mean over its tokens; ``None`` where there are none.
        settled: prompts that have had their feedback.
    """

    prompts: tuple[int, ...]
    evidence: dict[int, Evidence]
    weights: tuple[np.ndarray | None, ...]
    settled: set[int] = field(default_factory=set)


class Learner:
    """Takes feedback on the answers that it remembers. All calls are from one event loop.

    Args:
        dispatcher: whose prior learns; it keeps the prior in a file (``Dispatcher.keep_prior``).
        most: choices of answers to remember. While there are more, with those of the answer that came last, the owner
            who has the most of them loses the oldest of its answers. So nobody pushes out those of others who have
            fewer, and who has at most an equal part loses none; an answer of more choices is not remembered.

    Raises:
        ConfigError: fewer than one.
    """

    def __init__(self, dispatcher: Dispatcher, most: int = REMEMBERED) -> None:
        self._dispatcher, self._most = dispatcher, whole("remembered", most, 1)
        self._given: dict[str, dict[str, _Given]] = {}  # by owner and id, the oldest first
        self._held: dict[str, int] = {}  # choices, by owner
        self._thread = ThreadPoolExecutor(1, "feedback")  # so that one is learnt, or is not, before the next is begun

    @property
    def held(self) -> int:
        """Choices that are remembered."""
        return sum(self._held.values())

    def remember(self, name: str, owner: str, choices: Sequence[Choice]) -> None:
        """An answer is over; told again, nothing happens. name: its id. owner: who may tell of it."""
        own = self._given.setdefault(owner, {})
        if name in own or len(choices) > self._most:
            return
        evidence = {each.prompt: each.begun.evidence for each in choices if each.begun is not None}
        weights = tuple(None if each.shares is None else each.shares[None] / each.count for each in choices)
        own[name] = _Given(tuple(each.prompt for each in choices), evidence, weights)
        self._held[owner] = self._held.get(owner, 0) + len(choices)
        while self.held > self._most:
            self._forget()

    def _forget(self) -> None:
        """One answer: the oldest of who has the most choices."""
        owner = max(self._held, key=self._held.__getitem__)
        oldest = self._given[owner].pop(next(iter(self._given[owner])))
        self._held[owner] -= len(oldest.prompts)

    async def take(self, asked: FeedbackAsked, owner: str) -> PriorState:
        """Let the prior learn of it. What comes meanwhile waits.

        Returns:
            The prior after it, which the file has, and which following prompts are dispatched with.

        Raises:
            RefusedError: 400 for what fits no feedback; 404 for an answer that is not remembered, or another's; 409 for
                a prompt that has had its feedback; 500 where the file cannot be written: nothing has been learnt.
        """
        given = self._given.get(owner, {}).get(asked.id)
        if given is None:
            message = "expected the id of an answer that was given to this key and is over and remembered, got another"
            raise RefusedError(404, message, param="id", code="answer_not_found")
        choice = self._choice(asked, given)
        learn = self._learning(asked, given, choice)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._once, given, choice, learn)

    @staticmethod
    def _once(given: _Given, choice: int, learn: Callable[[], PriorState]) -> PriorState:
        """On the one thread, where it computes, and waits for the disk.

        Raises:
            RefusedError: 409 or 500, see ``take``.
        """
        prompt = given.prompts[choice]
        if prompt in given.settled:
            message = f"expected one feedback on a prompt, got another on that of choice {choice}"
            raise RefusedError(409, message, param="id", code="feedback_given")
        try:
            learnt = learn()
        except (BundleError, OSError) as error:
            reason = str(error)
            tell(logger, logging.ERROR, "prior not kept", lambda: {"class": type(error).__name__, "reason": reason})
            message = "expected to write the prior's file, got an error: nothing was learnt, and the log has why"
            raise RefusedError(500, message, code="prior_not_kept") from None
        given.settled.add(prompt)
        return learnt

    def _choice(self, asked: FeedbackAsked, given: _Given) -> int:
        count = len(given.prompts)
        if asked.choice is None and count > 1:
            raise RefusedError(400, f"expected choice, from 0 to {count - 1}, got none", param="choice")
        choice = asked.choice or 0
        if choice >= count or given.prompts[choice] not in given.evidence:
            message = f"expected a choice of the answer, from 0 to {count - 1} and begun, got {choice}"
            raise RefusedError(400, message, param="choice")
        return choice

    def _learning(self, asked: FeedbackAsked, given: _Given, choice: int) -> Callable[[], PriorState]:
        """What is to be done."""
        names = [*self._dispatcher.experts, "base"]
        if (asked.label is None) == (asked.reward is None):
            got = "neither" if asked.label is None else "both"
            raise RefusedError(400, f"expected a label or a reward, got {got}", param="label")
        for param in ("label", "expert"):
            if (name := getattr(asked, param)) is not None and name not in names:
                raise RefusedError(400, f"expected {param} among {', '.join(names)}, got {name!r:.80}", param=param)
        if asked.label is not None:
            if asked.expert is not None:
                raise RefusedError(400, "expected expert with a reward, got it with a label", param="expert")
            label = names.index(asked.label)
            return lambda: self._dispatcher.update([label])
        reward, weights, evidence = asked.reward, given.weights[choice], given.evidence[given.prompts[choice]]
        assert reward is not None
        if asked.expert is not None:
            expert = asked.expert
            return lambda: self._dispatcher.feedback(expert, reward, evidence)
        if weights is None:
            message = "expected expert with a reward where nothing was written here, got it without"
            raise RefusedError(400, message, param="expert")
        return lambda: self._dispatcher.feedback(weights, reward, evidence)


def feedback_answer(asked: FeedbackAsked, prior: PriorState) -> dict[str, Any]:
    """Of ``/v1/feedback``: the prior that there is now."""
    return {
        "id": asked.id,
        "object": "feedback",
        "prior": {
            "experts": list(prior.names),
            "mean": prior.mean.tolist(),
            "interval_90": prior.interval(0.9).T.tolist(),
            "events": prior.events,
        },
    }
