"""Settings of a launch: the model that it starts from, and the machines that it runs on."""

from dataclasses import dataclass

from megatron_ext.platform.features import PLATFORMS
from megatron_ext.settings import FREE, KEPT, SECONDS, setting


@dataclass
class ModelConfig:
    """The Hugging Face folder that training starts from."""

    path: str = setting("folder of a Hugging Face checkpoint")
    hub: str | None = setting(
        "repository of the Hugging Face Hub from which recipes.download fills that folder; null for none",
        on_resume=FREE,
    )
    frozen: list[str] = setting(
        "prefixes of Megatron parameter names that are not trained, with the full model's layer numbers; vision is the "
        "tower without its projector"
    )
    gguf_package: str | None = setting("Python package that the folder is made from where it is absent; null for none")
    gguf_file: str | None = setting("GGUF file in that package")
    random_weights_of: str | None = setting(
        "folder of configuration and tokenizer from which model.path, where it is absent, is made with random weights; "
        "null for none"
    )


@dataclass
class ClusterConfig:
    """Machines and processes."""

    platform: str = setting("what the trainer and the engines run on", choices=PLATFORMS, on_resume=KEPT)
    nodes: int = setting("machines of the trainer", range="[1, 1e5]")
    engine_nodes: int = setting(
        "further machines, after the trainer's, that have engines and no part of the model; with 0 the engines are on "
        "the trainer's",
        range="[0, 1e5]",
    )
    ranks: int = setting("trainer processes, all its nodes together; on GPUs one per GPU", range="[1, 1e6]")
    threads: int = setting("CPU threads of each rank; under srun --cpus-per-task counts", range="[1, 1e5]")
    timeout: float = setting("longest wait of a collective, generation included", range=SECONDS, unit="seconds")
    watchdog: float = setting(
        "longest time without progress; then the run ends with all stacks. Above the longest phase, below timeout",
        range=SECONDS,
        unit="seconds",
    )
    slow_factor: float = setting("a rank that takes this many times the median is reported as slow", range="(1, 1e6]")


def check_cluster(cluster: ClusterConfig) -> None:
    """Raises ValueError for settings that do not go together."""
    if cluster.watchdog >= cluster.timeout:
        raise ValueError(
            f"cluster.watchdog={cluster.watchdog}: must be below cluster.timeout={cluster.timeout}, after which a "
            "collective fails without saying where the other ranks are"
        )
