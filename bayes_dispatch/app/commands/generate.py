"""The command ``generate``: prompts continued under a blend, shown on the terminal or as JSON."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_dispatch.app.commands.terminal import (
    BlendOption,
    BundleOption,
    DeviceOption,
    DrawsOption,
    DtypeOption,
    JsonOption,
    SampleOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    components_of,
    open_bundle,
    open_console,
    print_json,
    refuse_unused,
    typed,
    with_options,
)
from bayes_dispatch.errors import PromptError

if TYPE_CHECKING:
    from bayes_dispatch.inference.two_pass.generation import Generation

__all__ = ["generate"]


def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="A text to continue; repeat the option for more.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="A file to continue, read whole; `-` is stdin.")
    ] = None,
    escapes: Annotated[bool, typer.Option("--escapes", help=r"Read \n in --prompt as a newline, and \\ as \.")] = False,
    blend: BlendOption = "posterior_predictive",
    top_k: TopKOption = None,
    draws: DrawsOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens to write after each prompt; of our own model they are bytes.")
    ] = 32,
    stop: Annotated[
        str | None, typer.Option(help="End a text once it has this in it; --escapes holds for it, too.")
    ] = None,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(
            help="Ask the gate, and use no expert for foreign prompts, which are unlike all that the experts know. "
            "At most this share of ordinary prompts is taken for foreign."
        ),
    ] = None,
    abstain: Annotated[
        bool, typer.Option("--abstain", help="With --false-alarm-rate: write nothing for such prompts.")
    ] = False,
    seed: SeedOption = 0,
    show_experts: Annotated[
        bool, typer.Option("--show-experts", help="Show each expert's weight below the text.")
    ] = False,
    as_json: JsonOption = False,
    bundle: BundleOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Continue prompts under Bayesian blends of the experts."""
    prompts = [*(typed(text, escapes) for text in prompt or ()), *(_read(path) for path in prompt_file or ())]
    if not prompts:
        raise PromptError("expected at least one --prompt or --prompt-file, got none")
    (named,) = with_options([blend], top_k, draws)
    refuse_unused("--temperature", temperature, sample, "with --sample")
    refuse_unused("--show-experts", show_experts, not as_json, "without --json, which always has them", "both")
    refuse_unused("--abstain", abstain, false_alarm_rate is not None, "with --false-alarm-rate")
    refuse_unused("--escapes", escapes, bool(prompt) or stop is not None, "with --prompt or --stop")
    temperature = 1.0 if temperature is None else temperature
    from bayes_dispatch.inference.two_pass.blends import as_blend
    from bayes_dispatch.inference.two_pass.prompts import check_prompts

    as_blend(named, components_of(bundle))  # a name that is none is told before the model is loaded
    checked = check_prompts(prompts)
    ending = None if stop is None else typed(stop, escapes)
    from bayes_dispatch.inference.generator import TwoPassGenerator

    opened = open_bundle(bundle, device, dtype)
    chosen = as_blend(named, opened.experts.components)
    generation = TwoPassGenerator(opened).generate(
        checked,
        blend=chosen,
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        temperature=temperature,
        seed=seed,
        stop=ending,
        false_alarm_rate=false_alarm_rate,
        abstain=abstain,
        progress=sys.stderr.isatty(),
    )
    if as_json:
        asked = {
            "blend_settings": vars(chosen),
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "stop": None if ending is None else ending.decode(errors="backslashreplace"),
            "sample": sample,
            "temperature": temperature,
            "false_alarm_rate": false_alarm_rate,
            "abstain": abstain,
        }
        return print_json(_as_json(generation) | asked)
    _print_generation(generation, show_experts, fitted=bool(opened.dispatcher.views))


def _read(path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
    except OSError as error:
        raise PromptError(f"expected a readable prompt file {path}, got: {error.strerror or error}") from None


def _as_json(generation: "Generation") -> dict[str, Any]:
    """The fields of a ``Generation`` under their names; lists have an entry for each prompt."""
    import numpy as np

    posterior, cost = generation.posterior, generation.cost

    def trimmed(values: Any) -> list[Any]:
        return [row[:length].tolist() for row, length in zip(values, generation.lengths, strict=True)]

    return {
        "prompts": [prompt.decode() for prompt in generation.prompts],
        "texts": list(generation.texts),
        "blend": generation.blend,
        "experts": list(posterior.experts),
        "weights": generation.weights.tolist(),
        "posterior": {
            "mean": posterior.mean.tolist(),
            "interval_90": posterior.interval(0.9).transpose(1, 2, 0).tolist(),
            "probability_best": posterior.probability_best.tolist(),
            "entropy": posterior.entropy.tolist(),
        },
        "token_ids": trimmed(generation.token_ids),
        "log_probabilities": trimmed(generation.log_probabilities),
        "predictive_entropy": trimmed(generation.predictive_entropy),
        "mutual_information": trimmed(generation.mutual_information),
        "rows": generation.rows.tolist(),
        "foreign": generation.foreign.tolist(),
        "p_values": [None if np.isnan(p) else p for p in generation.p_values.tolist()],
        "cost": {**asdict(cost), "total": cost.total, "prompt_passes": cost.prompt_passes},
    }


def _print_generation(generation: "Generation", experts: bool, fitted: bool) -> None:
    """Prompts with their texts, and the weights of the ``experts``."""
    from rich.text import Text

    from bayes_dispatch.app.tables import visible_lines, weights_table

    console = open_console()
    for n, (prompt, text) in enumerate(zip(generation.prompts, generation.texts, strict=True)):
        if len(generation.prompts) > 1:
            console.print(f"── {n + 1} of {len(generation.prompts)} ──", highlight=False)
        shown = Text.assemble((visible_lines(prompt.decode()), "dim"), (visible_lines(text), "bold"))
        console.print(shown, soft_wrap=True)
        if generation.foreign[n]:
            done = "base alone" if generation.lengths[n] else "nothing was generated"
            which = "the prompt" if len(generation.prompts) == 1 else f"prompt {n + 1} of {len(generation.prompts)}"
            print(f"{which} is foreign to all experts (p = {generation.p_values[n]:.2g}): {done}", file=sys.stderr)
        if experts and generation.lengths[n]:
            if not text.endswith("\n"):
                console.print()
            posterior, note = generation.posterior.select([n]), _note(generation, n, fitted)
            console.print(weights_table(posterior, generation.weights[n].tolist(), note).to_rich())


def _note(generation: "Generation", n: int, fitted: bool) -> str:
    """What the columns of the weights of prompt ``n`` are, and how sure its new tokens are."""
    import numpy as np

    told = "Mean, interval and P(best) say which experts the prompt needs. The"
    if not fitted:
        told = "This bundle's dispatcher was not fitted: mean, interval and P(best) are the same for every prompt. The"
    values = generation.log_probabilities[n], generation.predictive_entropy[n], generation.mutual_information[n]
    log_probability, entropy, information = (np.nanmean(value) for value in values)
    shared = f"{information:.4f}" if generation.rows[n] > 1 else "– (one row ran)"
    return (
        f"{told} blend weight is what its next token is predicted by, under {generation.blend}. Means over the new "
        f"tokens, in nats: log-probability {log_probability:.3f}, entropy {entropy:.3f}, mutual information {shared}."
    )
