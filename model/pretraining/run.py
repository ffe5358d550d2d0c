"""Pre-training of a causal language model: AdamW, data-parallel over processes, checkpointed and resumed exactly.

A batch is a function of the seed, the step and the row alone, so any number of processes trains on the same batches,
and a resumed run continues as if it had never stopped. To train on a text of your own:

    torchrun --nproc-per-node 2 -m bayes_dispatch.model.pretraining.text --text FILE --out DIR

The same command goes on after a crash. Where ``torchrun --max-restarts`` is to do so by itself, it needs
``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``: else it hands its processes the addresses of those before (pytorch #135712).
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException, start_processes
from tqdm import tqdm

from bayes_dispatch import errors
from bayes_dispatch.arguments import whole
from bayes_dispatch.errors import BayesDispatchError, ConfigError, TensorError
from bayes_dispatch.model.backbone import Tokenizer, padded, token_weights
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.pretraining.checkpoints import FILE, Identity, load_checkpoint, save_checkpoint
from bayes_dispatch.model.pretraining.processes import Worker, alone, join, join_launched, launched
from bayes_dispatch.model.pretraining.recipe import ComputeSettings, PretrainingSettings, schedule
from bayes_dispatch.model.subwords import SubwordTokenizer
from bayes_dispatch.storage import check_replaceable

__all__ = [
    "ComputeSettings",
    "PretrainingSettings",
    "RowSource",
    "next_token_loss",
    "pack_rows",
    "pretrain",
    "schedule",
]

Row = tuple[bytes, Sequence[float]]


@runtime_checkable
class RowSource(Protocol):
    """Training texts: picklable, and random by the given generator alone."""

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """At most ``length`` bytes of UTF-8, and the loss weight of each."""
        ...


def pack_rows(rows: Sequence[Row], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, 1 + T) of rows, and the loss weight (B, T) of each token after the first.

    A token weighs what its bytes do on average, one without any, as at padding, nothing.

    Raises:
        TensorError: another number of weights than of bytes. PromptError: bytes that are no UTF-8.
    """
    for data, given in rows:
        if len(data) != len(given):
            raise TensorError(f"expected a weight for each of {len(data)} bytes of a row, got {len(given)}")
    texts = [tokenizer.tokenize(data) for data, _ in rows]
    ids, _ = padded([text.ids for text in texts], tokenizer.pad_token_id)
    weights = torch.zeros(ids.shape)
    for own, text, (_, given) in zip(weights, texts, rows, strict=True):
        own[: len(text.ids)] = token_weights(text, given)
    return ids, weights[:, 1:]


def next_token_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sum over all tokens of weight times −log p, for logits (B, 1 + T, V) of ids (B, 1 + T) and weights (B, T)."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


class Run(NamedTuple):
    """What a process has to know: the model and its texts, the recipe, how to compute it, and where checkpoints lie."""

    config: LanguageModelConfig
    source: RowSource
    settings: PretrainingSettings
    compute: ComputeSettings
    directory: Path
    progress: bool
    tokenizer: SubwordTokenizer | None


def pretrain(
    config: LanguageModelConfig,
    source: RowSource,
    settings: PretrainingSettings,
    directory: Path,
    processes: int = 1,
    progress: bool = True,
    compute: ComputeSettings | None = None,
    tokenizer: SubwordTokenizer | None = None,
) -> MambaFormerForCausalLM:
    """Train a model from scratch, or from the last checkpoint in ``directory``.

    Under ``torchrun`` all its processes share each batch, and each of them is to make the same call.

    Args:
        config: the model. source: its texts. settings: the recipe.
        directory: where the checkpoint is kept; one that all processes can read.
        processes: processes to start, which share each batch, one thread each; they reach the same weights as one does,
            to rounding. 1 under ``torchrun``, which starts them itself.
        progress: show a progress bar.
        compute: device, precision, and what saves memory or time; float32 on the CPU by default.
        tokenizer: what the model reads and writes; ``None`` for bytes.

    Returns:
        The trained model, on the CPU, in every process.

    Raises:
        ConfigError: no process, a batch that cannot be shared evenly, the checkpoint is of other settings, or the
            machine lacks what ``compute`` asks for.
        TensorError: a loss or a gradient is not finite, the bytes of a batch weigh nothing, or not each of them has a
            weight; the last checkpoint stays.
        BundleError: the checkpoint is damaged, or could not be replaced by the next.
    """
    processes = whole("processes", processes, 1)
    compute = compute or ComputeSettings()
    compute.check()
    run = Run(config, source, settings, compute, directory, progress, tokenizer)
    if launched():
        if processes > 1:
            raise ConfigError(f"expected processes of 1 under torchrun, which has started them, got {processes}")
        with join_launched(compute.device) as worker:
            _train(run, worker)
    elif processes == 1:
        _train(run, alone(compute.device))
    else:
        _check_share(settings.batch_size, processes)
        if _begin(run, alone("cpu")).step < settings.steps:
            _train_in(processes, run)
    return _begin(run, alone("cpu")).model.eval()


