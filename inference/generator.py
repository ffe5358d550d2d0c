"""Two-pass generation: read the prompt, dispatch, and generate under the blended experts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.two_pass.blends import DEFAULT_BLEND, Blend, as_blend
from bayes_dispatch.inference.two_pass.generation import Generation, Streamed
from bayes_dispatch.inference.two_pass.prompts import Stop, Writing
from bayes_dispatch.inference.two_pass.second_pass import GenerationRequest, SecondPass
from bayes_dispatch.inference.two_pass.system import Strategy, System, check_system, cut_of

if TYPE_CHECKING:
    from bayes_dispatch.inference.chat.chat import Chat

__all__ = ["TwoPassGenerator"]


class TwoPassGenerator:
    """Generates for prompts of any lengths, each under its own blend of experts.

    Args:
        bundle: model, tokenizer, experts and dispatcher.

    Raises:
        ForeignExpertError: the experts were made for another model.
        ConfigError: the dispatcher was fitted for other experts.
    """

    def __init__(self, bundle: System) -> None:
        check_system(bundle)
        self.bundle = bundle
        self._cut = cut_of(bundle)

    def generate(
        self,
        prompts: Sequence[str | bytes],
        *,
        blend: Blend | str = DEFAULT_BLEND,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int | None = None,
        stop: Stop = None,
        own_evidence: bool = True,
        strategy: Strategy | None = None,
        false_alarm_rate: float | None = None,
        abstain: bool = False,
        use_cache: bool = True,
        progress: bool = False,
    ) -> Generation:
        """Continue each prompt under its blended experts.

        Args:
            prompts: UTF-8, with room for what follows in what the model can read.
            blend: how the posterior becomes particles, or its name (``as_blend``); also an expert's, or ``"base"``.
            max_new_tokens: tokens to generate, 1 to 65,536; for our own model these are bytes.
            do_sample, temperature: see ``Sampling``; greedy by default.
            seed: of posterior draws and sampling; ``None`` for a fresh one. A prompt's result does not depend on the
                prompts beside it, except that copies of a prompt draw differently, if not from a strategy's posterior.
            stop: a text with which each ends; a list for any of several.
            own_evidence: whether generated tokens filter the particles, as those of the prompt do: the joint predictive
                of all tokens, where they are drawn from it. If not, the weights stay as the prompt left them.
            strategy: gives the posterior; the system's dispatcher by default. What it costs is not counted.
            false_alarm_rate: ask the system's gate (``Gate``), and run base alone for prompts that it finds foreign to
                all experts; at most this share of prompts of their domains is. ``None`` asks nobody.
            abstain: generate nothing for them instead.
            use_cache: ``False`` recomputes everything for each token: the slow reference.
            progress: show a progress bar over tokens.

        Raises:
            PromptError: see ``check_prompts``. ConfigError: a setting out of range. UnknownNameError: of a blend.
        """
        writing, named = Writing.of(max_new_tokens, do_sample, temperature, stop), self._named(blend)
        request = GenerationRequest(named, writing, seed, own_evidence, strategy, false_alarm_rate, abstain, use_cache)
        run = SecondPass(self.bundle, self._cut, prompts, request)
        count, max_new_tokens = len(run.prompts), writing.max_new_tokens
        ids = np.full((count, max_new_tokens), self.bundle.tokenizer.pad_token_id)
        numbers = np.full((3, count, max_new_tokens), np.nan)
        lengths = np.zeros(count, dtype=int)
        paths: list[list[np.ndarray]] = [[] for _ in range(count)]
        with tqdm(total=count * max_new_tokens, desc=named.name, disable=None if progress else True) as bar:
            for token, chosen, _, _ in run.tokens():
                place = chosen, lengths[chosen]
                ids[place] = token.ids
                numbers[:, *place] = token.log_probabilities, token.entropy, token.mutual_information
                lengths[chosen] += 1
                for n, own in zip(chosen, token.weights, strict=True):
                    paths[n].append(own)
                bar.update(len(chosen))
        return Generation(
            prompts=run.prompts,
            texts=tuple(run.texts.get(n, "") for n in range(count)),
            token_ids=ids,
            log_probabilities=numbers[0],
            posterior=run.posterior(range(count)),
            blend=named.name,
            weights=np.stack([run.weights[n] for n in range(count)]),
            predictive_entropy=numbers[1],
            mutual_information=numbers[2],
            lengths=lengths,
            rows=np.array([run.rows.get(n, 0) for n in range(count)]),
            paths=tuple(np.concatenate([run.paths[n], *(each[None] for each in paths[n])]) for n in range(count)),
            cost=run.cost,
            foreign=np.array([n in run.foreign for n in range(count)]),
            p_values=np.array([run.p_values.get(n, np.nan) for n in range(count)]),
        )

    def stream(
        self,
        prompts: Sequence[str | bytes],
        *,
        blend: Blend | str = DEFAULT_BLEND,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int | None = None,
        stop: Stop = None,
        own_evidence: bool = True,
        strategy: Strategy | None = None,
        false_alarm_rate: float | None = None,
        abstain: bool = False,
    ) -> Iterator[Streamed]:
        """What ``generate`` gives with the same arguments, token by token as they come.

        Prompts of similar length go on together; others wait for them. Settings are checked at once, not at the first
        token; whether the blend fits the posterior is known then. A prompt that the gate made abstain gives none.

        Raises:
            PromptError, ConfigError: see ``generate``.
        """
        writing, named = Writing.of(max_new_tokens, do_sample, temperature, stop), self._named(blend)
        request = GenerationRequest(named, writing, seed, own_evidence, strategy, false_alarm_rate, abstain)
        run = SecondPass(self.bundle, self._cut, prompts, request)
        return self._stream(run)

    def chat(
        self,
        *,
        blend: Blend | str = DEFAULT_BLEND,
        seed: int = 0,
        threshold: float = 0.01,
        max_context: int | None = None,
        own_evidence: bool = False,
        file: str | Path | None = None,
    ) -> "Chat":
        """A conversation: caches stay over the turns, the weights follow what the user says (``inference.chat``).

        Args:
            blend: as in ``generate``. seed: of posterior draws and sampling.
            threshold: the chat re-adapts when its new posterior predicts otherwise by more nats a token.
            max_context: tokens of the transcript; where more are said, the oldest half is forgotten. 4096 by default,
                or what the model can read.
            own_evidence: whether the model's tokens go on filtering the particles when its reply has ended.
            file: a new one; what ``resume_chat`` goes on from is written to it now and after every turn.

        Raises:
            ConfigError: a setting out of range, a file that exists, or a blend that cannot be kept in one.
            OSError: the file cannot be written.
        """
        from bayes_dispatch.inference.chat.chat import Chat
        from bayes_dispatch.inference.chat.form import Form
        from bayes_dispatch.inference.chat.state import ChatSettings

        if max_context is None:
            max_context = min(4096, Form.of(self.bundle.tokenizer).room(self.bundle.model.longest))
        settings = ChatSettings(self._named(blend), seed, threshold, max_context, own_evidence)
        chat = Chat(self.bundle, settings, None if file is None else Path(file))
        if file is not None:
            if Path(file).exists():
                raise ConfigError(
                    f"expected a new file for a chat, got {file}, which exists: resume_chat goes on from it"
                )
            chat.save(file)
        return chat

    def resume_chat(self, file: str | Path) -> "Chat":
        """Go on with a chat from its file, as it would have gone on; the file is written after every turn.

        Raises:
            BundleError: the file is missing, damaged, or of a chat with another system; nothing is unpickled.
        """
        from bayes_dispatch.inference.chat.chat import Chat
        from bayes_dispatch.inference.chat.file import read_chat

        settings, state = read_chat(Path(file), self.bundle)
        return Chat(self.bundle, settings, Path(file), state)

    def _stream(self, run: SecondPass) -> Iterator[Streamed]:
        posteriors: dict[int, DispatchPosterior] = {}
        for token, chosen, ended, pieces in run.tokens():
            for i, n in enumerate(chosen):
                last = bool(ended[i])
                if n not in posteriors:
                    posteriors[n] = run.posterior([n])
                yield Streamed(
                    prompt=int(n),
                    text=pieces[i],
                    token_id=int(token.ids[i]),
                    log_probability=float(token.log_probabilities[i]),
                    predictive_entropy=float(token.entropy[i]),
                    mutual_information=float(token.mutual_information[i]),
                    weights=token.weights[i],
                    posterior=posteriors[n],
                    last=last,
                    foreign=int(n) in run.foreign,
                    p_value=run.p_values.get(int(n), float("nan")),
                )

    def _named(self, blend: Blend | str) -> Blend:
        return as_blend(blend, self.bundle.experts.components)
