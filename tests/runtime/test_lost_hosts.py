"""Two real processes of one run: one gets a signal, or is lost."""

import re
import signal
import time

import pytest
from support.jobs import LONG, Job, losses, saved, sealed

pytestmark = pytest.mark.slow


def test_a_signal_and_a_lost_process_end_both_and_change_nothing(folder):
    workdir = folder / "disturbed"
    job = Job(workdir, LONG, processes=2)
    job.wait_for(lambda: saved(workdir) >= 4)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [0, 0]
    stopped = saved(workdir)
    assert f"SIGTERM: saved step {stopped}" in job.logs[0].read_text()

    job = Job(workdir, LONG, processes=2)
    job.wait_for(lambda: saved(workdir) > stopped)
    job.processes[1].kill()
    begun = time.monotonic()
    assert job.wait()[0] != 0 and time.monotonic() - begun < 60
    # JAX's words, or ours where a computation has failed first.
    assert re.search("another (task died|was lost)", job.logs[0].read_text())

    total = max(12, saved(workdir) + 4)
    undisturbed = folder / "undisturbed"
    for run in (workdir, undisturbed):
        Job(run, f"--config.total_steps={total}", processes=2).finish()
    digests = [sealed(run, total)["digests"] for run in (workdir, undisturbed)]
    assert digests[0] == digests[1] and losses(workdir) == losses(undisturbed)
