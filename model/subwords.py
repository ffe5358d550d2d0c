"""Subwords of the tokenizers library, as ``model.backbone.Tokenizer``: of a MambaFormer, or of any other model."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import accumulate, chain
from typing import Any

import torch
from jaxtyping import Bool
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from bayes_dispatch.arguments import shown, whole
from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.model.backbone import Tokens
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["SubwordTokenizer", "train_subwords"]

WINDOW = 8  # tokens before a continuation that its text may depend on
LONGEST = 4  # bytes of a character, of which a token has one at least
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
BEGIN, PAD = "<bos>", "<pad>"  # special tokens of a tokenizer that is trained here


class SubwordTokenizer:
    """Text to subwords and back; it knows where in the text each token is.

    Args:
        backend: of the tokenizers library; a copy is kept. vocab_size: of the model's embedding, which may have more
            rows than there are tokens.
        prefix: ids that begin every text. pad: fills rows. special: ids that are no text, but for ``unknown``.
        ends: ids with which a text ends.

    Attributes:
        vocab_size: as given. pad_token_id: fills rows; nobody reads it. ends: ids with which a text ends.
        continues: (V,), which ids may continue a text: no special ones, none without a token; ends may.
        settings: the arguments after ``vocab_size``, by name, as JSON holds them.

    Raises:
        ConfigError: ids that the model's embedding has not, in the vocabulary or in another argument.
    """

    def __init__(
        self,
        backend: Tokenizer,
        vocab_size: int,
        *,
        prefix: Sequence[int],
        pad: int,
        special: Iterable[int],
        unknown: int | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        known = list(backend.get_vocab().values())
        if not known:
            raise ConfigError("expected a tokenizer with tokens, got one without any")
        if (most := max(known)) >= vocab_size:
            raise ConfigError(f"expected a tokenizer of at most {vocab_size} ids, as the embedding has, got id {most}")
        special, ends = sorted(set(special)), sorted(set(ends))
        self.settings: dict[str, Any] = {
            "prefix": list(prefix),
            "pad": pad,
            "special": special,
            "unknown": unknown,
            "ends": ends,
        }
        for name, ids in {**self.settings, "pad": [pad], "unknown": [] if unknown is None else [unknown]}.items():
            for id_ in ids:
                if not isinstance(id_, int) or isinstance(id_, bool) or not 0 <= id_ < vocab_size:
                    raise ConfigError(f"expected {name} of a text among {vocab_size} ids, got {id_!r:.80}")
        # a copy whose settings nobody changes: special tokens that are written out are text, and nothing is cut off
        self._backend = deepcopy(backend)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = vocab_size
        self.ends = frozenset(ends)
        self.continues: Bool[Tensor, " V"] = torch.zeros(vocab_size, dtype=torch.bool)
        self.continues[known] = True
        self.continues[special] = False
        self.continues[list(self.ends)] = True
        self.pad_token_id = pad
        self.prefix = tuple(prefix)
        self._control = {*special} - {unknown}
        # texts after which a text goes on: some tokenizers put a space before all that begins
        anchors = [(text, self._backend.encode(text, add_special_tokens=False).ids) for text in ("", "\n", ".", "a")]
        self._anchors = [(text, ids) for text, ids in anchors if self._goes_on(text, ids)]
        self.replacement = [id_ for id_, _, _ in self._pieces(UNFINISHED, goes_on=True)]  # a whole U+FFFD

    @classmethod
    def from_json(cls, data: bytes, vocab_size: int, settings: Mapping[str, Any] | None = None) -> "SubwordTokenizer":
        """What ``to_json`` gave.

        Args:
            settings: those of the tokenizer; ``None`` for one of ``train_subwords``.

        Raises:
            ConfigError: it is none, or one with ids that an embedding of this size has not.
        """
        try:
            backend = Tokenizer.from_str(data.decode())
        except Exception as error:  # that library raises nothing narrower
            raise ConfigError(f"expected a tokenizer of the tokenizers library, got: {error}") from None
        if settings is None and (settings := _trained(backend)) is None:
            raise ConfigError(f"expected a tokenizer with the tokens {BEGIN} and {PAD}, got one without")
        try:
            return cls(backend, vocab_size, **settings)
        except (TypeError, IndexError) as error:
            raise ConfigError(f"expected the settings of a tokenizer, got: {error}") from None

    def to_json(self) -> bytes:
        """All of it but ``vocab_size`` and ``settings``, as a tokenizer.json of that library."""
        return self._backend.to_str().encode()

    @property
    def trained(self) -> bool:
        """Whether its settings are those of ``train_subwords``, which ``to_json`` tells."""
        return self.settings == _trained(self._backend)

    def digest(self) -> str:
        """A hash of what texts become, and of ``settings``."""
        # those of ``train_subwords`` are told by the rest, and not hashed: checkpoints of training have such digests
        settings = b"" if self.trained else json.dumps(self.settings).encode()
        return hashlib.blake2b(self.to_json() + settings, digest_size=16).hexdigest()

    def tokenize(self, text: str | bytes, begin: bool = True) -> Tokens:
        """Ids and spans of ``text``: first what begins every text of this model, then what is said.

        Special tokens that are written out in the text are text.

        Raises:
            PromptError: it is no UTF-8.
        """
        given = utf8(text).decode()
        pieces = self._pieces(given, goes_on=not begin)
        at = [0, *accumulate(len(character.encode()) for character in given)]
        spans: list[tuple[int, int]] = []
        reached = 0  # what a tokenizer leaves out, such as spaces, belongs to the token after it, or to the last one
        for place, (_, start, stop) in enumerate(pieces):
            stop = len(given) if place == len(pieces) - 1 else max(stop, reached)
            spans.append((at[min(start, reached)], at[stop]))
            reached = stop
        prefix = self.prefix if begin else ()
        return Tokens((*prefix, *(id_ for id_, _, _ in pieces)), (*[(0, 0)] * len(prefix), *spans))

    def _pieces(self, text: str, *, goes_on: bool) -> list[tuple[int, int, int]]:
        """Ids of a text, and from which to which character each is."""
        for anchor, ids in [*(self._anchors if goes_on else ()), ("", [])]:
            found = self._backend.encode(anchor + text, add_special_tokens=False)
            if found.ids[: len(ids)] == ids:
                break
        pieces: list[tuple[int, int, int]] = []
        for id_, place in zip(found.ids[len(ids) :], found.offsets[len(ids) :], strict=True):
            start, stop = (max(0, each - len(anchor)) for each in place)
            if id_ in self._control and stop - start > 1:  # of a vocabulary that has it as a word like any other
                for part in (start, start + 1), (start + 1, stop):
                    inner = self._pieces(text[slice(*part)], goes_on=True)
                    pieces += [(own, part[0] + first, part[0] + last) for own, first, last in inner]
            else:
                pieces.append((id_, start, stop))
        return pieces

    def _goes_on(self, anchor: str, ids: list[int]) -> bool:
        """Whether a text after this one has no space put in front of it."""
        before = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode(f"{anchor}b", add_special_tokens=False).ids
        rest = whole[len(ids) :]
        return whole[: len(ids)] == ids and self.said([*before, *rest]) == self.said(before) + self.said(rest).strip()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens and numbers below 0; bytes that are no UTF-8 become U+FFFD.

        Raises:
            TensorError: an id above vocab_size − 1.
        """
        ids = [id_ for id_ in ids if id_ >= 0]  # a row that has ended may be filled with what is no token
        if ids and max(ids) >= self.vocab_size:
            raise TensorError(f"expected ids in 0 … {self.vocab_size - 1}, got {min(ids)} … {max(ids)}")
        text = self.said(ids)
        if UNFINISHED in text:  # some decoders give up whole runs of bytes for one that is none
            stream = self.stream(())
            text = "".join(map(stream.add, ids)) + stream.end()
        return text

    def said(self, ids: Sequence[int]) -> str:
        """What that library makes of ids."""
        return str(self._backend.decode([id_ for id_ in ids if id_ not in self.ends], skip_special_tokens=True))

    def stream(self, context: Sequence[int]) -> "SubwordStream":
        """The text that ids add, one after the other, to that of ``context``."""
        return SubwordStream(self, context)


