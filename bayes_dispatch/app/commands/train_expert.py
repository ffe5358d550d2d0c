"""``bayes-dispatch train-expert`` and ``train-experts``: experts on a user's own files, and a bundle that has them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_dispatch.app.commands.experts import is_of_a_bundle
from bayes_dispatch.app.commands.terminal import (
    UNCALIBRATED,
    BundleOption,
    JsonOption,
    SeedOption,
    announce,
    check_new_output,
    named_paths,
    open_bundle,
    print_json,
    refuse_unused,
    say_aside,
)
from bayes_dispatch.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.experts.domains import Domain
    from bayes_dispatch.experts.lora import LoraExpert
    from bayes_dispatch.experts.training import ExpertSettings
    from bayes_dispatch.experts.vectors import ExpertVector

__all__ = ["train_expert", "train_experts"]

StepsOption = Annotated[
    int | None, typer.Option(min=1, help="Most training steps; default: 160, fewer where nothing more is learnt.")
]


def train_expert(
    name: Annotated[str, typer.Option(help="What to call the expert: letters, digits, _ and -.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of the new bundle, which may be that of the old one; with --model of a PEFT adapter, or of "
            "a bank of scales."
        ),
    ],
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to learn from; with --reward a prompt on each line.")
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help='Lines of {"prompt": …, "answer": …}; with --reward answers may be left out.')
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Your own judge of answers, package:function of (prompt, answer) to a number. It is imported, so it "
            "runs your code."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="likelihood (learn the text) or reinforce (try answers, learn from those that are right); default: "
            "reinforce with --reward, else likelihood."
        ),
    ] = None,
    kl: Annotated[
        float | None, typer.Option(help="With reinforce: how much it costs to leave the base model; default: .2.")
    ] = None,
    answer_bytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="With reinforce: most tokens, bytes with our own model, of an answer it tries; default: 16."
        ),
    ] = None,
    steps: StepsOption = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            help="Fit the dispatcher again and write a bundle, the default; with --no-refit write the experts alone.",
        ),
    ] = None,
    bundle: BundleOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory of a causal language model of transformers, or a hub name; no bundle is needed."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="With --model: lora (low-rank updates, the default) or svf (scales).")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With --model: of each update, 8 by default; or most scales of a matrix.")
    ] = None,
    adapt_from: Annotated[
        int | None, typer.Option(min=0, help="With --model: the first block that is adapted; default: 0.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="With --model: take less memory and more time.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="With --model: where it runs: cpu, cuda, cuda:1; default: cpu.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --model: float32, bfloat16, or auto, as it is stored, the default.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train an expert on a file of yours, and write a bundle that has it beside the others.

    The dispatcher of the bundle is fitted again, so that it knows the new text. With --model the expert is for a model
    of the transformers library and is written alone: `bayes-dispatch build` makes a bundle of several.
    """
    own: dict[str, Any] = {"kind": kind, "rank": rank, "adapt_from": adapt_from}
    own |= {"checkpointing": gradient_checkpointing or None}
    loading = {"device": device, "dtype": dtype}
    for option, value in (own | loading).items():
        option = "gradient-checkpointing" if option == "checkpointing" else option.replace("_", "-")
        refuse_unused(f"--{option}", value, model is not None, "with --model")
    refuse_unused("--bundle", bundle, model is None, "without --model", "both")
    refuse_unused("--refit", refit or None, model is None, "without --model", "both")
    refuse_unused("--no-refit", refit is False, model is None, "without --model, which has no dispatcher", "both")
    if kind not in (None, "lora", "svf"):
        raise UnknownNameError(f"expected a kind of lora or svf, got {kind!r}")
    refit = model is None and refit is not False
    adapter = model is not None and kind != "svf"
    if not refit and is_of_a_bundle(out):
        raise ConfigError(f"expected a directory for experts alone, got that of a bundle's: {out}")
    index = "bundle.json" if refit else "adapter_config.json" if adapter else "bank.json"
    check_new_output(out, index, bundle if refit else None)
    from bayes_dispatch.app.training.own_expert import (
        import_reward,
        objective_by_name,
        own_settings,
        read_domain,
        train_own_expert,
    )

    function = None if reward is None else import_reward(reward)
    named = objective or ("likelihood" if reward is None else "reinforce")
    for option, value in (("--kl", kl), ("--answer-bytes", answer_bytes)):
        refuse_unused(option, value, named == "reinforce", "with the objective reinforce")
    asked = objective_by_name(named, kl=0.2 if kl is None else kl, answer_bytes=answer_bytes or 16)
    settings = own_settings(asked, steps, seed)
    domain = read_domain(name, text, jsonl, function, settings.length - 1)
    if model is None:
        old = open_bundle(bundle)
        train = partial(train_own_expert, progress=True)
        return _tell(out, *_train(old, [domain], settings, old.experts.names, out, refit, train), True, as_json)
    given = {setting: value for setting, value in own.items() if value is not None}
    settings = replace(settings, **{"kind": "lora", **given})
    _train_alone(domain, settings, out, model, {name: value for name, value in loading.items() if value}, as_json)


