"""A single component by its name is the expert itself, whatever the posterior says."""

import numpy as np
import pytest

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import UnknownNameError
from bayes_dispatch.inference.scoring.single_component import SingleComponent
from bayes_dispatch.inference.two_pass.blends import Blend


def test_all_weight_is_on_it() -> None:
    posterior = DispatchPosterior(np.random.default_rng(0).dirichlet(np.ones(3), (5, 2)), ("add", "sort", "base"))
    blend = SingleComponent("sort")
    assert isinstance(blend, Blend)
    particles = blend.particles(posterior)
    np.testing.assert_array_equal(particles.weights, [[[0, 1, 0]], [[0, 1, 0]]])
    np.testing.assert_array_equal(particles.mass, [[1], [1]])
    with pytest.raises(UnknownNameError, match="expected a component of add, sort, base, got 'shift'"):
        SingleComponent("shift").particles(posterior)
