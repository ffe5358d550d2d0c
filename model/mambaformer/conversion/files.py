"""Files of a checkpoint of the transformers library: config.json, safetensors in shards or one, tokenizer.json."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing
from torch import Tensor

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.model.subwords import SubwordTokenizer
from bayes_dispatch.storage import parse_json, read_bytes, write_json, write_output

__all__ = ["WHOLE", "Readers", "opened", "read_optional", "read_subwords", "write_subwords"]

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
MORE = "extra_special_tokens", "additional_special_tokens"  # the latter before version 5

Readers = Mapping[str, Callable[[], Tensor]]  # how each is read


def read_optional(path: Path) -> Any:
    """A JSON file; an empty object where there is none."""
    return parse_json(read_bytes(path), path) if path.is_file() else {}


def opened(directory: Path, stack: ExitStack) -> Readers:
    """The tensors of a checkpoint, memory-mapped for as long as ``stack`` is open.

    Raises:
        BundleError: there is no safetensors file, a shard is missing, or one is damaged.
    """
    index, whole = (
        directory / INDEX,
        (directory / WHOLE).is_file(),
    )  # where there are both, that library reads the latter
    if index.is_file() and not whole:
        named = read_optional(index)
        shards = named.get("weight_map") if isinstance(named, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(each, str) for each in shards.values()):
            raise BundleError(f"expected a weight_map of tensors to files in {index}, got none")
    elif whole:
        shards = dict.fromkeys([WHOLE], WHOLE)
    else:
        raise BundleError(f"expected {WHOLE} or {INDEX} in {directory}, got neither; no pickle is read")
    found: dict[str, Callable[[], Tensor]] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not (directory / shard).is_file():
            raise BundleError(f"expected the shard {shard} beside {index}, got none")
        try:
            file = stack.enter_context(safe_open(directory / shard, "pt"))
            own = file.keys()
        except (SafetensorError, OSError) as error:
            raise BundleError(f"expected a whole safetensors file {directory / shard}, got: {error}") from None
        if not whole and (elsewhere := [name for name in own if shards.get(name) != shard]):
            raise BundleError(f"expected the tensors that {index} names in {shard}, got {elsewhere[0]}, too")
        found |= {name: lambda file=file, name=name: file.get_tensor(name) for name in own}
    if not whole and (odd := sorted(set(shards) - set(found))):
        raise BundleError(f"expected the tensors that {index} names in its shards, got fewer: {odd[0]}")
    return found


def read_subwords(directory: Path, vocab_size: int) -> SubwordTokenizer:
    """The tokenizer of a checkpoint, by the tokenizers library.

    What begins every text, and which tokens are special, is as that file says; which end a text, as the configurations
    of the model and of its generation do.

    Raises:
        BundleError: there is none, or it is damaged. ConfigError: more tokens than the embedding has.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise BundleError(f"expected a tokenizer.json in {directory}, or a tokenizer to be given, got neither")
    try:
        backend = Tokenizer.from_str(read_bytes(file).decode())
    except Exception as error:  # that library raises nothing narrower
        raise BundleError(f"expected a tokenizer of the tokenizers library in {file}, got: {error}") from None
    files = [directory / f"{name}.json" for name in ("config", "generation_config", "tokenizer_config")]
    config, generation, own = map(read_optional, files)
    for path, data in zip(files, (config, generation, own), strict=True):
        if not isinstance(data, dict):
            raise BundleError(f"expected an object in {path}, got another value")

    def is_id(value: object) -> TypeGuard[int]:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size

    def known(token: object) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return backend.token_to_id(text) if isinstance(text, str) else None

    ids = {name: known(own.get(name)) for name in NAMED}
    ends: list[int] = []
    for given in (config.get("eos_token_id"), generation.get("eos_token_id"), ids["eos_token"]):
        ends += [] if given is None else given if isinstance(given, list) else [given]
    if bad := [each for each in ends if not is_id(each)]:
        raise BundleError(f"expected eos_token_id in {directory} of ids below {vocab_size}, got {bad[0]!r:.80}")
    more = [token for name in MORE if isinstance(own.get(name), list) for token in own[name]]
    special = {id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
    special |= {id_ for id_ in (*ids.values(), *map(known, more)) if id_ is not None}
    pad = next((id_ for id_ in (ids["pad_token"], config.get("pad_token_id")) if is_id(id_)), 0)
    return SubwordTokenizer(
        backend,
        vocab_size,
        prefix=_prefix(backend),
        pad=pad,
        special=special,
        unknown=ids["unk_token"],
        ends=sorted(set(ends)),
    )


def write_subwords(tokenizer: SubwordTokenizer, directory: Path) -> None:
    """What ``read_subwords`` reads but for the ends of a text, which are in config.json; that library, too."""
    backend, settings = Tokenizer.from_str(tokenizer.to_json().decode()), tokenizer.settings
    named = [*settings["prefix"], *settings["ends"], settings["pad"], *settings["special"], settings["unknown"]]
    if nameless := [id_ for id_ in named if id_ is not None and backend.id_to_token(id_) is None]:
        raise ConfigError(f"expected special ids that have tokens, for transformers to know them, got {nameless[0]}")
    if _prefix(backend) != (prefix := settings["prefix"]):
        tokens = [backend.id_to_token(id_) for id_ in prefix]
        begun = TemplateProcessing(single=[*tokens, "$A"], special_tokens=list(zip(tokens, prefix, strict=True)))
        backend.post_processor = Sequence([backend.post_processor, begun]) if backend.post_processor else begun
    chosen = (prefix[:1], settings["ends"][:1], [settings["pad"]])
    ids = {name: id_ for name, own in zip(NAMED, chosen, strict=False) for id_ in own if id_ in settings["special"]}
    if settings["unknown"] is not None:
        ids["unk_token"] = settings["unknown"]
    flagged = {id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
    more = [backend.id_to_token(id_) for id_ in settings["special"] if id_ not in flagged | set(ids.values())]
    write_output(directory / "tokenizer.json", backend.to_str().encode())
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: backend.id_to_token(id_) for name, id_ in ids.items()},
            **({MORE[0]: more} if more else {}),
        },
    )


def _prefix(backend: Tokenizer) -> list[int]:
    """Ids that this library puts before a text."""
    plain, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    before = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    return list(whole[:before])
