"""Any causal language model of the transformers library as a ``Backbone``."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as reports

from bayes_dispatch.arguments import in_a_line, shown, whole
from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.model.adaptation import Adaptation, Delta, block_of, rows_of_ones
from bayes_dispatch.model.backbone import check_tokens
from bayes_dispatch.model.mambaformer.fingerprint import Fingerprint
from bayes_dispatch.model.mambaformer.token_model import check_ids
from bayes_dispatch.model.transformers.parts import ModelParts
from bayes_dispatch.model.transformers.probes import called_matrices, ways_of_reading
from bayes_dispatch.model.transformers.session import LOGITS_AT_ONCE, TransformersSession
from bayes_dispatch.model.transformers.tokenizer import TransformersTokenizer
from bayes_dispatch.storage import read_saved

__all__ = ["DTYPES", "TransformersBackbone"]

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class _Cast(NamedTuple):
    """Fingerprints of weights before and after they were cast, and the dtype before."""

    before: str
    after: str
    dtype: torch.dtype


class TransformersBackbone:
    """A language model whose linear layers and embeddings can be adapted, row by row of a batch.

    Args:
        model: any ``AutoModelForCausalLM``, on its device and in its dtype; it is put into evaluation.
        tokenizer: its fast tokenizer. name: where it comes from, a path or a name.

    Attributes:
        tokenizer: see ``TransformersTokenizer``. depth: blocks. cuts: whether its blocks can run in two parts.

    Raises:
        ConfigError: something else than such a model, which PEFT's is; one that does not run, or gives NaN; blocks that
            cannot be found, predictions that look ahead or change when the model reads on, a tokenizer that does not
            fit.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str = "") -> None:
        given: Any = model
        if not isinstance(given, PreTrainedModel):
            got = f"a {type(given).__name__}: its unload() gives one" if hasattr(given, "unload") else shown(given)
            raise ConfigError(f"expected a model of the transformers library, got {got}")
        self.model = model.eval()
        self.name = name
        self.parts = ModelParts(model)
        self._path = _path_of(model, self.parts)  # of the list of blocks
        self.depth = self.parts.depth
        self.vocab_size = self.parts.vocab_size
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        self.tokenizer = TransformersTokenizer(tokenizer, self.vocab_size, [*ends, *_ends(tokenizer)])
        self._factors: dict[str, tuple[tuple[int, int], tuple[Tensor, Tensor, Tensor]]] = {}
        self._fingerprint = Fingerprint()
        self._cast: _Cast | None = None
        self._called = called_matrices(model, self.parts)
        self.parts.continues, self.cuts = ways_of_reading(model, self.parts)

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
    ) -> "TransformersBackbone":
        """A model and its tokenizer from a directory, or from the hub under a name that is no directory.

        Nothing of the directory is executed, and no pickle is read.

        Raises:
            ConfigError: there is no causal language model with all its weights, or no tokenizer, the device is not
                there, or a dtype that is none.
        """
        if isinstance(dtype, str) and dtype not in DTYPES:
            raise ConfigError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"expected a device of this machine, got {device}: {in_a_line(error)}") from None
        local = Path(path).is_dir()
        if not local and (isinstance(path, Path) or not HUB_NAME.fullmatch(path)):
            raise ConfigError(f"expected a directory, or a name on the hub, got {path}")
        read = partial(_read, dtype=dtype, device=device, local=local)
        model, tokenizer = read_saved(Path(path), "config.json", read) if local else read(path)
        return cls(model, tokenizer, str(path))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TransformersBackbone":
        """A backbone of a copy of the model, in parts of its own: those of this one would not hear its layers."""
        twin = copy(self)
        twin.model = deepcopy(self.model, memo)
        twin.parts = ModelParts(twin.model)
        twin.parts.continues = self.parts.continues
        twin._factors, twin._fingerprint = {}, Fingerprint()
        return twin

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.model.dtype

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of blend weights: float32 at least, in which scales near 1 are told from 1."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def loaded_dtype(self) -> torch.dtype:
        """Of the weights as they were loaded, before ``cast``."""
        return self.dtype if self._cast is None else self._cast.dtype

    @property
    def device(self) -> torch.device:
        """Of the embedding, where tokens go."""
        return self.parts.device

    @property
    def continues(self) -> bool:
        """Whether it reads several tokens at once from a state that it kept; if not, it reads them one by one."""
        return self.parts.continues

    @property
    def longest(self) -> int | None:
        """Tokens that it was made for; ``None`` where there is no bound."""
        return self.parts.longest

    def fingerprint(self) -> str:
        """A hash of all weights in float32: equal for equal weights only.

        A model that was cast has that of the weights that it was loaded with, until one changes.
        """
        own = self._fingerprint.of(self.model)
        return self._cast.before if self._cast is not None and own == self._cast.after else own

    def cast(self, dtype: torch.dtype) -> "TransformersBackbone":
        """The model in another dtype, which keeps its fingerprint: experts of the one are experts of the other.

        The model itself is cast: this backbone is not to be used afterwards.
        """
        before, loaded = self.fingerprint(), self.loaded_dtype
        nn.Module.to(self.model, dtype)
        twin = TransformersBackbone(self.model, self.tokenizer.inner, self.name)
        twin._cast = _Cast(before, twin.fingerprint(), loaded)
        return twin

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix that a delta may be added to, in order; an embedding is (width, tokens)."""
        return {name: self.parts.shapes[name] for name in self._called}

    @property
    def embeddings(self) -> frozenset[str]:
        """Those matrices whose columns are looked up by token."""
        return frozenset(name for name in self._called if isinstance(self.parts.matrices[name], nn.Embedding))

    def parameter(self, name: str) -> Tensor | None:
        """A weight or a bias of the model, as it is kept; ``None`` where there is none."""
        module, _, own = name.rpartition(".")
        found = getattr(dict(self.model.named_modules()).get(module), own, None)
        return found if isinstance(found, Tensor) else None

    def adaptable(self) -> dict[str, int]:
        """Rank of each matrix that singular-value scales adapt unless told otherwise: linear layers within blocks."""
        return {name: min(shape) for name, shape in self.linears().items() if name.startswith(f"{self._path}.")}

    def block_of(self, matrix: str) -> int:
        """The block that a matrix is in; one after all blocks counts as the last's, one before them as the first's."""
        if matrix.startswith(f"{self._path}."):
            return block_of(matrix.removeprefix(self._path))
        inner = self._path.removesuffix(self.parts.blocks)
        return 0 if matrix.startswith(inner) else self.depth - 1

    def cut(self, matrices: Iterable[str]) -> int:
        """How many blocks can run once for all adaptations of these matrices."""
        return min(map(self.block_of, matrices), default=0) if self.cuts else 0

    def open(
        self, rows: int, capacity: int, adaptation: Adaptation | None = None, blocks: range | None = None
    ) -> TransformersSession:
        """See ``Backbone``."""
        chosen = range(self.depth) if blocks is None else blocks
        rows, capacity = whole("rows", rows, 1), whole("capacity", capacity, 1)
        self.parts.check_length(capacity)
        if not chosen or chosen.step != 1 or chosen.start < 0 or chosen.stop > self.depth:
            raise ConfigError(f"expected some of {self.depth} blocks, got {chosen}")
        if chosen != range(self.depth) and not self.cuts:
            raise ConfigError(f"expected all {self.depth} blocks of a model that cannot be cut, got {chosen}")
        return TransformersSession(self.parts, rows, capacity, self.deltas(adaptation, rows), chosen)

    def score(
        self, ids: Tensor, tokens: Tensor | None = None, adaptation: Adaptation | None = None
    ) -> Float[Tensor, "R T"]:
        """See ``Backbone``."""
        check_tokens(ids, tokens, len(ids))
        check_ids(ids, self.vocab_size)
        self.parts.check_length(ids.shape[1])
        ids = ids.to(self.device, torch.long)
        mask = (
            None if tokens is None else torch.arange(ids.shape[1], device=self.device) < tokens.to(self.device)[:, None]
        )
        deltas, said = self.deltas(adaptation, len(ids)), []
        with self.parts.adding(deltas):
            arguments = {} if mask is None else {"attention_mask": mask.long()}
            hidden = self.parts.run(range(self.depth), ids, None, use_cache=False, **arguments)
            step = max(1, LOGITS_AT_ONCE // (len(ids) * self.vocab_size))
            for start in range(0, ids.shape[1] - 1, step):
                stop = min(start + step, ids.shape[1] - 1)
                piece = hidden[:, start:stop], ids[:, start + 1 : stop + 1]
                said.append(
                    checkpoint(self._said, *piece, deltas, use_reentrant=False)
                    if torch.is_grad_enabled()
                    else self._said(*piece, deltas)
                )
        first = hidden.new_full((len(ids), 1), torch.nan, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return torch.cat([first, *said], 1)

    def _said(self, hidden: Tensor, following: Tensor, deltas: Mapping[str, Delta]) -> Tensor:
        with self.parts.adding(deltas):
            logits = self.parts.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # of tokens in a row: of (B, V, T) it takes three times as long
        return -cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view_as(following)

    def deltas(self, adaptation: Adaptation | None, rows: int | None = None) -> dict[str, Delta]:
        """What an adaptation adds to each matrix, on this device and in this dtype.

        Raises:
            TensorError: matrices, ranks or rows that the model does not have.
        """
        found: dict[str, Delta] = {}
        if adaptation is None:
            return found
        if adaptation.rows not in (None, rows):
            raise TensorError(f"expected scales of {rows} rows, got {adaptation.rows}")
        shapes = self.linears()
        for name, delta in adaptation.deltas.items():
            if shapes.get(name) != (delta.up.shape[0], delta.down.shape[1]):
                got = delta.up.shape[0], delta.down.shape[1]
                raise TensorError(f"expected a delta of {name} of shape {shapes.get(name)}, got {got}")
            found[name] = Delta(*(each.to(self.device, self.dtype) for each in delta))
        for name, scales in adaptation.scales.items():
            rank = scales.shape[-1]  # fewer than all are those of the largest singular values
            if name not in shapes or rank > min(shapes[name]):
                raise TensorError(f"expected scales of {name} for a matrix {shapes.get(name)}, got {rank}")
            if not scales.requires_grad and rows_of_ones(scales) is True:  # as where base alone is asked for
                continue
            wide = torch.promote_types(scales.dtype, self.dtype)  # near 1 a bfloat16 tells no small change
            change = (scales.to(self.device, wide) - 1).to(self.dtype)
            left, values, right = self.factors(name)
            own = Delta(left[:, :rank], right[:rank], values[:rank] * change)
            found[name] = own if name not in found else Delta.joined([found[name], own])
        return found

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """While ``score`` is differentiated, blocks run again rather than keep all that they computed.

        Reads of a session that are differentiated have no place here: their blocks would run without what was kept.

        Raises:
            ConfigError: the model cannot.
        """
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(f"expected a model that can be checkpointed, got a {type(self.model).__name__}")

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.parts.adding_as_now()

        again = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        for layer in layers:  # what is within them stays in evaluation
            vars(layer).update(training=True, gradient_checkpointing=True, _gradient_checkpointing_func=again)
        try:
            yield
        finally:
            for layer in layers:
                vars(layer).update(training=False, gradient_checkpointing=False)

    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, r), s (r,) and Vᵀ (r, in) of a matrix; computed once, in float32 or better."""
        weight = _matrix(self.parts.matrices[name])
        key = weight.data_ptr(), weight._version
        if self._factors.get(name, (None,))[0] != key:
            with torch.no_grad():
                wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
                factors = torch.linalg.svd(wide, full_matrices=False)
            left, values, right = (each.to(self.dtype).contiguous() for each in factors)
            self._factors[name] = key, (left, values, right)
        return self._factors[name][1]


