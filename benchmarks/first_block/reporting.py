"""Tables of what was measured by first block: means over seeds, with standard errors."""

from collections.abc import Mapping, Sequence

import numpy as np

from bayes_dispatch.app.tables import Table
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.experts.vectors import BASE
from first_block.costs import BLENDS, PROMPT_BYTES, Cost
from first_block.measuring import BLENDED, JUDGED, OWN, Scores

__all__ = ["Found", "gain_kept", "quality_tables", "tables"]

Number = tuple[float, float]  # and its standard error
Found = Mapping[int, Sequence[Scores]]  # first block → scores by seed; 0 is there

CURVE = ("accuracy 32", "Brier, mixes")  # of the dispatcher
BLEND_NAMES = {"base": "base", "posterior_mean": "mean", "posterior_predictive(16)": "predictive"}


def gain_kept(base: Sequence[float], zero: Sequence[float], own: Sequence[float]) -> Number:
    """Share of the gain over base that experts from a later block have of those from block 0, by ratio of means.

    Args:
        base, zero, own: NLL of the same documents under base, the expert from block 0, and the other.

    Returns:
        The share, and its standard error over documents (delta method).
    """
    whole, part = np.subtract(base, zero), np.subtract(base, own)
    share = part.mean() / whole.mean()
    error = (part - share * whole).std(ddof=1) / len(whole) ** 0.5 / abs(whole.mean())
    return float(share), float(error)


def quality_tables(found: Found, shipped: Sequence[Mapping[str, float]]) -> list[Table]:
    """Experts, dispatchers, and both together.

    Args:
        found: by first block and seed. shipped: the scores of the shipped dispatcher, by seed.
    """
    blocks, domains = list(found), list(found[0][0].nll)
    heads = ["domain", BASE, *(f"from block {block}" for block in blocks)]

    def own(domain: str, metric: str) -> list[str]:
        first = [_mean(getattr(scores, metric)[domain][BASE]) for scores in found[0]]
        return [_cell(first), *(_cell([_mean(getattr(s, metric)[domain][OWN]) for s in found[b]]) for b in blocks)]

    conventions = [convention.name for convention in CONVENTIONS]
    kept = [[name, *(_cell(_kept(found, block, [name])) for block in blocks)] for name in domains]
    kept.append(["mean", *(_cell(_kept(found, block, domains)) for block in blocks)])
    judged = [
        [f"below block {block}" if block else "last layer", *_dispatch([each.dispatch for each in found[block]])]
        for block in blocks
    ]
    judged.append(["last layer, shipped dispatcher", *_dispatch(shipped)])
    seeds = len(found[0])
    note = f"Mean ± standard error over {seeds} seeds." if seeds > 1 else "One seed; ± over documents."
    return [
        Table("Own expert, NLL per scored byte", heads, [[name, *own(name, "nll")] for name in domains], note),
        Table("Own expert, exact match", heads, [[name, *own(name, "exact")] for name in conventions]),
        Table("Share of the gain over base that is kept", ["domain", *heads[2:]], kept),
        Table("Dispatchers by where evidence is pooled", ["hidden states of", *JUDGED], judged),
        *_blended(found),
    ]


