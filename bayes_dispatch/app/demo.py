"""The demonstration: first pass, dispatch and generation under every blend, on prompts that are always the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from bayes_dispatch.app.demo_prompts import DemoPrompt, prompts_for
from bayes_dispatch.app.reports import check_report, write_report
from bayes_dispatch.app.tables import Cell, Table, visible
from bayes_dispatch.checks.generation_plots import plot_weight_path
from bayes_dispatch.checks.plots import plot_blend_bars, plot_forest
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import (
    DEFAULT_BLEND,
    BestExpert,
    Blend,
    PosteriorMean,
    ThompsonSample,
    TopK,
)
from bayes_dispatch.inference.two_pass.generation import Generation
from bayes_dispatch.inference.two_pass.system import System

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SHOWN_BLENDS", "run_demo"]

SHOWN_BLENDS: Sequence[Blend] = (BestExpert(), TopK(2), PosteriorMean(), ThompsonSample(), DEFAULT_BLEND)
NEW_TOKENS = 24
SHOWN = 10  # characters of a continuation in a table
OPEN = 6  # prompts in the forest, those of the widest intervals: the others' are points at 0 and 1
FILES = ("posterior.nc", "forest.png", "blends.png", "path.png", "report.md")
TITLE = "# bayes-dispatch: demonstration"


def run_demo(bundle: System, out: Path, seed: int, console: Console, progress: bool = True) -> list[Path]:
    """Run the demonstration, print its tables, and write ``posterior.nc``, three pictures and ``report.md``.

    The result depends on the bundle and the seed alone. Other files in ``out`` stay.

    Args:
        bundle: a trained system. out: directory of the files. seed: of posterior draws. console: for the tables.
        progress: show progress bars.

    Returns:
        The files.

    Raises:
        BundleError: ``out`` is a file, or has files of these names that are of no earlier run.
        ConfigError: the bundle's experts are none that there are prompts for.
    """
    check_report(out, FILES, TITLE)
    generator = TwoPassGenerator(bundle)
    prompts = prompts_for(bundle.dispatcher.experts)
    texts = [prompt.text for prompt in prompts]
    generations = [
        generator.generate(texts, blend=blend, max_new_tokens=NEW_TOKENS, seed=seed, progress=progress)
        for blend in SHOWN_BLENDS
    ]
    posterior = generations[0].posterior  # the seed is the same, and so are the draws
    console.print(_posterior_table(prompts, posterior, components=3 if console.width >= 126 else 2).to_rich())
    answers = _answer_table(prompts, generations)
    console.print(answers.to_rich())
    settings = f"Seed {seed}, {posterior.weights.shape[0]} posterior draws, {NEW_TOKENS} new tokens, greedy decoding."
    report = _report([_full_posterior_table(prompts, posterior), answers, _prompt_table(prompts)], settings)
    names = [prompt.name for prompt in prompts]
    low, high = posterior.interval(0.9)
    open_ = np.sort(np.argsort(-(high - low).max(1), kind="stable")[:OPEN])
    with write_report(out, FILES, TITLE) as new:
        posterior.to_netcdf(new / "posterior.nc", names)
        plot_forest(posterior.select(open_), [names[n] for n in open_], columns=3).savefig(new / "forest.png")
        plot_blend_bars(posterior, names).savefig(new / "blends.png")
        _plot_changing(bundle, prompts, generations[-1]).savefig(new / "path.png")
        (new / "report.md").write_text(report, encoding="utf-8")
    return [out / name for name in FILES]


def _posterior_table(prompts: Sequence[DemoPrompt], posterior: DispatchPosterior, components: int) -> Table:
    """The largest components of each prompt."""
    mean, best, (low, high) = posterior.mean, posterior.probability_best, posterior.interval(0.9)
    rows: list[list[Cell | str]] = []
    for n, prompt in enumerate(prompts):
        order = np.argsort(-mean[n], kind="stable")[:components]
        largest = [f"{posterior.experts[k]} {_weight(mean[n, k], low[n, k], high[n, k])}" for k in order]
        rows.append([prompt.name, prompt.kind, *largest, _short(best[n, order[0]])])
    heads = ["largest weight", *("next" for _ in range(components - 1))]
    note = (
        "Mean of the weight and its 90% interval; P(best): that the first has the largest weight. Foreign prompts "
        "belong to base. One that goes elsewhere is what the gate is for (generate --false-alarm-rate)."
    )
    return Table("Dispatch: posterior weights of the experts", ["prompt", "kind", *heads, "P(best)"], rows, note)


def _full_posterior_table(prompts: Sequence[DemoPrompt], posterior: DispatchPosterior) -> Table:
    mean, (low, high) = posterior.mean, posterior.interval(0.9)
    rows: list[list[Cell | str]] = []
    for n, prompt in enumerate(prompts):
        cells = [_weight(*values) for values in zip(mean[n], low[n], high[n], strict=True)]
        rows.append(
            [prompt.name, *(Cell(c, "best" if k == mean[n].argmax() else "plain") for k, c in enumerate(cells))]
        )
    return Table("Posterior mean of each weight, with its 90% interval", ["prompt", *posterior.experts], rows)


def _answer_table(prompts: Sequence[DemoPrompt], generations: Sequence[Generation]) -> Table:
    """What each blend writes after each prompt, beside the right answer where there is one."""
    rows: list[list[Cell | str]] = []
    for n, prompt in enumerate(prompts):
        cells = []
        for generation in generations:
            text = generation.texts[n]
            line = visible(text.partition("\n")[0] or text, SHOWN)
            mark = "plain" if prompt.answer is None else "right" if text.startswith(prompt.answer) else "wrong"
            cells.append(Cell(line, mark, code=True))  # type: ignore[arg-type]
        answer = "–" if prompt.answer is None else Cell(prompt.answer.rstrip("\n"), code=True)
        information = generations[-1].mutual_information[n, 0]
        rows.append([prompt.name, answer, *cells, f"{information:.3f}"])
    judged = [n for n, prompt in enumerate(prompts) if prompt.answer is not None]
    right = [sum(g.texts[n].startswith(prompts[n].answer or "") for n in judged) for g in generations]
    rows.append(["right", f"of {len(judged)}", *(str(count) for count in right), ""])
    columns = ["prompt", "right answer", *(generation.blend for generation in generations), "MI"]
    note = (
        "First line of each continuation; none is marked where a prompt has no single right one. ✗: not the right one. "
        "Of texts, a small model seldom finds it under any expert; and a short prompt may not tell which is meant. One "
        "prompt says little of a blend: bayes-dispatch compare takes many. MI: "
        f"mutual information between expert weights and the first new token under {generations[-1].blend}, in nats."
    )
    return Table("Generation under each blend", columns, rows, note)


def _prompt_table(prompts: Sequence[DemoPrompt]) -> Table:
    rows: list[list[Cell | str]] = [
        [prompt.name, prompt.kind, Cell(visible(prompt.text), code=True)] for prompt in prompts
    ]
    return Table("Prompts", ["name", "kind", "text (⏎ ends a line)"], rows)


def _plot_changing(system: System, prompts: Sequence[DemoPrompt], generation: Generation) -> "Figure":
    """The filtered weights along the last prompt of several experts."""
    which = max(n for n, prompt in enumerate(prompts) if prompt.kind in ("mixed", "switch"))
    data = prompts[which].text.encode()
    spans = system.tokenizer.tokenize(data).spans[1:]
    texts = [visible(data[start:stop].decode(errors="replace")) for start, stop in spans]
    path, title = generation.paths[which][: len(texts)], f"Blend weights along the prompt “{prompts[which].name}”"
    return plot_weight_path(path, generation.posterior.experts, texts=texts, title=title)


def _weight(mean: float, low: float, high: float) -> str:
    return f"{_short(mean)} [{_short(low)}, {_short(high)}]"


def _short(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")


def _report(tables: Sequence[Table], settings: str) -> str:
    posterior, answers, asked = (table.to_markdown() for table in tables)
    parts = [
        TITLE,
        settings,
        "The first pass reads each prompt without any expert; the dispatcher answers with a posterior over weights.",
        "![Posterior mean of the weights, a bar for each prompt](blends.png)",
        "![Posterior mean and intervals of each weight, for the prompts whose intervals are widest](forest.png)",
        "![Weights along a prompt of several experts, filtered by each of its tokens](path.png)",
        posterior,
        "The second pass continues each prompt under blends of that posterior.",
        answers,
        asked,
        "The draws are in `posterior.nc` (group `posterior`, variable `weights`); `arviz.from_netcdf` reads them.",
    ]
    return "\n\n".join(parts) + "\n"
