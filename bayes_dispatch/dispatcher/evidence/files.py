"""Evidence in a NumPy ``.npz`` file of plain arrays: for ``bayes-dispatch fit``, and kept in bundles."""

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bayes_dispatch.arguments import shown
from bayes_dispatch.dispatcher.evidence.evidence import VIEWS, Evidence
from bayes_dispatch.errors import EvidenceError
from bayes_dispatch.storage import write_output

__all__ = ["EvidenceFile", "read_evidence", "write_evidence"]

ARRAYS = (*VIEWS, "lengths", "labels", "mixtures")


class EvidenceFile(NamedTuple):
    """Evidence of N prompts, with labels and mixtures as ``Dispatcher.fit`` takes them, where the file has them."""

    evidence: Evidence
    labels: np.ndarray | None
    mixtures: np.ndarray | None


def read_evidence(path: Path) -> EvidenceFile:
    """Read the arrays ``hidden``, ``counts``, ``surprise`` (one at least), ``lengths``, ``labels`` and ``mixtures``.

    Raises:
        EvidenceError: no such file, no ``.npz`` file, pickled objects in it, arrays of other names, or bad evidence.
    """
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise EvidenceError(f"expected a readable .npz file {path}, got: {error.strerror or error}") from None
    except Exception as error:  # damaged, encrypted, of arrays that no memory holds: each has an error of its own
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise EvidenceError(f"expected an .npz file of plain arrays at {path}, got {reason}") from None
    if unknown := arrays.keys() - set(ARRAYS):
        raise EvidenceError(
            f"expected arrays of the names {', '.join(ARRAYS)} in {path}, got {', '.join(sorted(unknown))}"
        )
    views = {name: arrays[name] for name in VIEWS if name in arrays}
    return EvidenceFile(Evidence(views, arrays.get("lengths")), arrays.get("labels"), arrays.get("mixtures"))


def write_evidence(
    path: Path, evidence: Evidence, labels: np.ndarray | None = None, mixtures: np.ndarray | None = None
) -> None:
    """Write what ``read_evidence`` reads; no view may be missing for some prompts alone.

    Raises:
        EvidenceError: something is missing, or there are other views.
    """
    if other := evidence.views.keys() - set(VIEWS):
        raise EvidenceError(f"expected evidence of the views {', '.join(VIEWS)} for {path}, got {shown(sorted(other))}")
    if any(mask.any() for mask in evidence.missing.values()) or evidence.lengths is None:
        raise EvidenceError(f"expected evidence with all views of all prompts for {path}, got missing ones")
    file = io.BytesIO()
    known = {name: values for name, values in (("labels", labels), ("mixtures", mixtures)) if values is not None}
    np.savez(file, allow_pickle=False, lengths=evidence.lengths, **evidence.views, **known)
    write_output(path, file.getvalue())
