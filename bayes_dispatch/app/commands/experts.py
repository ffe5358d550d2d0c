"""``bayes-dispatch experts``: the experts of a bundle, or of a bank on its own, listed, shown, checked and edited."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from bayes_dispatch.app.commands.terminal import BundleOption, JsonOption, open_console, print_json
from bayes_dispatch.errors import ConfigError

__all__ = ["experts", "is_of_a_bundle"]

experts = typer.Typer(help="List, show, check and edit the experts of a bundle, or of a bank on its own.")

BankOption = Annotated[Path | None, typer.Option("--bank", help="A bank's directory, in the place of a bundle.")]
T = TypeVar("T")
NameArgument = Annotated[str, typer.Argument(help="Name of an expert.", show_default=False)]


@experts.command(name="list")
def list_experts(bundle: BundleOption = None, bank: BankOption = None, as_json: JsonOption = False) -> None:
    """All experts, and what is known about them."""
    from bayes_dispatch.app.tables import Table, visible
    from bayes_dispatch.experts.bank import ExpertBank

    found = _read(bundle, bank, ExpertBank.load)
    scales = sum(found.matrices.values())
    if as_json:
        listed = [{"name": name, "metadata": dict(found.metadata[name])} for name in found.names]
        return print_json({"base": found.base, "matrices": dict(found.matrices), "scales": scales, "experts": listed})
    keys = sorted({key for known in found.metadata.values() for key in known} - {"bayes_dispatch", "torch"})
    rows = [[name, *(visible(found.metadata[name].get(key, "")) for key in keys)] for name in found.names]
    each = f"Each has {scales} scales, of" if found.adapts == tuple(found.matrices) else "They adapt"
    note = f"{each} {len(found.adapts)} matrices of base model {visible(found.base)}."
    open_console().print(Table("Experts", ["name", *map(visible, keys)], rows, note).to_rich())


@experts.command()
def show(name: NameArgument, bundle: BundleOption = None, bank: BankOption = None, as_json: JsonOption = False) -> None:
    """All that is known about one expert, and how far it changes each matrix."""
    from bayes_dispatch.app.tables import Table, visible
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.lora import LoraExpert

    expert = _read(bundle, bank, lambda directory: ExpertBank.load(directory)[name])
    matrices: list[dict[str, Any]] = []
    if isinstance(expert, LoraExpert):
        what = "Entries of its updates"
        changes = ((m, (up @ down).abs()) for m, (down, up) in expert.factors.items())  # one at a time: they are dense
    else:
        what = "Distances |z − 1| of its scales"
        changes = ((m, (z.double() - 1).abs()) for m, z in expert.scales.items())
    for matrix, change in changes:
        summary = {"mean": float(change.mean()), "max": float(change.max())}
        matrices.append({"name": matrix, "rank": expert.matrices[matrix], **summary})
    known = dict(sorted(expert.metadata.items()))
    if as_json:
        return print_json({"name": name, "base": expert.base, "metadata": known, "matrices": matrices})
    about = [["base", expert.base], *([visible(key), visible(text)] for key, text in known.items())]
    rows = [[visible(row["name"]), str(row["rank"]), f"{row['mean']:.4f}", f"{row['max']:.4f}"] for row in matrices]
    console = open_console()
    console.print(Table(f"Expert {name}", ["", ""], about).to_rich())
    console.print(Table(what, ["matrix", "rank", "mean", "max"], rows).to_rich())


@experts.command()
def verify(bundle: BundleOption = None, bank: BankOption = None, as_json: JsonOption = False) -> None:
    """Read every expert, and tell which are damaged; exit code 2 if any is."""
    from bayes_dispatch.app.tables import Cell, Table, visible
    from bayes_dispatch.experts.bank_files import verify_bank

    directory, checks = _read(bundle, bank, lambda directory: (directory, verify_bank(directory)))
    if as_json:
        listed = [{"name": check.name, "ok": check.ok, "reason": check.reason} for check in checks]
        print_json({"directory": str(directory), "ok": all(check.ok for check in checks), "experts": listed})
    else:
        rows: list[list[Cell | str]] = [
            [check.name, Cell("ok", "right") if check.reason is None else Cell(visible(check.reason), "wrong")]
            for check in checks
        ]
        note = f"{sum(check.ok for check in checks)} of {len(checks)} are whole."
        open_console().print(Table("Files of the experts", ["name", "file"], rows, note).to_rich())
    if not all(check.ok for check in checks):
        raise typer.Exit(2)


@experts.command()
def delete(
    name: NameArgument, bundle: BundleOption = None, bank: BankOption = None, as_json: JsonOption = False
) -> None:
    """Delete an expert of a bank; the others stay as they are."""
    directory = _editable(bundle, bank)
    from bayes_dispatch.experts.bank import ExpertBank

    left = ExpertBank.load(directory).without(name)
    left.save(directory)
    if as_json:
        return print_json({"deleted": name, "experts": list(left.names)})
    print(f"{directory}: deleted {name}, {len(left)} left")


@experts.command()
def rename(
    name: NameArgument,
    new: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    bundle: BundleOption = None,
    bank: BankOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give an expert of a bank another name, in the same place."""
    directory = _editable(bundle, bank)
    from bayes_dispatch.experts.bank import ExpertBank

    renamed = ExpertBank.load(directory).renamed(name, new)
    renamed.save(directory)
    if as_json:
        return print_json({"renamed": name, "to": new, "experts": list(renamed.names)})
    print(f"{directory}: {name} is now {new}")


def _read(bundle: Path | None, bank: Path | None, read: Callable[[Path], T]) -> T:
    """What ``read`` makes of the directory of the bank."""
    if bank is not None:
        if bundle is not None:
            raise ConfigError(f"expected --bundle or --bank, got both: {bundle} and {bank}")
        return read(bank)
    from bayes_dispatch.app.shipped import bundle_directory
    from bayes_dispatch.storage import read_saved

    return read_saved(bundle_directory(bundle), "bundle.json", lambda place: read(place / "experts"))


def is_of_a_bundle(bank: Path) -> bool:
    """Whether a directory of experts is a bundle's, whose dispatcher is fitted for them."""
    return (bank.resolve().parent / "bundle.json").exists()


def _editable(bundle: Path | None, bank: Path | None) -> Path:
    """Of the bank to edit; that of a bundle is none."""
    if bank is None or bundle is not None or is_of_a_bundle(bank):
        raise ConfigError(
            "expected --bank with a bank on its own, got that of a bundle, whose dispatcher has the old names: "
            "change a copy, refit a dispatcher to it, and save both as a new bundle"
        )
    return bank
