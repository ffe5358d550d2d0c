"""``bayes-dispatch compare``: what it prints is what ``compare_blends`` finds, and bad input is one line."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas
import pytest

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.experts import vectors
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.scoring.compare import compare_blends, compare_systems
from bayes_dispatch.inference.scoring.held_out import held_out_sets
from bayes_dispatch.inference.two_pass.blends import BestExpert, PosteriorPredictive, RefinedMean

Compare = Callable[..., tuple[int, str, str]]
LINES = [
    {"text": "kfpa>apfk\nbcde>edcb\n", "prompt_bytes": 10, "scored": [[15, 19]]},
    {"text": "37+58=95\n12+11=23\n", "prompt_bytes": 9},
]
OWN = [Document("kfpa>apfk\nbcde>edcb\n", 10, ((15, 19),)), Document("37+58=95\n12+11=23\n", 9)]


@pytest.fixture
def compare(capfd: pytest.CaptureFixture[str]) -> Compare:
    """Exit code, stdout and stderr of ``bayes-dispatch compare …``."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["compare", *map(str, arguments)])
        return (int(exit_.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def turned(bundle: Bundle) -> Bundle:
    """The same bundle with two experts in each other's place."""
    places = {"reverse": "sort", "sort": "reverse", "add": "add"}
    return replace(
        bundle, experts=ExpertBank([replace(bundle.experts[one], name=name) for name, one in places.items()])
    )


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in LINES), encoding="utf-8")
    return path


