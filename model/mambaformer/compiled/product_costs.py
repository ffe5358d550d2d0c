"""What products with small batches cost on this machine, and whether one row's matrices are worth folding (DESIGN §5).

A row that decodes under scales of its own reads U and Vᵀ at each token, or once builds W(z) = U diag(s z) Vᵀ and then
reads that, which is smaller. Building takes as long as some tens of tokens or some hundreds, by the machine and by
whether the matrices fit its caches; so it is measured. Several rows never fold: they share one reading of U and Vᵀ, and
two matrices of their own are as large as both, or larger.
"""

import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.model.mambaformer.compiled.switch import kernels
from bayes_dispatch.storage import read_json, write_json

__all__ = ["ProductCosts", "costs_file", "machine", "measure", "present_costs", "read_costs", "save_costs"]

VERSION = 1
SWITCH = "BAYES_DISPATCH_COSTS"  # another file, or "off"
SIZES = (2**19, 2**21, 2**23, 2**25, 2**27)  # bytes of weights that a token reads: from a cache of one core to memory
WIDTH = 256  # of the measured matrices
SECONDS, BATCHES = 0.2, 5  # for each number, about


@dataclass(frozen=True)
class ProductCosts:
    """Measured on one machine, on one thread.

    Attributes:
        machine: which one, and the versions of what computes on it.
        sizes: bytes of weights that are read for a token, rising. reading: seconds a byte, where so many are read for
            one row. building: seconds a multiplication of W(z).

    Raises:
        ConfigError: sizes that do not rise, another number of times than of sizes, or one that is no positive number.
    """

    machine: str
    sizes: tuple[int, ...]
    reading: tuple[float, ...]
    building: float

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or self.sizes[0] < 1 or not rising or len(self.sizes) != len(self.reading):
            raise ConfigError(f"expected rising sizes and a time for each, got {self.sizes} and {self.reading}")
        if not all(0 < each < float("inf") for each in (*self.reading, self.building)):
            raise ConfigError(f"expected times above 0, got {(*self.reading, self.building)}")

    def token(self, size: int) -> float:
        """Seconds to multiply one row by weights of so many bytes; between the measured sizes by their logarithm."""
        return size * float(np.interp(np.log(size), np.log(self.sizes), self.reading))

    def factored(self, shapes: Sequence[tuple[int, int]], itemsize: int, tokens: int) -> float:
        """Seconds for one row to decode with factors of matrices of these shapes."""
        return tokens * self.token(itemsize * sum(min(shape) * sum(shape) for shape in shapes))

    def folded(self, shapes: Sequence[tuple[int, int]], itemsize: int, tokens: int) -> float:
        """Seconds for one row to decode with W(z), building included."""
        built = itemsize / 4 * self.building * sum(out * into * min(out, into) for out, into in shapes)
        return built + tokens * self.token(itemsize * sum(out * into for out, into in shapes))

    def folding_pays(self, shapes: Sequence[tuple[int, int]], itemsize: int, tokens: int) -> bool:
        """Whether one row decodes so many tokens sooner with folded matrices.

        Args:
            shapes: (out_features, in_features) of the matrices with full-rank scales. itemsize: bytes of a number.
        """
        return bool(shapes) and self.folded(shapes, itemsize, tokens) < self.factored(shapes, itemsize, tokens)


def measure() -> ProductCosts:
    """Measure this machine, on one thread; some seconds."""
    draw, product = np.random.default_rng(0), kernels().product
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        reading = []
        for size in SIZES:
            weights = draw.standard_normal((size // 4 // WIDTH, WIDTH), dtype=np.float32)
            reading.append(_seconds(partial(product, weights[:1].copy(), weights, weights[:0], weights[:0])) / size)
        U = torch.from_numpy(draw.standard_normal((4 * WIDTH, WIDTH), dtype=np.float32))
        Vt, s = U[:WIDTH].clone(), U[0].clone()
        building = _seconds(lambda: (U * s) @ Vt) / (4 * WIDTH**3)
    finally:
        torch.set_num_threads(threads)
    return ProductCosts(machine(), SIZES, tuple(reading), building)


def save_costs(costs: ProductCosts, path: Path) -> None:
    """Keep them in a file, written whole or not at all."""
    write_json(path, {"version": VERSION, **asdict(costs)})


def read_costs(path: Path) -> ProductCosts:
    """What ``save_costs`` has kept on this machine.

    Raises:
        BundleError: the file is missing, damaged, of another version, or of another machine.
    """
    found = read_json(path)
    if not isinstance(found, Mapping) or found.get("version") != VERSION:
        raise BundleError(f"expected costs of products, version {VERSION}, in {path}, got others")
    try:
        sizes, reading = tuple(map(int, found["sizes"])), tuple(map(float, found["reading"]))
        costs = ProductCosts(str(found["machine"]), sizes, reading, float(found["building"]))
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise BundleError(f"expected costs of products in {path}, got damaged ones: {error}") from None
    if costs.machine != machine():
        raise BundleError(f"expected costs measured on {machine()}, got in {path} ones of {costs.machine}")
    return costs


def costs_file() -> Path | None:
    """Where the costs of this machine are kept; ``None`` where they are switched off, or the user has no home.

    ``BAYES_DISPATCH_COSTS`` names another file, or is "off"; by default the user's cache directory has it.
    """
    chosen = os.environ.get(SWITCH, "")
    if chosen:
        return None if chosen.lower() == "off" else Path(chosen)
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a process of a user that the system does not know
        return None
    return caches / "bayes-dispatch" / "products.json"


def present_costs() -> ProductCosts | None:
    """The costs that are kept, read once; ``None`` where there are none.

    A file that cannot be used is warned of, and one that ``BAYES_DISPATCH_COSTS`` names and is not there.
    """
    path = costs_file()
    return None if path is None else _kept(path)


@cache
def machine() -> str:
    """The processor, and the versions of the libraries that compute."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        named.setdefault(key.strip(), value.strip())  # of the first core
    known = [named[key] for key in ("model name", "CPU implementer", "CPU part", "CPU variant") if key in named]
    processor = " ".join(known) or platform.processor()
    return f"{platform.machine()} {processor}, torch {torch.__version__}, numba {version('numba')}"


@cache
def _kept(path: Path) -> ProductCosts | None:
    try:
        if not os.environ.get(SWITCH) and not path.exists():
            return None
        return read_costs(path)
    except (BundleError, OSError) as error:
        warnings.warn(f"{error}; `bayes-dispatch measure` makes a new one", stacklevel=2)
        return None


def _seconds(run: Callable[[], object]) -> float:
    """CPU time of a run, the least mean of some batches: what it takes when nothing else runs."""
    run()
    count, taken = 1, _batch(run, 1)
    while taken < SECONDS / BATCHES:
        count *= 2
        taken = _batch(run, count)
    return min(taken, *(_batch(run, count) for _ in range(BATCHES))) / count


def _batch(run: Callable[[], object], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        run()
    return time.process_time() - start
