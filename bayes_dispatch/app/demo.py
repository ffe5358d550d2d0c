"""The demonstration: first pass, dispatch and generation under every blend, on prompts that are always the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from bayes_dispatch.app.tables import Cell, Table, visible
from bayes_dispatch.checks.plots import plot_blend_bars, plot_forest
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.experts.domains import CONVENTIONS, Convention, Interleaved
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import (
    BestExpert,
    Blend,
    PosteriorMean,
    PosteriorPredictive,
    ThompsonSample,
    TopK,
)
from bayes_dispatch.inference.two_pass.generation import Generation
from bayes_dispatch.inference.two_pass.system import System
from bayes_dispatch.storage import check_files, write_files

__all__ = ["PROMPTS", "SHOWN_BLENDS", "DemoPrompt", "run_demo"]

SHOWN_BLENDS: Sequence[Blend] = (BestExpert(), TopK(2), PosteriorMean(), ThompsonSample(), PosteriorPredictive(16))
NEW_TOKENS = 24
SHOWN = 10  # characters of a continuation in a table
FILES = ("posterior.nc", "forest.png", "blends.png", "report.md")
TITLE = "# bayes-dispatch: demonstration"


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt.

    Attributes:
        name: short and unique. kind: ``"pure"``, ``"mixed"``, ``"short"`` or ``"foreign"`` (without an expert).
        text: what the model reads. answer: how its continuation must begin; ``None`` where nothing is right or wrong.
    """

    name: str
    kind: str
    text: str
    answer: str | None = None


def _items(name: str, kind: str, *names: str, prompt_bytes: int = 110) -> DemoPrompt:
    """Solved held-out items of the conventions in turn, and an open question of the next; seeded by ``name`` alone."""
    conventions = tuple(_convention(each) for each in names)
    rng = np.random.default_rng(list(name.encode()))
    solved = Interleaved(name, conventions).document(rng, prompt_bytes, prompt_bytes, "held_out").prompt
    following = conventions[solved.count("\n") % len(conventions)]
    rivals = [convention for convention in CONVENTIONS if convention.surface is following.surface]
    while True:
        question = following.surface.question(rng, "held_out")
        if len({rival.answer(question) for rival in rivals}) == len(rivals):  # its answer tells the conventions apart
            return DemoPrompt(name, kind, solved + question, following.answer(question) + "\n")


def _convention(name: str) -> Convention:
    return next(convention for convention in CONVENTIONS if convention.name == name)


JSON = """\
{"name": "Basket", "line": 12, "public": true, "doc": "A basket of fruit."}
{"name": "weigh", "line": 31, "arguments": ["self", "unit"], "doc": null}
{"name": "empty", "line": 47, "argum"""

CAPITALS = """\
THE FILE IS OPENED WHEN THE FIRST LINE IS READ, AND IT IS CLOSED AT THE END OF THE BLOCK. IF THE FILE DOES NOT EXIST,
AN ERROR IS RAISED. RETURN THE NUMBER OF CHARACTERS IN THE STR"""

CODE = '''\
def mean(values):
    """Return the arithmetic mean of a sequence of numbers."""
    if not values:
        raise Val'''

ROT13 = """\
Gur svefg cnff ernqf gur cebzcg, naq gur frpbaq cnff jevgrf gur nafjre. Orgjrra gurz gur qvfcngpure qrpvqrf ubj zhpu
bs rirel rkcreg vf jnag"""

FRENCH = """\
Le soir, les bateaux rentrent au port l'un après l'autre. Les pêcheurs déchargent leurs filets en silence, puis ils
s'en vont dans les ruelles où les fenêtres s'éc"""

HEXDUMP = """\
00000000  7f 45 4c 46 02 01 01 00  00 00 00 00 00 00 00 00
00000010  03 00 3e 00 01 00 00 00  60 6d 00 00 00 00 00 00
00000020  40 00 00 00"""

PROMPTS: tuple[DemoPrompt, ...] = (
    *(_items(convention.name, "pure", convention.name) for convention in CONVENTIONS),
    DemoPrompt("json", "pure", JSON, 'ents": ['),
    DemoPrompt("capitals", "pure", CAPITALS, "ING"),
    DemoPrompt("code (base)", "pure", CODE, "ueError"),
    _items("no_carry & sort", "mixed", "no_carry", "sort"),
    _items("add & reverse", "mixed", "add", "reverse"),
    DemoPrompt("short: reverse", "short", "kfpa>apfk\nbcde>", "edcb\n"),
    DemoPrompt("short: add", "short", "37+58=95\n12+19=", "31\n"),
    DemoPrompt("rot13", "foreign", ROT13),
    DemoPrompt("French", "foreign", FRENCH),
    DemoPrompt("hexdump", "foreign", HEXDUMP),
)


