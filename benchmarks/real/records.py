"""Scores of documents as lines of JSON, and the tables that are made of them alone."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Cell, Table
from bayes_dispatch.checks.paired import paired_comparison
from real.methods import HARD, OURS, PAIR, ROUTERS, SEARCH, UNIFORM, Nats

__all__ = ["BEST", "Record", "Records", "add_line", "bank_of", "tables", "whole_lines"]

BEST = "best fixed expert"
ORDER = ("base", "right expert", BEST, PAIR, HARD, UNIFORM, SEARCH, *ROUTERS)


@dataclass
class Record:
    """One document under the methods of some groups.

    Attributes:
        bank: see ``bank_of``. set, kind, seed, number: of the document.
        components: experts and base. bytes, tokens: scored ones. groups: those that were run. scores: of each method.
    """

    bank: str
    set: str
    kind: str
    seed: int
    number: int
    components: list[str]
    bytes: int
    tokens: int
    groups: list[str] = field(default_factory=list)
    scores: dict[str, Nats] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.bank, self.set, self.seed, self.number

    def nats(self, method: str) -> Nats | None:
        """A method's score; of the best fixed expert it is that of the component that did best."""
        if method != BEST:
            return self.scores.get(method)
        return min((self.scores[name] for name in self.components if name in self.scores), default=None)


class Records(dict[tuple[str, str, int, int], Record]):
    """Records by key, kept in a file if there is one; lines of one document add up, so that files may be joined."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self.path = path
        for line in whole_lines(path):
            fields: dict[str, Any] = json.loads(line)
            self._join(Record(**fields | {"scores": {name: Nats(*own) for name, own in fields["scores"].items()}}))

    def add(self, record: Record) -> None:
        """Keep it, in the file as well."""
        self._join(record)
        add_line(self.path, vars(record))

    def _join(self, record: Record) -> None:
        kept = self.setdefault(record.key, record)
        kept.groups = list(dict.fromkeys(kept.groups + record.groups))
        kept.scores = kept.scores | record.scores


def whole_lines(path: Path | None) -> list[str]:
    """The lines of a file, if there is one; what a run that was stopped left of its last line is taken away."""
    if path is None or not path.exists():
        return []
    whole, _, rest = path.read_text().rpartition("\n")
    if rest:
        path.write_text(whole and f"{whole}\n")
    return whole.splitlines()


def add_line(path: Path | None, fields: Mapping[str, Any]) -> None:
    """Add a line to a file of them, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(fields) + "\n")


def bank_of(bundle: bd.Bundle) -> str:
    """What tells a bundle's scores from another's: digests of experts and dispatcher, and the model's dtype."""
    digests = bundle.experts.digest[:12], bundle.dispatcher.fingerprint[:12]
    return f"{' '.join(digests)} {str(bundle.model.dtype).removeprefix('torch.')}"


def tables(records: Iterable[Record]) -> list[Table]:
    """Two tables of each kind of documents: all sets together, and what each method loses to ours in each set."""
    kinds: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        kinds.setdefault(record.kind, {}).setdefault(record.set, []).append(record)
    return [table for kind, sets in kinds.items() for table in (_pooled(kind, sets), _by_set(kind, sets))]


def _pooled(kind: str, sets: dict[str, list[Record]]) -> Table:
    every = [record for own in sets.values() for record in own]
    rows: list[list[Cell | str]] = []
    for method in _methods(every):
        own = [(record, nats) for record in every if (nats := record.nats(method)) is not None]
        each = [(nats.total / record.bytes, nats.total / record.tokens, nats.exact) for record, nats in own]
        per_byte, per_token, exact = (f"{mean:.3f}" for mean in np.mean(each, axis=0))
        rows.append([method, per_byte, per_token, _lost(every, method), exact, str(len(own))])
    heads = ["method", "nats per byte", "per token", f"minus {OURS}, per token", "exact match", "documents"]
    left = [name for name in ROUTERS if any(name in each.groups and name not in each.scores for each in every)]
    note = f" Left out, as they take LoRA experts alone: {', '.join(left)}." if left else ""
    return Table(f"Documents: {kind}", heads, rows, f"Paired, with standard errors over documents.{note}")


def _by_set(kind: str, sets: dict[str, list[Record]]) -> Table:
    methods = _methods([record for own in sets.values() for record in own])
    rows: list[list[Cell | str]] = [[method, *(_lost(own, method) for own in sets.values())] for method in methods]
    return Table(f"{kind}: nats per token that each method loses to {OURS}", ["", *sets], rows, "Paired.")


def _methods(records: Sequence[Record]) -> list[str]:
    """Those that some document was scored under, oracles and rivals first, then ours."""
    known = dict.fromkeys(name for record in records for name in record.scores)
    experts = dict.fromkeys(name for record in records for name in record.components if name != "base")
    ours = [name for name in known if name not in ORDER and name not in experts]
    return [name for name in (*ORDER, *experts, *ours) if any(record.nats(name) for record in records)]


def _lost(records: Sequence[Record], method: str) -> str:
    """Nats per token under a method minus those under ours, on the documents that both were scored on; ours as is."""
    pairs = [(record.nats(method), record.nats(OURS), record.tokens) for record in records]
    both = np.array([(one.total / n, ours.total / n) for one, ours, n in pairs if one and ours]).reshape(-1, 2)
    if method == OURS and len(both):
        return f"({both[:, 1].mean():.3f})"
    if len(both) < 2:
        return ""
    found = paired_comparison(*both.T)
    return f"{found.difference:+.3f} ± {found.standard_error:.3f}"
