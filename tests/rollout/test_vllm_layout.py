"""Tracing weight loaders, on small modules whose loaders do one thing each."""

import pytest
import torch
from torch import nn

from rollout.weight_sync.layout import LayoutError, Rectangle, Region
from rollout.weight_sync.vllm_layout import trace_layout


class Model(nn.Module):
    """A module with one parameter ``p`` and a loader given as a function of (parameter, name, tensor)."""

    def __init__(self, shape, load, **extra):
        super().__init__()
        self.p = nn.Parameter(torch.full(shape, 7.0), requires_grad=False)
        self.load = load
        for name, tensor in extra.items():
            self.register_buffer(name, tensor)

    def load_weights(self, weights):
        for name, tensor in weights:
            self.load(self.p, name, tensor)


def fused(parameter, name, tensor):
    """Gate and up into one parameter, second half of each, by differently written views."""
    half = tensor.shape[0] // 2
    if name == "gate":
        parameter.data.narrow(0, 0, half).copy_(tensor.narrow(0, half, half))
    else:
        parameter[half : 2 * half].data.copy_(tensor.chunk(2)[1])
        parameter[2 * half :].data.fill_(0)


def test_fused_slices_and_padding_are_seen_and_nothing_is_written():
    model = Model((5, 3), fused)
    (layout,) = trace_layout(model, {"gate": (4, 3), "up": (4, 3)})
    assert layout.regions == (Region((0, 0), "gate", (2, 0), (2, 3)), Region((2, 0), "up", (2, 0), (2, 3)))
    assert layout.padding == (Rectangle((4, 0), (1, 3)),)
    assert (layout.name, layout.shape, layout.dtype) == ("p", (5, 3), "float32")
    assert (model.p[:4] == 7).all()


def test_column_slices_are_rectangles_too():
    (layout,) = trace_layout(Model((3, 2), lambda p, _, t: p.data.copy_(t[:, 4:6])), {"a": (3, 8)})
    assert layout.regions == (Region((0, 0), "a", (0, 4), (3, 2)),)


def test_a_model_without_memory_has_the_same_layout():
    model = Model((5, 3), fused)
    assert trace_layout(model.to("meta"), {"gate": (4, 3), "up": (4, 3)}) == trace_layout(
        Model((5, 3), fused), {"gate": (4, 3), "up": (4, 3)}
    )


def test_weights_of_convolutions_and_of_tokens_keep_their_dimensions():
    """Patch embeddings: whole in three dimensions of space and time, and cut by channels; a class token."""
    (layout,) = trace_layout(Model((4, 3, 2, 5, 5), lambda p, _, t: p.data.copy_(t)), {"a": (4, 3, 2, 5, 5)})
    assert layout.regions == (Region((0,) * 5, "a", (0,) * 5, (4, 3, 2, 5, 5)),)
    (layout,) = trace_layout(Model((4, 2, 5, 5), lambda p, _, t: p.data.copy_(t.narrow(1, 1, 2))), {"a": (4, 3, 5, 5)})
    assert layout.regions == (Region((0,) * 4, "a", (0, 1, 0, 0), (4, 2, 5, 5)),)
    (layout,) = trace_layout(Model((1, 1, 6), lambda p, _, t: p.data.copy_(t)), {"a": (1, 1, 6)})
    assert layout.regions == (Region((0,) * 3, "a", (0,) * 3, (1, 1, 6)),)


def test_a_buffer_that_weights_fill_is_listed():
    model = Model((4, 2), lambda p, n, t: (p if n == "a" else model.mean).data.copy_(t), mean=torch.ones(3))
    layouts = trace_layout(model, {"a": (4, 2), "b": (3,)})
    assert [(layout.name, layout.regions[0].hf_name) for layout in layouts] == [("p", "a"), ("mean", "b")]


