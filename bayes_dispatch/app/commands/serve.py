"""The commands ``serve``, a bundle behind OpenAI's protocol, and ``export-vllm``, its experts for a vLLM server."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayes_dispatch.app.commands.terminal import (
    BundleOption,
    DeviceOption,
    DtypeOption,
    check_output,
    open_bundle,
    refuse_unused,
)
from bayes_dispatch.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.app.engines import EngineOf
    from bayes_dispatch.serving.ray.cluster import Scale
    from bayes_dispatch.serving.work import Engine

__all__ = ["export_vllm", "serve"]

VLLM_KEY = "BAYES_DISPATCH_VLLM_KEY"  # has the key of the vLLM server, if that has one


def serve(
    bundle: BundleOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's own need keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any that is free.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(help="A file of lines `name key`, which nobody else may read; requests need one of these keys."),
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Let everybody ask who reaches the address; for a trusted network.")
    ] = False,
    running: Annotated[int, typer.Option(min=1, help="Most choices that are written at once.")] = 32,
    waiting: Annotated[int, typer.Option(min=1, help="Most choices that wait; more get status 429.")] = 256,
    cache_bytes: Annotated[
        int | None, typer.Option(min=1, help="Most bytes kept of what the model has read; default: 4 GiB.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens that a choice may ask for.")] = 1024,
    prompt_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request's prompts.")] = 2**16,
    body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request's body.")] = 2**20,
    header_bytes: Annotated[int, typer.Option(min=1024, help="Most bytes of a request's headers.")] = 2**14,
    patience: Annotated[
        float, typer.Option(min=0.001, help="Seconds after which a request is given up, with status 504.")
    ] = 300.0,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds that requests have to end in, once the server is told to stop.")
    ] = 30.0,
    prior: Annotated[
        Path | None,
        typer.Option(help="Learn from /v1/feedback: the file where the prior is kept, begun if there is none."),
    ] = None,
    remembered: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most choices remembered for feedback; the key with most loses its oldest. Default: 4096.",
        ),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log, too.")] = False,
    vllm: Annotated[
        str | None,
        typer.Option(
            help="URL of a vLLM server that has these experts (export-vllm): it writes, and this process dispatches."
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run the engines in a Ray cluster: RAY_ADDRESS, or one on this machine alone.")
    ] = False,
    replicas: Annotated[
        str | None, typer.Option(help="With --ray: how many engines, such as 2; or 1-4, as the work needs. Default: 1.")
    ] = None,
    replica_busy: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --replicas A-B: choices at once that each is to have; default: half of --running."
        ),
    ] = None,
    replica_cpus: Annotated[
        float | None, typer.Option(min=0.001, help="With --ray: cores set aside for each engine; default: 1.")
    ] = None,
) -> None:
    """Serve a bundle to OpenAI's clients, until SIGINT or SIGTERM; stderr has a line of JSON for each request."""
    try:
        from bayes_dispatch.inference.two_pass.blends import DEFAULT_BLEND, PosteriorMean
        from bayes_dispatch.serving.web.app import make_app
        from bayes_dispatch.serving.web.feedback import REMEMBERED, Learner
        from bayes_dispatch.serving.web.keys import VARIABLE, Keys, is_loopback
        from bayes_dispatch.serving.web.server import Server, listen
        from bayes_dispatch.serving.web.settings import WebSettings
    except ImportError as error:
        raise MissingDependencyError.of("serve", error) from None
    known = Keys.given(keys, os.environ)
    refuse_unused("--no-keys", no_keys, known is None, "without keys", "both")
    if known is None and not no_keys and not is_loopback(host):
        raise ConfigError(f"expected --keys, {VARIABLE} or --no-keys to listen at {host}, got none of them")
    refuse_unused("--remembered", remembered, prior is not None, "with --prior")
    refuse_unused("--cache-bytes", cache_bytes, vllm is None, "without --vllm, where caches are vLLM's", "both")
    refuse_unused("--vllm", vllm, "@" not in (vllm or ""), "with a URL that has no name and password", "one with an @")
    settings = WebSettings(
        body_bytes=body_bytes,
        header_bytes=header_bytes,
        prompt_bytes=prompt_bytes,
        max_new_tokens=max_new_tokens,
        choices=min(WebSettings.choices, waiting if known is None else -(-waiting // 2)),  # more could never wait
        patience=patience,
        drain=drain,
        log_prompts=log_prompts,
        blend=DEFAULT_BLEND if vllm is None else PosteriorMean(),
    )
    refuse_unused("--prior", prior, not ray, "without --ray, whose engines have priors of their own", "both")
    refuse_unused("--replicas", replicas, ray, "with --ray")
    refuse_unused("--replica-cpus", replica_cpus, ray, "with --ray")
    refuse_unused("--replica-busy", replica_busy, "-" in (replicas or ""), "with --replicas A-B")
    scale = _scale(replicas or "1", replica_busy or max(1, running // 2), replica_cpus or 1.0, device) if ray else None
    with listen(host, port) as listening:
        from bayes_dispatch.app.bundle_at import BundleAt
        from bayes_dispatch.app.engines import EngineOf
        from bayes_dispatch.inference.two_pass.events import JsonLines
        from bayes_dispatch.model.mambaformer.compiled.threads import passing
        from bayes_dispatch.serving.engine import Limits

        here = "cpu" if ray else device  # a gateway runs no model
        loaded, learner = passing(partial(open_bundle, bundle, here, dtype)), None
        if prior is not None:
            loaded.dispatcher.keep_prior(prior)
            learner = Learner(loaded.dispatcher, REMEMBERED if remembered is None else remembered)
        limits = Limits(running=running, waiting=waiting)
        if cache_bytes is not None:
            limits = replace(limits, cache_bytes=cache_bytes)
        name = f"bayes-dispatch-{socket.gethostname()}-{listening.getsockname()[1]}"
        _log(JsonLines())
        make = EngineOf(
            BundleAt.here(bundle, device, dtype), limits, vllm, None if vllm is None else os.environ.get(VLLM_KEY)
        )
        with nullcontext(make.start(loaded)) if scale is None else _on_ray(make, loaded, scale, name) as engine:
            app = make_app(loaded, engine, settings, known, local=not no_keys, learner=learner)
            Server(app, engine, settings).serve_on(listening)


def _scale(replicas: str, busy: int, cpus: float, device: str) -> "Scale":
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"expected --device cpu or cuda with --ray, which chooses the GPUs, got {device:.80}")
    try:
        from bayes_dispatch.serving.ray.cluster import Scale
    except ImportError as error:
        raise MissingDependencyError.of("serve,ray", error) from None
    return Scale.read(replicas, busy, cpus, int(device == "cuda"))


@contextmanager
def _on_ray(make: "EngineOf", loaded: "Bundle", scale: "Scale", name: str) -> "Iterator[Engine]":
    """Engines in a cluster, each made by ``make``."""
    from bayes_dispatch.serving.ray.cluster import replicas_on_ray
    from bayes_dispatch.serving.replicas import ReplicatedEngine

    if loaded.default_dtype is None:  # what each replica would say after Ray has started
        from bayes_dispatch.app.bundle import refuse_elsewhere
        from bayes_dispatch.app.shipped import bundle_directory

        refuse_elsewhere(bundle_directory(make.bundle.path), make.bundle.device)
    if make.vllm is not None:  # likewise
        from bayes_dispatch.serving.vllm.export import check_lora

        check_lora(loaded.experts, loaded.model)
    holds = make.limits.running + make.limits.waiting
    with replicas_on_ray(make, scale, name, holds, make.limits.waiting) as replicas:
        yield ReplicatedEngine(replicas)


def export_vllm(
    out: Annotated[Path, typer.Option(help="A new directory, or that of an earlier export.")],
    bundle: BundleOption = None,
) -> None:
    """Write a bundle's LoRA experts as adapters that vLLM loads, for serve --vllm."""
    from bayes_dispatch.storage import check_directory

    check_output(out)
    check_directory(out, "vllm.json")  # an earlier one has nothing that its bundle has not
    from bayes_dispatch.serving.vllm.export import export_bank
    from bayes_dispatch.serving.vllm.format import BANK

    index = export_bank(open_bundle(bundle), out)
    print(f"{out}: {', '.join(index.ranks)} in {out / BANK}, of rank {index.rank}; start vLLM with the base model and")
    print(f"  BAYES_DISPATCH_VLLM={out.resolve()} VLLM_USE_V2_MODEL_RUNNER=0")
    print(f"  --enable-lora --max-loras 1 --max-lora-rank {index.server_rank}")


def _log(form: logging.Formatter) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(form)
    for name, level in (("bayes_dispatch.serving", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
