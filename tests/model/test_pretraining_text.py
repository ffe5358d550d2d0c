"""Texts of a user: every window is as likely, what is held out is not trained on, the loss counts every byte. One
command does it all, keeps to its text, and refuses bad input in a line."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.pretraining.corpus import TextCorpus
from bayes_dispatch.model.pretraining.text import app, loss_per_byte

CONFIG = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)


def test_every_window_is_as_likely() -> None:
    """False alarms: 1 in 10,000 seeds, by Bonferroni's bound over 8 windows."""
    corpus, rng = TextCorpus((b"abcdefgh", b"xy", b"stuvw")), np.random.default_rng(0)
    draws = 8000
    counts: Counter[bytes] = Counter()
    for _ in range(draws):
        data, weights = corpus.row(rng, 4)
        assert weights == [1.0] * len(data)
        counts[data] += 1
    windows = [b"abcd", b"bcde", b"cdef", b"defg", b"efgh", b"xy", b"stuv", b"tuvw"]
    assert set(counts) == set(windows)
    p = 1 / len(windows)
    bound = 4.4 * np.sqrt(draws * p * (1 - p))
    assert all(abs(counts[window] - draws * p) < bound for window in windows)


def test_what_is_held_out_is_the_end_of_each_document() -> None:
    corpus = TextCorpus((b"0123456789", b"a", b"abcde"))
    rest, held_out = corpus.split(0.2)
    assert (rest.documents, held_out.documents) == ((b"01234567", b"a", b"abcd"), (b"89", b"e"))
    assert (corpus.size, rest.size, held_out.size) == (16, 13, 3)
    with pytest.raises(ConfigError, match=r"expected enough text to hold out the share 0.01, got 16 bytes"):
        corpus.split(0.01)


def test_windows_are_spread_over_the_documents() -> None:
    corpus = TextCorpus((b"0123456789", b"a"))
    assert corpus.windows(4, 100) == [b"0123", b"4567", b"89", b"a"]
    assert corpus.windows(4, 2) == [b"0123", b"a"]


def test_no_character_is_cut() -> None:
    text = "añb日c😀d" * 3
    corpus, rng = TextCorpus((text.encode(),)), np.random.default_rng(0)
    rows = [corpus.row(rng, 9)[0] for _ in range(99)]
    assert max(map(len, rows)) == 9
    assert all(row.decode() in text for row in rows)
    assert b"".join(corpus.windows(5, 99)).decode() == text
    assert "".join(part.documents[0].decode() for part in corpus.split(0.3)) == text


def test_the_digest_tells_texts_apart() -> None:
    corpora = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"c", b"ab")]
    assert len({TextCorpus(documents).digest() for documents in corpora}) == 4
    assert TextCorpus((b"ab", b"c")).digest() == TextCorpus((b"ab", b"c")).digest()


def test_reading_files_and_folders(tmp_path: Path) -> None:
    for name, text in {"b.txt": "zwei", "a/c.txt": "ünö", "a/empty": "", ".git/x": "no", "a/.hidden": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert TextCorpus.read(tmp_path).documents == ("ünö".encode(), b"zwei")
    assert TextCorpus.read(tmp_path / "b.txt").documents == (b"zwei",)
    with pytest.raises(ConfigError, match=r"expected text in .*empty, got 1 empty files"):
        TextCorpus.read(tmp_path / "a" / "empty")
    with pytest.raises(ConfigError, match=r"expected a readable text file .*none, got: No such file"):
        TextCorpus.read(tmp_path / "none")
    (tmp_path / "a" / "picture").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match=r"picture: expected UTF-8 text, got byte 0xff at position 2"):
        TextCorpus.read(tmp_path)
    for documents in ((), (b"a", b"")):
        with pytest.raises(ConfigError, match="expected documents that are not empty"):
            TextCorpus(documents)


def test_the_loss_is_of_every_byte() -> None:
    """Against log-probabilities of each piece by itself."""
    torch.manual_seed(0)
    model = MambaFormerForCausalLM(CONFIG).eval()
    total = 0.0
    for piece in (b"to be", b" or n", b"ot"):
        with torch.no_grad():
            log_p = model(torch.tensor([[256, *piece]])).logits[0].log_softmax(-1)
        total -= sum(float(log_p[t, byte]) for t, byte in enumerate(piece))
    assert loss_per_byte(model, TextCorpus((b"to be or not",)), 5) == pytest.approx(total / 12, rel=1e-5)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()))
    (tmp_path / "text").write_text("to be or not to be, that is the question. " * 4)
    options = {"text": "text", "out": "out", "config": "config.json"}
    paths = [part for name, file in options.items() for part in (f"--{name}", str(tmp_path / file))]
    return [*paths, "--steps", "4", "--batch-size", "2", "--length", "16", "--checkpoint-every", "2"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def error(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return result.stderr.strip().splitlines()[-1]


def test_the_command(command: list[str], tmp_path: Path) -> None:
    done = run(*command, "--gradient-checkpointing", "--precision", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "out: 4 steps on 160 bytes, held-out loss " in done.stdout
    model = MambaFormerForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config == CONFIG
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = run(*command, "--precision", "bfloat16")  # nothing is left to do
    assert again.stdout == done.stdout
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert "held-out" not in run(*command, "--held-out", "0", "--work", str(tmp_path / "all")).stdout


def test_bad_input_ends_in_one_line(command: list[str], tmp_path: Path) -> None:
    assert "a batch_size that 3 processes can share, got 2" in error(run(*command, "--processes", "3"))
    for option, told in (("--length", "length to be"), ("--learning-rate", "learning_rate to be")):
        refused = error(run(*command, option, "0" if option == "--learning-rate" else "2"))
        assert refused.startswith(f"bayes_dispatch.model.pretraining.text: error: expected {told}")
    missing = error(run(*command, "--text", str(tmp_path / "none")))
    assert missing.startswith("bayes_dispatch.model.pretraining.text: error: expected a readable text file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary").write_text("dear")
    for place in ("out", "text"):
        refused = error(run(*command, "--out", str(tmp_path / place)))
        assert refused.endswith(("got other things in it: diary", "got a file"))
    (tmp_path / "out" / "diary").unlink()
    assert "Not a directory" in error(run(*command, "--work", str(tmp_path / "text" / "work")))
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json() | {"vocab_size": 256}))
    assert "expected a vocab_size of at least 258, for bytes" in error(run(*command))


def test_a_run_into_the_directory_where_it_is(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its work is beside that directory, and has its name."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = run(*command, "--out", ".")
    assert done.exit_code == 0, done.output
    assert MambaFormerForCausalLM.from_pretrained(".").config == CONFIG
    assert (tmp_path / "here.work").is_dir()


def test_a_run_keeps_to_its_text(command: list[str], tmp_path: Path) -> None:
    assert run(*command).exit_code == 0
    (tmp_path / "text").write_text("something else altogether, and as long as need be for a share to be held out")
    assert "expected the text that training in" in error(run(*command))
    assert run(*command, "--work", str(tmp_path / "new")).exit_code == 0
