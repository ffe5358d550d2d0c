"""A bank for vLLM is the bank, request by request; the engine tells what a server writes, lets go of what nobody wants,
and refuses what a server cannot do. vLLM itself is checked by `make check-vllm`.

The server here is a stand-in: it speaks vLLM's streamed completions, and its tokens are the model's own under the
weights that it was sent.
"""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event as Flag
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bayes_dispatch.app.commands.main import main
from bayes_dispatch.errors import BayesDispatchError, BundleError, ConfigError, PromptError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.inference.two_pass.blends import as_blend
from bayes_dispatch.inference.two_pass.prompts import Writing
from bayes_dispatch.serving import replicas
from bayes_dispatch.serving.engine import BatchedEngine, Limits
from bayes_dispatch.serving.replicas import ReplicatedEngine
from bayes_dispatch.serving.vllm import engine as vllm_engine
from bayes_dispatch.serving.vllm import upstream
from bayes_dispatch.serving.vllm.engine import VllmEngine
from bayes_dispatch.serving.vllm.export import export_bank, whole_bank
from bayes_dispatch.serving.vllm.format import FIELD, Index, Probe, gap, told, tolerance, weights_of
from bayes_dispatch.serving.vllm.plugin import Bank, _row, _scaled, register
from bayes_dispatch.serving.vllm.upstream import Upstream
from bayes_dispatch.serving.web.app import make_app
from bayes_dispatch.serving.web.server import Server, listen
from bayes_dispatch.serving.web.settings import WebSettings
from bayes_dispatch.serving.work import Begun, BusyError, Engine, Ticket, UpstreamError, Work
from tests.serving.test_replicas import Here
from tests.serving.told import Held, Told

IDS = torch.tensor([[1, 20, 70, 33, 90, 101, 55]])
KEY = "a-key-of-the-server"


@pytest.fixture(scope="module")
def uneven64(llama64: SimpleNamespace) -> SimpleNamespace:
    """The tiny Llama, with experts of other ranks and other matrices than one another's."""
    model, draw = llama64.model, torch.Generator().manual_seed(8)

    def factor(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=draw, dtype=torch.double)

    experts = []
    for n, name in enumerate(llama64.experts.names):
        matrices = {m: shape for m, shape in model.linears().items() if f".{n + 1}." in m or ".3.mlp" in m}
        ranks = {m: 1 + (n + len(m)) % 3 for m in matrices}
        factors = {m: (factor(ranks[m], inner), factor(outer, ranks[m])) for m, (outer, inner) in matrices.items()}
        experts.append(LoraExpert(name, factors, model.fingerprint()))
    return SimpleNamespace(**{**vars(llama64), "experts": ExpertBank(experts)})


