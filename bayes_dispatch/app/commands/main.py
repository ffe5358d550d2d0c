"""The command line. Heavy imports wait inside the commands, so that ``--help`` is quick.

Whatever a user does wrong ends in one line on stderr, ``bayes-dispatch: error: expected …, got …``, and exit code 2.
"""

import inspect
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bayes_dispatch.app.commands.build import build, train_documents
from bayes_dispatch.app.commands.chat import chat
from bayes_dispatch.app.commands.compare import compare
from bayes_dispatch.app.commands.experts import experts
from bayes_dispatch.app.commands.fit import fit
from bayes_dispatch.app.commands.generate import generate
from bayes_dispatch.app.commands.serve import export_vllm, serve
from bayes_dispatch.app.commands.terminal import (
    BundleOption,
    JsonOption,
    OwnJsonlOption,
    OwnTextOption,
    PackagesOption,
    SeedOption,
    announce,
    calibrated_by,
    check_new_output,
    check_output,
    components_of,
    open_bundle,
    open_console,
    own_domains,
    print_json,
    refuse_unused,
    say_aside,
    use_one_thread,
)
from bayes_dispatch.app.commands.train_expert import train_expert, train_experts
from bayes_dispatch.errors import BayesDispatchError, UnknownNameError

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.gate import Gate

__all__ = ["app", "main"]

app = typer.Typer(
    help="A language model that adapts itself to each prompt, and knows how sure it is about it.",
    add_completion=False,
    # --blend was called --blending-mode, and scripts of that time still run
    context_settings={"token_normalize_func": lambda name: "blend" if name == "blending-mode" else name},
    pretty_exceptions_enable=False,
)
app.add_typer(experts, name="experts")
app.command()(build)
app.command()(compare)
app.command()(fit)
app.command()(chat)
app.command()(serve)
app.command()(export_vllm)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 when all went well, 2 on bad input, 130 when interrupted."""
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no error
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _guarded(arguments)


def _guarded(arguments: list[str]) -> int:
    try:
        code = app(arguments or ["--help"], prog_name="bayes-dispatch", standalone_mode=False) or 0
        sys.stdout.flush()
        return int(code)
    except BayesDispatchError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)  # of the command whose arguments they are
        command = "bayes-dispatch" if context is None else context.command_path
        return _fail(f"expected arguments as `{command} --help` tells, got: {error.format_message()}")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        return _fail(f"expected readable and writable files, got: {error.strerror or error}{where}")


def _fail(message: str) -> int:
    say_aside("error", message)
    return 2


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    say_aside("warning", str(message))


def _show_version(asked: bool) -> bool:
    if asked:
        print(f"bayes-dispatch {sys.modules['bayes_dispatch'].__version__}")  # of what runs, whatever is installed
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def demo(
    bundle: BundleOption = None,
    out: Annotated[Path, typer.Option(help="Directory for the posterior, the pictures and the report.")] = Path(
        "demo-output"
    ),
    seed: SeedOption = 0,
) -> None:
    """Continue a few fixed prompts under every blend, and write tables, texts and pictures."""
    check_output(out)
    from bayes_dispatch.app.demo import FILES, TITLE, run_demo
    from bayes_dispatch.app.demo_prompts import prompts_for
    from bayes_dispatch.app.reports import check_report

    check_report(out, FILES, TITLE)
    prompts_for(components_of(bundle)[:-1])  # experts of which it asks nothing are told before the model is loaded
    begun, console = time.perf_counter(), open_console()
    files = run_demo(open_bundle(bundle), out, seed, console)
    console.print(f"Done in {time.perf_counter() - begun:.0f} s:", *files, highlight=False, soft_wrap=True)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Directory of the new bundle.")] = Path("runs/bundle"),
    work: Annotated[Path | None, typer.Option(help="Directory of the stages' results; default: OUT.work.")] = None,
    seed: SeedOption = 0,
    processes: Annotated[int, typer.Option(min=1, help="Processes that work at once.")] = 2,
    plan: Annotated[
        str,
        typer.Option(
            help="full: conventions, in bytes. translations: of interface texts, in subwords. smoke and "
            "translations-smoke: minutes, all stages without any quality."
        ),
    ] = "full",
    packages: Annotated[
        Path | None, typer.Option(help="Where `pip install --target` put the packages of the translations.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train base model, experts and dispatcher, judge them, and write a bundle. A stopped run goes on where it was."""
    check_new_output(out, "bundle.json")
    if work is not None:
        check_output(work)
    from bayes_dispatch.app.training.plans import PLANS
    from bayes_dispatch.app.training.train import train_bundle

    if plan not in PLANS:
        raise UnknownNameError(f"expected a plan of {', '.join(PLANS)}, got {plan!r}")

    use_one_thread()
    begun = time.perf_counter()
    chosen = PLANS[plan].with_seed(seed)
    new = train_bundle(chosen, out, work, processes, packages=packages, announce=announce)
    _print_report(new.report, new.gate, as_json)
    print(f"{out}: trained in {(time.perf_counter() - begun) / 60:.1f} minutes", file=sys.stderr)


app.command()(train_expert)
app.command()(train_experts)
app.command()(train_documents)
app.command()(generate)