def tables(
    found: Found, shipped: Sequence[Mapping[str, float]], spent: Mapping[int, Mapping[str, Cost]]
) -> list[Table]:
    """The curve of quality against cost, then its parts.

    Args:
        found, shipped: as in ``quality_tables``. spent: first block → name of a blend → cost.
    """
    names = list(found[0][0].nll)
    conventions = [convention.name for convention in CONVENTIONS]
    curve, cost = [], []
    for block, scores in found.items():
        exact = [_over([_mean(each.exact[name][OWN]) for name in conventions]) for each in scores]
        lost = [_lost(found, block, kind, BLENDS["predictive"].name) for kind in BLENDED]
        mean = spent[block]["mean"]
        curve.append(
            [
                str(block),
                _cell(_kept(found, block, names)),
                _cell(exact),
                *(_cell([(each.dispatch[name], 0.0) for each in scores]) for name in CURVE),
                *("" if block == 0 else _cell(each, signed=True) for each in lost),
                f"{mean.evaluations:g}",
                _ratio(mean),
            ]
        )
        cost.append([str(block)])
        for name in BLENDS:
            each = spent[block][name]
            cost[-1] += [f"{each.evaluations:g}", f"{1e3 * each.seconds:.1f}", _ratio(each)]
    heads = ["first block", "gain kept", "exact match", *CURVE, *(f"NLL, {kind}" for kind in BLENDED)]
    note = (
        "Gain: of NLL over base under the own expert, eight domains. Exact match: six conventions. NLL: what the "
        f"predictive loses to block 0. Evaluations: of a block per token of the prompt, until the first new byte under "
        f"the posterior mean; time: to that byte, {PROMPT_BYTES} bytes of prompt, over one pass of base."
    )
    costs = [f"{what}, {name}" for name in BLENDS for what in ("evaluations", "ms", "to plain base")]
    return [
        Table("Quality and cost by first adapted block", [*heads, "evaluations", "time"], curve, note),
        *quality_tables(found, shipped),
        Table(f"To the first new byte, {PROMPT_BYTES} bytes of prompt", ["first block", *costs], cost),
    ]


def _blended(found: Found) -> list[Table]:
    heads = [f"{kind}, {BLEND_NAMES[blend]}" for kind in BLENDED for blend in found[0][0].blends[kind]]
    nll, lost = [], []
    for block, scores in found.items():
        pairs = [(kind, blend) for kind in BLENDED for blend in scores[0].blends[kind]]
        nll.append([str(block), *(_cell([_mean(s.blends[kind][blend]) for s in scores]) for kind, blend in pairs)])
        if block:
            cells = (_cell(_lost(found, block, *pair), signed=True) for pair in pairs if pair[1] != BASE)
            lost.append([str(block), *cells])
    adapted = [head for head in heads if not head.endswith(BASE)]
    return [
        Table("Two passes, NLL per scored byte", ["first block", *heads], nll),
        Table("Two passes, NLL less that of block 0 on the same documents", ["first block", *adapted], lost),
    ]


def _kept(found: Found, block: int, domains: Sequence[str]) -> list[Number]:
    """For each seed the mean share of the domains."""

    def share(scores: Scores, zero: Scores, name: str) -> Number:
        return gain_kept(zero.nll[name][BASE], zero.nll[name][OWN], scores.nll[name][OWN])

    pairs = zip(found[block], found[0], strict=True)
    return [_over([share(scores, zero, name) for name in domains]) for scores, zero in pairs]


def _lost(found: Found, block: int, kind: str, blend: str) -> list[Number]:
    pairs = zip(found[block], found[0], strict=True)
    return [_mean(np.subtract(scores.blends[kind][blend], zero.blends[kind][blend])) for scores, zero in pairs]


def _dispatch(scores: Sequence[Mapping[str, float]]) -> list[str]:
    return [_cell([(each[name], 0.0) for each in scores]) for name in JUDGED]


def _mean(values: Sequence[float] | np.ndarray) -> Number:
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def _over(numbers: Sequence[Number]) -> Number:
    """The mean of independent numbers."""
    means, errors = np.array(numbers).T
    return float(means.mean()), float(np.sqrt((errors**2).sum()) / len(errors))


def _cell(numbers: Sequence[Number], signed: bool = False) -> str:
    """Mean over seeds ± its standard error; of one seed its own, where it has one."""
    mean, error = _mean([value for value, _ in numbers]) if len(numbers) > 1 else numbers[0]
    text = f"{mean:{'+' if signed else ''}.3f}"
    return f"{text} ± {error:.3f}" if len(numbers) > 1 or error else text


def _ratio(cost: Cost) -> str:
    median, spread = cost.ratio
    return f"{median:.2f} ± {spread / median:.0%}"
