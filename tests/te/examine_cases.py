"""What ``examine`` looks at and ``test_layers`` compares."""

from typing import Any

TEXT_TWINS = ("tied", "qwen2", "qwen3", "scalar")
VISION_TWINS = ("qwen", "6b-hf", "6b-chat", "300m-hf")
FP8: dict[str, dict[str, Any]] = {
    "delayed": {"recipe": "delayed", "format": "hybrid"},
    "current": {"recipe": "current", "format": "hybrid", "bf16_layers": 1},
    "blockwise": {"recipe": "blockwise", "format": "e4m3"},
}
# Published size → its recipe's layout (conf/parallel), and the ranks that train a replica.
PUBLISHED = {
    "Qwen2.5-VL-7B-Instruct": ("tp2_cp2", 4),
    "DeepSeek-R1-Distill-Llama-70B": ("tp8_pp4_cp2", 64),
    "Qwen2.5-VL-72B-Instruct": ("tp8_pp4_cp2", 64),
    "InternVL3-78B-hf": ("tp8_pp4_cp2", 64),
}
# Of Transformer Engine's matrices, for communication that overlaps with their products.
UB_SWITCHES = (
    "ub_overlap_ag_fprop",
    "ub_overlap_rs_fprop",
    "ub_overlap_ag_dgrad",
    "ub_overlap_rs_dgrad",
    "ub_bulk_dgrad",
    "ub_bulk_wgrad",
)
