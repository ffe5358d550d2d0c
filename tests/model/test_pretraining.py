"""Training goes on after an interruption as if there had been none, is plain AdamW, lowers the loss, and is decided
by its seed. Other settings need another directory; a checkpoint that fails leaves the former."""

import errno
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from bayes_dispatch.errors import BundleError, ConfigError, TensorError
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.pretraining.run import PretrainingSettings, next_token_loss, pack_rows, pretrain, schedule
from bayes_dispatch.model.subwords import train_subwords
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.storage import read_tensors, write_tensors

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

CONFIG = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)
SETTINGS = PretrainingSettings(steps=9, batch_size=4, length=24, warmup=3, checkpoint_every=4, seed=3)


class Source:
    """Counting up from a random letter; question-like bytes weigh less. Fails at one batch, if told to."""

    def __init__(self, fail_after: int = 10**9) -> None:
        self.left = fail_after

    def row(self, rng: np.random.Generator, length: int) -> tuple[bytes, list[float]]:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError
        start, count = int(rng.integers(26)), int(rng.integers(length // 2, length + 1))
        return bytes(97 + (start + i) % 26 for i in range(count)), [0.3 if i % 3 else 1.0 for i in range(count)]


def weights(model: "MambaFormerForCausalLM") -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(a: "MambaFormerForCausalLM", b: "MambaFormerForCausalLM") -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> "MambaFormerForCausalLM":
    return pretrain(CONFIG, Source(), SETTINGS, tmp_path_factory.mktemp("whole"), progress=False)


@pytest.mark.parametrize("steps_done", [3, 4, 6, 8])
def test_resuming_is_not_stopping(uninterrupted: "MambaFormerForCausalLM", tmp_path: Path, steps_done: int) -> None:
    with pytest.raises(ConnectionError):
        pretrain(CONFIG, Source(fail_after=4 * steps_done), SETTINGS, tmp_path, progress=False)
    rest = Source()
    resumed = pretrain(CONFIG, rest, SETTINGS, tmp_path, progress=False)
    assert 10**9 - rest.left == 4 * (9 - steps_done // 4 * 4)  # only what the checkpoint lacks is trained
    assert same(resumed, uninterrupted)


def test_a_finished_run_is_only_loaded(uninterrupted: "MambaFormerForCausalLM", tmp_path: Path) -> None:
    pretrain(CONFIG, Source(), SETTINGS, tmp_path, progress=False)
    assert same(pretrain(CONFIG, Source(fail_after=0), SETTINGS, tmp_path, progress=False), uninterrupted)


def test_subwords_are_trained_on_and_resumed(tmp_path: Path) -> None:
    """The model reads what its tokenizer makes of the rows; another tokenizer needs another directory."""
    tokenizer, other = (train_subwords(["abcdefghijklmnopqrstuvwxyz"] * 9, size) for size in (270, 280))
    config, settings = replace(CONFIG, vocab_size=280), replace(SETTINGS, steps=6)
    whole = pretrain(config, Source(), settings, tmp_path / "a", progress=False, tokenizer=tokenizer)
    assert whole.tokenizer.to_json() == tokenizer.to_json()
    assert whole.tokenizer.vocab_size == 280
    with pytest.raises(ConnectionError):
        pretrain(config, Source(fail_after=4 * 5), settings, tmp_path / "b", progress=False, tokenizer=tokenizer)
    for wrong in (other, None):
        with pytest.raises(ConfigError, match=r"expected a checkpoint of these settings .* use a new directory"):
            pretrain(config, Source(), settings, tmp_path / "b", progress=False, tokenizer=wrong)
    resumed = pretrain(config, Source(), settings, tmp_path / "b", progress=False, tokenizer=tokenizer)
    assert same(resumed, whole)
    assert not same(pretrain(config, Source(), settings, tmp_path / "c", progress=False, tokenizer=other), whole)


def test_the_seed_decides(uninterrupted: "MambaFormerForCausalLM", tmp_path: Path) -> None:
    torch.manual_seed(99)  # of no influence
    state = torch.random.get_rng_state()
    assert same(pretrain(CONFIG, Source(), SETTINGS, tmp_path / "a", progress=False), uninterrupted)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = pretrain(CONFIG, Source(), replace(SETTINGS, seed=4), tmp_path / "b", progress=False)
    assert not same(other, uninterrupted)


def test_it_is_plain_adamw(tmp_path: Path) -> None:
    """Against torch's own mean loss, clipping and unfused AdamW."""
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

    settings = replace(SETTINGS, steps=5, clip=2.0)
    trained = pretrain(CONFIG, Source(), settings, tmp_path, progress=False)
    torch.manual_seed(settings.seed)
    model = MambaFormerForCausalLM(CONFIG)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.95)
    )
    clipped = 0
    for step in range(5):
        rows = [Source().row(np.random.default_rng([3, step, row]), 24) for row in range(4)]
        total, weight = torch.zeros(()), 0.0
        for data, each in rows:
            ids = torch.tensor([[256, *data]])
            log_p = model(ids).logits[0].log_softmax(-1)
            for t, w in enumerate(each):
                total = total - w * log_p[t, data[t]]
                weight += w
        optimizer.zero_grad()
        (total / weight).backward()
        clipped += int(torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0) > 2.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * schedule(step, 5, 3, 0.3)
        optimizer.step()
    assert 0 < clipped < 5  # or the size of the gradients would not matter to Adam
    for name, value in weights(trained).items():
        torch.testing.assert_close(value, weights(model)[name], rtol=1e-3, atol=2e-5, msg=name)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    ids, weight = pack_rows([Source().row(np.random.default_rng(i), 24) for i in range(20)], ByteTokenizer())
    losses = []
    for steps in (1, 40):
        model = pretrain(
            CONFIG, Source(), replace(SETTINGS, steps=steps, warmup=1), tmp_path / str(steps), progress=False
        )
        with torch.no_grad():
            losses.append(float(next_token_loss(model(ids).logits, ids, weight) / weight.sum()))
    assert losses[0] > 3.5  # about uniform
    assert losses[1] < np.log(26) - 0.1  # less than the letters' own entropy: context is used


def test_other_settings_need_another_directory(tmp_path: Path) -> None:
    pretrain(CONFIG, Source(), SETTINGS, tmp_path, progress=False)
    other = LanguageModelConfig(backbone=MambaFormerConfig(d_model=32, n_pairs=1), vocab_size=258)
    for config, settings in ((CONFIG, replace(SETTINGS, steps=10)), (other, SETTINGS)):
        with pytest.raises(ConfigError, match=r"expected a checkpoint of these settings .* use a new directory"):
            pretrain(config, Source(), settings, tmp_path, progress=False)


def test_what_an_earlier_version_did_not_name_has_its_default(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        pretrain(CONFIG, Source(fail_after=4 * 5), SETTINGS, tmp_path, progress=False)
    tensors, header = read_tensors(tmp_path / "pretraining.safetensors")
    identity = json.loads(header["run"])
    assert identity.keys() == {"config", "settings", "precision", "tokenizer"}
    del (
        identity["precision"],
        identity["tokenizer"],
        identity["settings"]["clip"],
        identity["config"]["backbone"]["n_groups"],
    )
    file = tmp_path / "pretraining.json"  # it had a file of its own
    file.write_text(json.dumps(identity))
    write_tensors(tmp_path / "pretraining.safetensors", tensors, {})
    rest = Source()
    pretrain(CONFIG, rest, SETTINGS, tmp_path, progress=False)
    assert 10**9 - rest.left == 4 * 5  # from the checkpoint at step 4
    write_tensors(tmp_path / "pretraining.safetensors", tensors, {})
    for odd in ([], {}, {"config": 1}, identity | {"settings": {"steps": 9, "unknown": 1}}, identity | {"config": {}}):
        file.write_text(json.dumps(odd))
        with pytest.raises(ConfigError, match="expected a checkpoint of these settings"):
            pretrain(CONFIG, Source(), SETTINGS, tmp_path, progress=False)


def test_blocks_by_name_are_resumed(tmp_path: Path) -> None:
    """JSON makes a list of the tuple."""
    config = replace(CONFIG, backbone=replace(CONFIG.backbone, blocks=("attention", "mamba2")))
    settings = replace(SETTINGS, steps=2)
    first = pretrain(config, Source(), settings, tmp_path, progress=False)
    assert same(pretrain(config, Source(fail_after=0), settings, tmp_path, progress=False), first)


def test_a_checkpoint_that_cannot_be_written_leaves_the_former_one(
    uninterrupted: "MambaFormerForCausalLM", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second one, once its tensors are written but not safe."""
    calls = 0

    def fsync(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # of the first: its file and the directory
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            pretrain(CONFIG, Source(), SETTINGS, tmp_path, progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pretraining.safetensors"]
    rest = Source()
    assert same(pretrain(CONFIG, rest, SETTINGS, tmp_path, progress=False), uninterrupted)
    assert 10**9 - rest.left == 4 * 5


@pytest.mark.parametrize("begun", [False, True])
def test_a_checkpoint_that_cannot_be_replaced_is_refused_before_the_first_step(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes files of its own mode, and gives none the mode of another. What is finished is only read."""
    finished = tmp_path / "finished"
    pretrain(CONFIG, Source(), SETTINGS, finished, progress=False)
    directory = tmp_path / "new"
    if begun:
        with pytest.raises(ConnectionError):
            pretrain(CONFIG, Source(fail_after=4 * 5), SETTINGS, directory, progress=False)

    def forbidden(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", forbidden)
    with pytest.raises(BundleError, match=r"expected a file that another can take the place of, got .*new/pretraining"):
        pretrain(CONFIG, Source(fail_after=0), SETTINGS, directory, progress=False)
    assert [file.name for file in directory.iterdir()] == ["pretraining.safetensors"] * begun
    pretrain(CONFIG, Source(fail_after=0), SETTINGS, finished, progress=False)


def test_a_step_that_is_no_number_ends_it_and_leaves_the_checkpoint_before(
    uninterrupted: "MambaFormerForCausalLM", tmp_path: Path
) -> None:
    """Because the batch weighs nothing, or the steps before were too long."""

    class Weightless(Source):
        def row(self, rng: np.random.Generator, length: int) -> tuple[bytes, list[float]]:
            text, own = super().row(rng, length)
            return text, [0.0] * len(own) if 24 < 10**9 - self.left <= 28 else own

    with pytest.raises(TensorError, match=r"^expected bytes of step 6 whose weights sum to more than 0, got 0$"):
        pretrain(CONFIG, Weightless(), SETTINGS, tmp_path, progress=False)
    diverging = replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(TensorError, match=r"^expected a finite loss and gradient at step \d, .* the learning rate$"):
        pretrain(CONFIG, Source(), diverging, tmp_path / "diverging", progress=False)
    assert same(pretrain(CONFIG, Source(), SETTINGS, tmp_path, progress=False), uninterrupted)


def test_a_batch_is_shared_evenly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a batch_size that 3 processes can share, got 4"):
        pretrain(CONFIG, Source(), SETTINGS, tmp_path, processes=3)
    with pytest.raises(ConfigError, match="expected processes to be a whole number ≥ 1, got 0"):
        pretrain(CONFIG, Source(), SETTINGS, tmp_path, processes=0)


def test_the_schedule_rises_stays_and_falls() -> None:
    factors = [schedule(step, 200, 20, 0.3) for step in range(200)]
    np.testing.assert_allclose(factors[:20], np.arange(1, 21) / 20)
    np.testing.assert_allclose(factors[20:61], 1)
    assert all(a > b for a, b in pairwise(factors[60:]))
    np.testing.assert_allclose(factors[130], 0.5)  # half-way through the cosine
    assert 0 < factors[-1] < 1e-3
    assert [schedule(step, 8, 2, flat=1.0) for step in range(8)] == [0.5] + [1.0] * 7


def test_a_token_weighs_what_its_bytes_do_on_average() -> None:
    tokenizer = train_subwords(["the the"] * 3, 260)
    spans = ((0, 0), (0, 3), (3, 4), (4, 6), (4, 6))  # the word, a space, and two tokens of one character
    assert tokenizer.tokenize("the é").spans == spans
    ids, weights = pack_rows([("the é".encode(), [0.25, 0.75, 0.5, 0.5, 1.0, 0.0]), (b"t", [0.75])], tokenizer)
    assert weights.tolist() == [[0.5, 0.5, 0.5, 0.5], [0.75, 0.0, 0.0, 0.0]]
    assert ids[1, 2:].tolist() == [tokenizer.pad_token_id] * 3


@pytest.mark.parametrize("count", [1, 3])
def test_each_byte_has_a_weight(count: int) -> None:
    with pytest.raises(TensorError, match=f"^expected a weight for each of 2 bytes of a row, got {count}"):
        pack_rows([("é".encode(), [1.0] * count)], ByteTokenizer())


def test_packing_keeps_bytes_and_weights_together() -> None:
    ids, weight = pack_rows([(b"abc", [1.0, 0.5, 1.0]), (b"z", [0.25])], ByteTokenizer())
    assert ids.tolist() == [[256, 97, 98, 99], [256, 122, 257, 257]]
    assert weight.tolist() == [[1.0, 0.5, 1.0], [0.25, 0.0, 0.0]]
    logits = torch.randn(2, 4, 258, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 97] + 0.5 * log_p[0, 1, 98] + log_p[0, 2, 99] + 0.25 * log_p[1, 0, 122])
    torch.testing.assert_close(next_token_loss(logits, ids, weight), expected)