def test_a_buffer_that_is_not_saved_is_refused_when_weights_fill_it():
    model = Model((4, 2), lambda p, n, t: (p if n == "a" else model.cache).data.copy_(t))
    model.register_buffer("cache", torch.ones(3), persistent=False)
    with pytest.raises(LayoutError, match=r"b: vLLM writes it into a tensor of shape \(3,\) that is no parameter"):
        trace_layout(model, {"a": (4, 2), "b": (3,)})


def test_a_tied_parameter_is_listed_once():
    model = Model((4, 2), lambda p, _, t: p.data.copy_(t))
    model.other = nn.Module()
    model.other.weight = model.p
    assert [layout.name for layout in trace_layout(model, {"a": (4, 2)})] == ["p"]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda p, n, t: None, r"vLLM parameter p .*only 0 of 8"),
        (lambda p, n, t: p.data[:2].copy_(t[:2]), r"vLLM parameter p .*only 4 of 8"),
        (lambda p, n, t: (p.data.copy_(t), p.data[1:2].copy_(t[1:2])), r"vLLM parameter p .*same elements"),
        (lambda p, n, t: p.data.copy_(t + 1), "p: vLLM's loader computes its values"),
        (lambda p, n, t: p.data.copy_(t.to(torch.float64)), "p: vLLM's loader computes its values"),
        (lambda p, n, t: p.data.view(2, 4).copy_(t.t()), "a: vLLM writes it into p but not as a rectangle"),
        (lambda p, n, t: p.data[:, 0].copy_(t[:, 0]), "a: vLLM writes it into p but not as a rectangle"),
        (lambda p, n, t: p.data.copy_(t.view(2, 4).t()), "p: vLLM's loader takes no plain rectangle of a"),
        (lambda p, n, t: p.data.copy_(t[:1]), "p: vLLM's loader takes no plain rectangle of a"),
        (lambda p, n, t: p.data.fill_(1), "p: vLLM's loader fills .* with 1"),
        (lambda p, n, t: (p.data.copy_(t), p.data.add_(1)), r"p: vLLM's loader changes it by aten\.add_"),
        (lambda p, n, t: (p.data.copy_(t), p.data[:1].copy_(torch.ones(1, 2))), "p: vLLM's loader changes it by aten"),
        (lambda p, n, t: p.data.copy_(t.mul_(-1)), r"a: vLLM's loader changes it by aten\.mul_"),
        (lambda p, n, t: p.data.copy_(t.zero_()), r"a: vLLM's loader changes it by aten\.zero_"),
        (lambda p, n, t: p.data.copy_(t.view(torch.int32)), "p: vLLM's loader takes no plain rectangle of a"),
        (lambda p, n, t: p.data.view(torch.int32).copy_(t), "a: vLLM writes it into p but not as a rectangle"),
        (lambda p, n, t: torch.empty(4, 2).copy_(t), "a: vLLM writes it into a tensor .* that is no parameter"),
    ],
)
def test_what_rectangles_cannot_say_is_refused_by_name(load, message):
    with pytest.raises(LayoutError, match=message):
        trace_layout(Model((4, 2), load), {"a": (4, 2)})


def test_emptied_parameters_and_unfilled_buffers_are_refused_by_name():
    def copy(p, _, t):
        p.data.copy_(t)

    with pytest.raises(LayoutError, match=r"p has shape \(0,\).*adapt"):
        trace_layout(Model((0,), copy), {"a": (4, 2)})
    with pytest.raises(LayoutError, match=r"vLLM parameter scale .*only 0 of 1"):
        trace_layout(Model((4, 2), copy, scale=torch.ones(1)), {"a": (4, 2)})
    with pytest.raises(LayoutError, match=r"_k_scale is .* scales of the key-value cache are not supported"):
        trace_layout(Model((4, 2), copy, _k_scale=torch.tensor(0.5)), {"a": (4, 2)})
    assert len(trace_layout(Model((4, 2), copy, _k_scale=torch.tensor(1.0)), {"a": (4, 2)})) == 1
