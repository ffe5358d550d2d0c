"""Random requests from several threads to a server of the shipped model: what it answers, keeps and grows by.

    python benchmarks/server_stress.py                   # 2,000 requests, some minutes
    python benchmarks/server_stress.py --requests 200

Most ask for an answer or a stream of a random prompt, blend and seed; a tenth of these were asked before, and must come
back the same, and in the end as ``TwoPassGenerator.generate`` gives it. Of the others, some hang up, amid a stream or
at any time before (half of all wait for a place at first), some send a body that is no JSON, a field that nobody knows,
a prompt that is too long, or a wrong key. It ends with an error where an answer is another, where at the end something
is held, an error has been logged, or the server does not end with the status 0, and where the process has grown by more
than five hundredths since a tenth of the requests.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Any

import httpx2 as httpx
import typer

import bayes_dispatch as bd

KEY = "a-key-that-nobody-guesses"
BLENDS = ["posterior_predictive", "posterior_mean", "best_expert", "refined_mean", "top_k(3)", "sort", "base"]
LINES = ["kfpa>apfk\n", "mold>npme\n", "37+58=95\n", "12+21=33\n", '{"a": 1}\n', "THE CAT\n", "ab>ba\n", "2+2=4\n"]
GROWTH = 0.05  # at most, from the first tenth of the requests to the last
EXPECTED = {"json": 400, "field": 400, "long": 400, "key": 401, "big": 413}


def ask(client: httpx.Client, random_: random.Random, seen: dict[str, str], counts: Counter[str], lock: Any) -> None:
    """One request; differences from what is expected raise."""
    kind = random_.choices(["text", "stream", "hang up", "hang up early", *EXPECTED], [50, 20, 6, 6, 4, 4, 4, 4, 2])[0]
    body: dict[str, Any] = {
        "model": "bundle",
        "prompt": "".join(random_.choices(LINES, k=random_.randint(1, 12))),
        "max_tokens": random_.randint(1, 40),
        "temperature": random_.choice([0, 1]),
        "seed": random_.randint(0, 10**6),
        "blend": random_.choice(BLENDS),
        "stop": random_.choice([None, "\n"]),
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    content: bytes | None = None
    if kind == "json":
        content = json.dumps(body).encode()[:-5]
    elif kind == "big":
        content = b'{"prompt": "' + b"a" * 2**21 + b'"}'
    elif kind == "field":
        body["frobnicate"] = True
    elif kind == "long":
        body["prompt"] = "a" * 70_000
    elif kind == "key":
        headers = {"Authorization": f"Bearer {KEY[:-1]}x"}
    elif kind == "text" and seen and random_.random() < 0.1:
        with lock:
            body = json.loads(random_.choice(list(seen)))
    content = json.dumps(body).encode() if content is None else content
    headers["Content-Type"] = "application/json"
    if kind == "hang up early":  # waiting, being read, or written: the status comes with the whole answer
        content = json.dumps(body | {"prompt": body["prompt"] * random_.choice([1, 20])}).encode()
        try:
            client.post("/v1/completions", content=content, headers=headers, timeout=random_.uniform(0.001, 0.3))
        except httpx.TimeoutException:
            return counts.update([kind])
        return counts.update(["answered before they hung up"])
    if kind in ("stream", "hang up"):
        content = json.dumps(body | {"stream": True}).encode()
        text, read = "", random_.randint(0, 5)
        with client.stream("POST", "/v1/completions", content=content, headers=headers) as answer:
            assert answer.status_code == 200, answer.status_code
            for n, line in enumerate(answer.iter_lines()):
                if kind == "hang up" and n > read:
                    break
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    text += choices[0]["text"] if choices else ""
        if kind == "hang up":
            return counts.update([kind])
    else:
        answer = client.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == EXPECTED.get(kind, 200), (kind, answer.status_code, answer.text[:300])
        if kind in EXPECTED:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            return counts.update([kind])
        text = answer.json()["choices"][0]["text"]
    with lock:
        before = seen.setdefault(json.dumps(body), text)
    assert before == text, f"expected {before!r} of {body} again, got {text!r}"
    counts.update([kind])


def resident(process: subprocess.Popen[bytes]) -> int:
    """Bytes that the process has in memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return 1024 * int(found.group(1))


