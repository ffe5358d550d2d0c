"""What `serve --ray` refuses before anything starts, and what is sent to a replica; none of it needs Ray."""

import pickle
import sys
from pathlib import Path

import pytest

from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.app.engines import EngineOf
from bayes_dispatch.app.shipped import SHIPPED
from bayes_dispatch.errors import BundleError
from bayes_dispatch.serving.engine import BatchedEngine, Limits


def test_a_replica_runs_the_bundle_of_its_gateway_alone(tmp_path: Path, unchecked: None) -> None:
    """Its path and its checksum are sent, not itself."""
    sent = pickle.dumps(EngineOf.here(None, Limits(running=3)))
    assert len(sent) < 1000
    engine = pickle.loads(sent)()
    assert isinstance(engine, BatchedEngine)
    engine.close(0)
    (tmp_path / "bundle.json").write_bytes((SHIPPED / "bundle.json").read_bytes() + b" ")
    other = EngineOf.here(tmp_path, Limits())
    assert other.bundle == tmp_path
    (tmp_path / "bundle.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match="as at the gateway"):
        other()
    with pytest.raises(BundleError, match="got none"):
        EngineOf.here(tmp_path / "nothing", Limits())


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


def test_ray_is_asked_for_by_name(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # whether it is installed or not
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--port", "0", "--ray", "--replicas", "2"])
    assert ended.value.code == 2
    assert "bayes-dispatch[serve,ray]" in capfd.readouterr().err
