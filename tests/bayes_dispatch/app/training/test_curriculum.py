"""The curriculum of translations: its domains, and that the base model reads each entry in a language that is drawn."""

import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bayes_dispatch.app.training.curriculum import CURRICULA, Curriculum
from bayes_dispatch.app.training.plans import PLANS
from bayes_dispatch.app.training.train import train_bundle
from bayes_dispatch.errors import ConfigError
from tests.packages import install_translations


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packages")
    install_translations(directory)
    return directory


@pytest.fixture(scope="module")
def curriculum(packages: Path) -> Curriculum:
    return CURRICULA["translations"](packages)


def test_every_plan_has_a_curriculum() -> None:
    assert {plan.curriculum for plan in PLANS.values()} == set(CURRICULA)


def test_each_domain_gives_documents_in_any_process(curriculum: Curriculum) -> None:
    several = [*curriculum.mixed.values(), *curriculum.switching.values()]
    domains = [*curriculum.experts, *curriculum.foreign, *several]
    assert len({domain.name for domain in domains}) == len(domains)
    for domain in domains:
        twin = pickle.loads(pickle.dumps(domain))
        documents = [each.document(np.random.default_rng(1), 64, 128, "held_out") for each in (domain, twin)]
        assert documents[0] == documents[1]
        assert documents[0].data


def test_the_corpus_draws_the_language_of_each_entry(curriculum: Curriculum) -> None:
    seen, followed = Counter[str](), Counter[bool]()
    for seed in range(40):
        data, weights = curriculum.corpus.row(np.random.default_rng(seed), 768)
        assert len(data) == len(weights) <= 768
        lines = data.decode().split("\n")[:-1]
        if not lines[0].startswith("EN: "):
            continue  # prose or code
        languages = [line.split()[1] for line in lines if line.startswith("TR: ")]
        seen.update(languages)
        followed.update(a == b for a, b in pairwise(languages))
        at = data.index(b" ", data.index(b"TR:"))
        assert weights[:at] == [0.3] * at
        assert weights[at] == 1.0
    assert set(seen) == {domain.name for domain in curriculum.experts}
    share, count = followed[True] / followed.total(), followed.total()
    assert abs(share - 1 / 8) < 4 * (7 / 64 / count) ** 0.5  # fails by chance once in 16,000 seeds


def test_packages_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install .*Django"):
        train_bundle(PLANS["translations-smoke"], tmp_path / "out", processes=1, progress=False, packages=tmp_path)
