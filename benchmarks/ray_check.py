"""Two replicas in a Ray cluster on this machine, of which one is killed while they are asked: what has not begun to
stream must not fail.

    make check-ray
    python benchmarks/ray_check.py --bundle DIR --vllm URL    # replicas that let a vLLM server write (beside_vllm.py)

It asks for answers and streams, of several blends and seeds, from some threads at once; kills a replica's process amid;
and tells how long it takes until there are two again. Streams that fail after their first token are counted. It fails
where another request fails, an answer is not that of ``TwoPassGenerator.generate``, a client that hangs up leaves rows
behind, a full server answers anything but 429, or a process is left at the end. vLLM is asked for greedy answers of
blends of one row.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx2 as httpx
import typer

import bayes_dispatch as bd

RUNNING, WAITING = 4, 8  # of each replica; all that come at once wait at first
BLENDS = ["posterior_predictive", "posterior_mean", "sort", "refined_mean", "base"]
ONE_ROW = ["thompson_sample", "posterior_mean", "best_expert", "top_k(2)", "base"]  # that vLLM can run
PROMPTS = ["kfpa>lgab\nmold>npme\nhbme>", "37+58=95\n12+21=", "kfpa>apfk\nmold>", "ab>ba\nabc>"]
TITLE = "ray::ServeReplica"


def body_of(n: int) -> dict[str, Any]:
    """The n-th request; every other one is a stream."""
    return {
        "model": "bundle",
        "prompt": PROMPTS[n % 4],
        "blend": BLENDS[n % 5],
        "max_tokens": 20 + 10 * (n % 7),
        "temperature": n % 3 / 2,
        "seed": n,
        "stream": n % 2 == 1,
    }


def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """What came: the text, the status, whether a token was streamed, and what failed."""
    if not body["stream"]:
        answer = client.post("/v1/completions", json=body)
        failed = None if answer.status_code == 200 else answer.text
        text = "" if failed else answer.json()["choices"][0]["text"]
        return {"text": text, "status": answer.status_code, "began": False, "failed": failed, "headers": answer.headers}
    text, done, failed = "", False, None
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            failed = answer.read().decode()
        for line in answer.iter_lines() if not failed else ():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                told = json.loads(line.removeprefix("data: "))
                failed = told.get("error", failed)
                text += "".join(choice["text"] for choice in told.get("choices", ()))
    if not done and not failed:
        failed = "a stream that breaks off"
    return {
        "text": text,
        "status": answer.status_code,
        "began": bool(text),
        "failed": failed,
        "headers": answer.headers,
    }


def expected(bodies: list[dict[str, Any]], bundle: str | None) -> list[str]:
    """What ``generate`` writes."""
    generator = bd.TwoPassGenerator(bd.load_bundle(bundle))
    return [
        generator.generate(
            [body["prompt"]],
            blend=body["blend"],
            max_new_tokens=body["max_tokens"],
            do_sample=body["temperature"] > 0,
            temperature=body["temperature"] or 1.0,
            seed=body["seed"],
        ).texts[0]
        for body in bodies
    ]


def processes() -> dict[int, tuple[int, str]]:
    """Parent and title of every process of this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status, title = (folder / "status").read_text(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if "\nState:\tZ" not in status:
                parent = int(re.findall(r"^PPid:\t(\d+)", status, re.M)[0])
                found[int(folder.name)] = (parent, title.replace(b"\0", b" ").decode(errors="replace"))
    return found


def below(root: int) -> dict[int, str]:
    """Titles of all that a process has started, by number."""
    known, found = processes(), dict[int, str]()
    for number, (_, title) in known.items():
        above = number
        while above in known and above != root:
            above = known[above][0]
        if above == root and number != root:
            found[number] = title
    return found


def until(what: str, true: Callable[[], bool], seconds: float = 300) -> float:
    """Wait; for so long it took.

    Raises:
        SystemExit: it did not come.
    """
    begun = time.monotonic()
    while not true():
        if time.monotonic() - begun > seconds:
            raise SystemExit(f"expected {what} within {seconds:g} seconds, got none")
        time.sleep(0.1)
    return time.monotonic() - begun


def held(client: httpx.Client) -> dict[str, float]:
    """What the replicas hold, as ``/metrics`` tells it."""
    told = client.get("/metrics").text
    found = re.findall(r"^bayes_dispatch_(rows|running|waiting|replicas|new_tokens_total) (\S+)$", told, re.M)
    return {name: float(value) for name, value in found}


def settled(client: httpx.Client) -> bool:
    """Whether nothing is held."""
    now = held(client)
    return now["rows"] + now["running"] + now["waiting"] == 0


@contextmanager
def served(log: Path, words: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """The server, with more options, and a client of it; whatever was started is ended."""
    command = [sys.executable, "-m", "bayes_dispatch", "serve", "--port", "8764", "--ray", "--replicas", "2"]
    command += ["--replica-cpus", "0.2", "--running", str(RUNNING), "--waiting", str(WAITING), "--drain", "200", *words]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "OMP_NUM_THREADS": "1"
    }
    with log.open("wb") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env=environment)
    own: dict[int, str] = {}
    limits = httpx.Limits(max_connections=64)
    try:
        with httpx.Client(base_url="http://127.0.0.1:8764", timeout=300, limits=limits) as client:
            until("a server that is ready", lambda: _ready(client, process))
            own = below(process.pid)
            yield process, client
    finally:
        own |= below(process.pid)
        if process.poll() is None:
            process.kill()
            process.wait(30)
        for number in own.keys() & processes().keys():
            os.kill(number, signal.SIGKILL)


