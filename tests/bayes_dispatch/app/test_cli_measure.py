"""``bayes-dispatch measure`` keeps what it prints, where the user says."""

import json
import re
from pathlib import Path

import pytest

from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.app.commands.measure import WIDTHS, mambaformer_shapes
from bayes_dispatch.model.mambaformer.compiled import product_costs
from bayes_dispatch.model.mambaformer.compiled.product_costs import SWITCH, read_costs


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_costs, "SECONDS", 0.001)
    monkeypatch.setattr(product_costs, "SIZES", (2**16, 2**18))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0), *capsys.readouterr()


def test_it_keeps_what_it_prints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own" / "costs.json"
    monkeypatch.setenv(SWITCH, str(file))
    code, printed, _ = run(capsys, "measure", "--json")
    told, kept = json.loads(printed), read_costs(file)
    assert code == 0
    assert told["file"] == str(file)
    assert (tuple(told["reading"]), told["building"]) == (kept.reading, kept.building)
    code, printed, _ = run(capsys, "measure", "--tokens", "10")
    kept = read_costs(file)
    assert code == 0
    for width in WIDTHS:
        shapes = mambaformer_shapes(width)
        factored, folded, first = re.search(rf"^\W*{width}\W+([\d.]+)\W+([\d.]+)\W+(\d+|never)", printed, re.M).groups()
        assert (factored, folded) == tuple(f"{1000 * of(shapes, 4, 10):.1f}" for of in (kept.factored, kept.folded))
        assert first == "never" or kept.folding_pays(shapes, 4, int(first))
        assert first in ("never", "1") or not kept.folding_pays(shapes, 4, int(first) - 1)


def test_off_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    code, _, told = run(capsys, "measure")
    assert code == 2
    expected = "expected a file for the costs in BAYES_DISPATCH_COSTS, got off, or no home directory"
    assert told == f"bayes-dispatch: error: {expected}\n"


def test_the_shapes_are_the_shipped_ones() -> None:
    from bayes_dispatch.app.bundle import load_bundle
    from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

    found = [tuple(each.weight.shape) for each in load_bundle().model.modules() if isinstance(each, SVDLinear)]
    assert mambaformer_shapes(128) == found
