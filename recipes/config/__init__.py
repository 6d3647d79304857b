"""The configuration of a run: its schema, composed of every room's settings, and its checks."""

from recipes.config.checks import check
from recipes.config.parsing import parse
from recipes.config.schema import (
    Config,
    engines_of_a_node,
    generates,
    gpus_of_a_node,
    job_processes,
    nodes_with_engines,
    samples_per_step,
    samples_per_update,
    sequence_multiple,
)

__all__ = [
    "Config",
    "check",
    "engines_of_a_node",
    "generates",
    "gpus_of_a_node",
    "job_processes",
    "nodes_with_engines",
    "parse",
    "samples_per_step",
    "samples_per_update",
    "sequence_multiple",
]
