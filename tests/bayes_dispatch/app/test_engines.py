"""What makes an engine leaves no threads behind that would slow it."""

import subprocess
import sys
from pathlib import Path

import pytest

COUNTED = """
import os
import threading
import time
import torch
from bayes_dispatch.app.bundle_at import BundleAt
from bayes_dispatch.app.engines import EngineOf
from bayes_dispatch.serving.engine import Limits

def others():  # threads that are none of Python's
    return len(os.listdir("/proc/self/task")) - threading.active_count()

torch.set_num_threads(3)
make = EngineOf(BundleAt.here(None), Limits())
before = others()
engine = make()
deadline = time.monotonic() + 30
while others() > before and time.monotonic() < deadline:
    time.sleep(0.01)
assert others() == before, (before, others())
x = torch.ones(1000, 1000)
x.exp() @ x
assert others() == before + 2, (before, others())
engine.close(0)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux counts a process's threads in /proc")
def test_making_an_engine_leaves_no_threads() -> None:
    subprocess.run([sys.executable, "-c", COUNTED], check=True, timeout=120)
