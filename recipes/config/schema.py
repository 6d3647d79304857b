"""The schema of a run's configuration. It has one field for each group of conf/.

The class of each field is defined in the package that uses it.
"""

from dataclasses import dataclass

from megatron_ext.layout import ParallelConfig
from megatron_ext.optimizer_settings import OptimizerConfig
from megatron_ext.platform.features import capabilities
from megatron_ext.precision import PrecisionConfig
from megatron_ext.settings import FREE, setting
from recipes.algorithms.settings import AlgorithmConfig
from recipes.config.launch import ClusterConfig, ModelConfig
from recipes.config.records import CheckpointConfig, LoggerConfig
from recipes.config.stages import CriticConfig, StageConfig
from recipes.data.settings import DataConfig
from recipes.errors import ConfigError
from rewards.settings import RewardsConfig
from rollout.settings import RolloutConfig


@dataclass
class RecipeConfig:
    """A recipe is a file of conf/recipe."""

    name: str = setting("the recipe's name, and its folder below runs/")


@dataclass
class Config:
    """One field per Hydra group, and what every stage shares."""

    recipe: RecipeConfig = setting("the recipe")
    stage: StageConfig = setting("what a launch does")
    # It comes before the groups for which conf/ derives values from it, so that an impossible value is reported for the
    # setting that was given.
    cluster: ClusterConfig = setting("machines and processes", on_resume=FREE)
    model: ModelConfig = setting("the model that training starts from")
    algorithm: AlgorithmConfig = setting("the RL algorithm")
    rewards: RewardsConfig = setting("verifiers, their servers, and how their scores become a reward")
    parallel: ParallelConfig = setting("how the trainer's model is cut over ranks", on_resume=FREE)
    precision: PrecisionConfig = setting("the trainer's number formats")
    rollout: RolloutConfig = setting("engines and sampling")
    data: DataConfig = setting("rows and prompts")
    logger: LoggerConfig = setting("further records of metrics", on_resume=FREE)
    optimizer: OptimizerConfig = setting("the optimiser of every model that is trained")
    critic: CriticConfig = setting("PPO's critic")
    checkpoint: CheckpointConfig = setting("checkpoints to resume from", on_resume=FREE)
    seed: int = setting("seed of all random draws", range="[0, 2147483647]")
    run_dir: str = setting("the run's folder", on_resume=FREE)
    resume: bool = setting("go on from the newest checkpoint in run_dir", on_resume=FREE)
    resume_accept: list[str] = setting(
        "settings, or groups of them, in which the resumed run may differ although that is another experiment",
        on_resume=FREE,
    )
    overwrite: bool = setting("move what run_dir holds of another run to run_dir.1, .2, … and begin", on_resume=FREE)


def samples_per_step(config: Config) -> int:
    """Responses of one RL step, over all ranks."""
    return config.algorithm.prompts_per_step * config.algorithm.samples_per_prompt


def samples_per_update(config: Config) -> int:
    """Responses of one optimiser step, over all ranks."""
    return samples_per_step(config) // config.algorithm.updates_per_rollout


def sequence_multiple(config: Config) -> int:
    """The number that the sequences of an update must be a multiple of.

    With such a number, each data-parallel rank gets the same number of sequences, and the interleaved pipeline schedule
    can form as many micro-batches of them as it needs.
    """
    parallel = config.parallel
    return parallel.data_parallel(config.cluster.ranks) * parallel.micro_batch_multiple


def generates(config: Config) -> bool:
    """Whether a stage asks engines for responses."""
    return config.stage.evaluates or "rl" in config.stage.trains


def job_processes(config: Config) -> int:
    """Number of processes of a job: the trainer's ranks, and those on the engines' own nodes.

    Each of the engines' nodes has as many processes as a node of the trainer.
    """
    cluster = config.cluster
    return cluster.ranks + cluster.engine_nodes * (cluster.ranks // cluster.nodes)


def nodes_with_engines(config: Config) -> int:
    """Number of nodes that have engines: the engines' own nodes or, without such, the trainer's."""
    return config.cluster.engine_nodes or config.cluster.nodes


def engines_of_a_node(config: Config, nodes: int) -> int:
    """Number of engines on each of the ``nodes`` that have engines.

    Raises ConfigError if the nodes can't share the engines evenly, or if a node has too few GPUs for its engines.
    """
    engines = config.rollout.engines
    if engines % nodes:
        where = "cluster.engine_nodes is" if config.cluster.engine_nodes else "the job has"
        unit = "" if config.cluster.engine_nodes else " nodes"
        raise ConfigError(f"rollout.engines={engines}: {where} {nodes}{unit}; use a multiple, each gets as many")
    count = engines // nodes
    gpus = gpus_of_a_node(config, nodes)
    if capabilities(config.cluster.platform).has_gpus and count * config.rollout.tensor > gpus:
        raise ConfigError(
            f"rollout.engines={engines}, rollout.tensor={config.rollout.tensor}: {count} engines of so many GPUs do "
            f"not fit on a node's {gpus}"
        )
    return count


def gpus_of_a_node(config: Config, nodes: int) -> int:
    """Number of GPUs of each of the ``nodes`` that have engines. There is one process for each GPU."""
    trainers = config.cluster.nodes if config.cluster.engine_nodes else nodes
    return config.cluster.ranks // trainers
