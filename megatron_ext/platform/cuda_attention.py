"""The attention of decoder layers on a GPU. Importing this module needs Transformer Engine."""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention

from megatron_ext import flex


class DecoderAttention(TEDotProductAttention):
    """Transformer Engine's attention, or torch's FlexAttention for a pack with shared prompts.

    Transformer Engine's attention does not support the mask of such a pack.
    """

    def forward(self, query: Any, key: Any, value: Any, *others: Any, packed_seq_params: Any, **options: Any) -> Any:
        """Query [tokens, heads, head_dim], key and value [tokens, groups, head_dim] → [tokens, heads x head_dim]."""
        if packed_seq_params.segments is None:
            return super().forward(query, key, value, *others, packed_seq_params=packed_seq_params, **options)
        return flex.attend(query, key, value, packed_seq_params, self.softmax_scale)
