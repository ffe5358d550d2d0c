"""Tokens per second of an engine under a closed loop of clients, beside the same requests one at a time.

Each of C clients asks for one text after the other, of a prompt and a blend of its own: eight blends in turn. "One at a
time" are eight of these requests by one client, between the loads.

    python benchmarks/serving.py [--clients 1 8 32] [--tokens 64] [--rounds 3]
    python benchmarks/serving.py --bundle DIR --dtype float32 --one-row --clients 8 --tokens 256 --requests 8 --rounds 1
"""

from argparse import ArgumentParser
from functools import partial
from threading import Thread
from time import perf_counter

import numpy as np
import torch

import bayes_dispatch as bd
from bayes_dispatch.inference.two_pass.blends import as_blend
from bayes_dispatch.inference.two_pass.prompts import Writing
from bayes_dispatch.model.mambaformer.compiled.threads import passing
from bayes_dispatch.serving.engine import BatchedEngine, Limits
from bayes_dispatch.serving.work import Ended, Event, Work, Wrote

PROMPTS = ["kfpa>apfk\nbcde>", "37+58=95\n46+27=73\n64+85=", "EN: Save TR: Speichern\nEN: Close TR:", '{"name": "']


class Client(Thread):
    """Asks, waits for the whole answer, and asks again; when each token came."""

    def __init__(self, engine: BatchedEngine, works: list[Work]) -> None:
        super().__init__()
        self.first: list[float] = []
        self.between: list[float] = []
        self.tokens = 0
        self._engine, self._works = engine, works

    def run(self) -> None:
        from threading import Semaphore

        for work in self._works:
            over, times, begun = Semaphore(0), list[float](), perf_counter()

            def tell(event: Event, over: Semaphore = over, times: list[float] = times) -> None:
                if isinstance(event, Wrote):
                    times.append(perf_counter())
                elif isinstance(event, Ended):
                    assert event.error is None, event.error
                    over.release()

            self._engine.submit(work, tell)
            over.acquire()
            self.first.append(times[0] - begun)
            self.between += np.diff(times).tolist()
            self.tokens += len(times)


def works_of(components: tuple[str, ...], client: int, count: int, tokens: int, one_row: bool) -> list[Work]:
    """Requests of one client: every one of another prompt, blend and seed."""
    first = "top_k(3)" if one_row else "posterior_predictive"
    blends = [first, "posterior_mean", "best_expert", "top_k(2)", *components[:4]]
    made = []
    for n in range(count):
        place = client + n
        blend = as_blend(blends[place % len(blends)], components)
        writing = Writing.of(tokens, True, 1.0, None)
        made.append(Work(PROMPTS[place % len(PROMPTS)], blend, writing, seed=1000 * client + n, owner=str(client)))
    return made


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--bundle")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=32, help="of all clients, in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-row", action="store_true", help="blends of one row alone: none of many particles")
    parser.add_argument("--dtype", help="of the model's weights; that of its files by default")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bundle = passing(partial(bd.load_bundle, given.bundle, dtype=given.dtype))
    engine = passing(partial(BatchedEngine, bundle, Limits(running=64)))
    components = bundle.experts.components
    print("| clients | tokens/s | one at a time | ratio | first token p50, p99 (s) | between tokens p50, p99 (ms) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in given.clients:
        rates, alone, first, between = [], [], list[float](), list[float]()
        for turn in range(given.rounds + 1):  # the first is for warming up
            each = max(1, given.requests // count)
            tokens = given.tokens if turn else min(8, given.tokens)
            works = [works_of(components, client, each, tokens, given.one_row) for client in range(count)]
            clients, begun = [Client(engine, own) for own in works], perf_counter()
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            rate = sum(client.tokens for client in clients) / (perf_counter() - begun)
            lonely, begun = Client(engine, [work for own in works for work in own][:8]), perf_counter()
            lonely.run()
            if turn:
                rates.append(rate)
                alone.append(lonely.tokens / (perf_counter() - begun))
                first += [time for client in clients for time in client.first]
                between += [time for client in clients for time in client.between]
        ratio = np.median(np.array(rates) / np.array(alone))
        waits = " / ".join(f"{np.quantile(first, q):.2f}" for q in (0.5, 0.99))
        gaps = " / ".join(f"{1000 * np.quantile(between, q):.0f}" for q in (0.5, 0.99))
        print(
            f"| {count} | {np.median(rates):.1f} | {np.median(alone):.1f} | {ratio:.2f} | {waits} | {gaps} |",
            flush=True,
        )
    engine.close(0)


if __name__ == "__main__":
    main()
