"""Pyro draws the programs: every global, both plates, every view, and what depends on what."""

import pyro
import pytest
import torch

from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import CountsView, ProbabilitiesView, SurpriseView, VectorsView

VIEWS = (VectorsView(2), CountsView(3), SurpriseView(2), ProbabilitiesView(3))
N = 4


def prompts() -> Prompts:
    missing = {view.name: torch.zeros(N, dtype=torch.bool) for view in VIEWS}
    observed = {view.name: torch.full((N, view.width), 1 / view.width) for view in VIEWS} | {"counts": torch.ones(N, 3)}
    return Prompts(torch.full((N,), 50.0), {"counts": torch.full((N,), 3.0)}, missing, observed, torch.arange(N) - 2)


@pytest.mark.parametrize(
    "model", [DispatchModel(2, VIEWS), DispatchModel(3, VIEWS, families=(0, 0, 1))], ids=["plain", "families"]
)
def test_program_as_a_graph(model: DispatchModel) -> None:
    source = pyro.render_model(model, model_args=(prompts(),)).source
    sites = {"hidden": "M s2 lt xi base_M base_s2", "counts": "Phi conc base_Phi", "surprise": "a a2 base_a base_a2"}
    sites |= {"classifier": "classifier_Phi classifier_conc classifier_base_Phi", "w": "pi kappa"}
    edges = {parent: child for child, parents in sites.items() for parent in parents.split()}
    expected = set(edges.items())
    expected |= {("w", child) for child in ("hidden", "counts", "surprise", "classifier", "labels")}
    lines = [line.split() for line in source.splitlines()]
    assert {(line[0], line[2]) for line in lines if line[1:2] == ["->"]} == expected
    blocks = [block.partition("}")[0].split("cluster_")[1] for block in source.split("subgraph")[1:]]
    inside = {block.split()[0]: block for block in blocks}
    assert set(inside) == {"experts", "prompts"}
    assert all(f"\t{site} [" in inside["experts"] for site in ("M", "s2", "Phi", "a", "a2", "classifier_Phi"))
    assert all(f"\t{site} [" in inside["prompts"] for site in ("w", "labels", *(view.name for view in VIEWS)))
    assert inside["prompts"].count("fillcolor=gray") == 5  # the views and the labels are observed
