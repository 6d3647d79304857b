"""Hugging Face's answer, and whole tensors from what the ranks hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_ext.blocks import region
from tests.megatron_ext import cases
from tests.megatron_ext.cases import Case

Pieces = list[tuple[str, tuple[int, ...], torch.Tensor]]


@dataclass(frozen=True)
class Reference:
    """Plain transformers and torch AdamW on the same batch, one sequence at a time, FP32.

    ``log_probs`` (values, of a scalar head) and ``entropies`` by sequence and ``gradients`` by tensor before the first
    step; ``loss`` and ``grad_norm`` of each step; ``start`` and ``weights``: tensors before and after all steps.
    """

    loss: list[float]
    grad_norm: list[float]
    log_probs: dict[int, torch.Tensor]
    entropies: dict[int, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def train_reference(folder: Path, case: Case) -> Reference:
    auto = AutoModelForSequenceClassification if case.is_scalar else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    named = dict(model.named_parameters())
    if case.precision == "bf16":  # the trainer starts from rounded weights and keeps FP32 masters of them
        with torch.no_grad():
            for p in named.values():
                p.copy_(p.bfloat16())
    start = {name: p.detach().clone() for name, p in named.items()}
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": cases.OPTIMIZER.weight_decay},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (cases.OPTIMIZER.betas[0], cases.OPTIMIZER.betas[1])
    adam = torch.optim.AdamW(groups, lr=cases.SCHEDULE.learning_rate, betas=betas, eps=cases.OPTIMIZER.epsilon)
    loss, grad_norm, log_probs, entropies, gradients = [], [], {}, {}, {}
    sequences = cases.batch(case)
    for step in range(cases.STEPS):
        adam.zero_grad()
        total = torch.zeros(())
        for i, s in enumerate(sequences):
            tokens = torch.tensor([s.prompt + s.response])
            if case.is_scalar:
                output = model.score(model.model(tokens).last_hidden_state)[0, len(s.prompt) - 1 : -1].squeeze(-1)
            else:
                logits = model(tokens).logits[0, len(s.prompt) - 1 : -1] / case.temperature
                distribution = torch.distributions.Categorical(logits=logits)
                output = distribution.log_prob(torch.tensor(s.response))
                if step == 0:
                    entropies[i] = distribution.entropy().detach()
            if step == 0:
                log_probs[i] = output.detach()
            total = total + cases.token_loss(case, output).mean() / len(sequences)
        total.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in named.items()}
        loss.append(total.item())
        grad_norm.append(torch.nn.utils.clip_grad_norm_(named.values(), cases.OPTIMIZER.clip_grad_norm).item())
        adam.step()
    weights = {name: p.detach().clone() for name, p in named.items()}
    return Reference(loss, grad_norm, log_probs, entropies, gradients, start, weights)


def assemble(pieces: Pieces, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors from the pieces of all ranks; every element must be there, and replicas must agree bit for bit."""
    tensors = {name: torch.full_like(tensor, float("nan"), dtype=torch.float32) for name, tensor in like.items()}
    for name, start, piece in pieces:
        place = tensors[name][region(start, tuple(piece.shape))]
        seen = ~place.isnan()
        assert torch.equal(place[seen], piece.float()[seen]), f"{name}: ranks hold different values of an element"
        place.copy_(piece)
    missing = [name for name, tensor in tensors.items() if tensor.isnan().any()]
    assert missing == [], f"no rank holds all of {missing}"
    return tensors


def all_pieces(ranks: list[dict[str, Any]], field: str) -> Pieces:
    return [piece for rank in ranks for piece in rank[field]]


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from its files by what manifest.json says."""
    described = json.loads((checkpoint / "manifest.json").read_text())
    files = {name: load_file(checkpoint / name) for name in described["files"] if name.endswith(".safetensors")}
    tensors = {}
    for key, tensor in described["tensors"].items():
        parts = [(files[file][name], start) for file, name, start, _ in tensor["parts"]]
        tensors[key] = torch.empty(tensor["shape"], dtype=parts[0][0].dtype)
        for part, start in parts:
            tensors[key][tuple(slice(s, s + n) for s, n in zip(start, part.shape, strict=True))] = part
    return tensors
