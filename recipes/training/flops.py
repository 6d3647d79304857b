"""Model FLOPs of an update, for the MFU."""

from megatron_ext.batch import TokenBatch
from megatron_ext.model import Model
from megatron_ext.models import family
from recipes.preflight.scale_model import ModelShape, model_shape


def shape_of(model: Model) -> ModelShape:
    """The shape of the language model; a vision tower is left out."""
    hf_config = model.hf_config
    text = family(hf_config.architectures[0]).text_config(hf_config)
    return model_shape({"text_config": text.to_dict()})


def training_flops(model: Model, batch: TokenBatch) -> float:
    """Forward and backward on the batch's responses, all ranks together, as if no parameter were frozen.

    Operations that are repeated for memory (``parallel.recompute``) do not count, nor does padding: they are no work of
    the model. A prompt counts once for each response, whether its pass is shared or not. The output layer is computed
    for response tokens, and not at all for a scalar head.
    """
    lengths = batch.lengths
    outputs = 0 if model.is_scalar else int(batch.response_lengths.sum())
    return shape_of(model).training_flops(int(lengths.sum()), int((lengths**2).sum()), outputs)
