"""Parts of our models that no whole model of `transformers` has, each against the one of theirs that has it.

Capacity, experts of two matrices, capped logits, the rotary table far out. tests/moe/test_reference.py has the rest.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from transformers.models.nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.switch_transformers import SwitchTransformersConfig
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from moe.config import Config, apply
from moe.layers import Mixture, rotary
from moe.loss import sum_nats
from moe.routing import TokenChoice, losses_of
from tests.moe.reference.agreement import (
    SIGMOID,
    TINY,
    Names,
    agree,
    agree_in_gradients,
    randomize,
    text,
    translate,
    weights_of,
    widened,
)
from tests.moe.reference.causal_lm import backbone

KINDS = pytest.mark.parametrize(("kind", "act"), [("mlp", "silu"), ("relu2", "relu2")])


@KINDS
def test_two_matrix_experts_are_those_of_nemotron(kind: str, act: str) -> None:
    config = apply(TINY, SIGMOID | {"expert_kind": kind, "num_experts": 8, "top_k": 3})
    reference = NemotronHMoE(
        NemotronHConfig(
            hidden_size=config.d_model,
            moe_intermediate_size=config.d_expert,
            moe_shared_expert_intermediate_size=config.num_shared_experts * config.d_expert,
            n_routed_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            norm_topk_prob=config.normalize_gates,
            mlp_hidden_act=act,
            experts_implementation="eager",
        )
    )
    names = {
        "router": ("gate.weight",),
        "balance_bias": ("gate.e_score_correction_bias",),
        "experts.w_in": ("experts.up_proj",),
        "experts.w_out": ("experts.down_proj",),
        "shared.w_in": ("shared_experts.up_proj.weight",),
        "shared.w_out": ("shared_experts.down_proj.weight",),
    }
    _compare(config, reference, names)


@KINDS
def test_capacity_is_that_of_switch_transformers(kind: str, act: str) -> None:
    # Their group is a sequence. An expert has ceil(.75 * 32 tokens / 4 experts) = 6 places; the rest comes out as 0.
    changes = {"expert_kind": kind, "top_k": 1, "normalize_gates": False, "capacity_factor": 0.75, "routing_group": 1}
    config = apply(TINY, changes)
    with widened():  # the router takes its type when it is built
        reference = switch.SwitchTransformersSparseMLP(
            SwitchTransformersConfig(
                d_model=config.d_model,
                d_ff=config.d_expert,
                num_experts=config.num_experts,
                expert_capacity=6,
                dense_act_fn=act,
                router_jitter_noise=0.0,
                dropout_rate=0.0,
            )
        )

    experts = [f"experts.expert_{e}" for e in range(config.num_experts)]
    names = {
        "router": ("router.classifier.weight",),
        "experts.w_in": tuple(f"{expert}.wi.weight" for expert in experts),
        "experts.w_out": tuple(f"{expert}.wo.weight" for expert in experts),
    }
    x, routing = _compare(config, reference, names)
    with widened():
        kept, _, logits = reference.router(x)
        balance = switch.load_balancing_loss_func(logits.softmax(dim=-1), logits.argmax(dim=-1))

    assert kept.sum() < config.batch_size * config.seq_len
    assert torch.equal(routing.kept_E, kept.sum(dim=(0, 1)))
    agree("balance loss", losses_of([routing]).balance_L[0], balance)


def test_capped_logits_under_a_chunked_cross_entropy_are_those_of_gemma2() -> None:
    cap = 3.0
    settings = backbone(apply(TINY, {"tie_embeddings": True}))
    with widened():
        reference = Gemma2ForCausalLM(Gemma2Config(**settings, final_logit_softcapping=cap)).double()

    randomize(reference)
    tokens, targets = text(TINY)
    with widened():
        theirs = reference(input_ids=tokens, labels=targets, shift_labels=targets)
        x = reference.model(input_ids=tokens).last_hidden_state.flatten(0, 1)

    nats = sum_nats(x, reference.lm_head.weight, targets.flatten(), softcap=cap, chunk=7 * TINY.vocab_size)
    loss = nats / targets.numel()
    assert theirs.logits.abs().max() > 0.9 * cap
    agree("loss", loss, theirs.loss)
    weights = list(reference.parameters())
    gradients = zip(*(torch.autograd.grad(each, weights) for each in (loss, theirs.loss)), strict=True)
    for gradient, expected in gradients:
        agree("gradient", gradient, expected)


def test_rotary_table_is_exact_to_float32_at_any_position() -> None:
    # Frequencies and angles are rounded to 24 bits, so the error may grow with the angle.
    positions, width = torch.arange(8192), TINY.d_model // TINY.n_heads
    frequencies = TINY.rope_base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(positions.double(), frequencies)
    cos, sin = rotary(TINY, positions, torch.float32)
    bound = 1e-7 + 1e-6 * torch.cat((angles, angles), dim=1)[:, None]
    assert ((cos - torch.cat((angles.cos(), angles.cos()), dim=1)[:, None]).abs() < bound).all()
    assert ((sin - torch.cat((-angles.sin(), angles.sin()), dim=1)[:, None]).abs() < bound).all()


def _compare(config: Config, reference: nn.Module, names: Names) -> tuple[Tensor, TokenChoice]:
    """Outputs and all gradients of two layers in training; returns their input and where ours sent it."""
    reference.double().train()
    randomize(reference)
    ours = Mixture(config, layer=0).double()
    ours.load_state_dict(translate(weights_of(reference), names))
    generator = torch.Generator().manual_seed(1)
    shape = (config.batch_size, config.seq_len, config.d_model)
    x, direction = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, routing = ours(our_x, torch.zeros(shape[:2], dtype=torch.long), torch.float64, None)
    with widened():
        expected = reference(their_x)

    agree("output", y, expected)
    agree_in_gradients(ours, (y * direction).sum(), reference, (expected * direction).sum(), names)
    agree("gradient of the input", our_x.grad, their_x.grad)
    assert isinstance(routing, TokenChoice)
    return x, routing