def _ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise SystemExit(f"expected a server that answers, got one that ended with {process.returncode}")
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def kill_amid(
    process: subprocess.Popen[bytes],
    client: httpx.Client,
    bodies: list[dict[str, Any]],
    threads: int,
    bundle: str | None,
) -> dict[str, Any]:
    """Ask for many, and kill a replica after a third of them."""
    requests, done = len(bodies), list[int]()
    replicas = [number for number, title in below(process.pid).items() if title.startswith(TITLE)]
    assert len(replicas) == 2, f"expected two replicas, got {below(process.pid)}"

    def one(n: int) -> dict[str, Any]:
        found = ask(client, bodies[n])
        done.append(n)
        return found

    begun = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        asking = [pool.submit(one, n) for n in range(requests)]
        until("a third of the answers", lambda: len(done) >= requests // 3)
        amid = held(client)
        os.kill(replicas[0], signal.SIGKILL)
        killed = time.monotonic()
        until("a replica that is missed", lambda: held(client)["replicas"] == 1)
        until("a second replica", lambda: held(client)["replicas"] == 2)
        back = time.monotonic() - killed
        found = [each.result() for each in asking]
    seconds = time.monotonic() - begun
    unbegun = [each["failed"] for each in found if each["failed"] and not each["began"]]
    streamed = [each["failed"] for each in found if each["failed"] and each["began"]]
    assert not unbegun, f"expected no failed request that had not begun to stream, got {unbegun}"
    wanted = expected(bodies, bundle)
    different = [n for n in range(requests) if not found[n]["failed"] and found[n]["text"] != wanted[n]]
    assert not different, f"expected the answers of generate, got others for {different}"
    until("rows that are freed", lambda: settled(client))
    return {
        "requests": requests,
        "amid when killed": amid,
        "failed before they streamed": len(unbegun),
        "failed amid a stream": len(streamed),
        "equal to generate": f"{requests - len(streamed)} of {requests}",
        "seconds": round(seconds, 1),
        "seconds until two replicas again": round(back, 1),
    }


def hang_up(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """Amid a stream, which must not be written on."""
    most = body["max_tokens"]
    before = held(client)["new_tokens_total"]
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert all(next(lines).startswith("data: {") for _ in range(4))
        until("a request that runs", lambda: held(client)["running"] == 1)
    seconds = until("rows that are freed", lambda: settled(client), 30)
    written = held(client)["new_tokens_total"] - before
    assert written < most, "expected a text that is not written to its end, got all of it"
    return {"seconds until rows are free": round(seconds, 1), f"tokens of {most:,} written": int(written)}


def overload(client: httpx.Client, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """More at once than all replicas hold."""
    count = 3 * (RUNNING + WAITING)
    asked = [bodies[n % len(bodies)] | {"max_tokens": 200, "stream": False} for n in range(count)]
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda body: ask(client, body), asked))
    statuses = Counter(each["status"] for each in found)
    assert statuses.keys() == {200, 429}, f"expected answers and refusals, got {statuses}"
    assert statuses[200] > RUNNING + WAITING, f"expected more answers than one replica holds, got {statuses}"
    assert all(int(each["headers"]["retry-after"]) > 0 for each in found if each["status"] == 429)
    until("rows that are freed", lambda: settled(client))
    return {"asked": count, "answered": statuses[200], "refused with 429": statuses[429]}


def stop(process: subprocess.Popen[bytes], client: httpx.Client, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """With requests amid, which are answered."""
    started = below(process.pid)
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, client, body | {"max_tokens": 400}) for body in bodies[:4]]
        until("some that run", lambda: held(client)["running"] > 0)
        process.send_signal(signal.SIGTERM)
        found = [each.result() for each in asking]
    assert not any(each["failed"] for each in found), f"expected answers while the server drains, got {found}"
    code = process.wait(300)
    assert code == 0, f"expected the exit status 0, got {code}"
    seconds = until("no process that is left", lambda: not started.keys() & processes().keys(), 30)
    return {"answered while it drained": len(found), "seconds until all processes had ended": round(seconds, 1)}


def main(
    requests: Annotated[int, typer.Option(min=30, help="While one is killed.")] = 240,
    threads: Annotated[int, typer.Option(min=1, max=WAITING, help="That ask at once.")] = 8,
    bundle: Annotated[str | None, typer.Option(help="A bundle; the shipped one by default.")] = None,
    vllm: Annotated[str | None, typer.Option(help="URL of a vLLM server that has its experts.")] = None,
) -> None:
    """Ask, kill, and tell what came."""
    words = [] if bundle is None else ["--bundle", bundle]
    bodies = [body_of(n) for n in range(requests)]
    if vllm is not None:
        words += ["--vllm", vllm]
        bodies = [body | {"blend": ONE_ROW[n % 5], "temperature": 0.0} for n, body in enumerate(bodies)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        try:
            with served(log, words) as (process, client):
                found = {"killed": kill_amid(process, client, bodies, threads, bundle)}
                found |= {"hung up": hang_up(client, bodies[1] | {"max_tokens": 1000 if vllm is None else 400})}
                found |= {"overload": overload(client, bodies), "stopped": stop(process, client, bodies)}
        except BaseException:
            lines = log.read_text().splitlines()
            typer.echo("\n".join(line for line in lines if '"level": "info"' not in line), err=True)
            raise
        typer.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
