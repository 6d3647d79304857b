"""The fakes are what they stand for: kernels equal torch's operations and autograd, names are those that are bound."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from tests.te import fake_extension, fake_kernels, packages

THD = SimpleNamespace(name="NVTE_THD")
STARTS = torch.tensor([0, 3, 8])


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_rms_norm_and_its_gradients() -> None:
    rows, weight, gradient = draw(5, 8).requires_grad_(), draw(8).requires_grad_(), draw(5, 8)
    expected = F.rms_norm(rows, (8,), weight, 1e-5)
    expected.backward(gradient)
    normalised, _, scale = fake_kernels.rmsnorm_fwd(rows, weight, 1e-5, None, None, None, 0, False)
    torch.testing.assert_close(normalised, expected)
    of_rows, of_weight = fake_kernels.rmsnorm_bwd(gradient, rows, scale, weight, 0, False)
    torch.testing.assert_close((of_rows, of_weight), (rows.grad, weight.grad))


def test_layer_norm_and_its_gradients() -> None:
    rows, weight, bias = draw(5, 8).requires_grad_(), draw(8).requires_grad_(), draw(8).requires_grad_()
    gradient = draw(5, 8)
    expected = F.layer_norm(rows, (8,), weight, bias, 1e-5)
    expected.backward(gradient)
    normalised, mean, scale = fake_kernels.layernorm_fwd(rows, weight, bias, 1e-5, None, None, None, 0, False)
    torch.testing.assert_close(normalised, expected)
    gradients = fake_kernels.layernorm_bwd(gradient, rows, mean, scale, weight, 0, False)
    torch.testing.assert_close(gradients, (rows.grad, weight.grad, bias.grad))


def product(a: torch.Tensor, b: torch.Tensor, layout: str, **options: Any) -> Any:
    given: dict[str, Any] = {"out": None, "bias": None, "grad": False, "accumulate": False} | options
    return fake_kernels.generic_gemm(
        a, layout[0] == "T", b, layout[1] == "T", given["out"], None, None, given["bias"], None, False, None,
        given["grad"], torch.empty(0), 0, given["accumulate"], False,
    )  # fmt: skip


def test_the_three_products_of_a_linear_layer() -> None:
    """Forward y = x Wᵀ + b; backward x' = y' W and W' = y'ᵀ x, added to what is there, with the bias's gradient."""
    x, weight, bias, gradient, sum_so_far = draw(2, 5, 8), draw(6, 8), draw(6), draw(2, 5, 6), draw(6, 8)
    torch.testing.assert_close(product(weight, x, "TN", bias=bias)[0], F.linear(x, weight, bias))
    torch.testing.assert_close(product(weight, gradient, "NN", grad=True)[0], gradient @ weight)
    expected = sum_so_far + gradient.flatten(0, 1).T @ x.flatten(0, 1)
    of_weight, of_bias, _, _ = product(x, gradient, "NT", out=sum_so_far, bias=bias, grad=True, accumulate=True)
    torch.testing.assert_close((of_weight, of_bias), (expected, gradient.sum((0, 1))))
    assert of_weight is sum_so_far


def test_attention_by_blocks_and_its_gradients() -> None:
    """As torch's own by a mask of all scores; it reads which blocks are listed, and which are full."""

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key + 200 > query)

    mask = create_block_mask(sees, None, None, 300, 300, "cpu")
    inputs = [draw(1, heads, 300, 4).requires_grad_() for heads in (6, 2, 2)]
    everywhere = create_mask(sees, 1, 1, 300, 300, "cpu")
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=everywhere, scale=0.3, enable_gqa=True)
    gradient = draw(*expected.shape)
    output = fake_kernels.flex_attention(*inputs, block_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, gradient), torch.autograd.grad(expected, inputs, gradient)
    )
    mask.kv_num_blocks = mask.kv_num_blocks - 1
    others = fake_kernels.flex_attention(*inputs, block_mask=mask, scale=0.3, enable_gqa=True)
    assert not torch.allclose(others[:, :, 128:256], expected[:, :, 128:256])


def test_rotary_embedding_and_its_gradient() -> None:
    """Positions begin at 0 in each sequence. What the angles do not cover stays."""
    rows, gradient = draw(8, 2, 6).requires_grad_(), draw(8, 2, 6)
    angles = draw(16, 2).repeat(1, 2)  # of both halves of the first 4 elements
    place = angles[torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])][:, None]
    turned, rest = rows.split((4, 2), -1)
    first, second = turned.chunk(2, -1)
    expected = torch.cat((turned * place.cos() + torch.cat((-second, first), -1) * place.sin(), rest), -1)
    expected.backward(gradient)
    form = (None, THD, False, STARTS, 1, 0)
    torch.testing.assert_close(fake_kernels.fused_rope_forward(rows, angles[:, None, None], *form), expected)
    torch.testing.assert_close(fake_kernels.fused_rope_backward(gradient, angles[:, None, None], *form), rows.grad)


def test_adam_is_torchs_adamw() -> None:
    parameter = draw(7).requires_grad_()
    ours, first, second = parameter.detach().clone(), torch.zeros(7), torch.zeros(7)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    for step in (1, 2):
        parameter.grad = draw(7) * step
        optimizer.step()
        lists = [[parameter.grad], [ours], [first], [second]]
        fake_kernels.multi_tensor_adam(0, torch.zeros(1), lists, 0.1, 0.8, 0.9, 1e-3, step, 1, 1, 0.2)
        torch.testing.assert_close(ours, parameter.detach())


def test_a_step_that_is_no_integer_is_refused_as_by_pybind11() -> None:
    with pytest.raises(AssertionError, match="integers"):
        fake_kernels.multi_tensor_adam(0, torch.zeros(1), [[], [], [], []], 0.1, 0.8, 0.9, 1e-3, 1.0, 1, 1, 0.2)  # type: ignore[arg-type]


def test_norm_and_scaling_of_many_tensors() -> None:
    tensors = [draw(3), draw(2, 2)]
    norm, _ = fake_kernels.multi_tensor_l2norm(0, torch.zeros(1), [tensors])
    torch.testing.assert_close(norm[0], torch.cat([t.flatten() for t in tensors]).norm())
    scaled = [torch.empty_like(t) for t in tensors]
    fake_kernels.multi_tensor_scale(0, torch.zeros(1), [tensors, scaled], 0.5)
    torch.testing.assert_close(scaled, [t / 2 for t in tensors])


def test_packed_rows_are_padded_and_packed_again() -> None:
    rows = draw(8, 2, 4)
    padded = fake_kernels.convert_thd_to_bshd(rows, STARTS, 2, 5)
    assert padded.shape == (2, 5, 2, 4) and torch.equal(padded[1], rows[3:]) and not padded[0, 3:].any()
    assert torch.equal(fake_kernels.convert_bshd_to_thd(padded, STARTS, 8), rows)


def test_the_fake_extension_has_what_the_pinned_one_binds_and_no_more() -> None:
    extension = fake_extension.build()
    dtype = extension.DType
    assert (dtype.kByte, dtype.kFloat32, dtype.kBFloat16, dtype.kFloat8E4M3) == (0, 4, 6, 7)
    assert extension.NVTE_QKV_Format.NVTE_THD == 2
    assert len(fake_extension.functions(fake_extension.bindings(packages.sources()))) > 100
    assert not hasattr(extension, "rmsnorm_forward")
    with pytest.raises(NotImplementedError, match="multi_tensor_adam_fp8: no kernel without a GPU"):
        extension.multi_tensor_adam_fp8()
