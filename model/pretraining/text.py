"""Pre-training on a text of one's own, from the shell, in one process or under ``torchrun``.

torchrun --nproc-per-node 2 -m bayes_dispatch.model.pretraining.text --text FILE --out DIR
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from bayes_dispatch.errors import BayesDispatchError, ConfigError
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.pretraining.corpus import TextCorpus
from bayes_dispatch.model.pretraining.processes import is_first
from bayes_dispatch.model.pretraining.recipe import ComputeSettings, Device, Precision, PretrainingSettings
from bayes_dispatch.model.pretraining.run import next_token_loss, pack_rows, pretrain
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.storage import check_directory, read_json, work_beside, write_json

__all__ = ["loss_per_byte", "main"]

PROGRAM = "bayes_dispatch.model.pretraining.text"
JUDGED_ROWS = 256  # at most

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command and exit: 0 when all went well, 2 on bad input."""
    app(prog_name=f"python -m {PROGRAM}")


@app.command()
def train(
    text: Annotated[Path, typer.Option(help="A UTF-8 text file, or a folder of such files.")],
    out: Annotated[Path, typer.Option(help="Directory of the model, as from_pretrained reads it.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json; default: 0.5M parameters, as shipped.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step, over all processes.")] = 12,
    length: Annotated[int, typer.Option(min=1, help="Bytes in a row.")] = 256,
    learning_rate: Annotated[float, typer.Option(min=0, help="At its peak.")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="Share of each text's end that judges.")] = 0.05,
    processes: Annotated[int, typer.Option(min=1, help="To start here; without it under torchrun.")] = 1,
    device: Annotated[Device, typer.Option(help="Where to compute; one GPU per process.")] = "cpu",
    precision: Annotated[Precision, typer.Option(help="Of products; weights are float32.")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile; needs a C++ compiler.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    work: Annotated[Path | None, typer.Option(help="Directory of the checkpoint; default: OUT.work.")] = None,
) -> None:
    """Pre-train a byte-level model on text. The same command goes on where a stopped run's last checkpoint was."""
    work = work_beside(out) if work is None else work
    try:
        settings = PretrainingSettings(
            steps=steps,
            batch_size=batch_size,
            length=length,
            learning_rate=learning_rate,
            warmup=min(50, steps),
            seed=seed,
            checkpoint_every=checkpoint_every,
        )
        compute = ComputeSettings(
            device=device, precision=precision, gradient_checkpointing=gradient_checkpointing, compile=compile
        )
        check_directory(out, "config.json")
        corpus, judge = TextCorpus.read(text).split(held_out) if held_out else (TextCorpus.read(text), None)
        model_config = _config(config)
        _claim(work, corpus)
        model = pretrain(model_config, corpus, settings, work, processes, compute=compute)
        if is_first():
            model.save_pretrained(out)
            told = f"{out}: {steps} steps on {corpus.size} bytes"
            if judge is not None:
                told += f", held-out loss {loss_per_byte(model, judge, length):.4f} nats per byte"
            typer.echo(told)
    except (BayesDispatchError, OSError) as error:
        typer.echo(f"{PROGRAM}: error: {error}", err=True)
        raise typer.Exit(2) from None


@torch.no_grad()
def loss_per_byte(model: MambaFormerForCausalLM, corpus: TextCorpus, length: int) -> float:
    """Mean −log p, in nats, of the bytes of up to 256 pieces of ``length`` bytes."""
    total, count = 0.0, 0.0
    for piece in corpus.windows(length, JUDGED_ROWS):
        ids, weights = pack_rows([(piece, [1.0] * len(piece))], ByteTokenizer())
        total += float(next_token_loss(model(ids).logits, ids, weights))
        count += float(weights.sum())
    return total / count


def _config(file: Path | None) -> LanguageModelConfig:
    needed = ByteTokenizer.vocab_size
    if file is None:
        return LanguageModelConfig(backbone=MambaFormerConfig(), vocab_size=needed)
    config = LanguageModelConfig.from_json(read_json(file))
    if config.vocab_size < needed:
        raise ConfigError(f"expected a vocab_size of at least {needed}, for bytes, in {file}, got {config.vocab_size}")
    return config


def _claim(work: Path, corpus: TextCorpus) -> None:
    """A checkpoint does not know its texts: without this, a run would go on with others and nobody would see it."""
    file, mine = work / "corpus.json", {"blake2b": corpus.digest()}
    if not file.exists():
        if is_first():
            write_json(file, mine)
    elif read_json(file) != mine:
        raise ConfigError(f"expected the text that training in {work} began with, got another: use a new directory")


if __name__ == "__main__":
    main()