def _train_in(processes: int, run: Run) -> None:
    """Train in processes of this one's, and raise what one of them has raised."""
    with tempfile.TemporaryDirectory() as meeting:
        try:
            start_processes(_work, (processes, Path(meeting), run), processes, start_method="spawn")
        except ProcessRaisedException:
            if not (raised := sorted(Path(meeting).glob("*.error"))):
                raise
            kind, _, message = raised[0].read_text(encoding="utf-8").partition("\n")
            raise getattr(errors, kind)(message) from None


def _work(rank: int, world: int, meeting: Path, run: Run) -> None:
    torch.set_num_threads(1)
    try:
        with join(run.compute.device, rank, rank, world, f"file://{meeting}/store") as worker:
            _train(run, worker)
    except BayesDispatchError as error:  # of which torch would hand on the traceback alone
        (meeting / f"{rank}.error").write_text(f"{type(error).__name__}\n{error}", encoding="utf-8")
        raise


class _State(NamedTuple):
    model: MambaFormerForCausalLM
    optimizer: torch.optim.Optimizer
    identity: Identity
    step: int


def _begin(run: Run, worker: Worker) -> _State:
    """The state of the last checkpoint, or of step 0."""
    settings = run.settings
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = MambaFormerForCausalLM(run.config, run.tokenizer).to(worker.device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    tokenizer = "bytes" if run.tokenizer is None else run.tokenizer.digest()
    identity = Identity(run.config, settings, run.compute.precision, tokenizer)
    return _State(model, optimizer, identity, load_checkpoint(run.directory, model, optimizer, identity))


def _train(run: Run, worker: Worker) -> None:
    """Take all steps that the checkpoint lacks; the last leaves a checkpoint, too."""
    settings, compute = run.settings, run.compute
    _check_share(settings.batch_size, worker.world)
    model, optimizer, identity, start = _begin(run, worker)
    if not worker.agree(start):
        raise ConfigError(f"expected {run.directory} to be the same for all processes, got different checkpoints there")
    if worker.rank == 0 and start < settings.steps:
        check_replaceable(run.directory / FILE)
    model.gradient_checkpointing = compute.gradient_checkpointing
    if compute.compile:
        for block in model.blocks:  # one by one: all blocks of a kind share a graph, however many there are
            block.compile(dynamic=False)
    parameters = list(model.parameters())
    shown = run.progress and worker.rank == 0
    hidden = None if shown else True  # None: hidden where stderr is no terminal
    bar = tqdm(range(start, settings.steps), "pre-training", initial=start, total=settings.steps, disable=hidden)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings.steps, settings.warmup, settings.flat)
        ids, weights = _batch(run, model.tokenizer, worker, step)
        optimizer.zero_grad()
        with torch.autocast(worker.device.type, torch.bfloat16, enabled=compute.precision == "bfloat16"):
            logits = model(ids).logits
        loss = next_token_loss(logits.float(), ids, weights)
        loss.backward()
        mean, weight = _share_gradients(worker, parameters, loss.detach(), weights.sum())
        if not weight > 0:  # the same in all processes, here and below: none is left to wait for the others
            raise TensorError(
                f"expected bytes of step {step} whose weights sum to more than 0, got {float(weight):.6g}"
            )
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        if not (mean + norm).isfinite():
            got = f"a loss of {float(mean):.6g} and a gradient of norm {float(norm):.6g}"
            raise TensorError(f"expected a finite loss and gradient at step {step}, got {got}: lower the learning rate")
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(mean):.3f}", refresh=False)
        if worker.rank == 0 and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps):
            save_checkpoint(run.directory, model, optimizer, identity, step + 1)
    worker.wait()


def _batch(run: Run, tokenizer: Tokenizer, worker: Worker, step: int) -> tuple[Tensor, Tensor]:
    """This process' rows of the batch of a step."""
    settings = run.settings
    rows = [
        run.source.row(np.random.default_rng([settings.seed, step, row]), settings.length)
        for row in range(worker.rank, settings.batch_size, worker.world)
    ]
    ids, weights = pack_rows(rows, tokenizer)
    if run.compute.compile:  # one shape, one graph
        missing = settings.length - weights.shape[1]
        ids = F.pad(ids, (0, missing), value=tokenizer.pad_token_id)
        weights = F.pad(weights, (0, missing))
    return ids.to(worker.device), weights.to(worker.device)


def _share_gradients(
    worker: Worker, parameters: Sequence[torch.nn.Parameter], loss: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Give each parameter the gradient of the mean loss over the batches of all processes; returns that mean, and the
    weight of all of them.

    One sum over one flat tensor, not ``DistributedDataParallel``. That takes the mean of the processes' own means,
    which is another number where their weights differ. And it regroups the gradients after its first step, so that
    three processes or more add them up in another order before than after: a resumed run would no longer be the same
    bit for bit. There is little to gain by it: for 0.5M parameters the sum takes 0.3% of a step.
    """
    totals = torch.cat([torch.stack([loss, weight]), *(_gradient(p).flatten() for p in parameters)])
    worker.add_up(totals)
    gradients = (totals[2:] / totals[1]).split([p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return totals[0] / totals[1], totals[1]


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _check_share(batch_size: int, processes: int) -> None:
    if batch_size % processes:
        raise ConfigError(f"expected a batch_size that {processes} processes can share, got {batch_size}")
