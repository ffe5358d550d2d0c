"""The tokenizer of a model of the transformers library, as ``model.backbone.Tokenizer``."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.backbone import Tokens
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["TransformersTokenizer"]

WINDOW = 8  # tokens before a continuation that its text may depend on
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
        self.inner = tokenizer
        self.vocab_size = vocab_size
        self.ends = frozenset(ends)
        special = {*tokenizer.all_special_ids, *(id_ for id_, t in tokenizer.added_tokens_decoder.items() if t.special)}
        self.continues: Bool[Tensor, " V"] = torch.zeros(vocab_size, dtype=torch.bool)
        self.continues[list(tokenizer.get_vocab().values())] = True
        self.continues[list(special)] = False
        self.continues[list(self.ends)] = True
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.prefix = tuple(self._before(tokenizer))

    def tokenize(self, text: str | bytes, begin: bool = True) -> Tokens:
        """Ids and spans of ``text``: first what begins every text of this model, then what is said.

        Special tokens that are written out in the text are text.

        Raises:
            PromptError: it is no UTF-8.
        """
        given = utf8(text).decode()
        found = self.inner(
            given, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        at = [0, *accumulate(len(character.encode()) for character in given)]
        spans = [(at[start], at[stop]) for start, stop in found["offset_mapping"]]
        prefix = self.prefix if begin else ()
        return Tokens((*prefix, *found["input_ids"]), (*[(0, 0)] * len(prefix), *spans))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text = self.inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

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
    """Text of tokens as they come: what could still change, such as half a character, waits."""

    def __init__(self, tokenizer: TransformersTokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)[-WINDOW:]
        self._said = tokenizer.decode(self._ids)

    def add(self, token: int) -> str:
        """What there is to say after one more token."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(UNFINISHED):
            return ""
        new, self._ids = text[len(self._said) :], self._ids[-WINDOW:]
        self._said = self._tokenizer.decode(self._ids)
        return new

    def end(self) -> str:
        """What still waited."""
        return self._tokenizer.decode(self._ids)[len(self._said) :]