def train_experts(
    out: Annotated[
        Path, typer.Option(help="Directory of the new bundle; with --keep-experts it may be that of the old one.")
    ],
    text: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: an expert's name and the UTF-8 text it learns. Repeatable.")
    ] = None,
    jsonl: Annotated[
        list[str] | None,
        typer.Option(help='NAME=FILE, likewise, of lines {"prompt": …, "answer": …}. Repeatable.'),
    ] = None,
    keep_experts: Annotated[
        bool,
        typer.Option("--keep-experts", help="Keep the experts of --bundle; without it yours are the only ones."),
    ] = False,
    steps: StepsOption = None,
    bundle: BundleOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train an expert on each of several files of yours, and write a bundle of them with one dispatcher for all.

    Each is kept in OUT.work, so that a run that was stopped goes on; delete it when all is done.
    """
    check_new_output(out, "bundle.json", bundle if keep_experts else None)
    from bayes_dispatch.app.held_out import read_own
    from bayes_dispatch.app.training.own_expert import kept_expert, own_settings
    from bayes_dispatch.experts.domains.own import OwnPrompts
    from bayes_dispatch.experts.objectives import Likelihood

    settings = own_settings(Likelihood(), steps, seed)
    domains = read_own(named_paths(text, "--text"), named_paths(jsonl, "--jsonl"), settings.length - 1)
    if not domains:
        raise ConfigError("expected at least one --text or --jsonl of NAME=FILE, got none")
    if mute := [name for name, domain in domains.items() if isinstance(domain, OwnPrompts)]:
        raise ConfigError(f'expected an "answer" in each line of the files, got none for {", ".join(mute)}')
    old = open_bundle(bundle)
    keep = old.experts.names if keep_experts else ()
    train = partial(kept_expert, out=out, progress=True)
    _tell(out, *_train(old, list(domains.values()), settings, keep, out, True, train), False, as_json)


def _train(
    old: "Bundle",
    domains: "Sequence[Domain]",
    settings: "ExpertSettings",
    keep: "Sequence[str]",
    out: Path,
    refit: bool,
    train: "Callable[[Bundle, Domain, ExpertSettings], ExpertVector | LoraExpert]",
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Train an expert for each domain, join them to those of the bundle that stay, and write what came out.

    Args:
        keep: experts of the bundle that stay, unless a domain has their name. train: makes one expert.

    Returns:
        All experts, and what is known of those that were trained.
    """
    from bayes_dispatch.app.training.own_expert import RefitSettings, add_experts, check_texts
    from bayes_dispatch.experts.vectors import check_expert_name

    names = [domain.name for domain in domains]
    for name in sorted({*keep} & {*names}):
        say_aside("warning", f"the expert {name} of the bundle is replaced by the one of your text")
    keep = [name for name in keep if name not in names]
    for name in names:  # all that would be refused later is refused before training, which takes minutes
        check_expert_name(name)
    if refit:
        check_texts(old, keep)
        if len({*keep, *names}) < 2:
            raise ConfigError(f"expected at least two experts, another file or --keep-experts, got {names[0]} alone")
    trained, several = {}, len(domains) > 1
    for place, domain in enumerate(domains, 1):
        if several:
            announce(f"expert {domain.name}, {place} of {len(domains)}")
        trained[domain.name] = train(old, domain, settings), domain
    if refit:
        if several:
            announce("dispatcher")
        new = add_experts(old, trained, keep, RefitSettings(seed=settings.seed), True, announce)
        new.save(out)
        experts = new.experts
    else:
        experts = old.experts
        for expert, _ in trained.values():
            experts = experts.with_expert(expert)
        experts.save(out)
    return list(experts.names), {name: dict(expert.metadata) for name, (expert, _) in trained.items()}


def _train_alone(
    domain: "Domain",
    settings: "ExpertSettings",
    out: Path,
    model: str,
    loading: dict[str, str],
    as_json: bool,
) -> None:
    """Train an expert of a transformers model, and write and tell it."""
    from bayes_dispatch.app.bundle import transformers_backbone
    from bayes_dispatch.app.training.own_expert import check_trainable
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.peft import check_export
    from bayes_dispatch.experts.training import train_expert as train

    check_trainable(domain, settings.objective)
    if settings.kind == "lora":
        check_export(out)  # before training, not after it
    backbone = transformers_backbone(model, **{"device": "cpu", "dtype": "auto", **loading})
    expert = train(backbone, domain, settings, progress=True)
    bank = ExpertBank([expert])
    if settings.kind == "lora":
        bank.export([1.0, 0.0], out, backbone)
    else:
        bank.save(out)
    _tell(out, [domain.name], {domain.name: dict(expert.metadata)}, True, as_json)


def _tell(out: Path, experts: list[str], told: dict[str, dict[str, str]], one: bool, as_json: bool) -> None:
    """Print all experts, and those that were trained; ``one``: as of a command that trains a single one."""
    if as_json:
        (name, *_) = told
        trained = {"name": name, **told[name]} if one else {"trained": told}
        return print_json({"out": str(out), "experts": experts, **trained})
    print(f"{out}: experts {', '.join(experts)}")
    for name, found in told.items():
        unit = "mean reward" if found["objective"] == "reinforce" else "log-likelihood of a token, in nats"
        score = f"score {found['validation']} at step {found['best_step']}, of base {found['base_validation']}"
        print(f"{name} by {found['objective']}: {score} (held out; {unit})")
    if (out / "bundle.json").exists():
        print(UNCALIBRATED)
