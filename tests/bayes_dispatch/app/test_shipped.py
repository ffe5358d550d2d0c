"""The shipped bundle: cached generation is uncached generation, and a batch is one prompt at a time, token by token
in float64."""

import numpy as np
import pytest
import torch

import bayes_dispatch as bd
from bayes_dispatch.app.demo import SHOWN_BLENDS
from bayes_dispatch.app.demo_prompts import CONVENTION_PROMPTS as PROMPTS
from bayes_dispatch.inference.two_pass.blends import DEFAULT_BLEND, Blend, PosteriorPredictive
from bayes_dispatch.inference.two_pass.system import dispatch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]

TEXTS = [*(prompt.text for prompt in PROMPTS if prompt.kind != "pure"), PROMPTS[0].text][-6:]
TOKENS = 12
CLEAR = 1e-3  # gap between the two best logits below which float32 may choose either


@pytest.fixture(scope="module")
def shipped() -> bd.Bundle:
    return bd.load_bundle()


@pytest.fixture(scope="module")
def shipped64(shipped: bd.Bundle) -> bd.Bundle:
    bundle = bd.load_bundle()
    bundle.model.double()
    return bundle


def generate(bundle: bd.Bundle, texts: list[str], blend: Blend, *, use_cache: bool = True) -> bd.Generation:
    return bd.TwoPassGenerator(bundle).generate(texts, blend=blend, max_new_tokens=TOKENS, seed=0, use_cache=use_cache)


@pytest.mark.parametrize("blend", SHOWN_BLENDS, ids=lambda blend: blend.name)
def test_float64_token_by_token(shipped64: bd.Bundle, blend: Blend) -> None:
    cached = generate(shipped64, TEXTS, blend)
    alone = [generate(shipped64, [text], blend) for text in TEXTS]
    uncached = generate(shipped64, TEXTS, blend, use_cache=False)
    np.testing.assert_array_equal(cached.token_ids, uncached.token_ids)
    np.testing.assert_array_equal(cached.token_ids, np.concatenate([one.token_ids for one in alone]))
    np.testing.assert_allclose(cached.log_probabilities, uncached.log_probabilities, atol=1e-9)


@pytest.mark.parametrize("blend", SHOWN_BLENDS, ids=lambda blend: blend.name)
def test_float32_where_the_choice_is_clear(shipped: bd.Bundle, blend: Blend) -> None:
    """Rows agree up to the first token whose rival has nearly the same log-probability in float32."""
    cached = generate(shipped, TEXTS, blend)
    others = [generate(shipped, TEXTS, blend, use_cache=False)]
    alone = [generate(shipped, [text], blend) for text in TEXTS]
    for n in range(len(TEXTS)):
        for ids, logp in [
            *((other.token_ids[n], other.log_probabilities[n]) for other in others),
            (alone[n].token_ids[0], alone[n].log_probabilities[0]),
        ]:
            differ = np.flatnonzero(ids != cached.token_ids[n])
            if len(differ):  # both runs chose their best token: the gap is at most the difference of their best
                gap = abs(logp[differ[0]] - cached.log_probabilities[n, differ[0]])
                assert gap < CLEAR


def test_the_default_has_sixteen_rows(shipped: bd.Bundle) -> None:
    posterior, _ = dispatch(shipped, TEXTS, seed=0)
    found, expected = (blend.particles(posterior) for blend in (DEFAULT_BLEND, PosteriorPredictive(16)))
    assert found.weights.shape == (len(TEXTS), 16, 9)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_cached_logits_of_the_trained_model(shipped: bd.Bundle) -> None:
    """float32: at most 2e-5 apart, however the sequence is cut."""
    ids, _ = shipped.tokenizer.encode_batch([PROMPTS[0].text])
    with torch.no_grad():
        full = shipped.model(ids).logits
        cache = shipped.model.init_cache(1, ids.shape[1])
        parts = [shipped.model(part, cache=cache).logits for part in (ids[:, :50], *ids[:, 50:].split(1, dim=1))]
    assert float((torch.cat(parts, dim=1) - full).abs().max()) <= 2e-5
