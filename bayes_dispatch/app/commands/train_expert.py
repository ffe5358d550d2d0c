"""``bayes-dispatch train-expert``: an expert on a user's own file, and a bundle that has it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bayes_dispatch.app.commands.experts import is_of_a_bundle
from bayes_dispatch.app.commands.terminal import (
    BundleOption,
    JsonOption,
    SeedOption,
    check_new_output,
    print_json,
    use_one_thread,
)
from bayes_dispatch.errors import ConfigError

__all__ = ["train_expert"]


def train_expert(
    name: Annotated[str, typer.Option(help="Of the expert: letters, digits, _ and -.")],
    out: Annotated[Path, typer.Option(help="Directory of the new bundle.")],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text; with --reward a prompt on each line.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help='Lines of {"prompt": …, "answer": …}; with --reward answers may be left out.')
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="package:function of (prompt, answer) to a number. It is imported, which runs it; data never run."
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="likelihood or reinforce; default: reinforce with --reward, else likelihood.")
    ] = None,
    kl: Annotated[float, typer.Option(help="Penalty on leaving the base model, of reinforce.")] = 0.2,
    answer_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a sampled answer, of reinforce.")] = 16,
    steps: Annotated[int | None, typer.Option(min=1, help="At most; default: 160.")] = None,
    refit: Annotated[
        bool, typer.Option(help="Fit the dispatcher again and write a bundle; else write the experts alone.")
    ] = True,
    bundle: BundleOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train an expert on a file of yours, and write a bundle that has it, its dispatcher fitted again."""
    check_new_output(out, "bundle.json" if refit else "bank.json")
    if not refit and is_of_a_bundle(out):
        raise ConfigError(f"expected a directory for experts alone, got that of a bundle's: {out}")
    from bayes_dispatch.app.own_expert import import_reward, objective_by_name, own_settings, read_domain

    function = None if reward is None else import_reward(reward)
    named = objective or ("likelihood" if reward is None else "reinforce")
    settings = own_settings(objective_by_name(named, kl=kl, answer_bytes=answer_bytes), steps, seed)
    domain = read_domain(name, text, jsonl, function, settings.length - 1)
    from bayes_dispatch.app.bundle import load_bundle
    from bayes_dispatch.app.own_expert import RefitSettings, add_expert, train_own_expert

    def announce(line: str) -> None:
        print(line, file=sys.stderr)

    use_one_thread()
    old, progress = load_bundle(bundle), sys.stderr.isatty()
    expert = train_own_expert(old, domain, settings, progress)
    if refit:
        new = add_expert(old, expert, domain, RefitSettings(seed=seed), progress, announce)
        new.save(out)
        experts = new.experts
    else:
        experts = old.experts.with_expert(expert)
        experts.save(out)
    if as_json:
        return print_json({"out": str(out), "name": name, "experts": list(experts.names), **expert.metadata})
    told = expert.metadata
    scores = f"score {told['validation']} at step {told['best_step']}, of base {told['base_validation']}"
    print(f"{out}: experts {', '.join(experts.names)}; {name} by {named}: {scores}")
