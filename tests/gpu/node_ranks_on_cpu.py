"""The node's ranks on a CPU: ``python -m tests.gpu.node_ranks_on_cpu FOLDER``, for the rehearsal of the checks.

The platform ``cpu`` is in the place of ``cuda``, gloo in that of NCCL; a GPU's memory is always as full; messages and
the 72B block are small.
"""

import os
import runpy

import torch
from transformers import LlamaConfig

from tests.gpu import node_cases

if __name__ == "__main__":
    os.environ["RANKS_PLATFORM"] = "cpu"
    torch.cuda.mem_get_info = lambda device=None: (2**30, 2**31)
    node_cases.LINK_MIB = node_cases.SMALL_REPEATS = node_cases.PASSES = 1
    node_cases.TOKENS = 64
    node_cases.ROUNDS = 3
    node_cases.LAYERS_72B = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        tie_word_embeddings=False,
    )
    runpy.run_module("tests.gpu.node_ranks", run_name="__main__", alter_sys=True)
