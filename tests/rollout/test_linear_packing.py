"""Linear layers are packed from rows that lie apart in the cache, and multiply as those that vLLM packs itself."""

import json
import subprocess
import sys

SCRIPT = """
import json
from types import SimpleNamespace
import torch
from rollout.weight_sync import worker

found = {}
for width in (1024, 1000):
    weight, x = torch.randn(96, width).bfloat16(), torch.randn(5, width).bfloat16()
    theirs, ours = (SimpleNamespace(weight=weight.clone()) for _ in range(2))
    worker._vllm_pack(theirs, remove_weight=False)
    worker._pack(ours)
    found[width] = {
        "same": torch.equal(ours.cpu_linear(x, ours.weight, None), theirs.cpu_linear(x, theirs.weight, None)),
        "kept": torch.equal(ours.weight, weight) and ours.weight.is_contiguous(),
        "stride": worker._apart_in_cache(weight).stride(0),
    }
print(json.dumps(found))
"""


def test_packing_from_rows_apart_gives_the_same_bits() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["1024"] == {"same": True, "kept": True, "stride": 1056}
    assert found["1000"] == {"same": True, "kept": True, "stride": 1000}