def main(
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 2000,
    threads: Annotated[int, typer.Option(help="That ask at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
) -> None:
    """Ask, and tell what came."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.write_text(f"stress {KEY}\n")
        keys.chmod(0o600)
        log = Path(folder, "log")
        with log.open("wb") as told:
            command = [sys.executable, "-m", "bayes_dispatch", "serve", "--port", "8765", "--keys", str(keys)]
            command += ["--running", str(max(1, threads // 2))]
            process = subprocess.Popen(command, stderr=told, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            found = _ask_all(process, requests, threads, seed)
        finally:
            process.terminate()
            code = process.wait(60)
        errors = sum(1 for line in log.read_text().splitlines() if '"level": "error"' in line)
    found |= {"exit status": code, "errors logged": errors}
    typer.echo(json.dumps(found, indent=1))
    if wrong := faults(found):
        raise SystemExit("\n".join(wrong))


def faults(found: dict[str, Any]) -> list[str]:
    """What is not as it has to be, in one line each."""
    equal, asked = found["equal to generate"]
    rules = [
        ("nothing that is held", all(float(value) == 0 for value in found["held"].values()), found["held"]),
        (f"growth of at most {GROWTH}", found["growth"] <= GROWTH, found["growth"]),
        ("the answers of generate", 0 < equal == asked, f"{asked - equal} others of {asked}"),
        ("the exit status 0", found["exit status"] == 0, found["exit status"]),
        ("no error that is logged", found["errors logged"] == 0, found["errors logged"]),
    ]
    return [f"expected {what}, got {got}" for what, fine, got in rules if not fine]


def _ask_all(process: subprocess.Popen[bytes], requests: int, threads: int, seed: int) -> dict[str, Any]:
    counts, seen, lock = Counter[str](), dict[str, str](), threading.Lock()
    with httpx.Client(base_url="http://127.0.0.1:8765", timeout=120) as client:
        _until_ready(client, process)

        def some(places: range) -> None:
            with ThreadPoolExecutor(threads) as pool:
                jobs = [pool.submit(ask, client, random.Random(f"{seed}:{n}"), seen, counts, lock) for n in places]
                for job in jobs:
                    job.result()

        some(range(requests // 10))
        early = resident(process)
        some(range(requests // 10, requests))
        late = resident(process)
        deadline = monotonic() + 30  # for those that have just hung up
        held = _held(client)
        while any(float(value) for value in held.values()) and monotonic() < deadline:
            sleep(0.1)
            held = _held(client)
    return (
        dict(counts)
        | {"held": held, "MiB": [early >> 20, late >> 20], "growth": round(late / early - 1, 3)}
        | _as_generated(seen)
    )


def _held(client: httpx.Client) -> dict[str, str]:
    """What the engine holds, as ``/metrics`` tells it."""
    metrics = client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    held = dict(re.findall(r"^(bayes_dispatch_(?:rows|running|waiting|cache_bytes)) (\S+)$", metrics, re.M))
    assert len(held) == 4, metrics
    return held


def _until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            sleep(0.2)
    raise SystemExit(f"expected a server that answers, got one that ended with {process.returncode}")


def _as_generated(seen: dict[str, str], most: int = 300) -> dict[str, Any]:
    """How many of the answers ``generate`` gives, too."""
    generator, equal, asked = bd.TwoPassGenerator(bd.load_bundle()), 0, list(seen.items())[:most]
    for key, text in asked:
        body = json.loads(key)
        alone = generator.generate(
            [body["prompt"]],
            blend=body["blend"],
            max_new_tokens=body["max_tokens"],
            do_sample=body["temperature"] > 0,
            seed=body["seed"],
            stop=body["stop"],
        ).texts[0]
        equal += text == (alone.removesuffix(body["stop"]) if body["stop"] else alone)
    return {"equal to generate": (equal, len(asked))}


if __name__ == "__main__":
    typer.run(main)
