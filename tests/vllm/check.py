"""Whether a real vLLM says what PEFT says, whatever blends share its batches; `make check-vllm` runs this.

    python -m tests.vllm.check --python .venv-vllm/bin/python

A small random Llama and eight random LoRA adapters, made and saved by PEFT, become a bank. vLLM serves it on
127.0.0.1. Base, each expert and eight blends are asked at once, greedily, as weights of the one adapter and as models
of their own; then again, when the prompt is in vLLM's cache. PEFT merges each blend (``cat``) and reads the answers:
every token must be its most probable one, and of the same log-probability. The same goes through ``VllmEngine``,
beside the engine in this process. A bank whose experts are exchanged must be refused. At last, tokens of blends are
timed beside those of one plain adapter at a server without the plugin.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Event as Flag
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx2
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.two_pass.blends import FixedWeights, PosteriorMean
from bayes_dispatch.inference.two_pass.prompts import Writing
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from bayes_dispatch.serving.engine import BatchedEngine
from bayes_dispatch.serving.vllm.engine import VllmEngine
from bayes_dispatch.serving.vllm.export import export_bank
from bayes_dispatch.serving.vllm.format import told
from bayes_dispatch.serving.work import Ended, Event, Work, Wrote
from tests.tiny import SPECIAL, dispatcher_of, tiny_tokenizer

NAMES = ("ada", "bo", "cy", "dee", "eve", "fay", "gus", "hal")
RANKS = (8, 4, 8, 8, 2, 8, 8, 8)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = "the cat and the dog: 12 + 12 = 24; a bath, a path. " * 2  # longer than two blocks of vLLM's cache
BLOCK, TOKENS, CLOSE, STARTING = 32, 24, 1e-4, 600.0  # seconds
CLIENTS, TIMED, ROUNDS = 8, 48, 11


class Answer(NamedTuple):
    ids: list[int]
    log_probabilities: list[float]


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise SystemExit(f"check-vllm failed: {message}")


def make(directory: Path) -> TransformersBackbone:
    """A checkpoint with its tokenizer in ``base``, and PEFT's adapters in ``adapters``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=270,
        hidden_size=256,
        num_hidden_layers=6,
        intermediate_size=768,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        **SPECIAL,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1) if parameter.ndim == 1 else parameter.mul_(3)
    model.save_pretrained(directory / "base")
    tiny_tokenizer().save_pretrained(directory / "base")
    for name, rank in zip(NAMES, RANKS, strict=True):
        base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
        settings = LoraConfig(target_modules=TARGETS, r=rank, lora_alpha=2 * rank, init_lora_weights=False)
        adapted = get_peft_model(base, settings)
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(directory / "adapters" / name)
    return TransformersBackbone.load(str(directory / "base"), dtype="float32", device="cpu")


def cases() -> dict[str, dict[str, float]]:
    """Base, each expert, and eight blends: of two, of all, some with base."""
    found = {"base": {"base": 1.0}} | {name: {name: 1.0} for name in NAMES}
    rng = np.random.default_rng(1)
    for n in range(8):
        chosen = list(rng.choice([*NAMES, "base"], 2 + n % 3, replace=False)) if n < 6 else [*NAMES, "base"]
        found[f"blend {n}"] = dict(zip(map(str, chosen), rng.dirichlet(np.ones(len(chosen))).tolist(), strict=True))
    return found


