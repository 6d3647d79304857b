"""vLLM's queue between the engine's process and its workers, as rollout.vllm_platform changes it on a CPU."""

import json
import subprocess
import sys

from tests import warm

SCRIPT = """
import json, threading, time
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from rollout import vllm_platform

vllm_platform.spin_less()
writer = MessageQueue(n_reader=1, n_local_reader=1)
reader = MessageQueue.create_from_handle(writer.export_handle(), rank=0)
ready = threading.Thread(target=reader.wait_until_ready)
ready.start()
writer.wait_until_ready()
ready.join()
seconds = []
for notify in (writer._spin_condition.notify, lambda: None):  # the second message wakes nobody
    writer._spin_condition.notify = notify
    got = threading.Thread(target=reader.dequeue)
    got.start()
    time.sleep(0.3)  # the reader sleeps
    started = time.monotonic()
    writer.enqueue("a call")
    got.join()
    seconds.append(time.monotonic() - started)
print(json.dumps(seconds))
"""


def test_a_message_that_wakes_nobody_is_found_within_a_moment() -> None:
    """vLLM's workers look for it themselves after 5 s."""
    with warm.processes():
        run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    woken, seconds = json.loads(run.stdout.splitlines()[-1])
    assert woken < 1 and seconds < 1
