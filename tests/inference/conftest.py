"""The slow way, one particle at a time through the whole model and the filter written out."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from bayes_dispatch.experts.bank import ExpertBank


@pytest.fixture(scope="session")
def explicit_filter() -> Callable[..., SimpleNamespace]:
    """Predictive distributions along a text under weighted particles: no batches, padding or caches."""

    def run(
        model: Any,
        bank: "ExpertBank",
        data: bytes,
        weights: np.ndarray,
        mass: np.ndarray,
        switching: tuple[float, ...] = (0.0,),
        target: np.ndarray | None = None,
        prompt: int = 0,
    ) -> SimpleNamespace:
        """For T bytes: log-probabilities (T + 1, V), entropy and information (T + 1,), filtered masses (T + 1, S).

        A switch leads to ``mass`` within as many bytes as ``prompt`` has, and then to ``target``, if there is one.
        """
        ids = torch.tensor([[256, *data]])
        with torch.no_grad():
            each = np.stack(
                [
                    model(ids, adaptation=bank.blend(torch.tensor(w).to(model.dtype)))
                    .logits[0]
                    .double()
                    .softmax(-1)
                    .numpy()
                    for w in weights
                ]
            )  # (S, 1 + T, V)
        rates = np.array(switching)[:, None]
        joint = np.tile(mass, (len(rates), 1)) / len(rates)  # of rate and particle
        masses, mixtures, information = [], [], []
        for t in range(len(data) + 1):
            v = joint.sum(0)
            mixture = v @ each[:, t]
            masses.append(v)
            mixtures.append(mixture)
            ratio = np.log(each[:, t] / mixture)
            information.append(float((v[:, None] * each[:, t] * ratio).sum()))
            if t < len(data):
                joint = joint * each[:, t, data[t]]
                joint /= joint.sum()
                aim = mass if target is None or t < prompt else target
                joint = (1 - rates) * joint + rates * joint.sum(1, keepdims=True) * aim
        p = np.stack(mixtures)
        return SimpleNamespace(
            log_p=np.log(p), entropy=-(p * np.log(p)).sum(1), information=np.array(information), masses=np.stack(masses)
        )

    return run