def _trained(backend: Tokenizer) -> dict[str, Any] | None:
    """The settings of a tokenizer of ``train_subwords``, where it could be one."""
    begin, pad = backend.token_to_id(BEGIN), backend.token_to_id(PAD)
    if begin is None or pad is None:
        return None
    return {"prefix": [begin], "pad": pad, "special": sorted([begin, pad]), "unknown": None, "ends": []}


def train_subwords(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2's rules for words), the same for the same texts.

    Args:
        texts: what to learn from. vocab_size: tokens, at most: a beginning one, padding, 256 bytes, and merges.

    Raises:
        ConfigError: a vocabulary below 258, or one text in the place of several. PromptError: one that is no UTF-8.
    """
    whole("vocab_size", vocab_size, 258)
    if isinstance(texts, str | bytes):  # whose letters would be texts
        raise ConfigError(f"expected several texts, got one: {shown(texts)}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN, PAD], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((utf8(text).decode() for text in texts), trainer)
    return SubwordTokenizer.from_json(backend.to_str().encode(), backend.get_vocab_size())


class SubwordStream:
    """Text of tokens as they come: what could still change, such as half a character, waits.

    A few tokens are decoded again with each new one, from a place where a character began.
    """

    def __init__(self, tokenizer: SubwordTokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._parts: list[list[int]] = []  # each ends where a character does
        self._waiting: list[int] = []
        self._said = ""
        for token in context[-4 * WINDOW :]:
            self.add(token)

    def add(self, token: int) -> str:
        """What there is to say after one more token."""
        self._waiting.append(token)
        whole = self._tokenizer.replacement
        if not self._text(self._waiting).endswith(UNFINISHED) or self._waiting[-len(whole) :] == whole:
            return self._settled(len(self._waiting))
        return self._settled(len(self._waiting) - LONGEST) if len(self._waiting) > WINDOW else ""

    def end(self) -> str:
        """What still waited."""
        return self._settled(len(self._waiting))

    def _settled(self, count: int) -> str:
        part, self._waiting = self._waiting[:count], self._waiting[count:]
        text = self._text(part)
        new = text[len(self._said) :] if text.startswith(self._said) else self._tokenizer.said(part)
        self._parts.append(part)
        while sum(map(len, self._parts[1:])) >= WINDOW:
            del self._parts[0]
        self._said = self._text([])
        return new

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.said([*chain(*self._parts), *ids])
