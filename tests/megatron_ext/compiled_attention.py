"""``python -m tests.megatron_ext.compiled_attention``: how often ``megatron_ext.flex`` is compiled, as JSON.

Of each list of packs it says how many graphs torch has after each pack. The backend computes the graphs' operations on
the CPU one by one, forward and backward; on a GPU they become kernels.
"""

import json

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torchs

from megatron_ext import flex
from tests.megatron_ext.test_flex import draw, packed_as

# Of each list the lengths of its packs, with other prompts and responses in each.
LENGTHS = {"one length": [300, 300, 300], "many lengths": [300, 450, 260, 1000, 150, 700]}


def main() -> None:
    torchs._validate_device = lambda *tensors: None
    counts = {}
    for name, lengths in LENGTHS.items():
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        flex._attend = torch.compile(torchs.flex_attention, **flex.COMPILING, backend=backend)
        graphs = []
        for number, length in enumerate(lengths):
            prompts = [(40 + number, [30, 20 + number]), (17, [9, 8, 7 + number])]
            inputs = draw(length)
            output = flex.attend(*inputs, packed_as(prompts, length), scale=0.3)
            torch.autograd.grad(output.sum(), inputs)
            graphs.append(backend.frame_count)
        counts[name] = graphs
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