@app.command()
def calibrate_gate(
    out: Annotated[Path, typer.Option(help="Directory of the new bundle; it may be that of the old one.")],
    bundle: BundleOption = None,
    text: OwnTextOption = None,
    jsonl: OwnJsonlOption = None,
    prompts: Annotated[int, typer.Option(min=20, help="Held-out prompts of each expert's domain.")] = 120,
    mixed: Annotated[int, typer.Option(min=20, help="Held-out prompts of several domains.")] = 3200,
    longest: Annotated[int, typer.Option(min=16, max=4096, help="Bytes of the longest; the shortest have 16.")] = 1024,
    seed: SeedOption = 2,
    packages: PackagesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Calibrate a bundle on held-out prompts: the gate for foreign ones, and guaranteed intervals and sets.

    No line of a file is in two prompts of its expert, or in two prompts of several experts: only so the guarantees
    hold. A short file therefore gives fewer prompts than asked for.
    """
    check_new_output(out, "bundle.json", bundle)
    own = own_domains(bundle, text, jsonl)
    from bayes_dispatch.app.held_out import calibrated

    new = calibrated(open_bundle(bundle), own, prompts, mixed, (16, longest), seed, sys.stderr.isatty(), packages)
    new.save(out)
    gate = new.gate
    assert gate is not None
    if as_json:
        return print_json({"out": str(out), **_of_gate(gate)})
    print(f"{out}: {calibrated_by(gate)}")


@app.command()
def report(
    bundle: BundleOption = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")] = False,
) -> None:
    """Show what was measured when a bundle was trained, experts, dispatch, calibration and blends, and its gate."""
    from bayes_dispatch.app.bundle import read_index
    from bayes_dispatch.app.shipped import bundle_directory
    from bayes_dispatch.dispatcher.gate import Gate
    from bayes_dispatch.storage import read_saved

    refuse_unused("--markdown", markdown, not as_json, "without --json", "both")

    def read(place: Path) -> tuple[Any, Gate | None]:
        index = read_index(place)
        gated = any(name.startswith("gate/") for name in index["files"])
        return index["report"], Gate.load(place / "gate") if gated else None

    _print_report(*read_saved(bundle_directory(bundle), "bundle.json", read), as_json, markdown)


@app.command()
def diagnose(
    bundle: BundleOption = None,
    text: OwnTextOption = None,
    jsonl: OwnJsonlOption = None,
    out: Annotated[Path, typer.Option(help="Directory for the report, the pictures and the numbers.")] = Path(
        "diagnosis"
    ),
    simulations: Annotated[int, typer.Option(min=20, help="Prompts drawn from the fitted program.")] = 1000,
    mixtures: Annotated[int, typer.Option(min=20, help="Held-out prompts of known mixture.")] = 1000,
    shortest: Annotated[int, typer.Option(min=4, help="Bytes of the shortest of these.")] = 16,
    longest: Annotated[int, typer.Option(min=4, help="Bytes of the longest of these.")] = 256,
    prompts: Annotated[int, typer.Option(min=20, help="Held-out prompts of each domain and length.")] = 100,
    risk: Annotated[float, typer.Option(help="Share of served prompts that may be wrong.")] = 0.05,
    seed: SeedOption = 1,
    packages: PackagesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a dispatcher's calibration: simulated ranks, coverage, reliability, foreign text, when to abstain.

    Experts of your own are judged on files that you name by --text or --jsonl; else none of the prompts is theirs.
    """
    check_output(out)
    from bayes_dispatch.app.diagnosis import DiagnosisSettings
    from bayes_dispatch.app.diagnosis import diagnose as run
    from bayes_dispatch.app.diagnosis_report import FILES, TITLE, diagnosis_tables, in_words, write_diagnosis
    from bayes_dispatch.app.reports import check_report

    check_report(out, FILES, TITLE)
    own = own_domains(bundle, text, jsonl)
    span = (shortest, longest)
    settings = DiagnosisSettings(
        simulations=simulations, mixtures=mixtures, mixture_lengths=span, prompts=prompts, risk=risk, seed=seed
    )
    found = run(open_bundle(bundle), settings, progress=sys.stderr.isatty(), own=own, packages=packages)
    files, console = write_diagnosis(found, out), open_console()
    if as_json:
        return print_json(found.to_dict())
    console.print(in_words(found), highlight=False)
    for table in diagnosis_tables(found):
        console.print(table.to_rich())
    console.print(*files, highlight=False, soft_wrap=True)


for _command in app.registered_commands:  # typer would keep the ends of the lines that a docstring has here
    _paragraphs = (inspect.getdoc(_command.callback) or "").split("\n\n")
    _command.help = "\n\n".join(" ".join(each.split()) for each in _paragraphs)


def _print_report(measured: Any, gate: "Gate | None", as_json: bool, markdown: bool = False) -> None:
    from bayes_dispatch.app.tables import report_markdown, report_tables

    if as_json:
        return print_json({**measured, "gate": None if gate is None else _of_gate(gate)})
    tables, console = report_tables(measured, gate), open_console()
    if len(tables) == (gate is not None):
        print("Nothing was measured when this bundle was made. `bayes-dispatch diagnose` judges its dispatcher.")
    if markdown and tables:
        print(report_markdown(measured, gate))
    for table in () if markdown else tables:
        console.print(table.to_rich())
    if gate is None:
        print("It has no gate for foreign prompts. `bayes-dispatch calibrate-gate` makes one.")


def _of_gate(gate: "Gate") -> dict[str, Any]:
    return {"ranks": len(gate.scores), "bins": len(gate.edges), "least_rate": gate.least_rate}
