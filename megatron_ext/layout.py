"""How a model is divided over ranks. Pure, because it is imported before a run has any rank."""

from dataclasses import dataclass

from megatron_ext.settings import TOKENS, setting

RECOMPUTE = ("none", "selective", "full")
# Modules of a dense layer that Megatron-Core can recompute on their own.
RECOMPUTE_MODULES = CORE_ATTENTION, LAYERNORM, MLP = "core_attn", "layernorm", "mlp"
GROUP = "[1, 1e5]"
LAYERS = "[1, 1e4]"


@dataclass
class ParallelConfig:
    """Sizes of the model-parallel groups; data parallelism is what is left of the ranks."""

    tensor: int = setting("tensor-parallel size", range=GROUP)
    pipeline: int = setting("pipeline-parallel size", range=GROUP)
    virtual_pipeline: int = setting("model chunks on each pipeline rank (interleaved schedule)", range=GROUP)
    first_stage_layers: int | None = setting(
        "decoder layers of the first pipeline rank, all its chunks; null shares the layers out evenly", range=LAYERS
    )
    last_stage_layers: int | None = setting(
        "decoder layers of the last pipeline rank, all its chunks; null shares the layers out evenly", range=LAYERS
    )
    context: int = setting("context-parallel size", range=GROUP)
    sequence: bool = setting("sequence parallelism, within the tensor-parallel group")
    recompute: str = setting(
        "activations recomputed in the backward pass: none, selective (some modules) or full (layers)",
        choices=RECOMPUTE,
    )
    recompute_modules: list[str] = setting(
        "selective: the modules of each layer that are recomputed: core_attn, mlp", choices=RECOMPUTE_MODULES
    )
    recompute_layers: list[int] | None = setting(
        "full: decoder layers recomputed in each model chunk, a number for each pipeline stage; null: all"
    )
    distributed_optimizer: bool = setting("shard optimiser states over the data-parallel ranks")
    micro_batch_tokens: int = setting(
        "tokens of one packed micro-batch on one data-parallel rank", range=TOKENS, unit="tokens"
    )
    constant_length: bool = setting("every packed micro-batch is padded to micro_batch_tokens")
    gradient_accumulation_fusion: bool = setting(
        "GPU: the product that computes a matrix's gradient adds it to the FP32 buffer"
    )
    overlap_grad_reduce: bool = setting(
        "gradients are reduced over the data-parallel ranks during an update's last backward pass"
    )
    tp_comm_overlap: bool = setting(
        "GPU: tensor-parallel communication overlaps with the matrix products; needs sequence and constant_length"
    )
    shared_prompts: bool | None = setting(
        "in RL the responses to a prompt share its passes in log-probs and training; null: on a CPU where it can be, "
        "not on a GPU, where it has never been run"
    )

    @property
    def model_parallel(self) -> int:
        """The number of ranks of one replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def token_multiple(self) -> int:
        """Each sequence is padded to a multiple of this many tokens."""
        return token_multiple(self.context)

    @property
    def micro_batch_multiple(self) -> int:
        """The number of micro-batches must be a multiple of this. The interleaved pipeline schedule needs it."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    def data_parallel(self, ranks: int) -> int:
        """The number of replicas of the model on ``ranks`` ranks."""
        return ranks // self.model_parallel


def token_multiple(context: int) -> int:
    """The multiple to which a sequence is padded, because each context-parallel rank has two slices of it."""
    return 2 * context if context > 1 else 1


def stage_layers(sizes: ParallelConfig, layers: int, stage: int) -> int:
    """The number of decoder layers of a pipeline stage, in all its chunks. The model has ``layers`` layers."""
    own = {sizes.pipeline - 1: sizes.last_stage_layers, 0: sizes.first_stage_layers}
    of_outer = [count for count in own.values() if count is not None]
    of_inner = (layers - sum(of_outer)) // max(1, sizes.pipeline - len(of_outer))
    of_stage = own.get(stage)
    return of_inner if of_stage is None else of_stage


def check(ranks: int, parallel: ParallelConfig) -> None:
    """Check that the sizes fit the number of ranks and each other. Raises ValueError naming the field."""
    if ranks % parallel.model_parallel:
        raise ValueError(
            f"cluster.ranks={ranks}: parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x "
            f"parallel.context={parallel.context} needs a multiple of {parallel.model_parallel} ranks"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError("parallel.sequence=true: needs parallel.tensor > 1; add parallel.sequence=false")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ValueError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1: set "
            "parallel.virtual_pipeline=1"
        )
    if parallel.shared_prompts and parallel.context > 1:
        raise ValueError(
            f"parallel.shared_prompts=true with parallel.context={parallel.context}: the slices of a prompt with all "
            "its responses would not cost every rank the same; use parallel.context=1 or parallel.shared_prompts=null"
        )
    for name in ("sequence", "constant_length"):
        if parallel.tp_comm_overlap and not getattr(parallel, name):
            raise ValueError(
                f"parallel.tp_comm_overlap=true with parallel.{name}=false: Transformer Engine overlaps the "
                "communication of sequence parallelism, in buffers for one number of tokens; set it true, or "
                "parallel.tp_comm_overlap=false"
            )
    check_recompute(parallel)
    for name in ("first_stage_layers", "last_stage_layers"):
        layers = getattr(parallel, name)
        if layers is not None and parallel.pipeline == 1:
            raise ValueError(f"parallel.{name}={layers}: needs parallel.pipeline > 1; set it null")


def check_recompute(parallel: ParallelConfig) -> None:
    """Check the settings of recomputation. Raises ValueError naming a field with which nothing would be recomputed.

    Also raises it for a wrong ``recompute_layers``.
    """
    modules = parallel.recompute_modules
    if parallel.recompute == "selective" and not modules:
        raise ValueError("parallel.recompute_modules=[]: name a module, or use parallel.recompute=none")
    if parallel.recompute == "selective" and LAYERNORM in modules:
        raise ValueError(
            f"parallel.recompute_modules={list(modules)}: Megatron-Core recomputes a layernorm that is a module of its "
            "own; Transformer Engine's are a part of the matrix after them, so nothing would be recomputed; use mlp"
        )
    layers = parallel.recompute_layers
    if layers is None:
        return
    if parallel.recompute != "full":
        raise ValueError(f"parallel.recompute_layers={list(layers)}: needs parallel.recompute=full; set it null")
    if len(layers) != parallel.pipeline or min(layers) < 0 or not any(layers):
        raise ValueError(
            f"parallel.recompute_layers={list(layers)}: give a number of layers for each of parallel.pipeline="
            f"{parallel.pipeline} stages, one of them above 0; or null for all layers"
        )
