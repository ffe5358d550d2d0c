"""Who is compared with whom, and at which sizes.

Everywhere the same width (256), vocabulary (258 bytes, embeddings tied), convolution (4 taps), expansion (2) and state:
16 per channel for Mamba, 64 for Mamba-2 with heads of width 64, as published with these mixers; random weights, as no
speed here depends on them.

The pure models have the same blocks as their peers, ten, and so the same number of parameters. Hybrids do not: our
MambaFormer has mixers only, Bamba and Jamba also a feed-forward network in every layer. Two rows of ours answer that:

- the MambaFormer (7 state-space and 6 attention blocks) with as many parameters as the peers, whose 8 layers (4 and 4,
  with feed-forward networks of width 288) are 16 residual blocks. So ours has fewer blocks, theirs fewer mixers; and
- "same blocks": our blocks in the peer's own order and sizes, so that nothing but the implementation differs.

Where a peer has settings that change its speed and not its result, there is an entry for each: the chunk of Bamba's and
Mamba-2's scan (256 by default, which is slow here), and mamba.py's parallel scan in place of a loop over tokens. "Best
peer" is the fastest of all entries, for each measure anew.
"""

from importlib import import_module
from typing import cast

from bayes_dispatch.model.mambaformer.config import BlockKind, MambaFormerConfig
from peers.contestant import Contestant, Entry, Group
from peers.ours import language_model

__all__ = ["GROUPS", "mambaformer", "pure"]

D_MODEL, N_HEADS, HEAD_DIM, VOCAB = 256, 4, 64, 258
D_STATE: dict[BlockKind, int] = {"mamba1": 16, "mamba2": 64}
N_PAIRS, N_LAYERS, D_FF, N_PURE = 6, 8, 288, 10
SCAN_CHUNKS = (256, 64)  # of peers


def config(kind: BlockKind, blocks: tuple[BlockKind, ...] | None = None, **more: object) -> MambaFormerConfig:
    """Our backbone with state-space blocks of this kind, at the sizes above."""
    sizes = {"d_model": D_MODEL, "n_heads": N_HEADS, "head_dim": HEAD_DIM, "d_state": D_STATE[kind], "d_ff": D_FF}
    return MambaFormerConfig(**sizes | {"mixer": kind, "blocks": blocks} | more)  # type: ignore[arg-type]


def mambaformer(kind: BlockKind, n_pairs: int = N_PAIRS, attention_window: int | None = None) -> Contestant:
    """Our MambaFormer."""
    return language_model(config(kind, n_pairs=n_pairs, attention_window=attention_window), VOCAB)


def pure(kind: BlockKind, n_blocks: int = N_PURE) -> Contestant:
    """Our blocks of one kind."""
    return language_model(config(kind, (kind,) * n_blocks), VOCAB)


def same_blocks(kind: BlockKind, positions: str) -> Contestant:
    """Our blocks in Bamba's and Jamba's order."""
    layers: tuple[BlockKind, ...] = (kind, "feed_forward", "attention", "feed_forward")
    return language_model(config(kind, layers * (N_LAYERS // 2), positions=positions), VOCAB)


def peer(module: str, builder: str, **sizes: object) -> Contestant:
    """Import a peer and build it."""
    built = getattr(import_module(f"peers.{module}"), builder)(d_model=D_MODEL, vocab_size=VOCAB, **sizes)
    return cast(Contestant, built)


def _hybrids(kind: BlockKind, positions: str, others: tuple[Entry, ...], title: str) -> Group:
    blocks = f"{N_PAIRS + 1} {kind}, {N_PAIRS} attention"
    like = f"{N_LAYERS // 2} × ({kind}, feed-forward, attention, feed-forward)"
    ours = (
        Entry("MambaFormer", blocks, lambda: mambaformer(kind), ours=True),
        Entry("ours, same blocks", like, lambda: same_blocks(kind, positions), ours=True),
    )
    return Group(f"mambaformer-{kind}", title, ours + others)


def _bamba(chunk: int) -> Entry:
    sizes = {"n_layers": N_LAYERS, "d_ff": D_FF, "n_heads": N_HEADS, "d_state": D_STATE["mamba2"]}
    return Entry(
        f"Bamba, chunk {chunk}",
        f"{N_LAYERS // 2} × (mamba2, feed-forward, attention, feed-forward)",
        lambda: peer("huggingface", "bamba", **sizes, head_dim=HEAD_DIM, chunk=chunk),
    )


def _jamba(name: str, module: str, **more: object) -> Entry:
    sizes = {"n_layers": N_LAYERS, "d_ff": D_FF, "n_heads": N_HEADS, "d_state": D_STATE["mamba1"]}
    blocks = f"{N_LAYERS // 2} × (mamba1, feed-forward, attention, feed-forward)"
    return Entry(name, blocks, lambda: peer(module, "jamba", **sizes, **more))


def _mamba(name: str, module: str, **more: object) -> Entry:
    sizes = {"n_layers": N_PURE, "d_state": D_STATE["mamba1"]}
    return Entry(name, f"{N_PURE} mamba1", lambda: peer(module, "mamba", **sizes, **more))


def _mamba2(chunk: int) -> Entry:
    sizes = {"n_layers": N_PURE, "d_state": D_STATE["mamba2"], "head_dim": HEAD_DIM}
    name = f"transformers Mamba2, chunk {chunk}"
    return Entry(name, f"{N_PURE} mamba2", lambda: peer("huggingface", "mamba2", **sizes, chunk=chunk))


BAMBAS = tuple(_bamba(chunk) for chunk in SCAN_CHUNKS)
JAMBAS = (
    _jamba("Jamba", "huggingface", mambapy=False),
    _jamba("Jamba, mamba.py's scan", "huggingface", mambapy=True),
    _jamba("mamba.py Jamba", "mamba_py"),
)
MAMBAS = (
    Entry("ours", f"{N_PURE} mamba1", lambda: pure("mamba1"), ours=True),
    _mamba("transformers Mamba", "huggingface", mambapy=False),
    _mamba("transformers Mamba, mamba.py's scan", "huggingface", mambapy=True),
    _mamba("mamba.py", "mamba_py"),
    _mamba("MiniMamba", "mini_mamba"),
)
MAMBA2S = (
    Entry("ours", f"{N_PURE} mamba2", lambda: pure("mamba2"), ours=True),
    *(_mamba2(chunk) for chunk in SCAN_CHUNKS),
)

GROUPS = (
    _hybrids("mamba2", "rotary", BAMBAS, "Mamba-2 and attention: MambaFormer against Bamba"),
    _hybrids("mamba1", "none", JAMBAS, "Mamba and attention: MambaFormer against Jamba"),
    Group("mamba1", "Mamba alone", MAMBAS),
    Group("mamba2", "Mamba-2 alone", MAMBA2S),
)
