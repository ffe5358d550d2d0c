"""Checkpoints of hybrid models, with the sizes of real ones and random weights: our core beside transformers.

    python benchmarks/checkpoints.py                                      # Granite-4.0-H-350M
    python benchmarks/checkpoints.py --shape bamba --threads 2
    python benchmarks/checkpoints.py --dtype bfloat16 --prefill 512 --prefill 4096
    python benchmarks/checkpoints.py --dtype bfloat16 --precision medium  # many rows are rounded to it, as theirs are
    python benchmarks/checkpoints.py --dtype bfloat16 --long 65536        # a long prompt, read by ours alone

A checkpoint is written to a temporary directory, and read by both, each in a process of its own ("load"). Then both
take turns in one process, and ratios are taken round by round, as in ``model.py``. "Products" is the share of our time
that the matrix products of our model alone take, which no implementation of it can be faster than.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor

import bayes_dispatch as bd
from peers.memory import grown
from peers.ours import Ours
from peers.tasks import products, prompt
from peers.timing import Rounds, Work, interleaved

BEFORE = 32  # tokens of the prompts that are decoded after
OURS, THEIRS = "bayes_dispatch", "transformers"


def granite() -> transformers.PreTrainedConfig:
    """Granite-4.0-H-350M, as published."""
    attention = (10, 13, 17, 27)
    return transformers.GraniteMoeHybridConfig(
        vocab_size=100_352,
        hidden_size=768,
        num_hidden_layers=32,
        layer_types=["attention" if layer in attention else "mamba" for layer in range(32)],
        shared_intermediate_size=2048,
        num_local_experts=0,
        num_attention_heads=12,
        num_key_value_heads=4,
        mamba_n_heads=48,
        mamba_d_head=32,
        mamba_d_state=128,
        embedding_multiplier=12.0,
        residual_multiplier=0.246,
        attention_multiplier=0.015625,
        logits_scaling=3.0,
        tie_word_embeddings=True,
        position_embedding_type="nope",
    )


def bamba() -> transformers.PreTrainedConfig:
    """Bamba-9B at a quarter of its width and half of its depth."""
    return transformers.BambaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=16,
        attn_layer_indices=[4, 13],
        num_attention_heads=8,
        num_key_value_heads=2,
        mamba_n_heads=32,
        mamba_d_head=64,
        mamba_d_state=256,
    )


class Shape(StrEnum):
    """Whose sizes."""

    granite = "granite"
    bamba = "bamba"


SHAPES: dict[Shape, Callable[[], transformers.PreTrainedConfig]] = {Shape.granite: granite, Shape.bamba: bamba}


def read(library: str, directory: Path, dtype: torch.dtype) -> Any:
    """The checkpoint's model."""
    if library == THEIRS:
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return bd.MambaFormerForCausalLM.from_transformers(directory, dtype=dtype, tokenizer=bd.ByteTokenizer())


