"""What two-pass generation costs, side by side in one run: ``python benchmarks/generation.py``.

Three tables of ratios: generation with the cache against without it, each blend against the plain base model, and the
import of the package against an empty interpreter. Times vary from machine to machine; only the ratios mean something.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.experts.vectors import BASE
from bayes_dispatch.inference.two_pass.blends import FixedWeights

PROMPTS = ["kfpa>apfk\nmgfoe>eofgm\nbcde>", "37+58=95\n60+20=80\n12+11=", "def mean(xs):\n    return ", "ab"] * 2


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(works: dict[str, Callable[[], object]], repeats: int, title: str) -> dict[str, float]:
    """Median seconds of each piece of work; they take turns, so that a slow phase of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in tqdm(range(repeats + 1), title):
        for name, work in works.items():
            spent = seconds(work)
            if repeat:  # the first round warms up
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, times: dict[str, float], reference: str) -> Table:
    """Median seconds and their ratio to ``reference``."""
    result = Table("what", "seconds", f"ratio to {reference}", title=title)
    for name, value in times.items():
        result.add_row(name, f"{value:.3f}", f"{value / times[reference]:.2f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    bundle = bd.load_bundle()
    generator = bd.TwoPassGenerator(bundle)

    def run(blend: bd.Blend, tokens: int = 32, use_cache: bool = True) -> Callable[[], object]:
        return lambda: generator.generate(PROMPTS, blend=blend, max_new_tokens=tokens, seed=0, use_cache=use_cache)

    for tokens in (10, 50):
        works = {name: run(bd.PosteriorMean(), tokens, name == "cached") for name in ("cached", "uncached")}
        times = interleaved(works, arguments.repeats, f"cache, {tokens} tokens")
        console.print(table(f"{tokens} new tokens, {len(PROMPTS)} prompts", times, "cached"))

    base = FixedWeights.vertex(bundle.experts.components, BASE)
    blends = [base, bd.BestExpert(), bd.PosteriorMean(), bd.PosteriorPredictive(4), bd.PosteriorPredictive(16)]
    named = {f"{blend.name} ({getattr(blend, 'draws', 1)} rows)": run(blend) for blend in blends}
    times = interleaved(named, arguments.repeats, "blends")
    console.print(table(f"blends, 32 new tokens, {len(PROMPTS)} prompts", times, next(iter(named))))

    python = [sys.executable, "-c"]
    imports = {
        "python": lambda: subprocess.run([*python, "pass"], check=True),
        "import bayes_dispatch": lambda: subprocess.run([*python, "import bayes_dispatch"], check=True),
    }
    console.print(table("import", interleaved(imports, arguments.repeats, "import"), "python"))


if __name__ == "__main__":
    main()
