"""Conversations: what re-adapting only when the posterior has moved saves, and what endless ones take.

    python benchmarks/chat.py            # five minutes on one core
    python benchmarks/chat.py --quick

In each conversation the user holds to one convention for six turns, then to another: every turn has a solved item and a
question. *Late*: the last three turns of each convention. *Cost*: block evaluations a turn. Thresholds are compared on
the same conversations; the endless ones go through all conventions again and again.
"""

import resource
import time
from typing import Annotated

import numpy as np
import torch
import typer

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.tables import Table
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import PosteriorPredictive

__all__ = ["main"]

HELD = 6  # turns of one convention
THRESHOLDS = (0.0, 0.002, 0.005, 0.01, 0.03, float("inf"))


def conversation(seed: int, conventions: int) -> list[tuple[str, str]]:
    """What the user says and what the right reply is, ``HELD`` times for each convention."""
    rng = np.random.default_rng(seed)
    turns, order = [], [n % len(CONVENTIONS) for n in range(conventions)]
    shuffled = rng.permutation(len(CONVENTIONS))
    for domain in (CONVENTIONS[shuffled[n]] for n in order):
        for _ in range(HELD):
            solved, asked = domain.document(rng, 0, 80, "held_out").text.split("\n")[:2]
            place = max(asked.find(sign) for sign in ">=") + 1
            turns.append((f"{solved}\n{asked[:place]}", f"{asked[place:]}\n"))
    return turns


def thresholds(generator: TwoPassGenerator, conversations: int) -> Table:
    """Right replies, re-adaptations and cost."""
    said = [conversation(seed, 3) for seed in range(conversations)]
    rows = []
    for threshold in THRESHOLDS:
        right, adapted, cost = [], [], []
        for seed, turns in enumerate(said):
            chat = generator.chat(blend=PosteriorPredictive(16), threshold=threshold, seed=seed)
            for text, answer in turns:
                turn = chat.say(text, 10)
                right.append(turn.text == answer)
                adapted.append(turn.adapted)
                cost.append(turn.cost.total)
        late = np.array(right).reshape(-1, HELD)[:, HELD // 2 :]
        shares = [f"{np.mean(right):.3f}", f"{late.mean():.3f}", f"{np.mean(adapted):.3f}", f"{np.mean(cost):,.0f}"]
        rows.append([f"{threshold:g}", *shares])
    note = f"{conversations} conversations of {3 * HELD} turns, PosteriorPredictive(16), greedy."
    return Table("Re-adapting", ["threshold", "right", "late", "re-adapted", "cost"], rows, note)


def endless(generator: TwoPassGenerator, turns: int) -> Table:
    """Time and memory after so many turns."""
    rows = []
    for max_context in (512, 2048):
        chat = generator.chat(blend=PosteriorPredictive(16), max_context=max_context)
        said = [text for text, _ in conversation(0, turns // HELD + 1)][:turns]
        begun = time.perf_counter()
        for n, text in enumerate(said, 1):
            chat.say(text, 10)
            if n % (turns // 4) == 0:
                seconds, begun = (time.perf_counter() - begun) / (turns // 4), time.perf_counter()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                sizes = [f"{len(chat.transcript)}", f"{chat.nbytes / 2**20:.1f}", f"{peak:.0f}"]
                rows.append([f"{max_context}", f"{n}", f"{seconds:.2f}", *sizes])
    columns = [
        "max_context",
        "turns",
        "seconds a turn",
        "tokens of transcript",
        "MiB of caches",
        "MiB of process, peak",
    ]
    return Table("Endless conversations", columns, rows, "Seconds a turn since the row before.")


def main(quick: Annotated[bool, typer.Option(help="few turns")] = False) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    generator = TwoPassGenerator(load_bundle())
    for table in (thresholds(generator, 1 if quick else 8), endless(generator, 12 if quick else 200)):
        print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
