"""BF16, FP32 and FP8: what each means for Megatron-Core's configurations."""

from dataclasses import dataclass
from typing import Any

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp8": "bfloat16"}  # of weights and activations
RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}  # ours → Megatron-Core's


@dataclass(frozen=True)
class Precision:
    """``name`` is bf16, fp32 or fp8; the rest is for fp8 alone.

    FP8: linear layers multiply in FP8 through Transformer Engine, all else is BF16 and master weights FP32. ``recipe``
    scales by the history of maxima ("delayed"), the present maximum ("current") or 128 x 128 blocks ("blockwise").
    ``format`` is hybrid (E4M3 forward, E5M2 gradients) or e4m3. ``bf16_layers``: layers at each end that stay in BF16.
    ``parameter_gather``: weights are kept and gathered in FP8 by the distributed optimiser.
    """

    name: str
    recipe: str | None = None
    format: str | None = None
    bf16_layers: int = 0
    parameter_gather: bool = False

    @property
    def dtype(self) -> Any:
        """torch.dtype of weights and activations outside FP8 matrix products."""
        import torch  # here, because configurations are checked before torch is needed

        return getattr(torch, DTYPES[self.name])

    def transformer_options(self) -> dict[str, Any]:
        """TransformerConfig fields."""
        if self.name != "fp8":
            return {}
        options: dict[str, Any] = {
            "fp8": self.format,
            "fp8_recipe": RECIPES[str(self.recipe)],
            "fp8_param": self.parameter_gather,
            "first_last_layers_bf16": self.bf16_layers > 0,
        }
        if self.bf16_layers:
            options |= {
                "num_layers_at_start_in_bf16": self.bf16_layers,
                "num_layers_at_end_in_bf16": self.bf16_layers,
            }
        if self.recipe == "delayed":  # Transformer Engine's own defaults; Megatron-Core's history of 1 is "current"
            options |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
        return options

    def ddp_options(self) -> dict[str, Any]:
        """DistributedDataParallelConfig fields."""
        return {"fp8_param_gather": self.parameter_gather}

    @property
    def token_multiple(self) -> int:
        """FP8 matrix products want their inner size, the tokens in a weight's gradient, as a multiple of 16."""
        return 16 if self.name == "fp8" else 1


def check(precision: Precision) -> None:
    """Raises ValueError naming the field."""
    if precision.name not in DTYPES:
        raise ValueError(f"precision.name={precision.name!r}: use one of {', '.join(DTYPES)}")
    if precision.name != "fp8":
        return
    if precision.recipe not in RECIPES:
        raise ValueError(f"precision.recipe={precision.recipe!r}: use one of {', '.join(RECIPES)}")
    if precision.format not in ("hybrid", "e4m3"):
        raise ValueError(f"precision.format={precision.format!r}: use hybrid or e4m3")
    if precision.bf16_layers < 0:
        raise ValueError(f"precision.bf16_layers={precision.bf16_layers}: use 0 or more")
    if precision.recipe == "delayed" and precision.bf16_layers:
        raise ValueError(
            f"precision.bf16_layers={precision.bf16_layers}: Megatron-Core can't mix BF16 layers with delayed scaling; "
            "use precision.recipe=current or blockwise, or precision.bf16_layers=0"
        )
