"""A bundle as a model of lm-eval, the language model evaluation harness of EleutherAI.

    python examples/lm_eval_model.py --model bayes-dispatch --tasks conventions --include_path examples --device cpu

It is lm-eval's own command with one more model. See examples/README.md.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

import bayes_dispatch as bd

__all__ = ["BayesDispatchLM"]

MAX_NEW_TOKENS = 256  # where a task says nothing


@register_model("bayes-dispatch")
class BayesDispatchLM(LM):
    """Each context is read, dispatched, and gone on with under its own blend of experts.

    Args:
        bundle: loaded, or its directory; ``None`` for the one that ships with the package.
        blend: of ``bd.as_blend``, or an expert's name, or ``"base"``.
        seed: of posterior draws and sampling. device: where it runs; lm-eval gives cuda:0 unless told.
        batch_size: lm-eval always gives one. It is not needed: texts of similar lengths are read together.
    """

    def __init__(
        self,
        bundle: bd.Bundle | str | None = None,
        blend: str = "posterior_predictive",
        seed: int = 0,
        device: str = "cpu",
        batch_size: int | str = 1,
    ) -> None:
        super().__init__()
        self.bundle = bundle if isinstance(bundle, bd.Bundle) else bd.load_bundle(bundle, device=device)
        self.blend, self.seed = blend, seed
        # Of a text without context nothing is known before its first token: every blend is as likely as any other.
        self.unread = replace(self.bundle, dispatcher=bd.Dispatcher.flat(self.bundle.experts.names), gate=None)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, in nats, and whether its every token is the most probable one."""
        return self._scored([_divided(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of each text, in nats; it is read in one piece."""
        return [score for score, _ in self._scored([("", *request.args) for request in requests])]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What follows each context, without the text that it is to end with."""
        generator, alike = bd.TwoPassGenerator(self.bundle), defaultdict(list)
        texts = [""] * len(requests)
        for n, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(n)
        for places in alike.values():
            settings: dict[str, Any] = requests[places[0]].args[1]
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            do_sample = settings.get("do_sample", False)
            found = generator.generate(
                [requests[n].args[0] for n in places],
                blend=self.blend,
                max_new_tokens=settings.get("max_gen_toks", MAX_NEW_TOKENS),
                do_sample=do_sample,
                temperature=settings.get("temperature", 1.0) if do_sample else 1.0,
                seed=self.seed,
                stop=stops,
            )
            for n, text in zip(places, found.texts, strict=True):
                texts[n] = text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=None)]
        return texts

    def _scored(self, texts: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Contexts and continuations; those without context are scored apart."""
        results: dict[int, tuple[float, bool]] = {}
        for system, places in (
            (self.bundle, [n for n, (context, _) in enumerate(texts) if context]),
            (self.unread, [n for n, (context, _) in enumerate(texts) if not context]),
        ):
            if places:
                documents = [_document(*texts[n]) for n in places]
                scores = bd.compare_blends(system, documents, [self.blend], self.seed).scores
                for n, found in zip(places, [score.scored for score in scores], strict=True):
                    results[n] = float(found.log_probability.sum()), bool(found.right.all())
        return [results[n] for n in range(len(texts))]


def _divided(context: str, continuation: str) -> tuple[str, str]:
    """White space where they meet is the continuation's, as in lm-eval's own models: tokens may begin with it."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _document(context: str, continuation: str) -> bd.Document:
    text = context + continuation
    seen = context or text[:1]  # a document needs a prompt; the flat dispatcher does not look at it
    return bd.Document(text, len(seen.encode()), ((len(context.encode()), len(text.encode())),))


if __name__ == "__main__":
    cli_evaluate()
