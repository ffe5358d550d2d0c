"""Held-out documents by name: kinds hold their domains, and a seed repeats them."""

import pytest

from bayes_dispatch.errors import UnknownNameError
from bayes_dispatch.inference.scoring.held_out import KINDS, domains_of, held_out_sets


def test_kinds_hold_their_domains() -> None:
    names = [domain.name for domains in KINDS.values() for domain in domains]
    assert len(set(names) | set(KINDS)) == len(names) + len(KINDS)
    assert all(domains_of(kind) == domains for kind, domains in KINDS.items())
    assert [domain.name for name in names for domain in domains_of(name)] == names
    with pytest.raises(UnknownNameError, match=r"expected a set of pure, mixed, switching, foreign, reverse, .*'plus'"):
        domains_of("plus")


def test_sets_are_repeatable() -> None:
    found = held_out_sets(["switching", "add"], 3, seed=4)
    assert {name: len(documents) for name, documents in found.items()} == {"switching": 9, "add": 3}
    assert found == held_out_sets(["switching", "add"], 3, seed=4)
    assert found["switching"][:3] == held_out_sets(["add then reversed_add"], 3, seed=4)["add then reversed_add"]
    assert found["add"] != held_out_sets(["add"], 3, seed=5)["add"]
    for document in found["switching"]:
        assert 128 <= document.prompt_bytes < len(document.data)
        assert all(start >= document.prompt_bytes for start, _ in document.ranges)
