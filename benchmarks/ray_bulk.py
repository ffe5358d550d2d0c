"""Documents are scored, and prompts read, by processes of a Ray cluster on this machine, of which one is killed.

    make check-ray

It fails where ``compare --ray`` or ``fit --ray`` gives anything else than without, though a process that was at a
block is killed amid; where a prompt that cannot be read, a cluster that others fill, or a process that is lost each
time, is anything but one line that tells so; or where a process is left at the end.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas
import typer

import bayes_dispatch as bd
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.scoring.held_out import held_out_sets
from ray_check import below, processes, until

KINDS = ("pure", "switching")
SAME = 1e-5  # nats per byte: what other sizes of matrix products may round away


def command(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, without a cluster that is there already."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "bayes_dispatch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What it printed on stdout and on stderr."""
    out, told = process.communicate(timeout=600)
    assert process.returncode == code, f"expected the exit status {code}, got {process.returncode}: {told}"
    return out, told


def killed_amid(process: subprocess.Popen[str], title: str) -> tuple[str, str]:
    """Kill one of its processes while that is at a block; all that it has started has to end with it."""
    at_work: list[int] = []

    def found() -> bool:
        assert process.poll() is None, f"expected a command that runs, got {process.communicate()}"
        at_work[:] = [number for number, name in below(process.pid).items() if name.startswith(title)]
        return bool(at_work)

    until(f"a process that is at {title}", found)
    started = below(process.pid)
    os.kill(at_work[0], signal.SIGKILL)
    printed = ended(process)
    until("no process that is left", lambda: not started.keys() & processes().keys(), 30)
    return printed


def documents(count: int, folder: Path) -> tuple[Path, list[Document]]:
    """Held-out ones in a file, and themselves."""
    found = [each for texts in held_out_sets(KINDS, count, 1).values() for each in texts]
    lines = [{"text": d.text, "prompt_bytes": d.prompt_bytes, "scored": [list(r) for r in d.ranges]} for d in found]
    return written(folder / "documents.jsonl", lines), found


def written(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def scored(file: Path, folder: Path) -> dict[str, Any]:
    """Scores here and there."""
    paths, begun = [folder / "here.csv", folder / "there.csv"], time.monotonic()
    ended(command("compare", "--jsonl", file, "--csv", paths[0]))
    amid = time.monotonic()
    out, _ = killed_amid(command("compare", "--ray", "--jsonl", file, "--csv", paths[1], "--json"), "ray::score_block")
    assert json.loads(out)["sets"], "expected one document of JSON on stdout, got another"
    seconds = {"seconds here": amid - begun, "seconds on Ray, a process killed": time.monotonic() - amid}
    here, there = map(pandas.read_csv, paths)
    keys = ["set", "document", "blend", "rows"]
    assert here[keys].equals(there[keys]), "expected the same documents and blends in the same order, got others"
    rest = here.columns.difference(keys)
    apart = float(np.abs(here[rest] - there[rest]).to_numpy().max())
    assert apart < SAME, f"expected the same scores, got some that are {apart:.2g} apart"
    return {"rows": len(here), "largest difference": apart} | {name: round(value, 1) for name, value in seconds.items()}


def fitted(texts: Sequence[Document], folder: Path) -> dict[str, Any]:
    """Dispatchers here and there."""
    bundle = bd.load_bundle()
    names = [*bundle.experts.components, None]
    lines = [{"expert": names[n % len(names)], "text": text.text} for n, text in enumerate(texts * 3)]
    file = written(folder / "prompts.jsonl", lines)
    ended(command("fit", "--examples", file, "--out", folder / "here"))
    killed_amid(command("fit", "--ray", "--examples", file, "--out", folder / "there"), "ray::read_block")
    evidence = bd.first_pass(bundle.model, bundle.tokenizer, [text.prompt for text in texts], cut=bundle.cut).evidence
    here, there = (bd.load_bundle(folder / name).dispatcher.predict_proba(evidence) for name in ("here", "there"))
    apart = float(np.abs(here - there).max())
    assert apart == 0, f"expected the same dispatcher, got one whose probabilities are {apart:.2g} apart"
    return {"prompts": len(lines), "largest difference of a probability": apart}


def refused(folder: Path) -> str:
    """A prompt amid the others that is too long for the model."""
    lines = [{"text": "a" * (40_000 if n == 69 else 4)} for n in range(100)]
    file = written(folder / "refused.jsonl", lines)
    _, told = ended(command("fit", "--ray", "--examples", file, "--out", folder / "refused"), 2)
    assert told.count("\n") == 1, f"expected one line, got {told}"
    assert f"in line 70 of {file}" in told, f"expected the line of the prompt, got {told}"
    assert not (folder / "refused").exists(), "expected no bundle, got one"
    return told.strip()


def lost(block: Sequence[int]) -> int:
    """Work that no process outlives."""
    if 2 in block:
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(block)


def failing(block: Sequence[int]) -> int:
    """Work that raises an error of ours."""
    if 2 in block:
        raise ConfigError("expected no 2, got one")
    return sum(block)


def unfree(seconds: float) -> None:
    """Work of others."""
    time.sleep(seconds)


def waited() -> str:
    """For others who have all cores: in one line, and no longer than they have them."""
    from bayes_dispatch.serving.ray.bulk import SILENT, blocks_on_ray

    said = StringIO()
    with redirect_stderr(said), blocks_on_ray() as mapped:
        import ray  # which reads what ours has set

        cores = ray.cluster_resources()["CPU"]
        ray.remote(num_cpus=cores)(unfree).remote(2 * SILENT + 5)
        until("cores that are taken", lambda: ray.available_resources().get("CPU", 0) < 1)
        assert mapped(lost, [[0, 1], [3]]) == [1, 3]
    told = [line for line in said.getvalue().splitlines() if "waiting" in line]
    assert len(told) == 1, f"expected one line on what is waited for, got {told}"
    assert f"2 blocks want a core each, or one in turn; 0 of {cores:g} cores are free" in told[0], told[0]
    return told[0]


def given_up() -> str:
    """A block whose process is lost each time, and one that fails."""
    from bayes_dispatch.serving.ray.bulk import blocks_on_ray

    with blocks_on_ray() as mapped:
        try:
            mapped(failing, [[0, 1], [3, 2]])
        except ConfigError as error:
            told = str(error)
        else:
            raise AssertionError("expected an error for a block that fails, got none")
        assert told == "expected no 2, got one, in the block of items 2 to 3", told
        assert mapped(lost, [[0, 1], [3]]) == [1, 3]
        try:
            mapped(lost, [[0, 1], [2]])
        except ConfigError as error:
            told = str(error)
        else:
            raise AssertionError("expected an error for a block that was lost, got none")
    assert "items 2 to 2" in told, f"expected the place of the lost item, got {told}"
    return told


def main(count: Annotated[int, typer.Option(min=2, help="Documents of each held-out domain.")] = 4) -> None:
    """Score, read, kill, and tell what came."""
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, texts = documents(count, folder)
        found: dict[str, Any] = {"documents": len(texts), "compare": scored(file, folder), "fit": fitted(texts, folder)}
        found |= {"refused": refused(folder), "waited": waited(), "given up": given_up()}
    until("no process that is left", lambda: not below(os.getpid()), 30)
    typer.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