def after(system: Any, bank: ExpertBank, weights: Any) -> torch.Tensor:
    with torch.no_grad():
        found = (
            system.model.open(1, 7, bank.blend(torch.as_tensor(weights, dtype=torch.double))).read(IDS, tail=7).after
        )
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore:.* adds zeros alone")  # base's own adapter
@pytest.mark.parametrize("name", ["llama64", "uneven64"])
def test_an_exported_blend_is_the_banks(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Columns times weights are the blend; so is the adapter of one blend, and each expert's own."""
    system = request.getfixturevalue(name)
    index = export_bank(system, tmp_path)
    bank, names = Bank(tmp_path), system.experts.names
    assert (tuple(index.ranks), index.components) == (names, system.experts.components)
    assert index.server_rank >= index.rank == sum(max(system.experts[each].matrices.values()) for each in names)
    deltas = whole_bank(system.experts)[1]
    for weights in ([0.2, 0.5, 0.0, 0.3], [0, 0, 1, 0], [0, 0, 0, 1], [0.25] * 4):
        text, blend = told(weights, index.components), system.experts.blend(torch.tensor(weights, dtype=torch.double))
        columns = torch.from_numpy(bank.columns(text)).double()
        for matrix, delta in deltas.items():
            update = (delta.up * columns) @ delta.down
            own = blend.deltas.get(matrix)
            expected = torch.zeros_like(update) if own is None else (own.up * own.c) @ own.down
            torch.testing.assert_close(update, expected, rtol=0, atol=1e-7)
        made = tmp_path.with_name(f"{name}-{'-'.join(map(str, weights))}")
        made.mkdir()
        bank.write_blend(text, made)
        alone = ExpertBank.from_peft(system.model, {"blend": made})
        expected = after(system, system.experts, weights)
        torch.testing.assert_close(after(system, alone, [1, 0]), expected, rtol=0, atol=1e-5)
    read = ExpertBank.from_peft(system.model, {each: tmp_path / "experts" / each for each in names})
    for weights in torch.eye(4):
        torch.testing.assert_close(after(system, read, weights), after(system, system.experts, weights))


def test_probes_tell_banks_apart(llama64: SimpleNamespace, uneven64: SimpleNamespace, tmp_path: Path) -> None:
    """What is right passes; experts in another order, others, or weights that nobody hears do not."""
    index = export_bank(llama64, tmp_path)
    said = [probe.log_probabilities for probe in index.probes]
    assert gap(said, index.probes) == 0
    assert len({probe.weights for probe in index.probes}) == len(index.probes) == 7
    others = export_bank(uneven64, tmp_path)  # in the place of the first
    unheard = [said[0]] * len(said)
    swapped = [said[1], said[0], *said[2:]]
    nothing = [[float("nan")] * len(index.asked), *said[1:]]
    for wrong in ([probe.log_probabilities for probe in others.probes], unheard, swapped, nothing):
        with pytest.raises(ValueError, match="expected the log-probabilities of the blend"):
            gap(wrong, index.probes)


def test_probes_that_are_close_are_told_apart_or_refused(llama64: SimpleNamespace, tmp_path: Path) -> None:
    """Whatever two blends differ by, one in the place of the other is found; where that is too little, none passes."""
    index = export_bank(llama64, tmp_path)
    first, second = index.probes[0], index.probes[1]
    for apart in (1e-3, 0.02, 5.0):
        near = second._replace(log_probabilities=tuple(each + apart for each in first.log_probabilities))
        probes = [first, near]
        assert tolerance(probes) <= apart / 3 * (1 + 1e-9)
        right = [[each + 0.3 * min(apart, 0.3) for each in probe.log_probabilities] for probe in probes]
        assert gap(right, probes) == pytest.approx(0.3 * min(apart, 0.3))
        for mixed in ([first, first], [near, near], [near, first]):
            with pytest.raises(ValueError, match="expected the log-probabilities of the blend"):
                gap([probe.log_probabilities for probe in mixed], probes)
    for apart in (0.0, 2e-4):
        near = second._replace(log_probabilities=tuple(each + apart for each in first.log_probabilities))
        with pytest.raises(ValueError, match=r"differ by 0\.0003 nats .* got .* differ by .*: a mix-up") as refused:
            gap([probe.log_probabilities for probe in (first, near)], [first, near])
        assert "\n" not in str(refused.value)


def test_experts_that_are_alike_are_refused(llama64: SimpleNamespace, tmp_path: Path) -> None:
    """Already where they are written."""
    name, first = llama64.experts.names[0], next(iter(llama64.experts.values()))
    twins = [LoraExpert(each, first.factors, first.base) for each in (name, "twin", *llama64.experts.names[2:])]
    alike = SimpleNamespace(**{**vars(llama64), "experts": ExpertBank(twins)})
    with pytest.raises(ConfigError, match=r"expected blends of the bank that differ .* got"):
        export_bank(alike, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bank_is_refused(llama64: SimpleNamespace, tmp_path: Path) -> None:
    export_bank(llama64, tmp_path / "bank")
    path = tmp_path / "bank" / "vllm.json"
    whole = json.loads(path.read_text())
    for wrong in ("", "[]", "{}", json.dumps(whole | {"format": 2}), json.dumps(whole | {"ranks": [4]})):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="expected a bank of export-vllm"):
            Index.read(path.parent)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").touch()
    with pytest.raises(BundleError, match=r"notes\.txt"):
        export_bank(llama64, tmp_path / "else")


def test_experts_that_vllm_cannot_run_are_refused(llama64: SimpleNamespace, bundle: Any, tmp_path: Path) -> None:
    model, double = llama64.model, torch.double

    def bank(matrix: str, rank: int) -> SimpleNamespace:
        outer, inner = model.linears()[matrix]
        factors = {matrix: (torch.ones(rank, inner, dtype=double), torch.ones(outer, rank, dtype=double))}
        return SimpleNamespace(
            **{**vars(llama64), "experts": ExpertBank([LoraExpert("x", factors, model.fingerprint())])}
        )

    for system, why in (
        (bundle, "singular-value scales of reverse"),
        (bank("lm_head", 2), "lm_head of x"),
        (bank("model.embed_tokens", 2), "embed_tokens of x"),
        (bank("model.layers.1.self_attn.q_proj", 513), "at most 512 for vLLM, got 513"),
    ):
        with pytest.raises(ConfigError, match=why):
            export_bank(system, tmp_path)
    with pytest.raises(ConfigError, match="singular-value scales of reverse"):
        VllmEngine(bundle, "http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


def test_weights_are_read_as_they_were_told() -> None:
    components = ("de", "fr", "base")
    for weights in ([0.1 + 0.2, 0.7 - 1e-17, 0.0], [1 / 3] * 3, [0, 0, 1]):
        assert weights_of(told(weights, components), components) == weights
    for wrong in (
        "",
        "de",
        "de=",
        "de=x",
        "de=0.5",
        "de=1,fr=1",
        "de=2,fr=-1",
        "de=nan",
        "es=1",
        "de=.5,de=.5",
        None,
        [1.0],
    ):
        with pytest.raises(ValueError, match=r"expected weights such as de=0\.4"):
            weights_of(wrong, components)


def test_the_plugin_is_light_and_does_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads where vLLM's libraries are and ours are not; unless a bank is named, nothing of vLLM is touched."""
    code = "import sys, bayes_dispatch.serving.vllm.plugin as p; p.register(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {name.split(".")[0] for name in loaded} & {
        "pyro",
        "arviz",
        "sklearn",
        "scipy",
        "vllm",
        "httpx2",
        "jaxtyping",
    }
    ours = {name for name in loaded if name.startswith("bayes_dispatch.")}
    assert {name.rpartition(".")[2] for name in ours} == {"serving", "vllm", "format", "plugin"}
    monkeypatch.setenv("BAYES_DISPATCH_VLLM", "/nowhere")
    with pytest.raises(ValueError, match="expected a bank of export-vllm"):
        register()


def test_each_token_has_its_requests_weights(llama64: SimpleNamespace, tmp_path: Path) -> None:
    """Between the factors, in one batch: two blends, another adapter, which stays as it is, and none."""
    export_bank(llama64, tmp_path)
    bank, rank, draw = Bank(tmp_path), 8, torch.Generator().manual_seed(0)
    requests = [
        SimpleNamespace(
            lora_request=None if name is None else SimpleNamespace(lora_name=name),
            sampling_params=SimpleNamespace(extra_args={FIELD: "reverse=0.25,add=0.75"} if name == "bank" else None),
        )
        for name in ("bank", "other", None)
    ]
    rows = torch.from_numpy(np.stack([_row(bank, each, rank) for each in requests])).repeat_interleave(2, 0)
    seen = []
    buffers = torch.randn(3, 6, rank, generator=draw)
    before = buffers.clone()
    _scaled(lambda *given: seen.append(given), rows)("y", buffers, "up")
    assert (seen[0][0], seen[0][2]) == ("y", "up")
    factors = torch.tensor([0.25] * 2 + [0.0] * 2 + [0.75] * 2 + [1.0] * 2)  # the last two are nobody's
    torch.testing.assert_close(seen[0][1][:, :2], before[:, :2] * factors)
    torch.testing.assert_close(seen[0][1][:, 2:4], before[:, 2:4])
    assert not seen[0][1][:, 4:].any()


class Stand:
    """A stand-in for a vLLM server that has a system's bank; ``fault`` is how it fails."""

    def __init__(self, system: Any, bank: ExpertBank | None = None) -> None:
        self.system, self.bank = system, system.experts if bank is None else bank
        self.fault: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.gone, self.models = Flag(), ["base", "bank"]
        self.reading = threading.Lock()
        stand = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = [{"id": each, "max_model_len": 300 if each == "base" else None} for each in stand.models]
                self.reply(200, {"data": models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert self.headers["authorization"] == f"Bearer {KEY}"
                stand.asked.append(body)
                if stand.fault in ("400", "429", "503", "500"):
                    self.reply(int(stand.fault), {"error": {"message": "no such thing"}}, {"retry-after": "7"})
                elif body.get("stream"):
                    self.stream(body)
                else:
                    said = stand.after(body["prompt"], body)
                    top = {f"token_id:{each}": float(said[each]) for each in body["logprob_token_ids"]}
                    self.reply(200, {"choices": [{"logprobs": {"top_logprobs": [top]}}]})

            def stream(self, body: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                ids, left = list(body["prompt"]), body["max_tokens"]
                banned = [int(each) for each in body["logit_bias"]]
                try:
                    while left:
                        said = stand.after(ids, body)
                        masked = said.clone()
                        masked[banned] = -torch.inf
                        ids.append(int(masked.argmax()))
                        left -= 1
                        stopped = ids[-1] in body["stop_token_ids"]
                        if stand.fault == "breaks" and left == 1:
                            return
                        if stand.fault == "error" and left == 1:
                            return self.event({"error": {"message": "engine", "code": 500}})
                        if stand.fault == "slow":
                            time.sleep(0.05)
                        reason = "stop" if stopped else "length" if not left else None
                        choice = {"token_ids": ids[-1:], "finish_reason": reason}
                        self.event({"choices": [choice | {"logprobs": {"token_logprobs": [float(said[ids[-1]])]}}]})
                        if stopped:
                            break
                    self.wfile.write(b"data: [DONE]\n\n")
                except (BrokenPipeError, ConnectionResetError):
                    stand.gone.set()

            def event(self, document: dict[str, Any]) -> None:
                self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())

            def reply(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
                data = json.dumps(document).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()  # a close waits for it

    def after(self, ids: list[int], body: dict[str, Any]) -> torch.Tensor:
        weights = torch.tensor(weights_of(body["vllm_xargs"][FIELD], self.bank.components), dtype=torch.double)
        with self.reading, torch.no_grad():
            read = self.system.model.open(1, len(ids), self.bank.blend(weights)).read(torch.tensor([ids]))
        assert read.after is not None
        return read.after[0, -1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def _unchecked(unchecked: None) -> None:
    """Engines are timed against; checks of every shape would only slow them."""


@pytest.fixture
def stand(llama64: SimpleNamespace) -> Iterator[Stand]:
    found = Stand(llama64)
    yield found
    found.close()


@pytest.fixture
def start(stand: Stand) -> Iterator[Callable[..., VllmEngine]]:
    """Makes engines, and ends them."""
    made: list[VllmEngine] = []

    def make(system: Any | None = None, **limits: int) -> VllmEngine:
        engine = VllmEngine(system or stand.system, f"{stand.url}/v1/", Limits(**limits), KEY)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close(0)


def work(system: Any, blend: str = "posterior_mean", tokens: int = 8, prompt: Any = "ab>", **settings: Any) -> Work:
    writing = Writing.of(
        tokens, settings.pop("sampled", False), 1.0, settings.pop("stop", None), settings.pop("top_p", None)
    )
    return Work(prompt, as_blend(blend, system.experts.components), writing, settings.pop("seed", 0), **settings)


def test_answers_are_those_of_the_engine_in_this_process(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    """Greedily: texts, ends, posteriors, weights and log-probabilities, of texts and of a conversation."""
    system, engine = stand.system, start(running=3)
    assert isinstance(engine, Engine)
    assert engine.off < 1e-9
    own = BatchedEngine(system)
    blends, prompts = (
        ["posterior_mean", "top_k(2)", "sort", "base", "thompson_sample"],
        ["ab>ba\nab>", "1+2=3\n" * 6, "9"],
    )
    works = [
        work(system, blends[n % 5], 5 + n, prompts[n % 3], seed=n, stop="a" if n % 4 == 3 else None) for n in range(10)
    ]
    works.append(replace(works[0], prompt=(system_says("b"), says("ab>"))))
    works.append(replace(works[0], writing=None))
    heard = [(Told(), Told()) for _ in works]
    for each, pair in zip(works, heard, strict=True):
        for one, told_to in zip((engine, own), pair, strict=True):
            assert isinstance(one.submit(each, told_to), Ticket)
    for theirs, ours in heard:
        assert theirs.why() == ours.why()
        assert theirs.text == ours.text
        assert theirs.begun is not None
        assert ours.begun is not None
        np.testing.assert_array_equal(theirs.begun.posterior.weights, ours.begun.posterior.weights)
        assert theirs.begun.prompt_tokens == ours.begun.prompt_tokens
        for mine, expected in zip(theirs.tokens, ours.tokens, strict=True):
            assert mine.log_probability == pytest.approx(expected.log_probability, abs=1e-9)
            np.testing.assert_allclose(mine.weights, expected.weights)
            assert (mine.predictive_entropy, mine.mutual_information) == (None, None)
    assert engine.state.new_tokens == own.state.new_tokens
    assert engine.state.prompt_tokens == own.state.prompt_tokens
    own.close(0)


def says(text: str) -> Any:
    from bayes_dispatch.serving.work import Message

    return Message("user", text)


def system_says(text: str) -> Any:
    return replace(says(text), role="system")


def test_the_server_is_asked_for_what_was_asked(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    """All that changes a token is said, so that no default of the server's holds."""
    engine, heard = start(), Told()
    engine.submit(work(stand.system, "sort", 3, sampled=True, top_p=0.5, seed=4), heard)
    assert heard.why() in ("length", "stop")
    body = stand.asked[-1]
    ids = list(stand.system.tokenizer.tokenize("ab>").ids)
    assert (body["model"], body["prompt"], body["vllm_xargs"]) == ("bank", ids, {"blend_weights": "sort=1.0"})
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["seed"]) == (3, 1.0, 0.5, 5)
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0, 1)
    assert (body["presence_penalty"], body["frequency_penalty"], body["ignore_eos"]) == (0, 0, True)
    assert body["stop_token_ids"] == sorted(stand.system.tokenizer.ends)
    never = {str(n) for n, may in enumerate(stand.system.tokenizer.continues.tolist()) if not may}
    assert body["logit_bias"].keys() == never - {str(n) for n in stand.system.tokenizer.ends} != set()


def test_a_cancelled_request_is_closed_at_the_server(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    engine, first, second = start(running=1), Told(), Told()
    stand.fault = "slow"
    ticket = engine.submit(work(stand.system, tokens=200), first)
    waiting = engine.submit(work(stand.system, tokens=200), second)
    assert first.wrote.wait(60)
    waiting.cancel()
    assert second.why() == "cancelled"
    assert second.begun is None
    ticket.cancel()
    assert first.why() == "cancelled"
    assert stand.gone.wait(60)
    assert (engine.state.running, engine.state.waiting) == (0, 0)
    ticket.cancel()  # harmless


def test_an_owner_of_half_of_the_places_lets_others_go_first(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    engine, order = start(running=2), list[str]()
    stand.fault = "slow"
    heard = {name: Told() for name in ("a0", "b0", "a1", "b1")}
    tickets = {}
    for name, own in heard.items():

        def tell(event: Any, name: str = name, own: Told = own) -> None:
            own(event)
            order.extend([name] * isinstance(event, Begun))

        tickets[name] = engine.submit(work(stand.system, tokens=200 if "0" in name else 2, owner=name[0]), tell)
    assert heard["a0"].wrote.wait(60)
    assert heard["b0"].wrote.wait(60)
    tickets["b0"].cancel()
    heard["b1"].why()
    heard["a1"].why()
    assert order[2:] == ["b1", "a1"]
    tickets["a0"].cancel()


def test_a_long_prompt_holds_up_no_short_one(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    """Prompts are read by turns, piece by piece."""
    engine, first, order = start(piece=2), Held(), list[str]()
    engine.submit(replace(work(stand.system), writing=None), first)
    heard = {"long": Told(), "short": Told()}
    for name, own in heard.items():

        def tell(event: Any, name: str = name, own: Told = own) -> None:
            order.extend([name] * isinstance(event, Begun))
            own(event)

        engine.submit(work(stand.system, prompt="ab>ba\n" * 20 if name == "long" else "a", tokens=2), tell)
    first.go.set()
    for own in heard.values():
        own.why()
    assert order == ["short", "long"]


def test_a_stop_ends_the_request_at_the_server(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    engine, whole, cut = start(), Told(), Told()
    engine.submit(work(stand.system, tokens=30), whole)
    assert whole.why() in ("length", "stop")
    stop = whole.text[3]
    stand.fault = "slow"
    engine.submit(work(stand.system, tokens=200, stop=stop), cut)
    assert cut.why() == "stop"
    assert cut.text == whole.text[: whole.text.index(stop) + 1]
    assert stand.gone.wait(60)


def test_patience_ends_what_runs_and_what_waits(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    engine, heard = start(running=1), [Told(), Told()]
    stand.fault = "slow"
    for own in heard:
        engine.submit(work(stand.system, tokens=200, patience=0.3), own)
    assert [own.why() for own in heard] == ["late", "late"]
    assert engine.state.running == 0


@pytest.mark.parametrize(
    ("fault", "reason", "kind", "told_of"),
    [
        ("400", "failed", ConfigError, "expected a request that vLLM takes, got one that it refuses"),
        ("429", "failed", BusyError, "busy"),
        ("503", "failed", BusyError, "busy"),
        ("500", "broken", UpstreamError, "status 500"),
        ("error", "broken", UpstreamError, "status 500"),
        ("breaks", "broken", UpstreamError, "got"),
    ],
)
def test_a_servers_failure_is_told(
    stand: Stand, start: Callable[..., VllmEngine], fault: str, reason: str, kind: type[Exception], told_of: str
) -> None:
    engine, heard, later = start(), Told(), Told()
    stand.fault = fault
    engine.submit(work(stand.system), heard)
    assert heard.why() == reason
    assert heard.ended is not None
    assert isinstance(heard.ended.error, kind)
    assert told_of in str(heard.ended.error)
    assert reason == "broken" or "no such thing" not in str(heard.ended.error)  # what clients read
    if isinstance(heard.ended.error, BusyError):
        assert heard.ended.error.retry_after == 7
    stand.fault = None
    engine.submit(work(stand.system), later)
    assert later.why() in ("length", "stop")


@pytest.mark.parametrize("fault", ["500", "error", "breaks", "429"])
def test_another_replica_goes_on_where_a_server_fails(
    llama64: SimpleNamespace, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each replica has a server of its own. What was begun goes on at the other; where both fail, the client hears."""
    monkeypatch.setattr(replicas, "PAUSE", 0.01)
    stands = [Stand(llama64), Stand(llama64)]
    engines = [VllmEngine(llama64, each.url, Limits(), KEY) for each in stands]
    whole, gone_on, given_up = Told(), Told(), Told()
    engine = ReplicatedEngine(Here(first=engines[0], second=engines[1]))
    engine.submit(work(llama64, tokens=20), whole)
    whole.why()
    stands[0].fault = fault
    engine.submit(work(llama64, tokens=20), gone_on)
    assert gone_on.why() == whole.why()
    assert gone_on.text == whole.text
    stands[1].fault = fault
    engine.submit(work(llama64, tokens=20), given_up)
    busy = fault == "429"
    assert given_up.why() == ("failed" if busy else "broken")
    assert isinstance(given_up.ended and given_up.ended.error, BusyError if busy else UpstreamError)
    for each in (engine, *engines, *stands):
        each.close(0) if not isinstance(each, Stand) else each.close()


def test_blends_of_many_particles_are_refused_by_name(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    engine = start()
    for blend in ("posterior_predictive", "refined_mean(6)", "posterior_predictive(4)"):
        with pytest.raises(ConfigError, match=rf"posterior_mean, top_k.* got {re.escape(as_blend(blend).name)}"):
            engine.submit(work(stand.system, blend), Told())
    with pytest.raises(ConfigError, match="k of at most 4"):
        engine.submit(work(stand.system, "top_k(9)"), Told())
    alone = Told()
    engine.submit(replace(work(stand.system, "posterior_predictive"), writing=None), alone)
    assert alone.why() == "dispatched"


def test_what_cannot_be_asked_is_refused_at_once(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    """And no more waits than there is room for; the server's length counts, too."""
    engine = start(running=1, waiting=1)
    for wrong in (
        work(stand.system, prompt=""),
        work(stand.system, abstain=True),
        work(stand.system, false_alarm_rate=0.1),  # this system has no gate
    ):
        with pytest.raises(BayesDispatchError, match="expected"):
            engine.submit(wrong, Told())
    with pytest.raises(PromptError, match="at most 300 tokens"):
        engine.submit(work(stand.system, tokens=299), Told())
    stand.fault, first, second = "slow", Told(), Told()
    engine.submit(work(stand.system, tokens=200), first)
    assert first.wrote.wait(60)
    engine.submit(work(stand.system, tokens=200), second)
    with pytest.raises(BusyError, match="at most 1 waiting"):
        engine.submit(work(stand.system), Told())
    engine.close(0)
    assert (first.why(), second.why()) == ("closed", "closed")
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit(work(stand.system), Told())


def test_it_closes_when_all_is_said(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    engine, heard = start(running=1), [Told() for _ in range(3)]
    for own in heard:
        engine.submit(work(stand.system), own)
    engine.close(60)
    assert {own.why() for own in heard} <= {"length", "stop"}


def test_another_server_is_refused(stand: Stand, start: Callable[..., VllmEngine], uneven64: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="expected the log-probabilities of the blend reverse"):
        start(uneven64)
    stand.models = ["base"]
    with pytest.raises(ConfigError, match=r"with the model bank of export-vllm .* got base"):
        start()
    stand.close()
    with pytest.raises(UpstreamError, match="expected a vLLM server at http"):
        start()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_server_that_failed_is_checked_before_it_serves(
    stand: Stand, start: Callable[..., VllmEngine], uneven64: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have come back with other experts, of the same names."""
    monkeypatch.setattr(vllm_engine, "FAILED", 0.01)
    engine, lost, other, again = start(), Told(), Told(), Told()
    assert engine.state.serves
    stand.fault, stand.bank = "breaks", uneven64.experts
    engine.submit(work(stand.system, "sort"), lost)
    assert lost.why() == "broken"
    assert not engine.state.serves
    stand.fault = None
    engine.submit(work(stand.system, "sort"), other)
    assert (other.why(), other.tokens) == ("broken", [])
    assert isinstance(other.ended and other.ended.error, UpstreamError)
    stand.bank = stand.system.experts
    until(lambda: engine.state.serves)
    engine.submit(work(stand.system, "sort"), again)
    assert again.why() in ("length", "stop")


def test_a_server_that_said_nothing_for_long_is_checked_before_it_writes(
    stand: Stand, start: Callable[..., VllmEngine], uneven64: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may be in its place, and nobody was told."""
    engine, before, after = start(), Told(), Told()
    stand.bank = uneven64.experts
    engine.submit(work(stand.system, "sort"), before)
    assert before.why() in ("length", "stop")
    monkeypatch.setattr(vllm_engine, "CHECKED", 0.0)
    engine.submit(work(stand.system, "sort"), after)
    assert (after.why(), after.tokens) == ("broken", [])
    until(lambda: not engine.state.serves)


def test_a_server_that_nobody_asks_is_checked(
    stand: Stand, start: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "FAILED", 0.01)
    monkeypatch.setattr(vllm_engine, "CHECKED", 0.01)
    monkeypatch.setattr("bayes_dispatch.serving.replicas.REPORTS", 0.01)
    engine, replicated = start(), ReplicatedEngine(Here(only=start()))
    assert replicated.state.serves
    stand.fault = "500"
    until(lambda: not engine.state.serves)
    until(lambda: not replicated.state.serves)
    stand.fault = None
    until(lambda: engine.state.serves)
    replicated.close(0)


def test_why_the_check_is_refused_is_told(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    """To whoever starts the server, who knows what is inside."""
    stand.fault = "400"
    with pytest.raises(ConfigError, match="got one that it refuses: no such thing"):
        start()


def test_a_web_server_before_it(stand: Stand, start: Callable[..., VllmEngine]) -> None:
    """A blend is the posterior mean unless one is named; what vLLM does not tell is null."""
    import httpx2

    engine, settings = start(), WebSettings(blend=as_blend("posterior_mean"))
    listening = listen("127.0.0.1", 0)
    server = Server(make_app(stand.system, engine, settings), engine, settings)
    thread = threading.Thread(target=server.serve_on, args=[listening])
    thread.start()
    with httpx2.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as http:
        asked = {"model": "bundle", "prompt": "ab>", "max_tokens": 4, "temperature": 0, "logprobs": 0, "seed": 1}
        answer = http.post("/v1/completions", json=asked).json()
        assert answer["dispatch"]["blend"] == "posterior_mean"
        told_of = answer["choices"][0]["logprobs"]
        assert told_of["mutual_information"] == [None] * len(told_of["tokens"]) != []
        refused = http.post("/v1/completions", json=asked | {"blend": "posterior_predictive", "stream": True})
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
        stand.fault = "429"
        busy = http.post("/v1/completions", json=asked)
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "7")
    server.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_a_bundle_of_scales_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By both commands, in one line, before a server is asked."""
    for words, why in (
        (["export-vllm", "--out", str(tmp_path / "out")], "expected LoRA experts for vLLM, got singular-value scales"),
        (["serve", "--port", "0", "--vllm", "http://127.0.0.1:9"], "expected LoRA experts for vLLM"),
        (["serve", "--vllm", "http://127.0.0.1:9", "--cache-bytes", "5"], "expected --cache-bytes without --vllm"),
        (["serve", "--vllm", "http://ann:s3cret@127.0.0.1:9"], "expected --vllm with a URL that has no name"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        printed = capfd.readouterr()
        assert (stopped.value.code, printed.out) == (2, "")
        assert why in printed.err
        assert "s3cret" not in printed.err
        assert printed.err.count("\n") == 1


@pytest.mark.parametrize(("url", "key"), [("http://127.0.0.1:80a1", None), ("http://127.0.0.1:8001", "schlüssel")])
def test_what_is_no_url_or_key_is_refused(url: str, key: str | None) -> None:
    with pytest.raises(ConfigError, match=r"expected a (URL|key)"):
        Upstream(url, key)


@pytest.mark.parametrize("url", ["http://ann:s3cret@127.0.0.1:9", "http://s3cret@host:80a1", "ann:s3/cret@host"])
def test_a_url_with_a_password_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="without a name and password") as refused:
        Upstream(url)
    assert "cret" not in str(refused.value)


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before requests are taken; it has accepted the connection."""
    monkeypatch.setattr(upstream, "STARTING", 0.05)

    async def ask(url: str) -> None:
        server = Upstream(url)
        for question in (server.longest(), server.check([1], [Probe("base=1", (0.0,))])):
            with pytest.raises(UpstreamError, match=rf"the vLLM server at {url} in 0\.05 seconds, got none"):
                await asyncio.wait_for(question, 30)
        await server.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(ask(f"http://127.0.0.1:{silent.getsockname()[1]}"))