class Reference:
    """PEFT's own model, with a merged adapter for each case."""

    def __init__(self, directory: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
        first, *others = NAMES
        self._model = PeftModel.from_pretrained(base, directory / "adapters" / first, adapter_name=first).eval()
        for name in others:
            self._model.load_adapter(directory / "adapters" / name, adapter_name=name)

    def check(self, name: str, weights: Mapping[str, float], prompt: list[int], answer: Answer) -> float:
        """By how much the answer's log-probabilities are off; every token must be the most probable one."""
        own = {each: w for each, w in weights.items() if each != "base"}
        ids = torch.tensor([prompt + answer.ids])
        with torch.no_grad():
            if own:
                self._model.add_weighted_adapter(list(own), list(own.values()), "case", combination_type="cat")
                self._model.set_adapter("case")
                logits = self._model(input_ids=ids).logits
                self._model.delete_adapter("case")
            else:
                with self._model.disable_adapter():
                    logits = self._model(input_ids=ids).logits
        said = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        expect(said.argmax(-1).tolist() == answer.ids, f"{name}: PEFT would have written another text")
        chosen = said.gather(1, ids[0, len(prompt) :, None])[:, 0]
        return float((chosen - torch.tensor(answer.log_probabilities)).abs().max())


@contextmanager
def serving(python: Path, base: Path, log: Path, rank: int, slots: int, *words: str, **env: str) -> Iterator[str]:
    """A vLLM server's URL; it and its children are ended after the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(rank)]
    command += ["--max-model-len", "256", "--block-size", str(BLOCK), "--max-num-batched-tokens", "256"]
    command += ["--max-num-seqs", "64", *words]
    known = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    known |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | env
    known.pop("PYTHONPATH", None)
    with log.open("w") as out:
        process = subprocess.Popen(command, env=known, stdout=out, stderr=out, start_new_session=True)
    try:
        url, begun = f"http://127.0.0.1:{port}", time.monotonic()
        while process.poll() is None and time.monotonic() - begun < STARTING:
            try:
                if httpx2.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(1)
        yield url if process.poll() is None else ""
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):  # of the whole group: its workers outlive it otherwise
            try:
                os.killpg(process.pid, sign)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def ask(url: str, model: str, prompt: list[int], tokens: int = TOKENS, **more: Any) -> Answer:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0}
    body |= {"ignore_eos": True, "return_token_ids": True} | more
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=600, trust_env=False)
    expect(answer.status_code == 200, f"{model}: status {answer.status_code}: {answer.text:.300}")
    choice = answer.json()["choices"][0]
    return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])


def check_answers(url: str, reference: Reference, prompt: list[int]) -> None:
    """By (a), models of their own, and (b), weights of one adapter; with base by its own name between them."""
    asked = cases()
    ways: list[tuple[str, str, dict[str, Any]]] = []
    for name, weights in asked.items():
        text = told(list(weights.values()), list(weights))
        ways.append((name, f"blend:{text}", {}))
        ways.append((name, "bank", {"vllm_xargs": {"blend_weights": text}}))
    ways += [("base", "model", {})] * 3
    with ThreadPoolExecutor(len(ways)) as pool:
        for again in (False, True):
            answers = list(pool.map(lambda way: ask(url, way[1], prompt, **way[2]), ways))
            off: dict[str, float] = {}
            for (name, model, _), answer in zip(ways, answers, strict=True):
                kind = model.partition(":")[0]
                found = reference.check(f"{name} by {kind}", asked[name], prompt, answer)
                off[kind] = max(off.get(kind, 0.0), found)
            told_off = ", ".join(f"{kind} {value:.1e}" for kind, value in off.items())
            cached = "again, prompts cached" if again else "at once"
            print(f"{len(ways)} requests {cached}: greedy texts are PEFT's; log-probabilities off by {told_off} nats")
            expect(max(off.values()) <= CLOSE, f"log-probabilities off by {told_off}")
            texts = {tuple(answer.ids) for (_, model, _), answer in zip(ways, answers, strict=True) if model == "bank"}
            expect(len(texts) == len(asked), f"expected {len(asked)} different texts, got {len(texts)}")
    lines = httpx2.get(f"{url}/metrics", trust_env=False).text.splitlines()
    hits = sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))
    expect(hits >= BLOCK * len(asked), f"expected prompts in vLLM's cache, got {hits:g} tokens")


def check_refusals(url: str) -> None:
    for model, more, status in (
        ("bank", {}, 400),
        ("bank", {"vllm_xargs": {"blend_weights": "ada=0.5"}}, 400),
        ("model", {"vllm_xargs": {"blend_weights": "ada=1"}}, 400),
        ("blend:ada=2", {}, 404),
    ):
        body = {"model": model, "prompt": [1, 5], "max_tokens": 1, **more}
        got = httpx2.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).status_code
        expect(got == status, f"expected status {status} of {model} with {more}, got {got}")


def check_engine(url: str, system: Any) -> None:
    """``VllmEngine`` gives what the engine in this process gives."""

    class Heard:
        def __init__(self) -> None:
            self.text, self.log_probabilities, self.ended, self.over = "", list[float](), "", Flag()

        def __call__(self, event: Event) -> None:
            if isinstance(event, Wrote):
                self.text += event.text
                self.log_probabilities.append(event.log_probability)
            elif isinstance(event, Ended):
                self.ended = f"{event.reason} {event.error or ''}"
                self.over.set()

    components, works = system.experts.components, []
    for n, weights in enumerate([None, *cases().values()]):
        blend = PosteriorMean() if weights is None else FixedWeights(tuple(weights.get(c, 0.0) for c in components))
        works.append(Work(f"{TEXT[n:]}", blend, Writing.of(TOKENS, False, 1.0, None), seed=n))
    found = []
    for engine in (VllmEngine(system, url), BatchedEngine(system)):
        heard = [Heard() for _ in works]
        for work, own in zip(works, heard, strict=True):
            engine.submit(work, own)
        expect(all(own.over.wait(600) for own in heard), "a request has not ended")
        engine.close(0)
        found.append(heard)
    off = 0.0
    for n, (theirs, ours) in enumerate(zip(*found, strict=True)):
        expect((theirs.text, theirs.ended) == (ours.text, ours.ended), f"request {n}: {theirs.ended}, not {ours.ended}")
        pairs = zip(theirs.log_probabilities, ours.log_probabilities, strict=True)
        off = max([off, *(abs(a - b) for a, b in pairs)])
    print(f"{len(works)} requests by VllmEngine: texts are those of the engine in process; off by {off:.1e} nats")
    expect(off <= CLOSE, f"log-probabilities off by {off}")


def check_exchanged(python: Path, directory: Path) -> None:
    """A bank whose experts have one another's names must be refused."""
    path = directory / "bank" / "vllm.json"
    whole = path.read_text()
    index = json.loads(whole)
    first, second, *others = index["ranks"].items()
    path.write_text(json.dumps(index | {"ranks": dict([(second[0], first[1]), (first[0], second[1]), *others])}))
    try:
        log = directory / "exchanged.log"
        with serving(python, directory / "base", log, 64, 1, BAYES_DISPATCH_VLLM=str(directory / "bank")) as url:
            expect(url == "", "a bank with exchanged experts was served")
        expect("expected the log-probabilities of the blend" in log.read_text(), f"another failure:\n{tail(log)}")
    finally:
        path.write_text(whole)
    print("a bank with exchanged experts is refused at the start")


def time_tokens(bank: str, plain: str, prompt: list[int]) -> None:
    """Eight blends at once against one adapter of rank 8 eight times, in turns."""
    blends = [told(list(w.values()), list(w)) for w in cases().values()][-CLIENTS:]

    def seconds(pool: ThreadPoolExecutor, url: str, model: str, xargs: list[dict[str, Any]]) -> float:
        begun = time.perf_counter()
        list(pool.map(lambda more: ask(url, model, prompt, TIMED, **more), xargs))
        return time.perf_counter() - begun

    weighted, nothing = [{"vllm_xargs": {"blend_weights": each}} for each in blends], [{}] * CLIENTS
    with ThreadPoolExecutor(CLIENTS) as pool:
        pairs = [
            (seconds(pool, bank, "bank", weighted), seconds(pool, plain, "ada", nothing)) for _ in range(ROUNDS + 1)
        ][1:]
    ratio, each = median(a / b for a, b in pairs), median(a for a, _ in pairs) / TIMED * 1000
    low, high = min(a / b for a, b in pairs), max(a / b for a, b in pairs)
    print(
        f"a token of {CLIENTS} blends of {len(NAMES)} experts costs {ratio:.2f} times one of a plain adapter of rank 8 "
        f"(median of {ROUNDS} pairs, {low:.2f} to {high:.2f}; {each:.1f} ms for {CLIENTS} tokens)"
    )


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has vLLM and this package")
    python = parser.parse_args().python.absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are ended
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        model = make(directory)
        experts = ExpertBank.from_peft(model, {name: directory / "adapters" / name for name in NAMES})
        parts = {"model": model, "tokenizer": model.tokenizer, "experts": experts}
        system = SimpleNamespace(**parts, dispatcher=dispatcher_of(NAMES, model, model.tokenizer))
        index = export_bank(system, directory / "bank")
        prompt = list(model.tokenizer.tokenize(TEXT).ids)
        check_exchanged(python, directory)
        log, env = directory / "bank.log", {"BAYES_DISPATCH_VLLM": str(directory / "bank")}
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # for models of one blend each
        with serving(python, directory / "base", log, index.server_rank, 4, **env) as url:
            expect(url != "", f"the server did not start:\n{tail(log)}")
            print(
                *(line[line.index("bayes-dispatch: ") :] for line in log.read_text().splitlines() if " probes " in line)
            )
            check_answers(url, Reference(directory), prompt)
            check_refusals(url)
            check_engine(url, system)
        one = ["--lora-modules", f"ada={directory / 'adapters' / 'ada'}"]
        log = directory / "plain.log"
        with (
            serving(python, directory / "base", directory / "again.log", index.server_rank, 1, **env) as bank,
            serving(python, directory / "base", log, 8, 1, *one) as plain,
        ):
            expect(bank != "" and plain != "", f"a server did not start:\n{tail(log)}")
            time_tokens(bank, plain, prompt[:8])
    print("check-vllm passed")


if __name__ == "__main__":
    main()
