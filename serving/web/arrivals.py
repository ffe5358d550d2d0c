"""Do the prompts that arrive look like those that the bundle was made for? The gate is asked, and a drift monitor.

Both read one number of a prompt: how badly the experts explain it for its length (``Gate.foreignness``), which no
feedback moves. What the monitor compares it with are the held-out prompts of the gate's calibration.
"""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bayes_dispatch.dispatcher.drift import DriftMonitor, drift_monitor, watch
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.gate import Gate

__all__ = ["DRIFT_RATE", "FOREIGN_RATE", "Arrivals"]

logger = logging.getLogger(__name__)

FOREIGN_RATE = 0.05  # a prompt counts as foreign with a p-value of at most this
DRIFT_RATE = 0.01  # of servers whose prompts are as the held-out ones, at most this share ever raises the alarm
DUTY = 0.05  # share of the time that is spent on this


class Arrivals:
    """Asks the gate about prompts on a thread of its own, for a twentieth of the time at most.

    A prompt that comes while it is asked about another, or rests, is let by. Whether it is does not depend on the
    prompt, so that those that are asked about are exchangeable where all are.

    Args:
        dispatcher, gate: of the bundle.

    Attributes:
        gated, foreign: prompts that were asked about, and the foreign ones of these. monitor: after them.
    """

    def __init__(self, dispatcher: Dispatcher, gate: Gate) -> None:
        gate.check_dispatcher(dispatcher)
        self._dispatcher, self._gate = dispatcher, gate
        self.gated = self.foreign = 0
        mixed = np.random.default_rng(0).permutation(gate.scores)  # they may be in the order of their domains
        self.monitor: DriftMonitor = drift_monitor(mixed, DRIFT_RATE)
        self._thread = ThreadPoolExecutor(1, "arrivals")
        self._busy, self._rested = False, 0.0

    def add(self, evidence: Evidence) -> None:
        """A prompt has come. Quick; from one thread."""
        if self._busy or time.monotonic() < self._rested:
            return
        self._busy = True
        self._thread.submit(self._ask, evidence)

    def ask(self, evidence: Evidence) -> None:
        """Ask about one prompt, and count it; from one thread."""
        score = self._gate.foreignness(self._dispatcher, evidence)
        p_value = self._gate.ranked(score, evidence.known_lengths())[0]
        self.monitor, _ = watch(self.monitor, score)
        self.foreign += int(p_value <= FOREIGN_RATE)
        self.gated += 1

    def _ask(self, evidence: Evidence) -> None:
        begun = time.monotonic()
        try:
            self.ask(evidence)
        except Exception:
            logger.exception("asking the gate failed")
        finally:
            now = time.monotonic()
            self._rested = now + (now - begun) * (1 / DUTY - 1)
            self._busy = False
