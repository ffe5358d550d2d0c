"""The tokenizer of a model of the transformers library, as ``model.backbone.Tokenizer``."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import accumulate, chain

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.backbone import Tokens
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["TransformersTokenizer"]

WINDOW = 8  # tokens before a continuation that its text may depend on
LONGEST = 4  # bytes of a character, of which a token has one at least
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TransformersTokenizer:
    """A fast tokenizer: it knows where in the text each token is.

    Args:
        tokenizer: of ``AutoTokenizer``. vocab_size: of the model's embedding, which may have more rows than tokens.

    Attributes:
        vocab_size: as given. pad_token_id: fills rows; nobody reads it. ends: ids with which a text ends.
        continues: (V,), which ids may continue a text: no special ones, none without a token; ends may.

    Raises:
        ConfigError: a slow tokenizer, or one with ids that the model's embedding has not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: Sequence[int] = ()) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(f"expected a fast tokenizer, got {type(tokenizer).__name__}")
        if (most := max(tokenizer.get_vocab().values())) >= vocab_size:
            raise ConfigError(f"expected a tokenizer of at most {vocab_size} ids, as the embedding has, got id {most}")
        if outside := [end for end in ends if not 0 <= end < vocab_size]:
            raise ConfigError(f"expected ends of a text among {vocab_size} ids, got {outside[0]}")
        self.inner = tokenizer
        # a copy whose settings nobody changes: special tokens that are written out are text, and nothing is cut off
        self._backend = deepcopy(tokenizer.backend_tokenizer)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = vocab_size
        self.ends = frozenset(ends)
        special = {*tokenizer.all_special_ids, *(id_ for id_, t in tokenizer.added_tokens_decoder.items() if t.special)}
        self.continues: Bool[Tensor, " V"] = torch.zeros(vocab_size, dtype=torch.bool)
        self.continues[list(tokenizer.get_vocab().values())] = True
        self.continues[list(special)] = False
        self.continues[list(self.ends)] = True
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.prefix = tuple(self._before(tokenizer))
        self._control = special - {tokenizer.unk_token_id}
        # texts after which a text goes on: some tokenizers put a space before all that begins
        anchors = [(text, self._backend.encode(text, add_special_tokens=False).ids) for text in ("", "\n", ".", "a")]
        self._anchors = [(text, ids) for text, ids in anchors if self._goes_on(text, ids)]
        self.replacement = [id_ for id_, _, _ in self._pieces(UNFINISHED, goes_on=True)]  # a whole U+FFFD

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
        """The text of ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text = self.said(ids)
        if UNFINISHED in text:  # some decoders give up whole runs of bytes for one that is none
            stream = self.stream(())
            text = "".join(map(stream.add, ids)) + stream.end()
        return text

    def said(self, ids: Sequence[int]) -> str:
        """What that library makes of ids."""
        return str(self._backend.decode([id_ for id_ in ids if id_ not in self.ends], skip_special_tokens=True))

    def stream(self, context: Sequence[int]) -> "TransformersStream":
        """The text that ids add, one after the other, to that of ``context``."""
        return TransformersStream(self, context)

    def chat(self) -> tuple[tuple[int, ...], ...]:
        """What the model's chat template puts before all else, after a reply, and before and after a user's words.

        Nothing where there is no template.

        Raises:
            ConfigError: a template that does not take turns of a user and replies of an assistant.
        """
        if not self.inner.chat_template:
            return ()
        marks = ["first words", "one reply", "last words"]
        turns = [{"role": ("user", "assistant")[n % 2], "content": mark} for n, mark in enumerate(marks)]
        try:
            texts = [
                str(self.inner.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
                for said in (turns[:1], turns)
            ]
        except Exception as error:  # a template may raise whatever it wants
            raise ConfigError(f"expected a chat template of turns and replies, got {error}") from None
        if any(mark not in text for mark, text in zip(marks, texts[:1] + texts[1:] * 2, strict=True)):
            raise ConfigError("expected a chat template that shows what is said, got one that does not")

        def around(text: str, mark: str) -> tuple[list[int], list[int]]:
            """Tokens before and after a mark."""
            whole, own = self._parsed(text), list(self.tokenize(mark, begin=False).ids)
            for place in range(len(whole)):
                if whole[place : place + len(own)] == own:
                    return whole[:place], whole[place + len(own) :]
            before, _, after = text.partition(mark)
            return self._parsed(before), self._parsed(after)

        head, after = around(texts[0], marks[0])
        between, _ = around(texts[1].partition(marks[1])[2], marks[2])
        same = 0
        while same < min(len(head), len(between) - 1) and head[-1 - same] == between[-1 - same]:
            same += 1
        pieces = head[: len(head) - same], between[: len(between) - same], head[len(head) - same :], after
        return tuple(map(tuple, pieces))

    def _parsed(self, text: str) -> list[int]:
        """Ids of a text whose special tokens are what they are called."""
        return list(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"])

    @staticmethod
    def _before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
        plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        count = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        return list(whole[:count])


class TransformersStream:
    """Text of tokens as they come: what could still change, such as half a character, waits.

    A few tokens are decoded again with each new one, from a place where a character began.
    """

    def __init__(self, tokenizer: TransformersTokenizer, context: Sequence[int]) -> None:
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
