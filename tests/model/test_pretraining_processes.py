"""Several processes train as one does, by `pretrain` or torchrun, and go on after a kill; a process group is left as
it was found. What they cannot share is refused by its own error."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.pretraining.corpus import TextCorpus
from bayes_dispatch.model.pretraining.run import PretrainingSettings, next_token_loss, pack_rows, pretrain
from bayes_dispatch.model.pretraining.text import loss_per_byte
from bayes_dispatch.model.tokenizer import ByteTokenizer
from tests.model.tensors import assert_same

CONFIG = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)
SETTINGS = PretrainingSettings(steps=8, batch_size=4, length=24, warmup=8, checkpoint_every=3, seed=3)
# Of very different lengths: the processes' shares of a batch weigh differently, so that a mean of their means is wrong.
TEXTS = ("a man a plan a canal panama, or so they say who have seen it.", "no", "yes", "to be or not", "tea?")
CORPUS = TextCorpus(tuple(text.encode() for text in TEXTS))

SCRIPT = f"""
import os, signal, sys
from pathlib import Path
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.pretraining.run import PretrainingSettings, pretrain
from bayes_dispatch.model.pretraining.corpus import TextCorpus

config = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)
settings = {SETTINGS!r}
corpus = {CORPUS!r}
directory = Path(sys.argv[1])
"""


def start(*arguments: str | Path, torchrun: tuple[str, ...] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run Python on these arguments, by itself or under torchrun with these options, on one thread each."""
    launcher = [] if torchrun is None else ["-m", "torch.distributed.run", "--standalone", *torchrun]
    command = [sys.executable, *launcher, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, env=environment, stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun takes its processes with it
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> MambaFormerForCausalLM:
    """Trained by one process, in one go."""
    return pretrain(CONFIG, CORPUS, SETTINGS, tmp_path_factory.mktemp("one"), progress=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> MambaFormerForCausalLM:
    """Trained by two processes that ``pretrain`` has started."""
    return pretrain(CONFIG, CORPUS, SETTINGS, tmp_path_factory.mktemp("two"), processes=2, progress=False)


def loss(model: MambaFormerForCausalLM) -> float:
    ids, weights = pack_rows([(text, [1.0] * len(text)) for text in CORPUS.documents], ByteTokenizer())
    with torch.no_grad():
        return float(next_token_loss(model(ids).logits, ids, weights) / weights.sum())


def test_two_processes_are_one(one: MambaFormerForCausalLM, two: MambaFormerForCausalLM) -> None:
    assert loss(one) < loss(MambaFormerForCausalLM(CONFIG)) - 0.3  # there is something to lose
    assert loss(two) == pytest.approx(loss(one), rel=1e-5)
    assert_same(one, two, rtol=1e-3, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same(one, two)  # they did add up in another order


@pytest.mark.slow
def test_two_processes_of_torchrun_are_one(tmp_path: Path) -> None:
    """By the command, on a folder of texts."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()))
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    out = tmp_path / "out"
    done = start(
        *("-m", "bayes_dispatch.model.pretraining.text", "--text", tmp_path / "texts", "--out", out),
        *("--config", tmp_path / "config.json", "--steps", "8", "--batch-size", "4", "--length", "24", "--seed", "3"),
        *("--held-out", "0.2", "--checkpoint-every", "3"),
        torchrun=("--nproc-per-node", "2"),
    )
    assert done.returncode == 0, done.stderr
    corpus, judge = CORPUS.split(0.2)
    alone = pretrain(CONFIG, corpus, SETTINGS, tmp_path / "alone", progress=False)
    assert_same(MambaFormerForCausalLM.from_pretrained(out), alone, rtol=1e-3, atol=1e-5)
    told = re.fullmatch(r"(.*): 8 steps on (\d+) bytes, held-out loss ([\d.]+) nats per byte\n", done.stdout)
    assert told is not None, done.stdout
    assert (told[1], int(told[2])) == (str(out), corpus.size)
    assert float(told[3]) == pytest.approx(loss_per_byte(alone, judge, 24), abs=1e-4)


class CountingCorpus(TextCorpus):
    """Counts the rows that it gives."""

    rows = 0

    def row(self, rng: np.random.Generator, length: int) -> tuple[bytes, list[float]]:
        CountingCorpus.rows += 1
        return super().row(rng, length)


@pytest.fixture
def counting() -> CountingCorpus:
    CountingCorpus.rows = 0
    return CountingCorpus(CORPUS.documents)


@pytest.mark.slow
def test_a_run_killed_as_it_writes_goes_on_from_the_checkpoint_before(
    one: MambaFormerForCausalLM, counting: CountingCorpus, tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        SCRIPT
        + """
fsync, calls = os.fsync, []

def killed(file):
    calls.append(file)
    if len(calls) == 3:  # a file and its directory for each checkpoint: the second file is written, but not in place
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)

os.fsync = killed
pretrain(config, corpus, settings, directory, progress=False)
"""
    )
    assert start(script, tmp_path / "run").returncode == -signal.SIGKILL
    assert_same(pretrain(CONFIG, counting, SETTINGS, tmp_path / "run", progress=False), one)
    assert counting.rows == 4 * (8 - 3)


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed(two: MambaFormerForCausalLM, tmp_path: Path) -> None:
    """One of two processes dies in step 5 of 8; both are started again, and go on from the checkpoint after step 3."""
    script = tmp_path / "killed.py"
    script.write_text(
        SCRIPT
        + """
life, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]

class Deadly(TextCorpus):
    rows = 0

    def row(self, rng, length):
        Deadly.rows += 1
        if life == "0" and rank == "1" and Deadly.rows > 2 * 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().row(rng, length)

pretrain(config, Deadly(corpus.documents), settings, directory, progress=False)
print(f"life {life}: {Deadly.rows} rows")
"""
    )
    done = start(script, tmp_path / "run", torchrun=("--nproc-per-node", "2", "--max-restarts", "1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("life 1: 10 rows") == 2  # each read its half of what was left, and nothing else
    assert_same(pretrain(CONFIG, CORPUS, SETTINGS, tmp_path / "run", progress=False), two)


@pytest.mark.slow
def test_processes_of_torchrun_have_to_see_the_same_checkpoint(tmp_path: Path) -> None:
    pretrain(CONFIG, CORPUS, SETTINGS, tmp_path / "run0", progress=False)
    script = tmp_path / "parted.py"
    script.write_text(SCRIPT + "pretrain(config, corpus, settings, Path(sys.argv[1] + os.environ['RANK']))")
    done = start(script, tmp_path / "run", torchrun=("--nproc-per-node", "2"))
    assert done.returncode != 0
    assert "to be the same for all processes, got different checkpoints there" in done.stderr


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun would start a single process."""
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("launched")
def test_a_process_group_is_left_as_it_was_found(one: MambaFormerForCausalLM, tmp_path: Path) -> None:
    assert_same(pretrain(CONFIG, CORPUS, SETTINGS, tmp_path / "ours", progress=False), one)
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    try:
        assert_same(pretrain(CONFIG, CORPUS, SETTINGS, tmp_path / "theirs", progress=False), one)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("launched")
def test_torchrun_starts_the_processes_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected processes of 1 under torchrun, which has started them, got 2"):
        pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, processes=2, progress=False)


@pytest.mark.usefixtures("launched")
def test_a_batch_is_shared_evenly_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="a batch_size that 3 processes can share, got 4"):
        pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, progress=False)


def test_a_finished_run_starts_no_processes(
    one: MambaFormerForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, progress=False)
    monkeypatch.setattr("bayes_dispatch.model.pretraining.run.start_processes", None)
    assert_same(pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, processes=2, progress=False), one)


def test_several_processes_report_a_wrong_directory_by_its_own_error(tmp_path: Path) -> None:
    pretrain(CONFIG, CORPUS, replace(SETTINGS, steps=1), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="expected a checkpoint of these settings"):
        pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, processes=2, progress=False)


def test_several_processes_report_a_loss_that_is_no_number_by_its_own_error(tmp_path: Path) -> None:
    diverging = replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(TensorError, match=r"^expected a finite loss and gradient at step \d, .* the learning rate$"):
        pretrain(CONFIG, CORPUS, diverging, tmp_path, processes=2, progress=False)