def _matrix(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ConfigError(f"expected a matrix of numbers for singular values, got a {type(module).__name__}")
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight


def _path_of(model: PreTrainedModel, parts: ModelParts) -> str:
    base = next(name for name, module in model.named_modules() if module is model.base_model)
    return f"{base}.{parts.blocks}" if base else parts.blocks


def _ends(tokenizer: Any) -> list[int]:
    end = getattr(tokenizer, "eos_token_id", None)
    return [] if end is None else [end]


def _read(
    path: str | Path, dtype: torch.dtype | str, device: str | torch.device, local: bool
) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a directory or a name on the hub."""
    if local and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"expected a model's directory with a config.json, got {path}")
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        if type(config) in AutoModelForCausalLM._model_mapping:
            with _bars_at_a_terminal():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
                )
            model, found = loaded
            nn.Module.to(model, device)
    except Exception as error:  # a config can make that library fail in any way
        reason = in_a_line(error) if local else f"no such directory, and from the hub: {in_a_line(error)}"
        raise ConfigError(f"expected a causal language model in {path}, got {reason}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"expected a causal language model, got {type(config).__name__} in {path}")
    if missing := sorted(found["missing_keys"]):  # that library would draw them at random
        raise ConfigError(f"expected all weights of the model in {path}, got none of {missing[0]}")
    try:
        return model, AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:
        none = local and not any(Path(path).glob("tokenizer*"))
        raise ConfigError(
            f"expected a tokenizer in {path}, got {'none: no tokenizer.json' if none else in_a_line(error)}"
        ) from None


@contextmanager
def _bars_at_a_terminal() -> Iterator[None]:
    """That library shows its progress bars everywhere: in logs they would be noise."""
    hidden = reports.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        reports.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            reports.enable_progress_bar()
