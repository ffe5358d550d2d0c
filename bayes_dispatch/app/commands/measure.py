"""``bayes-dispatch measure``: what products cost on this machine, kept for the choice of how one row decodes."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_dispatch.app.commands.terminal import JsonOption, open_console, print_json
from bayes_dispatch.errors import ConfigError

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.compiled.product_costs import ProductCosts

__all__ = ["measure"]

WIDTHS = (128, 256, 512, 1024)  # of models whose choice is shown


def measure(
    as_json: JsonOption = False,
    tokens: Annotated[int, typer.Option(min=1, help="that one row decodes.")] = 256,
) -> None:
    """Measure products on this machine, a few seconds, and keep them for long generations under one blend."""
    from dataclasses import asdict

    from bayes_dispatch.app.tables import Table
    from bayes_dispatch.model.mambaformer.compiled.product_costs import costs_file, save_costs
    from bayes_dispatch.model.mambaformer.compiled.product_costs import measure as measure_products

    path = costs_file()
    if path is None:
        raise ConfigError("expected a file for the costs in BAYES_DISPATCH_COSTS, got off, or no home directory")
    costs = measure_products()
    save_costs(costs, path)
    models = [_choice(costs, width, tokens) for width in WIDTHS]
    if as_json:
        return print_json({"file": str(path), **asdict(costs), "tokens": tokens, "models": models})
    rows = []
    for each in models:
        times = (f"{1000 * each[name]:.1f}" for name in ("factored", "folded"))
        rows.append([str(each["width"]), *times, "never" if each["folded_from"] is None else str(each["folded_from"])])
    heads = ["model width", f"factored, {tokens} tokens, ms", "folded, ms", "folded from … tokens on"]
    open_console().print(Table("Products of one row", heads, rows, f"Kept in {path}.").to_rich())
    return None


def _choice(costs: "ProductCosts", width: int, tokens: int) -> dict[str, Any]:
    """Seconds of so many tokens of a model of that width, either way, and from how many tokens on folding pays."""
    shapes = mambaformer_shapes(width)
    factored, folded = (seconds(shapes, 4, tokens) for seconds in (costs.factored, costs.folded))
    first = next((n for n in range(1, 100_000) if costs.folding_pays(shapes, 4, n)), None)
    return {"width": width, "factored": factored, "folded": folded, "folded_from": first}


def mambaformer_shapes(width: int, pairs: int = 2) -> list[tuple[int, int]]:
    """(out_features, in_features) of the scaled matrices of a MambaFormer of that width, otherwise as shipped."""
    mamba = [(4 * width + 64 + width // 16, width), (width, 2 * width)]
    attention = [(3 * width, width), (width, width)]
    return mamba + pairs * (attention + mamba)
