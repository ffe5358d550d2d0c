"""How what the user says becomes tokens of a conversation: a chat template's around it, or nothing."""

from dataclasses import dataclass

from bayes_dispatch.inference.chat.state import MAX_CONTEXT, Transcript
from bayes_dispatch.model.backbone import Tokenizer, Tokens

__all__ = ["Form"]


@dataclass(frozen=True)
class Form:
    """What stands around turns.

    Attributes:
        begin: ids before all else. closing: after a reply. before, after: around what the user says.
        ends: ids with which a reply ends. stop: text with which one ends unless told otherwise.
    """

    begin: tuple[int, ...]
    closing: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    ends: frozenset[int]
    stop: str | None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Form":
        """That of the model's chat template, where it has one: a reply ends as the model ends its turns.

        Else there is nothing between the turns, and a reply ends with a line.
        """
        template: tuple[tuple[int, ...], ...] = getattr(tokenizer, "chat", tuple)()  # not every tokenizer knows of one
        if not template:
            return cls(tokenizer.tokenize(b"").ids, (), (), (), tokenizer.ends, "\n")
        begin, closing, before, after = template
        end = {id_ for id_ in closing[:1] if not tokenizer.continues[id_]}  # a special one, not a word
        return cls(begin, closing, before, after, tokenizer.ends | end, None)

    @property
    def around(self) -> int:
        """Tokens that a turn may have beside its words."""
        return len(self.closing) + len(self.before) + len(self.after)

    def room(self, longest: int | None) -> int:
        """Tokens that a transcript may have in a model made for ``longest``; ``MAX_CONTEXT`` without a bound."""
        return MAX_CONTEXT if longest is None else longest - len(self.begin)

    def heard(self, transcript: Transcript, data: bytes, words: Tokens) -> Transcript:
        """The transcript, followed by what the user says.

        Args:
            data: the words. words: their tokens, without what begins a text.
        """
        closing = self.closing if len(transcript) else ()
        if closing and transcript.own[-1] and transcript.ids[-1] == closing[0]:  # the model has ended its turn
            closing = closing[1:]
        text = transcript.followed_by((*closing, *self.before))
        return text.followed_by(words.ids, words.spans, data, user=True).followed_by(self.after)
