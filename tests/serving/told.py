"""What an engine tells of a request, kept for tests."""

from threading import Event as Flag

from bayes_dispatch.serving.work import Begun, Ended, Event, Wrote

__all__ = ["Held", "Told"]


class Told:
    """What an engine told of a request; in the order in which it may."""

    def __init__(self) -> None:
        self.begun: Begun | None = None
        self.tokens: list[Wrote] = []
        self.ended: Ended | None = None
        self.wrote, self.over = Flag(), Flag()

    def __call__(self, event: Event) -> None:
        assert self.ended is None
        if isinstance(event, Begun):
            assert self.begun is None
            self.begun = event
        elif isinstance(event, Wrote):
            assert self.begun is not None
            self.tokens.append(event)
            self.wrote.set()
        else:
            self.ended = event
            self.over.set()

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    def why(self) -> str:
        assert self.over.wait(600)
        assert self.ended is not None
        return self.ended.reason


class Held(Told):
    """Holds the engine up where its prompt has been dispatched, until ``go``."""

    def __init__(self) -> None:
        super().__init__()
        self.go = Flag()

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, Begun):
            assert self.go.wait(60)
