"""Randomised requests in several threads, each beside the same prompts asked for one by one: no answer may differ.

    python benchmarks/request_stress.py                   # 10,000 requests, most of an hour on two slow cores
    python benchmarks/request_stress.py --requests 500    # minutes

A tiny model of random weights in float64, whose experts leave its first block alone, serves prompts of 1 to 2,000
bytes under every blend, greedily or by drawing, with and without a text that stops it. One request in ten is invalid
and has to be refused. One in fifty is repeated without any cache. At the end come the differences, of which there
should be none, and how the process grew between the first tenth of the requests and the last.
"""

import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.two_pass.blends import Blend, FixedWeights

__all__ = ["Found", "main", "run", "system"]

NAMES = ("reverse", "sort", "add")
BLENDS: tuple[Blend, ...] = (
    bd.PosteriorMean(),
    bd.TopK(2),
    bd.BestExpert(),
    bd.ThompsonSample(),
    FixedWeights((0.2, 0.0, 0.5, 0.3)),
    bd.PosteriorPredictive(3, merge=0.0),
    bd.PosteriorPredictive(6),
    bd.RefinedMean(5),
)
INVALID: tuple[dict[str, Any], ...] = (
    {"prompts": []},
    {"prompts": [""]},
    {"prompts": ["a" * 40_000]},
    {"prompts": [b"\xff"]},
    {"prompts": ["a\ud800"]},
    {"max_new_tokens": 0},
    {"temperature": float("nan")},
    {"stop": ""},
    {"blend": bd.PosteriorPredictive(100)},
)
LONGEST = 2000
ALPHABET = np.frombuffer(b"abcdefghijklmnop0123456789+=>\n ", dtype=np.uint8)


@dataclass
class Found:
    """What went wrong, and counts."""

    served: int = 0
    refused: int = 0
    uncached: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def system() -> bd.Bundle:
    """A tiny system, its dispatcher fitted coarsely."""
    torch.manual_seed(0)
    config = bd.LanguageModelConfig(backbone=bd.MambaFormerConfig.tiny(), vocab_size=258)
    model = bd.MambaFormerForCausalLM(config).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    ranks = {name: rank for name, rank in model.adaptable().items() if not name.startswith("blocks.0.")}
    base = model.fingerprint()
    bank = bd.ExpertBank(
        [ExpertVector(n, {m: 1 + 0.5 * torch.randn(r) for m, r in ranks.items()}, base) for n in NAMES]
    )
    texts = [("ab>ba\n", "ba>ab\n", "1+2=3\n")[i % 3] * (1 + i % 4) for i in range(30)]
    evidence = bd.first_pass(model, bd.ByteTokenizer(), texts, cut=model.cut(bank.adapts)).evidence
    features = FeatureSettings(dimensions=4, folds=2)
    dispatcher = bd.Dispatcher(NAMES, svi=SVISettings(steps=40), features=features)
    return bd.Bundle(model, bank, dispatcher.fit(evidence, np.arange(30) % 3))


def request(rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of ``generate``."""
    lengths = np.exp(rng.uniform(0, np.log(LONGEST + 1), rng.integers(1, 5))).astype(int)
    prompts: list[str | bytes] = [rng.choice(ALPHABET, max(1, n)).tobytes() for n in lengths]
    if len(prompts) > 1 and rng.random() < 0.3:
        prompts[-1] = prompts[0]
    return {
        "prompts": [p if rng.random() < 0.5 else bytes(p).decode() for p in prompts],
        "blend": BLENDS[rng.integers(len(BLENDS))],
        "max_new_tokens": int(rng.integers(1, 7)),
        "do_sample": bool(rng.random() < 0.5),
        "temperature": float(rng.uniform(0.5, 2)),
        "stop": None if rng.random() < 0.5 else bytes(rng.integers(32, 127, 1).astype(np.uint8)),
        "own_evidence": bool(rng.random() < 0.7),
        "seed": int(rng.integers(2**31)),
    }


def answer(generator: bd.TwoPassGenerator, asked: dict[str, Any], **changes: Any) -> bd.Generation:
    given = asked | changes
    return generator.generate(given.pop("prompts"), **given)


def check(generator: bd.TwoPassGenerator, seed: int, found: Found) -> None:
    """One request, and what it should have been."""
    rng = np.random.default_rng([3, seed])
    asked, wrong = request(rng), []
    if seed % 10 == 0:
        asked |= INVALID[seed // 10 % len(INVALID)]
        try:
            answer(generator, asked)
            wrong.append(f"request {seed}: expected a refusal, got an answer")
        except bd.BayesDispatchError as error:
            if "expected" not in str(error):
                wrong.append(f"request {seed}: {error}")
        with found.lock:
            found.refused += 1
            found.wrong.extend(wrong)
        return
    whole = answer(generator, asked)
    copies: set[bytes] = set()
    for n, prompt in enumerate(asked["prompts"]):
        data = prompt.encode() if isinstance(prompt, str) else prompt
        if data in copies:
            continue  # copies of a prompt draw differently
        copies.add(data)
        changes = {"use_cache": False} if seed % 50 == 1 and len(data) < 200 else {}
        alone = answer(generator, asked, prompts=[prompt], **changes)
        same = whole.texts[n] == alone.texts[0] and np.allclose(
            whole.log_probabilities[n], alone.log_probabilities[0], rtol=0, atol=1e-7, equal_nan=True
        )
        if not same or not np.allclose(whole.weights[n], alone.weights[0], rtol=0, atol=1e-9):
            wrong.append(f"request {seed}, prompt {n}: {whole.texts[n]!r} beside others, {alone.texts[0]!r} alone")
        with found.lock:
            found.uncached += len(changes)
    with found.lock:
        found.served += 1
        found.wrong.extend(wrong)


def run(count: int, threads: int, found: Found) -> list[float]:
    """Ask ``count`` requests; MiB that the process has at most, after each tenth of them."""
    generator = bd.TwoPassGenerator(system())
    peaks = []
    tenth = max(1, count // 10)
    with ThreadPoolExecutor(threads) as pool, tqdm(total=count, desc="requests", disable=None) as bar:
        for start in range(0, count, tenth):
            for _ in pool.map(lambda seed: check(generator, seed, found), range(start, min(start + tenth, count))):
                bar.update()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks


def main(
    requests: Annotated[int, typer.Option(min=1, help="how many")] = 10_000,
    threads: Annotated[int, typer.Option(min=1, help="that ask at once")] = 4,
) -> None:
    """Print counts; exit with 1 if an answer differed."""
    torch.set_num_threads(1)
    found = Found()
    peaks = run(requests, threads, found)
    rows = [
        ["served", str(found.served)],
        ["refused", str(found.refused)],
        ["prompts repeated without a cache", str(found.uncached)],
        ["wrong", str(len(found.wrong))],
        ["peak memory after the first tenth", f"{peaks[0]:.0f} MiB"],
        ["peak memory at the end", f"{peaks[-1]:.0f} MiB"],
    ]
    print(Table(f"{requests} requests, {threads} threads", ["", ""], rows).to_markdown())
    print("\n".join(found.wrong[:20]))
    raise typer.Exit(bool(found.wrong))


if __name__ == "__main__":
    typer.run(main)
