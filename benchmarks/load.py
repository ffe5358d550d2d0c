"""Locust's clients in a closed loop against servers, side by side: ours, and transformers' own of the base model.

    pip install locust 'transformers[serving]'
    python benchmarks/load.py                                        # the shipped bundle, 1, 8 and 32 clients
    python benchmarks/load.py --bundle smollm2 --beside DIR          # and `transformers serve DIR`, the same base model
    python benchmarks/load.py --lora OUT --vllm PYTHON --beside DIR  # and vLLM, for LoRA blends (beside_vllm.py)
    python benchmarks/load.py --overload                             # ten times as many clients as places to wait

Each client asks for one streamed completion after the other, of a prompt, a blend and a seed of its own. "First" is the
time from a request to its first token, "between" from one to the next; what is not over when the time is, is cut off,
and its tokens until then count. "Failed" are answers of another status than 200, 429 or 503, and streams that tell an
error, break off, or have fewer tokens than they say. With ``--overload`` the table tells how many requests got an
answer, and which; every one has to get one.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

BLENDS = ["posterior_predictive", "posterior_mean", "best_expert", "refined_mean", "top_k(2)", "top_k(3)", "base"]
ONE_ROW = ["posterior_mean", "best_expert", "thompson_sample", "top_k(2)", "top_k(3)", "base"]  # that vLLM can run
WEIGHTS = ["ada=0.4,bo=0.6", "cy=1", "dee=0.2,eve=0.3,fay=0.5", "gus=0.7,base=0.3", "hal=0.5,ada=0.5", "base=1"]
PROMPTS = ["kfpa>apfk\nbcde>", "37+58=95\n46+27=73\n64+85=", "EN: Save TR: Speichern\nEN: Close TR:", '{"name": "']
BUSY = (429, 503)
STARTING = 300.0  # seconds


def pieces(lines: Iterable[bytes], tokens: int, tells_done: bool) -> Iterator[str]:
    """The texts of a stream, as they come.

    Args:
        tokens: that were asked for. tells_done: whether the server ends its streams with ``[DONE]``.

    Raises:
        ValueError: it tells an error, breaks off, or has not as many tokens as the reason why it ended says.
    """
    reason: str | None = None
    written: int | None = None
    over = not tells_done
    for line in lines:
        over = over or line == b"data: [DONE]"
        if not line.startswith(b"data: {"):
            continue
        told = json.loads(line.removeprefix(b"data: "))
        if "error" in told:
            raise ValueError(f"expected a text, got the error {told['error']}")
        if told.get("usage"):
            written = told["usage"]["completion_tokens"]
        for choice in told.get("choices", ()):
            reason = choice.get("finish_reason") or reason
            if choice.get("text"):
                yield choice["text"]
    if not over or reason is None or written is None:
        raise ValueError("expected a stream that tells its end, got one that breaks off")
    if written > tokens or (reason == "length" and written < tokens):
        raise ValueError(f"expected {tokens} tokens before the end {reason}, got {written}")


if "LOAD_MODEL" in os.environ:  # this file is also what Locust runs
    from locust import HttpUser, task
    from locust.env import Environment

    class Client(HttpUser):
        """Asks, reads the whole stream, and asks again."""

        def __init__(self, environment: Environment) -> None:
            super().__init__(environment)
            self.random = np.random.default_rng()

        @task
        def ask(self) -> None:
            body: dict[str, Any] = {
                "model": os.environ["LOAD_MODEL"],
                "prompt": PROMPTS[self.random.integers(len(PROMPTS))],
                "max_tokens": int(os.environ["LOAD_TOKENS"]),
                "temperature": 1.0,
                "seed": int(self.random.integers(2**31)),
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            more = json.loads(os.environ["LOAD_MORE"])
            body |= more[self.random.integers(len(more))]
            last, name = time.perf_counter(), "first"
            with self.client.post("/v1/completions", json=body, stream=True, catch_response=True, name="all") as answer:
                if answer.status_code in BUSY:
                    self.told(str(answer.status_code), 0.0)
                    answer.success()
                    return
                if answer.status_code != 200:
                    answer.failure(f"expected the status 200, got {answer.status_code}")
                    return
                try:
                    for _ in pieces(answer.iter_lines(), body["max_tokens"], os.environ["LOAD_DONE"] == "1"):
                        now = time.perf_counter()
                        self.told(name, 1000 * (now - last))
                        last, name = now, "between"
                except (ValueError, OSError) as error:  # of the latter kind are those of requests
                    answer.failure(str(error))

        def told(self, name: str, milliseconds: float) -> None:
            self.environment.events.request.fire(
                request_type="token",
                name=name,
                response_time=milliseconds,
                response_length=0,
                exception=None,
                context={},
            )


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def serving(command: list[str], port: int) -> Iterator[str]:
    """A server's URL, once it answers; it is ended with the context."""
    url, begun = f"http://127.0.0.1:{port}", time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not answers(url):
                if process.poll() is not None:
                    raise SystemExit(f"expected a server, got exit code {process.returncode} of {' '.join(command)}")
                if time.monotonic() - begun > STARTING:
                    raise SystemExit(f"expected a server, got no answer in {STARTING:g} s of {' '.join(command)}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


def answers(url: str) -> bool:
    """Whether a server there says that it is well."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
    except OSError:
        return False
    return True


def run(
    url: str,
    model: str,
    clients: int,
    seconds: int,
    tokens: int,
    more: list[dict[str, Any]],
    wait: int = 0,
    tells_done: bool = True,
) -> dict[str, Any]:
    """Locust's statistics by name: of all requests, and of tokens.

    Args:
        more: fields of requests, one of these at random. wait: seconds in which what is asked may still be answered.
        tells_done: see ``pieces``.
    """
    settings = {"LOAD_MODEL": model, "LOAD_TOKENS": str(tokens), "LOAD_MORE": json.dumps(more)}
    settings["LOAD_DONE"] = str(int(tells_done))
    command = [sys.executable, "-m", "locust", "-f", __file__, "--headless", "--json", "--only-summary"]
    command += ["-H", url, "-u", str(clients), "-r", str(clients), "-t", f"{seconds}s", "-s", str(wait), "-L", "ERROR"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    found = re.search(r"^\[$.*^\]$", done.stdout, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"expected statistics from Locust, got: {done.stdout[-300:]}{done.stderr[-1000:]}")
    return {each["name"]: each for each in json.loads(found.group())}


def quantiles(of: dict[str, Any] | None) -> str:
    """Median and 99th percentile in milliseconds, as Locust rounds them."""
    if of is None:
        return "none"
    times = sorted((float(time_), count) for time_, count in of["response_times"].items())
    values, counts = np.array([each for each, _ in times]), np.array([count for _, count in times])
    places = np.searchsorted(counts.cumsum() / counts.sum(), [0.5, 0.99])
    return " / ".join(f"{values[place]:.0f}" for place in places)


def main(
    bundle: Annotated[str | None, typer.Option(help="A bundle; the shipped one by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of a transformers model's weights, ours and theirs.")] = None,
    beside: Annotated[Path | None, typer.Option(help="Folder of its base model, for `transformers serve`.")] = None,
    clients: Annotated[list[int], typer.Option(help="Clients at once.")] = [1, 8, 32],  # noqa: B006  # typer's way
    seconds: Annotated[int, typer.Option(help="Of each load.")] = 30,
    tokens: Annotated[int, typer.Option(help="Of each completion.")] = 64,
    lora: Annotated[Path | None, typer.Option(help="What beside_vllm.py wrote, in place of a bundle.")] = None,
    vllm: Annotated[Path | None, typer.Option(help="With --lora: Python of an environment that has vLLM.")] = None,
    overload: Annotated[bool, typer.Option("--overload", help="Ten times as many clients as places.")] = False,
) -> None:
    """Print a table of loads."""
    port = free_port()
    ours = [sys.executable, "-m", "bayes_dispatch", "serve", "--port", str(port)]
    bundle = bundle if lora is None else str(lora / "bundle")
    ours += [] if bundle is None else ["--bundle", bundle]
    blends = [{"blend": each} for each in (BLENDS if lora is None else ONE_ROW)]
    ours += [] if dtype is None else ["--dtype", dtype]
    if vllm is not None:
        from beside_vllm import vllm_serving
    if overload:
        with serving([*ours, "--running", "4", "--waiting", "12"], port) as url:
            found = run(url, "bundle", 160, seconds, tokens, blends, wait=60)
        asked, failed = found["all"]["num_requests"], found["all"]["num_failures"]
        refused = {str(code): found[str(code)]["num_requests"] for code in BUSY if str(code) in found}
        print(f"160 clients, 16 places, {seconds} s: {asked} requests, {refused} refused, {failed} without an answer")
        raise SystemExit(int(failed > 0))
    servers: list[tuple[str, list[str] | str, str, list[dict[str, Any]]]] = [
        ("ours, blends", ours, "bundle", blends),
        ("ours, base", ours, "bundle:base", [{}]),
    ]
    if beside is not None and vllm is None:
        theirs = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(beside)]
        theirs += ["--port", str(port), "--device", "cpu", "--dtype", dtype or "float32", "--continuous-batching"]
        servers.append(("transformers, base", theirs, str(beside), [{}]))
    with ExitStack() as stack:
        if lora is not None and vllm is not None and beside is not None:
            log = Path(stack.enter_context(tempfile.TemporaryDirectory()), "log")
            there = stack.enter_context(vllm_serving(vllm, beside, lora / "bank", free_port(), log))
            weights = [{"vllm_xargs": {"blend_weights": each}} for each in WEIGHTS]
            servers[1:] = [
                ("ours with --vllm, blends", [*ours, "--vllm", there], "bundle", blends),
                ("vLLM with our plugin alone, blends", there, "bank", weights),
            ]
        print("| server | clients | requests/s | tokens/s | first p50 / p99 (ms) | between p50 / p99 (ms) | failed |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for count in clients:
            for name, command, model, more in servers:
                with nullcontext(command) if isinstance(command, str) else serving(command, port) as url:
                    tells_done = not name.startswith("transformers")  # whose streams end with the usage
                    run(url, model, 1, 5, tokens, more, tells_done=tells_done)  # to warm up
                    found = run(url, model, count, seconds, tokens, more, tells_done=tells_done)
                written = sum(found[each]["num_requests"] for each in ("first", "between") if each in found)
                over = found["all"]["num_requests"] if "all" in found else 0
                failed = found["all"]["num_failures"] if "all" in found else 0
                rates = f"{over / seconds:.1f} | {written / seconds:.0f}"
                times = f"{quantiles(found.get('first'))} | {quantiles(found.get('between'))}"
                print(f"| {name} | {count} | {rates} | {times} | {failed} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
