"""A bundle of random LoRA experts of a model, and a vLLM server that has them: for measurements of both, not for texts.

    python benchmarks/beside_vllm.py MODEL OUT

The experts are random and small, the dispatcher is fitted coarsely: what a token costs does not depend on them.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import numpy as np
import torch
import typer

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from bayes_dispatch.serving.vllm.export import export_bank
from bayes_dispatch.serving.vllm.format import BANK

__all__ = ["lora_bundle", "vllm_serving"]

NAMES = ("ada", "bo", "cy", "dee", "eve", "fay", "gus", "hal")
RANK = 8
STARTING = 600.0  # seconds


def lora_bundle(model: Path, out: Path) -> None:
    """Write a bundle of eight experts of rank 8 in every matrix of every block but the first, and its bank for vLLM.

    Args:
        model: directory of a model of the transformers library. out: where ``bundle`` and ``bank`` go; it is made.
    """
    backbone, draw = TransformersBackbone.load(str(model), dtype="float32", device="cpu"), torch.Generator()
    draw.manual_seed(0)
    shapes = {name: shape for name, shape in backbone.linears().items() if ".layers." in name and ".0." not in name}
    experts = []
    for name in NAMES:
        factors = {}
        for matrix, (outer, inner) in shapes.items():
            down = torch.randn(RANK, inner, generator=draw) / inner**0.5
            factors[matrix] = (down, 0.05 * torch.randn(outer, RANK, generator=draw))
        experts.append(LoraExpert(name, factors, backbone.fingerprint()))
    bank = ExpertBank(experts)
    labels = np.arange(64) % len(NAMES)
    texts = [f"{'abcdefgh'[label]}{n}" * (3 + n % 5) for n, label in enumerate(labels)]
    evidence = first_pass(backbone, backbone.tokenizer, texts, cut=backbone.cut(bank.adapts)).evidence
    dispatcher = Dispatcher(NAMES, svi=SVISettings(steps=40), features=FeatureSettings(dimensions=4, folds=2))
    bundle = Bundle(backbone, bank, dispatcher.fit(evidence, labels))
    bundle.save(out / "bundle")
    export_bank(bundle, out / "bank")


@contextmanager
def vllm_serving(python: Path, model: Path, bank: Path, port: int, log: Path) -> Iterator[str]:
    """URL of a vLLM server of a build for CPUs; it and its children are ended with the context.

    Args:
        python: of the environment that has vLLM and this package (``make check-vllm`` makes one).
        model, bank: see ``lora_bundle``. log: what it says.

    Raises:
        SystemExit: it does not start.
    """
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "512"]
    command += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "64", "--block-size", "32"]
    command += ["--max-num-batched-tokens", "512", "--max-num-seqs", "64"]
    known = os.environ | {"BAYES_DISPATCH_VLLM": str(bank), "VLLM_USE_V2_MODEL_RUNNER": "0"}
    known |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=known, stdout=out, stderr=out, start_new_session=True)
    try:
        url, begun = f"http://127.0.0.1:{port}", time.monotonic()
        while not _has_bank(url):
            if process.poll() is not None or time.monotonic() - begun > STARTING:
                said = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                raise SystemExit(f"expected a vLLM server at {url}, got:\n{said}")
            time.sleep(1)
        yield url
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):  # of the whole group: its workers outlive it otherwise
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(20)


def _has_bank(url: str) -> bool:
    try:
        told = httpx2.get(f"{url}/v1/models", timeout=5, trust_env=False).json()["data"]
    except (httpx2.HTTPError, ValueError, KeyError):
        return False
    return BANK in {each["id"] for each in told}


if __name__ == "__main__":
    typer.run(lora_bundle)
