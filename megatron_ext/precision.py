"""The precisions BF16, FP32 and FP8, and their fields in Megatron-Core's configurations."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.settings import setting

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp8": "bfloat16"}  # of weights and activations
RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}  # ours → Megatron-Core's


@dataclass
class PrecisionConfig:
    """What is computed and stored in which format. With fp8 linear layers multiply in FP8 through Transformer Engine;
    all else is BF16 and master weights are FP32."""

    name: str = setting(
        "weights and activations: bf16, fp32 or fp8; gradients, moments and master weights are FP32", choices=DTYPES
    )
    recipe: str | None = setting(
        "fp8's scales: delayed (history of maxima), current (present maximum), blockwise (128 x 128 blocks)",
        choices=RECIPES,
    )
    format: str | None = setting("fp8: hybrid (E4M3 forward, E5M2 gradients) or e4m3", choices=("hybrid", "e4m3"))
    bf16_layers: int = setting("fp8: layers at each end that stay in BF16; not with delayed scaling", range="[0, 1e4]")

    @property
    def dtype(self) -> Any:
        """The torch.dtype of weights and of activations outside FP8 matrix products."""
        import torch  # here, because configurations are checked before torch is needed

        return getattr(torch, DTYPES[self.name])

    def transformer_options(self) -> dict[str, Any]:
        """The TransformerConfig fields for FP8. Empty for other precisions."""
        if self.name != "fp8":
            return {}
        options: dict[str, Any] = {
            "fp8": self.format,
            "fp8_recipe": RECIPES[str(self.recipe)],
            "first_last_layers_bf16": self.bf16_layers > 0,
        }
        if self.bf16_layers:
            options |= {
                "num_layers_at_start_in_bf16": self.bf16_layers,
                "num_layers_at_end_in_bf16": self.bf16_layers,
            }
        if self.recipe == "delayed":
            # Transformer Engine's defaults. Megatron-Core's history of length 1 would be "current".
            options |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
        return options

    @property
    def token_multiple(self) -> int:
        """The number of tokens of a rank is padded to a multiple of this.

        FP8 matrix products need an inner size that is a multiple of 16. In the product for a weight's gradient the
        inner size is the number of tokens. With blockwise scales a block has 128 tokens. If the number of tokens that
        sequence parallelism leaves to a rank is not a multiple of 128, Transformer Engine gathers activations in BF16,
        which is twice as many bytes.
        """
        if self.name != "fp8":
            return 1
        return 128 if self.recipe == "blockwise" else 16


def check(precision: PrecisionConfig) -> None:
    """Check that the settings fit each other. Raises ValueError naming the field."""
    if precision.name != "fp8":
        return
    if precision.recipe is None:
        raise ValueError(f"precision.recipe=None: fp8 needs one: use one of {', '.join(RECIPES)}")
    if precision.format is None:
        raise ValueError("precision.format=None: fp8 needs one: use hybrid or e4m3")
    if precision.recipe == "delayed" and precision.bf16_layers:
        raise ValueError(
            f"precision.bf16_layers={precision.bf16_layers}: Megatron-Core can't mix BF16 layers with delayed scaling; "
            "use precision.recipe=current or blockwise, or precision.bf16_layers=0"
        )
