"""Linear layers are packed from rows that lie apart in the cache, and multiply as those that vLLM packs itself.

vLLM chooses the kernel by processor and by size: below 1 MiB one of its own where there is AMX, oneDNN for the rest.
"""

import json
import subprocess
import sys
from typing import Any

from tests import warm

SCRIPT = """
import json
from types import SimpleNamespace
import torch
from rollout import vllm_platform

results = {}
for name, rows, width in (("small", 96, 1024), ("large", 640, 1024), ("odd width", 640, 1000)):
    weight = torch.randn(rows, width).bfloat16()
    bias = torch.randn(rows).bfloat16()
    x = torch.randn(5, width).bfloat16()
    theirs = SimpleNamespace(weight=weight.clone(), bias=bias.clone())
    vllm_platform.vllm_pack()(theirs, remove_weight=False)
    ours = SimpleNamespace(weight=weight.clone(), bias=bias.clone())
    vllm_platform.pack_layer(ours)
    product = ours.cpu_linear(x, ours.weight, ours.bias)
    results[name] = {
        "same product": torch.equal(product, theirs.cpu_linear(x, theirs.weight, theirs.bias)),
        "weight kept": torch.equal(ours.weight, weight) and ours.weight.is_contiguous(),
        "bias kept": torch.equal(ours.bias, bias) and ours.bias.dtype == torch.bfloat16,
        "bytes from row to row": 2 * vllm_platform.rows_apart_in_cache(weight).stride(0),
    }
print(json.dumps(results))
"""


def test_packing_from_rows_apart_gives_the_same_bits() -> None:
    with warm.processes():
        run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    results: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    for result in results.values():
        assert result["same product"] and result["weight kept"] and result["bias kept"]
    assert results["large"]["bytes from row to row"] % 2048 != 0
    assert results["odd width"]["bytes from row to row"] == 2 * 1000, "no copy where rows share few sets anyway"
