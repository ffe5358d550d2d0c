"""What commands refuse of `--ray` before anything starts, and what is sent to a replica; little of it needs Ray."""

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bayes_dispatch.app.bundle_at import BundleAt
from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.app.commands import serve as commands
from bayes_dispatch.app.engines import EngineOf
from bayes_dispatch.app.shipped import SHIPPED
from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.serving.engine import BatchedEngine, Limits


def test_a_replica_runs_the_bundle_of_its_gateway_alone(tmp_path: Path, unchecked: None) -> None:
    """Its path and its checksum are sent, not itself."""
    sent = pickle.dumps(EngineOf(BundleAt.here(None), Limits(running=3)))
    assert len(sent) < 1000
    engine = pickle.loads(sent)()
    assert isinstance(engine, BatchedEngine)
    engine.close(0)
    (tmp_path / "bundle.json").write_bytes((SHIPPED / "bundle.json").read_bytes() + b" ")
    other = BundleAt.here(tmp_path)
    assert other.path == tmp_path
    (tmp_path / "bundle.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match="as where it was named"):
        other.load()
    with pytest.raises(BundleError, match="which is neither"):
        BundleAt.here(tmp_path / "nothing")


def test_the_key_of_a_vllm_server_is_not_shown() -> None:
    """It is sent; what prints the settings of a replica, such as Ray's logs, has it not."""
    made = EngineOf(BundleAt.here(None), Limits(), "http://127.0.0.1:8001", "a-key-of-the-server")
    assert "a-key-of-the-server" not in repr(made)
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--replicas", "2"], "expected --replicas with --ray, got it without"),
        (["--replica-cpus", "2"], "expected --replica-cpus with --ray, got it without"),
        (["--ray", "--replicas", "2", "--replica-busy", "3"], "expected --replica-busy with --replicas A-B"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    capfd: pytest.CaptureFixture[str], given: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--port", "0", *given])
    assert ended.value.code == 2
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["serve", "--port", "0", "--device", "cuda:1"], "cpu or cuda with --ray, which chooses the GPUs, got cuda:1"),
        (["compare", "--device", "cuda"], "cpu with --ray, whose blocks have a core each, got cuda"),
        (
            ["fit", "--examples", "prompts.jsonl", "--out", "new", "--device", "cuda"],
            "cpu with --ray, whose blocks have a core each, got cuda",
        ),
    ],
)
def test_devices_that_ray_is_not_asked_for_are_refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--ray"])
    assert ended.value.code == 2
    assert capfd.readouterr().err == f"bayes-dispatch: error: expected --device {told}\n"


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda", 1)])
def test_ray_is_asked_for_a_gpu_where_replicas_run_on_one(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int
) -> None:
    """The gateway loads the bundle for itself on the CPU."""
    asked: list[Any] = []

    class Scale:
        @staticmethod
        def read(*given: Any) -> str:
            asked.append(given)
            return "scale"

    @contextmanager
    def on_ray(make: EngineOf, loaded: Any, scale: Any, name: str) -> Iterator[None]:
        asked.append((make.bundle.device, loaded, scale))
        raise ConfigError("enough")
        yield

    monkeypatch.setitem(sys.modules, "bayes_dispatch.serving.ray.cluster", SimpleNamespace(Scale=Scale))
    monkeypatch.setattr(commands, "open_bundle", lambda _, device, dtype: (device, dtype))
    monkeypatch.setattr(commands, "_on_ray", on_ray)
    monkeypatch.setattr(commands, "_log", lambda _: None)  # it would stay for other tests
    with pytest.raises(SystemExit):
        cli.main(["serve", "--port", "0", "--ray", "--replicas", "2", "--device", device])
    assert asked == [("2", 16, 1.0, gpus), (device, ("cpu", None), "scale")]


def test_a_model_of_ours_on_a_gpu_is_refused_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster = SimpleNamespace(Scale=SimpleNamespace(read=lambda *_: "scale"), replicas_on_ray=None)  # not to be called
    monkeypatch.setitem(sys.modules, "bayes_dispatch.serving.ray.cluster", cluster)
    monkeypatch.setattr(commands, "_log", lambda _: None)  # it would stay for other tests
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--port", "0", "--ray", "--device", "cuda"])
    assert ended.value.code == 2
    assert "expected a bundle of a transformers model for cuda, got " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["serve", "--port", "0", "--ray", "--replicas", "2"], "serve,ray"),
        (["compare", "--ray"], "ray"),
        (["fit", "--ray", "--examples", "prompts.jsonl", "--out", "new"], "ray"),
    ],
)
def test_ray_is_asked_for_by_name(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # whether it is installed or not
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 2
    told = f"expected the extra {extra} (pip install '.[{extra}]' in a copy of the repository), got no ray"
    assert capfd.readouterr().err == f"bayes-dispatch: error: {told}\n"


@pytest.mark.parametrize("cpus", [0.0, -1.0, float("nan"), float("inf")])
def test_cores_are_a_number(cpus: float) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    from bayes_dispatch.serving.ray.cluster import Scale

    with pytest.raises(ConfigError, match="expected cpus to be a finite number > 0"):
        Scale.read("2", 1, cpus)


@pytest.mark.parametrize("own", [True, False])
def test_a_replica_has_the_gpu_that_it_is_to_run_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own: bool
) -> None:
    """And where there is none: of this machine no more can come, of a cluster's others may."""
    pytest.importorskip("ray", reason="needs the extra ray")
    from bayes_dispatch.serving.ray import cluster

    class Asked(Exception):
        pass

    def deployment(*_: Any, **options: Any) -> None:
        raise Asked(options["ray_actor_options"])

    monkeypatch.setattr(cluster, "connected", lambda: nullcontext(own))
    monkeypatch.setattr(cluster.serve, "deployment", deployment)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    scale = cluster.Scale.read("1", 1, 0.5, 1)
    with pytest.raises(Asked) as asked, cluster.replicas_on_ray(lambda: None, scale, "name", 1, 1):  # type: ignore[arg-type,return-value]
        pass
    assert asked.value.args == ({"num_cpus": 0.5, "num_gpus": 1},)
    assert not caplog.records
    error = ConfigError if own else Asked
    scale = cluster.Scale.read("2", 1, 0.5, 1)
    with pytest.raises(error) as refused, cluster.replicas_on_ray(lambda: None, scale, "name", 1, 1):  # type: ignore[arg-type,return-value]
        pass
    told = "expected replicas for the 1 GPUs of this machine, got 2 replicas of 1"
    assert (str(refused.value) == told) is own
    assert [record.facts for record in caplog.records] == ([] if own else [{"for": "GPUs", "has": 1.0, "needs": 2}])  # type: ignore[attr-defined]
