"""The settings of the node check: the group ``node_check``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """conf/node_check/: the requirements for a node. None: not checked.

    Attributes:
        driver: least major version of NVIDIA's driver.
        gpus: least number of a node's GPUs; None for as many as it has ranks.
        gpu_free_share: least share of a GPU's memory that is free.
        host_memory_share: least share of the node's memory that the job's cgroup allows, on GPU nodes.
        shm_gib: least free memory of /dev/shm.
        open_files: least soft limit of open files.
        disk_gib: least free space in the folder of temporary files.
        clock_skew: greatest difference from the first node's clock, in seconds.
        timeout: seconds in which all nodes have to reach the first.
        node_gb_s: least bus bandwidth of an all-reduce within a node, in 1e9 bytes a second.
        neighbour_gb_s: least bandwidth of a GPU to and from its neighbour in the next node.
        link_mib: size of the messages with which bandwidths are measured.
    """

    driver: int | None
    gpus: int | None
    gpu_free_share: float | None
    host_memory_share: float | None
    shm_gib: float | None
    open_files: int | None
    disk_gib: float | None
    clock_skew: float | None
    timeout: float
    node_gb_s: float | None
    neighbour_gb_s: float | None
    link_mib: int
