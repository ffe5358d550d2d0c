"""What makes an engine leaves no threads behind that would slow it."""

import subprocess
import sys
from pathlib import Path

import pytest

COUNTED = """
import os
import time
import torch
from bayes_dispatch.app.engines import passing

def count():
    return len(os.listdir("/proc/self/task"))

def compute():
    x = torch.ones(1000, 1000)
    return float((x.exp() @ x).sum())

torch.set_num_threads(3)
before = count()
passing(compute)
deadline = time.monotonic() + 30
while count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
between = count()
compute()
print(before, between, count())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads of the system are counted by Linux's /proc")
def test_threads_of_openmp_end_with_the_thread_that_has_them() -> None:
    before, between, after = map(int, subprocess.check_output([sys.executable, "-c", COUNTED], timeout=120).split())
    assert before == between < after