def test_own_documents(compare: Compare, saved: Path, bundle: Bundle, jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.csv").symlink_to("scores.far")
    code, out, err = compare(
        *("--bundle", saved, "--jsonl", jsonl, "--blend", "max", "--blend", "predictive(6)", "--blend", "refined_mean"),
        *("--draws", "5", "--seed", "3", "--json", "--csv", tmp_path / "scores.csv"),
    )
    assert (code, err) == (0, "")
    found = compare_blends(bundle, OWN, [BestExpert(), PosteriorPredictive(6), RefinedMean(5)], seed=3)
    document = json.loads(out)
    assert (document["seed"], document["reference"]) == (3, "posterior_predictive(6)")
    printed = document["sets"]["own.jsonl"]
    assert printed["summary"] == found.summary().to_dict("records")
    assert printed["differences"] == found.differences("predictive(6)").to_dict("records")
    table = pandas.read_csv(tmp_path / "scores.csv")
    assert list(table.columns) == ["set", *found.to_frame().columns]
    pandas.testing.assert_frame_equal(table.drop(columns="set"), found.to_frame())
    assert set(table["set"]) == {"own.jsonl"}
    assert sorted(path.name for path in tmp_path.iterdir() if "scores" in path.name) == ["scores.csv", "scores.far"]
    assert (tmp_path / "scores.csv").is_symlink()


def test_held_out_sets_by_name(compare: Compare, saved: Path, bundle: Bundle) -> None:
    arguments = ["--bundle", saved, "--set", "add", "--set", "reverse then sort", "--documents", "2", "--blend", "max"]
    code, out, err = compare(*arguments, "--blend", "sort", "--reference", "sort", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert list(document["sets"]) == ["add", "reverse then sort"]
    assert document["reference"] == "sort"
    for name, documents in held_out_sets(["add", "reverse then sort"], 2, 0).items():
        found = compare_blends(bundle, documents, [BestExpert()]).summary().iloc[0]
        assert document["sets"][name]["summary"][0]["nll"] == pytest.approx(found.nll, abs=1e-6)
        assert document["sets"][name]["summary"][0]["documents"] == 2
    code, out, err = compare(*arguments, "--blend", "base")
    assert (code, err) == (0, "")
    words = ("add", "reverse then sort: minus best_expert", "base", "95% intervals", "2 documents")
    assert all(word in out for word in words)


def test_experts_of_ones_own_take_documents_of_ones_own(compare: Compare, bundle: Bundle, tmp_path: Path) -> None:
    """The held-out ones are of the experts that ship; who names their sets wants them."""
    experts = ExpertBank([replace(bundle.experts["add"], name=name) for name in ("sql", "mail")])
    Bundle(bundle.model, experts, Dispatcher.flat(experts.names)).save(tmp_path / "own")
    code, out, err = compare("--bundle", tmp_path / "own")
    assert (code, out) == (2, "")
    assert "expected --jsonl FILE, documents for sql, mail, got none: held-out ones are of the experts that ship" in err
    assert compare("--bundle", tmp_path / "own", "--set", "add", "--documents", 2, "--blend", "base")[0] == 0


def test_an_expert_of_an_old_bank_that_is_called_as_a_blend_is(
    compare: Compare, bundle: Bundle, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("reverse", "sort", "max")
    dispatcher = replace(bundle.dispatcher, experts=names)
    dispatcher._know(bundle.dispatcher.state)
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "NAMES_OF_BLENDS", set())
        old = replace(bundle, experts=bundle.experts.renamed("add", "max"), dispatcher=dispatcher)
    old.save(tmp_path / "old")
    arguments = ["--bundle", tmp_path / "old", "--jsonl", jsonl, "--blend", "max", "--blend", "best_expert", "--json"]
    for reference, other in (("max", "best_expert"), ("best_expert", "max")):
        code, out, err = compare(*arguments, "--reference", reference)
        assert (code, err) == (0, "")
        document = json.loads(out)
        assert document["reference"] == reference
        printed = document["sets"]["own.jsonl"]
        assert [row["blend"] for row in printed["summary"]] == ["max", "best_expert"]
        assert {row["blend"] for row in printed["differences"]} == {other}


def test_two_bundles(
    compare: Compare, saved: Path, bundle: Bundle, turned: Bundle, jsonl: Path, tmp_path: Path
) -> None:
    turned.save(tmp_path / "turned")
    arguments = ["--bundle", saved, "--other", tmp_path / "turned", "--jsonl", jsonl, "--blend", "max"]
    code, out, err = compare(*arguments, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    found = compare_systems({"bundle": bundle, "other": turned}, OWN, [BestExpert()])
    assert document["reference"] == "bundle"
    assert document["sets"]["own.jsonl"]["summary"] == found.summary().to_dict("records")
    assert document["sets"]["own.jsonl"]["differences"] == found.differences("bundle").to_dict("records")
    code, out, err = compare(*arguments)
    assert (code, err) == (0, "")
    assert all(word in out for word in ("bundle best_expert", "other best_expert", "minus bundle"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "subtract"], "expected a set of pure, mixed, switching, foreign, reverse, .*got 'subtract'"),
        (["--blend", "mean"], "expected a blend of best_expert, .*, reverse, sort, add, base, got 'mean'"),
        (
            ["--blend", "max", "--blend", "max", "--set", "add"],
            "expected blends that all differ, got best_expert, b",
        ),
        (["--blend", "max", "--reference", "base"], "expected a --reference of best_expert, got 'base'"),
        (["--other", "nowhere"], "expected a bundle directory or smollm2, got nowhere"),
        (["--other", "nowhere", "--reference", "max"], "expected --reference or --other, got both"),
        (["--documents", "1"], "got: Invalid value for .--documents.: Input should be greater than or equal to 2"),
        (["--jsonl", "JSONL", "--set", "add"], "expected --jsonl, or --set and --documents, got both"),
        (["--jsonl", "JSONL", "--documents", "2"], "expected --jsonl, or --set and --documents, got both"),
        (["--jsonl", "nowhere"], "expected a readable file nowhere, got: No such file"),
        (["--jsonl", "ONE"], "expected at least 2 documents in .*, got 1"),
        (["--csv", "FOLDER"], "expected a file for --csv, got the directory"),
        (["--csv", "FOLDER/nowhere/scores.csv"], "expected an existing directory for .*, which is none"),
        (["--set", "add", "--blend", "top_k", "--top-k", "9"], "expected k of at most 4 components, got 9"),
        (["word"], "got: .*unexpected extra argument"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_bad_input_is_one_line(
    compare: Compare, saved: Path, jsonl: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(LINES[0]), encoding="utf-8")
    places = {"JSONL": str(jsonl), "ONE": str(one)}
    given = [places.get(word, word.replace("FOLDER", str(tmp_path))) for word in arguments]
    code, out, err = compare("--bundle", saved, *given)
    assert (code, out) == (2, "")
    assert err.startswith("bayes-dispatch: error: expected ")
    assert err.count("\n") == 1
    assert re.search(said, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "own.jsonl"]