def run_demo(bundle: System, out: Path, seed: int, console: Console, progress: bool = True) -> list[Path]:
    """Run the demonstration, print its tables, and write ``posterior.nc``, two pictures and ``report.md``.

    The result depends on the bundle and the seed alone. Other files in ``out`` stay.

    Args:
        bundle: a trained system. out: directory of the files. seed: of posterior draws. console: for the tables.
        progress: show progress bars.

    Returns:
        The files.

    Raises:
        BundleError: ``out`` is a file, or has files of these names that are of no earlier run.
    """
    check_files(out, FILES, TITLE)
    generator = TwoPassGenerator(bundle)
    texts = [prompt.text for prompt in PROMPTS]
    generations = [
        generator.generate(texts, blend=blend, max_new_tokens=NEW_TOKENS, seed=seed, progress=progress)
        for blend in SHOWN_BLENDS
    ]
    posterior = generations[0].posterior  # the seed is the same, and so are the draws
    console.print(_posterior_table(posterior, components=3 if console.width >= 126 else 2).to_rich())
    answers = _answer_table(generations)
    console.print(answers.to_rich())
    settings = f"Seed {seed}, {posterior.weights.shape[0]} posterior draws, {NEW_TOKENS} new bytes, greedy decoding."
    report = _report([_full_posterior_table(posterior), answers, _prompt_table()], settings)
    names = [prompt.name for prompt in PROMPTS]
    with write_files(out, FILES, TITLE) as new:
        posterior.to_netcdf(new / "posterior.nc", names)
        plot_forest(posterior, names).savefig(new / "forest.png")
        plot_blend_bars(posterior, names).savefig(new / "blends.png")
        (new / "report.md").write_text(report, encoding="utf-8")
    return [out / name for name in FILES]


def _posterior_table(posterior: DispatchPosterior, components: int) -> Table:
    """The largest components of each prompt."""
    mean, best, (low, high) = posterior.mean, posterior.probability_best, posterior.interval(0.9)
    rows: list[list[Cell | str]] = []
    for n, prompt in enumerate(PROMPTS):
        order = np.argsort(-mean[n], kind="stable")[:components]
        largest = [f"{posterior.experts[k]} {_weight(mean[n, k], low[n, k], high[n, k])}" for k in order]
        rows.append([prompt.name, prompt.kind, *largest, _short(best[n, order[0]])])
    heads = ["largest weight", *("next" for _ in range(components - 1))]
    note = "Mean of the weight and its 90% interval; P(best): that the first has the largest weight."
    return Table("Dispatch: posterior weights of the experts", ["prompt", "kind", *heads, "P(best)"], rows, note)


def _full_posterior_table(posterior: DispatchPosterior) -> Table:
    mean, (low, high) = posterior.mean, posterior.interval(0.9)
    rows: list[list[Cell | str]] = []
    for n, prompt in enumerate(PROMPTS):
        cells = [_weight(*values) for values in zip(mean[n], low[n], high[n], strict=True)]
        rows.append(
            [prompt.name, *(Cell(c, "best" if k == mean[n].argmax() else "plain") for k, c in enumerate(cells))]
        )
    return Table("Posterior mean of each weight, with its 90% interval", ["prompt", *posterior.experts], rows)


def _answer_table(generations: Sequence[Generation]) -> Table:
    """What each blend writes after each prompt, beside the right answer where there is one."""
    rows: list[list[Cell | str]] = []
    for n, prompt in enumerate(PROMPTS):
        cells = []
        for generation in generations:
            text = generation.texts[n]
            line = visible(text.partition("\n")[0] or text, SHOWN)
            mark = "plain" if prompt.answer is None else "right" if text.startswith(prompt.answer) else "wrong"
            cells.append(Cell(line, mark, code=True))  # type: ignore[arg-type]
        answer = "–" if prompt.answer is None else Cell(prompt.answer.rstrip("\n"), code=True)
        information = generations[-1].mutual_information[n, 0]
        rows.append([prompt.name, answer, *cells, f"{information:.3f}"])
    judged = [n for n, prompt in enumerate(PROMPTS) if prompt.answer is not None]
    right = [sum(g.texts[n].startswith(PROMPTS[n].answer or "") for n in judged) for g in generations]
    rows.append(["right", f"of {len(judged)}", *(str(count) for count in right), ""])
    columns = ["prompt", "right answer", *(generation.blend for generation in generations), "MI"]
    note = (
        "First line of each continuation; none is marked where a prompt has no single right one. MI: mutual "
        f"information between expert weights and the first new byte under {generations[-1].blend}, in nats."
    )
    return Table("Generation under each blend", columns, rows, note)


def _prompt_table() -> Table:
    rows: list[list[Cell | str]] = [
        [prompt.name, prompt.kind, Cell(visible(prompt.text), code=True)] for prompt in PROMPTS
    ]
    return Table("Prompts", ["name", "kind", "text (⏎ ends a line)"], rows)


def _weight(mean: float, low: float, high: float) -> str:
    return f"{_short(mean)} [{_short(low)}, {_short(high)}]"


def _short(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")


def _report(tables: Sequence[Table], settings: str) -> str:
    posterior, answers, prompts = (table.to_markdown() for table in tables)
    parts = [
        TITLE,
        settings,
        "The first pass reads each prompt without any expert; the dispatcher answers with a posterior over weights.",
        "![Posterior mean of the weights, a bar for each prompt](blends.png)",
        "![Posterior mean and intervals of each weight](forest.png)",
        posterior,
        "The second pass continues each prompt under blends of that posterior.",
        answers,
        prompts,
        "The draws are in `posterior.nc` (group `posterior`, variable `weights`); `arviz.from_netcdf` reads them.",
    ]
    return "\n\n".join(parts) + "\n"
