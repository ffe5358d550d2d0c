"""``bayes-dispatch chat``: a conversation, line by line, from stdin to stdout."""

import json
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_dispatch.app.commands.terminal import (
    BLENDS_HELP,
    SEED_HELP,
    BundleOption,
    DeviceOption,
    DrawsOption,
    DtypeOption,
    SampleOption,
    TemperatureOption,
    TopKOption,
    components_of,
    open_bundle,
    refuse_unused,
    say_aside,
    typed,
    with_options,
)
from bayes_dispatch.app.tables import visible_lines
from bayes_dispatch.errors import BayesDispatchError, ConfigError

if TYPE_CHECKING:
    from bayes_dispatch.inference.chat.chat import Chat
    from bayes_dispatch.inference.chat.state import Turn

__all__ = ["chat"]


def chat(
    state: Annotated[
        Path | None,
        typer.Option(
            help="The chat's file, written after every turn; if it is there, its chat goes on, with its settings."
        ),
    ] = None,
    blend: Annotated[str | None, typer.Option(help=BLENDS_HELP)] = None,
    top_k: TopKOption = None,
    draws: DrawsOption = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Choose the experts anew once what you said changes the predictions by more nats a token than this; "
            "0: after every line; default: .01."
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of the conversation that are remembered; default: 4096, or what the model can read."
        ),
    ] = None,
    escapes: Annotated[bool, typer.Option("--escapes", help=r"Read \n in lines and --stop as a newline.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")] = 64,
    stop: Annotated[
        str | None,
        typer.Option(
            help="A reply ends with it; default: a newline, or the end of a turn of the model's chat template."
        ),
    ] = None,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help=SEED_HELP)] = None,
    show_experts: Annotated[bool, typer.Option("--show-experts", help="Show the weights after each reply.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a turn, each on a line.")] = False,
    bundle: BundleOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Reply to each line of stdin, by the model's chat template if it has one. Empty lines are skipped.

    At a terminal, a line that cannot be read is refused, and the chat goes on.
    """
    from bayes_dispatch.inference.two_pass.blends import as_blend
    from bayes_dispatch.inference.two_pass.prompts import Writing

    (named,) = with_options([blend or "posterior_predictive"], top_k, draws)
    as_blend(named, components_of(bundle))  # a name that is none is told before the model is loaded
    refuse_unused("--temperature", temperature, sample, "with --sample")
    refuse_unused("--show-experts", show_experts, not as_json, "without --json, which always has them", "both")
    temperature = 1.0 if temperature is None else temperature
    ending = ... if stop is None else typed(stop, escapes)
    Writing.of(max_new_tokens, sample, temperature, None if isinstance(ending, EllipsisType) else ending)
    from bayes_dispatch.inference.generator import TwoPassGenerator

    generator = TwoPassGenerator(open_bundle(bundle, device, dtype))
    chosen = as_blend(named, generator.bundle.experts.components)
    if state is not None and state.exists():
        conversation = generator.resume_chat(state)
        kept = conversation.settings
        spelled = "(" in (blend or "")  # with settings; else those that the chat began with
        kept_name, asked_name = (name if spelled else name.partition("(")[0] for name in (kept.blend.name, chosen.name))
        for option, value, began in (
            ("blend", asked_name if blend else None, kept_name),
            ("draws", draws, getattr(kept.blend, "draws", None)),
            ("top-k", top_k, getattr(kept.blend, "k", None)),
            ("threshold", threshold, kept.threshold),
            ("max-context", max_context, kept.max_context),
            ("seed", seed, kept.seed),
        ):
            if value is not None and value != began:
                kept_as = f"no --{option}" if began is None else f"--{option} {began}"
                raise ConfigError(f"expected {kept_as}, with which the chat in {state} began, got {value}")
    else:
        given = {"seed": seed, "threshold": threshold, "max_context": max_context}
        settings = {name: value for name, value in given.items() if value is not None}
        begin = partial(generator.chat, blend=chosen, **settings)  # type: ignore[arg-type]
        begin().settings.check_reply(max_new_tokens)  # before a file keeps the settings
        conversation = begin(file=state)
    conversation.settings.check_reply(max_new_tokens)
    interactive = sys.stdin.isatty()
    for told in _lines(interactive):
        written = ""
        try:
            line = typed(told, escapes)
            reply = conversation.stream(line, max_new_tokens, do_sample=sample, temperature=temperature, stop=ending)
            try:
                for event in reply:
                    written += event.text
                    if not as_json:
                        sys.stdout.write(visible_lines(event.text))
                        sys.stdout.flush()
            except BaseException as error:  # amid a reply, which would else count as said when it is closed
                reply.throw(error)
                raise
        except BayesDispatchError as error:
            if not interactive:
                raise
            if written and not as_json:
                print(flush=True)
            say_aside("error", str(error))  # the conversation is as it was before this line
            continue
        assert conversation.turn is not None
        if as_json:
            document = _as_json(conversation, conversation.turn, line)
            print(json.dumps(document, allow_nan=False), flush=True)
            continue
        if not written.endswith("\n"):
            print(flush=True)
        if show_experts:
            print(_note(conversation.turn), flush=True)


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, without the newlines that end it."""
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if line:
            yield os.fsdecode(line)


def _note(turn: "Turn") -> str:
    """The weights in one line, largest first, and whether the particles are new."""
    named = sorted(zip(turn.posterior.experts, turn.weights, strict=True), key=lambda pair: -pair[1])
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in named if weight >= 0.005)
    moved = "first posterior" if math.isnan(turn.divergence) else f"posterior moved by {turn.divergence:.4f} nats"
    return f"  [{weights}; {moved}{', adapted' if turn.adapted else ''}]"


def _as_json(conversation: "Chat", turn: "Turn", line: bytes) -> dict[str, Any]:
    return {
        "turn": conversation.turns,
        "user": line.decode(),
        "text": turn.text,
        "experts": list(turn.posterior.experts),
        "weights": turn.weights.tolist(),
        "posterior": {"mean": turn.posterior.mean[0].tolist(), "entropy": float(turn.posterior.entropy[0])},
        "divergence": None if math.isnan(turn.divergence) else turn.divergence,
        "adapted": turn.adapted,
        "forgotten": turn.forgotten,
        "log_probabilities": turn.log_probabilities.tolist(),
        "predictive_entropy": turn.predictive_entropy.tolist(),
        "mutual_information": turn.mutual_information.tolist(),
        "cost": {**vars(turn.cost), "total": turn.cost.total},
    }
