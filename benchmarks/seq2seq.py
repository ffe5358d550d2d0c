"""Sequence-to-sequence generation with the cache against without it: ``python benchmarks/seq2seq.py``.

Ragged batches of inputs, greedy and with four beams. Both ways read the input once; without the cache, each new token
runs the decoder over the whole output so far, and its cross-attention computes the input's keys and values again.
"encoder" is the share of the input in the cached time, which no cache saves. The tokens are compared, too.

The two take turns, and ratios are taken round by round. Times vary from machine to machine; ± is half the distance
between the quartiles.
"""

import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bayes_dispatch as bd
from peers.timing import Rounds, Work, interleaved

MODELS = {
    "Mamba-2 + attention": bd.MambaFormerConfig(d_model=256, n_pairs=2, d_state=32),
    "Mamba-1 + attention": bd.MambaFormerConfig(d_model=256, n_pairs=2, d_state=16, mixer="mamba1"),
}
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "4 beams": {"num_beams": 4}}


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows of ``length`` down to half of it, padded on the left and on the right in turn, and their mask."""
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(batch):
        padding = row * length // (2 * batch)
        mask[row, slice(0, padding) if row % 2 else slice(length - padding, length)] = 0
    return ids, mask


def main(
    threads: Annotated[int, typer.Option()] = 1,
    batch: Annotated[int, typer.Option(help="Rows.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of the longest input.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 7,
    cpu: Annotated[bool, typer.Option(help="Time of this process on the CPU, not wall time.")] = False,
) -> None:
    """Print a table for each model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rounds = Rounds(repeats, clock=time.process_time if cpu else time.perf_counter)
    ids, mask = inputs(batch, length)
    for name, backbone in MODELS.items():
        config = bd.Seq2SeqConfig.symmetric(backbone, vocab_size=258, start_token_id=256)
        model = bd.MambaFormerForSeq2Seq(config).eval()
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        title = f"{name}, {size:.1f}M parameters, {batch} inputs of up to {length} tokens, threads: {threads}"
        table = Table("way", "new tokens", "tokens/s cached", "× uncached", "encoder", "tokens", title=title)
        for way, arguments in WAYS.items():
            for new in (10, 20, 50):
                outputs: dict[str, Tensor] = {}

                def generate(key: str, new: int = new, arguments: Any = arguments, outputs: Any = outputs) -> None:
                    outputs[key] = model.generate(  # noqa: B023 (called before the next model is made)
                        ids, attention_mask=mask, max_new_tokens=new, use_cache=key == "cached", **arguments
                    )

                works = {key: Work(lambda _, key=key: generate(key)) for key in ("cached", "uncached")}
                with torch.inference_mode():
                    works["encoder"] = Work(lambda _: model.encode(ids, mask))  # noqa: B023
                    times = interleaved(works, f"{name}, {way}, {new} tokens", rounds)
                ratio, spread = times.ratio("uncached", "cached")
                share, _ = times.ratio("encoder", "cached")
                speed = batch * new / times.median("cached")
                same = "the same" if torch.equal(outputs["cached"], outputs["uncached"]) else "[red]others[/]"
                table.add_row(way, str(new), f"{speed:,.0f}", f"{ratio:.1f} ±{spread:.0%}", f"{share:.0%}", same)
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
