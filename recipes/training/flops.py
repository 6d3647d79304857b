"""Model FLOPs of an update, from which the MFU is computed."""

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
    """The FLOPs of forward and backward pass over the batch, all ranks together, as if no parameter were frozen.

    Recomputation (``parallel.recompute``) and padding do not count, since they are no work of the model. A prompt
    counts once for each of its responses, whether the responses share the pass over it or not. The output layer counts
    for response tokens only. With a scalar head it does not count at all.
    """
    lengths = batch.lengths
    outputs = 0 if model.is_scalar else int(batch.response_lengths.sum())
    return shape_of(model).training_flops(int(lengths.sum()), int((lengths**2).sum()), outputs)
