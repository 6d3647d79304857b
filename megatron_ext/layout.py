"""How a model is cut over ranks: the sizes, and what they must fulfil. Pure: imported before a run has any rank."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How a model is cut: group sizes. Data parallelism is what is left of the ranks.

    ``virtual`` is the number of model chunks on each pipeline rank. ``first_stage_layers`` and ``last_stage_layers``
    are decoder layers of the outer pipeline ranks (all their chunks); None shares the layers out evenly.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    sequence: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @property
    def model_parallel(self) -> int:
        """Ranks of one replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def token_multiple(self) -> int:
        """A sequence is padded to a multiple of this: each context-parallel rank has two slices of it."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def micro_batch_multiple(self) -> int:
        """The interleaved pipeline schedule wants a multiple of this many micro-batches."""
        return self.pipeline if self.virtual > 1 else 1


def check(world: int, layout: Layout) -> None:
    """Raises ValueError naming the field when the sizes do not fit the number of ranks or each other."""
    sizes = {
        "parallel.tensor": layout.tensor,
        "parallel.pipeline": layout.pipeline,
        "parallel.virtual_pipeline": layout.virtual,
        "parallel.context": layout.context,
    }
    for field, size in sizes.items():
        if size < 1:
            raise ValueError(f"{field}={size}: must be above 0")
    if world % layout.model_parallel:
        raise ValueError(
            f"cluster.ranks={world}: parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} x "
            f"parallel.context={layout.context} needs a multiple of {layout.model_parallel} ranks"
        )
    if layout.sequence and layout.tensor == 1:
        raise ValueError("parallel.sequence=true: needs parallel.tensor > 1; add parallel.sequence=false")
    if layout.virtual > 1 and layout.pipeline == 1:
        raise ValueError(
            f"parallel.virtual_pipeline={layout.virtual} needs parallel.pipeline > 1: set parallel.virtual_pipeline=1"
        )
    for field, layers in (("first", layout.first_stage_layers), ("last", layout.last_stage_layers)):
        if layers is not None and layout.pipeline == 1:
            raise ValueError(f"parallel.{field}_stage_layers={layers}: needs parallel.pipeline > 1; set it null")
