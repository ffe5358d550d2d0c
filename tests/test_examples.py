"""The examples run, and what they tell of a model is what the model says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from lm_eval.api.instance import Instance

import bayes_dispatch as bd
from lm_eval_model import BayesDispatchLM
from tests.tiny import tiny_adapter, tiny_backbone, tiny_model

ROOT = Path(__file__).parents[1]


def requests(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> bd.Bundle:
    directory, backbone = tmp_path_factory.mktemp("adapters"), tiny_backbone()
    for seed, name in enumerate(("one", "two")):
        tiny_adapter(directory / name, seed=seed)
    bank = bd.ExpertBank.from_peft(backbone, {name: directory / name for name in ("one", "two")})
    return bd.Bundle(backbone, bank, bd.Dispatcher.flat(bank.names))


def test_base_is_the_model_of_the_library(bundle: bd.Bundle) -> None:
    """Token by token; a token that begins with the context's last space is the continuation's."""
    lm, tokenizer = BayesDispatchLM(bundle, blend="base"), bundle.tokenizer
    asked = [("12 the ", "ab"), ("", "12 the"), ("x", "the 12")]
    first = [len(tokenizer.tokenize(text).ids) for text in ("12 the", "", "x")]
    expected = []
    for (context, continuation), begin in zip(asked, first, strict=True):
        ids = torch.tensor([tokenizer.tokenize(context + continuation).ids])
        with torch.no_grad():
            after = tiny_model()(input_ids=ids).logits.log_softmax(-1)[0, begin - 1 : -1]
        true = ids[0, begin:]
        greedy = bool((after.argmax(1) == true).all())
        expected.append((pytest.approx(float(after.gather(1, true[:, None]).sum()), abs=1e-9), greedy))
    assert lm.loglikelihood(requests("loglikelihood", *asked)) == expected
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("12 the",))) == [expected[1][0]]


def test_a_text_is_as_probable_as_its_parts_one_after_the_other(bundle: bd.Bundle) -> None:
    """Under a mixture of blends that the text's own tokens filter: all texts and continuations have the same draws."""
    lm = BayesDispatchLM(bundle)  # whose dispatcher is flat, so that a context tells it no more than no context does
    whole, begin = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("x the 12",), ("x",)))
    other, rest, again = lm.loglikelihood(requests("loglikelihood", ("x", " 1"), ("x", " the 12"), ("x", " 1")))
    assert whole == pytest.approx(begin + rest[0], abs=1e-9)
    assert other == again


def test_what_is_written_is_greedy_and_ends_before_the_stop() -> None:
    lm = BayesDispatchLM(blend="reverse")
    context, short, long = "kfpa>apfk\nbcde>", {"until": ["\n"], "max_gen_toks": 8}, {"until": "d", "max_gen_toks": 2}
    asked = [(context, short), (context, long), (context, {"until": ["x", "c"], "max_gen_toks": 8})]
    texts = lm.generate_until(requests("generate_until", *asked))
    assert texts == ["edcb", "e", "ed"]
    scored = lm.loglikelihood(requests("loglikelihood", (context, texts[0]), (context, "edca")))
    assert [greedy for _, greedy in scored] == [True, False]
    assert scored[0][0] > scored[1][0]


@pytest.mark.slow
def test_the_command_prints_what_is_shown() -> None:
    shown = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").split("```")
    command = shown[1].splitlines()[3].split()
    done = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert shown[5].removeprefix("text\n") in done.stdout