def loading(library: str, directory: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds until each weight has been looked at, and MiB by which the process is larger at its peak."""
    begun = time.perf_counter()
    peak = grown(lambda: [weight.sum() for weight in read(library, directory, dtype).parameters()])
    return time.perf_counter() - begun, peak / 2**20


def prefilling(model: Any, tokens: int) -> Work:
    """Read a prompt, with a cache, for the logits after it."""
    ids = prompt(tokens)
    if isinstance(model, bd.MambaFormerForCausalLM):
        return Work(lambda _: model.open(1, tokens).read(ids))
    return Work(lambda _: model(ids, use_cache=True, logits_to_keep=1))


def decoding(model: Any, rows: int, tokens: int) -> Work:
    """Read tokens one by one after a prompt, which is not timed."""
    steps, before = prompt(tokens, rows).split(1, dim=1), prompt(BEFORE, rows)
    filled: list[Any] = []  # transformers pads a prompt to a chunk of its scan: 16 rows take it minutes

    def prepare() -> Callable[[Tensor], object]:
        if isinstance(model, bd.MambaFormerForCausalLM):
            session = model.open(rows, BEFORE + tokens)
            session.read(before)
            return session.read
        if not filled:
            filled.append(model(before, use_cache=True, logits_to_keep=1).past_key_values)
        cache = deepcopy(filled[0])
        places = iter(range(BEFORE, BEFORE + tokens))

        def read_on(ids: Tensor) -> object:
            at = torch.full((rows, 1), next(places))
            return model(ids, past_key_values=cache, position_ids=at, use_cache=True)

        return read_on

    def run(read_on: Callable[[Tensor], object]) -> None:
        for step in steps:
            read_on(step)

    return Work(run, prepare)


def long(model: bd.MambaFormerForCausalLM, tokens: int) -> None:
    """Print what reading a long prompt takes, and what a token after it does."""
    session, begun = model.open(1, tokens + 16), time.perf_counter()
    peak = grown(lambda: session.read(prompt(tokens)))
    seconds, states = time.perf_counter() - begun, session.nbytes
    begun = time.perf_counter()
    for step in prompt(16).split(1, dim=1):
        session.read(step)
    after = 16 / (time.perf_counter() - begun)
    print(
        f"\n{tokens} tokens: {tokens / seconds:.0f} tokens/s, {peak / 2**20:.0f} MiB more at the peak, of which "
        f"{states / 2**20:.0f} are the cache; then {after:.1f} tokens/s, one by one"
    )


def main(
    shape: Annotated[Shape, typer.Option(help="Whose sizes.")] = Shape.granite,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    threads: Annotated[int, typer.Option(help="Of torch, and of compiled loops.")] = 1,
    prefill: Annotated[list[int], typer.Option(help="Tokens of a prompt; repeat it.")] = [512],  # noqa: B006  # typer's way
    rows: Annotated[list[int], typer.Option(help="Rows to decode; repeat it.")] = [1, 4, 16],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="To decode.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 5,
    precision: Annotated[str, typer.Option(help="Of float32's products: torch's word, such as medium.")] = "highest",
    length: Annotated[int, typer.Option("--long", help="Read that many tokens, with ours alone.")] = 0,
) -> None:
    """Print how long loading, prefill and decoding take."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(precision)
    wanted = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        transformers.logging.set_verbosity_error()  # it warns of every kernel that is not installed
        transformers.AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=wanted).save_pretrained(directory)
        size = (directory / "model.safetensors").stat().st_size / 2**20
        context = multiprocessing.get_context("spawn")
        for library in (OURS, THEIRS):
            with context.Pool(1) as pool:
                seconds, peak = pool.apply(loading, (library, directory, wanted))
            print(f"load, {library}: {seconds:.1f} s, {peak:.0f} MiB at the peak; the file has {size:.0f}", flush=True)
        if length:
            with torch.inference_mode():
                return long(read(OURS, directory, wanted), length)
        models = {library: read(library, directory, wanted) for library in (OURS, THEIRS)}
    weights = Ours(models[OURS]).matrices()
    works: dict[str, tuple[int, Callable[[Any], Work], Work]] = {}
    for count in prefill:
        works[f"prefill of {count}"] = count, partial(prefilling, tokens=count), products(weights[:-1], count, 1)
    for count in rows:
        step = partial(decoding, rows=count, tokens=tokens)
        works[f"decode, rows: {count}"] = count * tokens, step, products(weights, count, tokens)
    print(f"\n| {shape}, {dtype}, {threads} threads | ours, tokens/s | transformers | ratio | products |")
    print("| --- | --- | --- | --- | --- |")
    for title, (number, work, alone) in works.items():
        own: dict[str, Work] = {library: work(model) for library, model in models.items()} | {"products": alone}
        with torch.inference_mode():
            times = interleaved(own, title, Rounds(rounds, 200.0))
        rates = " | ".join(f"{number / times.median(library):.1f}" for library in (OURS, THEIRS))
        ratio, spread = times.ratio(THEIRS, OURS)
        share = times.ratio("products", OURS)[0]
        print(f"| {title} | {rates} | {ratio:.2f} ± {spread * ratio:.2f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
