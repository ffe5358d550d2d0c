"""The tokenizer of a model of the transformers library, as ``model.backbone.Tokenizer``."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.subwords import SubwordTokenizer

__all__ = ["TransformersTokenizer"]


class TransformersTokenizer(SubwordTokenizer):
    """A fast tokenizer, with what its model puts around texts.

    Args:
        tokenizer: of ``AutoTokenizer``. vocab_size, ends: see ``SubwordTokenizer``.

    Raises:
        ConfigError: a slow tokenizer, or one with ids that the model's embedding has not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: Sequence[int] = ()) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
            raise ConfigError(f"expected a fast tokenizer, got {type(tokenizer).__name__}")
        self.inner = tokenizer
        added = [id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special]
        super().__init__(
            tokenizer.backend_tokenizer,
            vocab_size,
            prefix=self._before(tokenizer),
            pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            special={*tokenizer.all_special_ids, *added},
            unknown=tokenizer.unk_token_id,
            ends=ends,
        )

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
