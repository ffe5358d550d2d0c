"""SVF beside LoRA (peft): gain on the own domain, harm on others, size on disk, cost to switch and to mix in a batch.

    pip install peft
    python benchmarks/adapters.py            # one seed, half an hour on one core
    python benchmarks/adapters.py --quick    # a smoke test; the numbers mean nothing

All adapt the shipped base model with the same documents in the same order, batch, number of steps and schedule; the
learning rate is SVF's recipe for SVF, and for LoRA the best of a few on the first domain's validation documents. LoRA
at "matched parameters" has rank 1 on as many matrices as make about the 1,280 numbers that SVF has.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Cell, Table
from bayes_dispatch.checks.paired import paired_comparison
from bayes_dispatch.experts.domains import CONVENTIONS, EXPERT_TEXTS, Domain
from bayes_dispatch.experts.training import ExpertSettings, train_expert
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear
from bayes_dispatch.model.pretraining.run import next_token_loss, pack_rows, schedule
from bayes_dispatch.model.tokenizer import ByteTokenizer
from peers.timing import Rounds, Work, interleaved

__all__ = ["main"]

QUESTION_WEIGHT = 0.5
RATES = (3e-3, 1e-2, 3e-2)  # of LoRA, to choose from
PROMPT_BYTES, TOTAL_BYTES = 128, 256


@dataclass(frozen=True)
class LoRA:
    """A configuration of peft.

    Attributes:
        name: in tables. rank: of the update. matrices: that have one; all by default.
    """

    name: str
    rank: int
    matrices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    settings: ExpertSettings
    domains: tuple[Domain, ...]
    documents: int = 48
    rounds: int = 9


FULL = Plan(ExpertSettings(), (*CONVENTIONS, *EXPERT_TEXTS))
QUICK = Plan(ExpertSettings(steps=2, batch_size=2, length=64), tuple(CONVENTIONS[:2]), documents=2, rounds=2)


class PlainLinear(nn.Linear):
    """What peft can adapt, called as the model calls its matrices."""

    def forward(self, x: Tensor, scales: None = None) -> Tensor:
        return super().forward(x)


def plain(model: bd.MambaFormerForCausalLM) -> bd.MambaFormerForCausalLM:
    """A copy whose matrices are plain ones."""
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, SVDLinear):
            linear = PlainLinear(module.weight.shape[1], module.weight.shape[0], bias=False)
            linear.weight.data.copy_(module.weight.data)
            parent, _, own = name.rpartition(".")
            setattr(made.get_submodule(parent), own, linear)
    return made


def with_lora(model: bd.MambaFormerForCausalLM, kind: LoRA, names: Sequence[str] = ("default",)) -> Any:
    """The peft model, with an adapter for each name."""
    from peft import LoraConfig, inject_adapter_in_model

    matrices = list(kind.matrices or model.adaptable())
    made = plain(model)
    for name in names:
        config = LoraConfig(r=kind.rank, lora_alpha=2 * kind.rank, lora_dropout=0.0, target_modules=matrices)
        made = inject_adapter_in_model(config, made, adapter_name=name)
    return made


def documents_of(domain: Domain, settings: ExpertSettings, step: int) -> tuple[Tensor, Tensor]:
    """The batch that ``train_expert`` trains on at this step."""
    rows = []
    for row in range(settings.batch_size):
        rng = np.random.default_rng([settings.seed, step, row])
        document = domain.document(rng, 0, settings.length, "train").cut(settings.length)
        rows.append((document.data, document.byte_weights(QUESTION_WEIGHT)))
    return pack_rows(rows, ByteTokenizer())


def train_lora(
    model: bd.MambaFormerForCausalLM, domain: Domain, kind: LoRA, settings: ExpertSettings, rate: float
) -> tuple[Any, float]:
    """The trained peft model, and its loss on validation documents."""
    torch.manual_seed(settings.seed)
    made = with_lora(model, kind)
    parameters = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for step in tqdm(range(settings.steps), f"{kind.name}, {domain.name}", disable=None, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, settings.steps, warmup=10, flat=0.1)
        ids, weights = documents_of(domain, settings, step)
        loss = next_token_loss(made(ids).logits, ids, weights) / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        ids, weights = documents_of(domain, settings, 10**6)
        return made.eval(), float(next_token_loss(made(ids).logits, ids, weights) / weights.sum())


@torch.no_grad()
def judge(run: Callable[[Tensor], Tensor], domain: Domain, count: int, seed: int) -> tuple[float, float]:
    """Mean NLL of the scored bytes, and share of scored ranges that are right, on held-out documents."""
    rng = np.random.default_rng([seed, 3])
    documents = [domain.document(rng, PROMPT_BYTES, TOTAL_BYTES, "held_out") for _ in range(count)]
    nlls, exact = [], []
    for start in range(0, count, 16):
        part = documents[start : start + 16]
        ids, weights = pack_rows([(d.data, d.byte_weights(0.0)) for d in part], ByteTokenizer())
        logs = run(ids)[:, :-1].log_softmax(-1)
        losses = -logs.gather(2, ids[:, 1:, None])[..., 0]
        right = logs.argmax(-1) == ids[:, 1:]
        nlls += ((losses * weights).sum(1) / weights.sum(1)).tolist()
        exact += [
            float(np.mean([right[row, a:b].all().item() for a, b in document.ranges if b > a]))
            for row, document in enumerate(part)
        ]
    return float(np.mean(nlls)), float(np.mean(exact))


def bytes_on_disk(tensors: Mapping[str, Tensor]) -> int:
    """Of these tensors in a safetensors file."""
    from safetensors.torch import save

    return len(save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}))


def adapters(model: bd.MambaFormerForCausalLM, plan: Plan) -> tuple[list[Table], LoRA, dict[str, bd.ExpertVector]]:
    """Gain and harm of every kind in every domain."""
    matched = LoRA("LoRA, matched parameters", 1, _matched(model))
    kinds = [matched, LoRA("LoRA, rank 1", 1), LoRA("LoRA, rank 4", 4)]
    rates = {}
    for kind in kinds:
        losses = {rate: train_lora(model, plan.domains[0], kind, plan.settings, rate)[1] for rate in RATES}
        rates[kind.name] = min(losses, key=losses.__getitem__)
    base = {domain.name: judge(lambda ids: model(ids).logits, domain, plan.documents, 0) for domain in plan.domains}
    own: dict[str, list[list[float]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    vectors = {}
    rows = []
    for domain in plan.domains:
        vector = vectors[domain.name] = train_expert(model, domain, plan.settings, progress=False)
        adaptation = vector.adaptation()
        runs: dict[str, Callable[[Tensor], Tensor]] = {
            "SVF": lambda ids, adaptation=adaptation: model(ids, adaptation=adaptation).logits
        }
        sizes["SVF"] = (sum(len(z) for z in vector.scales.values()), bytes_on_disk(vector.scales))
        for kind in kinds:
            made, _ = train_lora(model, domain, kind, plan.settings, rates[kind.name])
            trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
            sizes[kind.name] = (sum(p.numel() for p in trained.values()), bytes_on_disk(trained))
            runs[kind.name] = lambda ids, made=made: made(ids).logits
        cells = [domain.name, f"{base[domain.name][0]:.3f}, {base[domain.name][1]:.2f}"]
        for name, run in runs.items():
            found = {other.name: judge(run, other, plan.documents, 0) for other in plan.domains}
            nll, exact = found[domain.name]
            harm = float(np.mean([found[o.name][0] - base[o.name][0] for o in plan.domains if o is not domain]))
            own.setdefault(name, []).append([base[domain.name][0] - nll, exact - base[domain.name][1], harm])
            cells.append(f"{nll:.3f}, {exact:.2f}")
        rows.append(cells)
    heads = ["domain", "base", *own]
    note = f"{plan.documents} documents each; {plan.settings.steps} steps. LoRA's learning rates: {rates}."
    first = Table("Own domain: held-out NLL (nats a byte), exact match", heads, rows, note)
    summary = []
    for name, values in own.items():
        spread = np.std(values, axis=0, ddof=1) / len(values) ** 0.5
        cells = [f"{m:+.3f} ± {s:.3f}" for m, s in zip(np.mean(values, axis=0), spread, strict=True)]
        summary.append([name, f"{sizes[name][0]:,}", f"{sizes[name][1]:,}", *cells])
    measures = ["gain, nats", "gain, exact match", "harm to others, nats"]
    columns = ["adapter", "parameters", "bytes on disk", *measures]
    means = Table("Means over domains ± standard error", columns, summary)
    return [first, means, versus_svf(own, measures)], kinds[2], vectors


def versus_svf(own: Mapping[str, Sequence[Sequence[float]]], measures: Sequence[str]) -> Table:
    """What each kind has more than SVF; ``own`` is by kind, domain and measure."""
    rows: list[list[Cell | str]] = []
    for name, values in own.items():
        if name != "SVF":
            pairs = [
                paired_comparison(*both) for both in zip(np.transpose(values), np.transpose(own["SVF"]), strict=True)
            ]
            rows.append([name, *(f"{pair.difference:+.3f} ± {pair.standard_error:.3f}" for pair in pairs)])
    return Table("Minus SVF, paired by domain", ["adapter", *measures], rows)


def _matched(model: bd.MambaFormerForCausalLM) -> tuple[str, ...]:
    """Matrices whose rank-1 updates have together about as many numbers as SVF has scales."""
    target = sum(model.adaptable().values())
    chosen: list[str] = []
    total = 0
    for name in reversed(list(model.adaptable())):
        size = sum(model.get_submodule(name).weight.shape)
        if total + size <= 1.1 * target:
            chosen.append(name)
            total += size
    return tuple(chosen)


def serving(model: bd.MambaFormerForCausalLM, vectors: Mapping[str, bd.ExpertVector], kind: LoRA, plan: Plan) -> Table:
    """Milliseconds to switch to another adapter, and to run a batch whose rows have different ones."""
    names = list(vectors)[:4]
    tuned = with_lora(model, kind, names)
    bank = bd.ExpertBank([vectors[name] for name in names])
    ids = torch.randint(256, (8, 128), generator=torch.Generator().manual_seed(0))
    one_hot = torch.eye(len(names) + 1)[torch.arange(8) % len(names)]
    turn = iter(range(10**9))

    def switch_ours(_: None) -> object:
        weights = torch.eye(len(names) + 1)[next(turn) % len(names)]
        return model(ids[:1, :1], adaptation=bank.blend(weights)).logits

    def switch_peft(_: None) -> object:
        from peft.tuners.tuners_utils import BaseTunerLayer

        chosen = names[next(turn) % len(names)]
        for module in tuned.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(chosen)
        return tuned(ids[:1, :1]).logits

    def mixed_peft(_: None) -> object:
        from peft.tuners.lora import LoraLayer

        hooks = []
        wanted = [names[row % len(names)] for row in range(8)]
        for module in tuned.modules():
            if isinstance(module, LoraLayer):
                hooks.append(module.register_forward_pre_hook(_with_names(wanted), with_kwargs=True))
        out = tuned(ids).logits
        for hook in hooks:
            hook.remove()
        return out

    works = {
        "SVF: switch, then one token": Work(switch_ours),
        "LoRA rank 4: switch, then one token": Work(switch_peft),
        "SVF: batch of 8, four experts": Work(lambda _: model(ids, adaptation=bank.blend(one_hot)).logits),
        "LoRA rank 4: batch of 8, four adapters": Work(mixed_peft),
        "base: batch of 8": Work(lambda _: model(ids).logits),
    }
    with torch.no_grad():
        times = interleaved(works, "serving", Rounds(plan.rounds, clock=time.process_time))
    rows = [
        [name, f"{1e3 * times.median(name):.2f}", f"{times.ratio(name, 'base: batch of 8')[0]:.2f}"] for name in works
    ]
    return Table("Serving", ["", "ms on the CPU", "times the base batch"], rows, "Medians; 128 tokens a row.")


def _with_names(names: list[str]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    return hook


def main(quick: Annotated[bool, typer.Option(help="a smoke test")] = False) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    plan, model = QUICK if quick else FULL, bd.load_bundle().model
    tables, kind, vectors = adapters(model, plan)
    for table in [*tables, serving(model, vectors, kind, plan)]:
        print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
