"""The whole network: causal, independent of the micro-batch, router losses in the loss, weights from the seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.config import Config, apply
from moe.knobs import Value
from moe.layers import Attention, rotary
from moe.loss import sum_nats
from moe.model import MoE
from moe.observe import build
from moe.presets import PRESETS

NANO = apply(PRESETS["nano"], {"seq_len": 32})


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router_score": "sigmoid", "balance_bias_rate": 0.01, "num_shared_experts": 1},
        {"capacity_factor": 0.5},
        {"routing": "expert_choice"},
        {"routing": "hash", "first_k_dense": 1},
    ],
    ids=str,
)
def test_gradients_are_equal_for_every_split_into_micro_batches(changes: dict[str, Value], group: int) -> None:
    weights = {"load_balance_weight": 1.0, "router_z_weight": 0.1}
    config = apply(NANO, {"routing_group": group, **weights, **changes})
    tokens, targets = _text(config)
    whole = _gradients(config, tokens, targets, config.batch_size)
    for size in range(group, config.batch_size, group):
        if config.batch_size % size == 0:
            for split, reference in zip(_gradients(config, tokens, targets, size), whole, strict=True):
                torch.testing.assert_close(split, reference, rtol=1e-9, atol=1e-12)


def test_balancing_over_the_micro_batch_would_change_the_gradients() -> None:
    # What the routing group protects from: the same split, balanced over whatever happens to be in one forward pass.
    config = apply(NANO, {"routing_group": 8, "load_balance_weight": 1.0})
    tokens, targets = _text(config)
    name = "blocks.0.feed_forward.router"
    index = [parameter_name for parameter_name, _ in MoE(config).named_parameters()].index(name)
    whole = _gradients(config, tokens, targets, 8)[index]
    smaller = apply(config, {"routing_group": 2, "micro_batch_size": 2})
    assert (_gradients(smaller, tokens, targets, 2)[index] - whole).norm() > 0.01 * whole.norm()


def test_router_losses_reach_the_loss_with_their_weights() -> None:
    config = apply(NANO, {"load_balance_weight": 0.5, "router_z_weight": 0.25})
    output = build(config, seed=0)(*_text(config))
    expected = output.cross_entropy + 0.5 * output.balance_loss + 0.25 * output.z_loss
    torch.testing.assert_close(output.loss.detach(), expected)
    assert output.balance_loss > 0.9
    assert output.z_loss > 0


def test_chunked_cross_entropy_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    words = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(300, (50,))
    plain = torch.nn.functional.cross_entropy(x @ words.T, targets, reduction="sum")
    chunked = sum_nats(x, words, targets, chunk=300 * 7)
    torch.testing.assert_close(chunked, plain)
    pairs = zip(torch.autograd.grad(chunked, [x, words]), torch.autograd.grad(plain, [x, words]), strict=True)
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference)


def test_one_expert_is_a_dense_model() -> None:
    config = apply(NANO, {"num_experts": 1, "top_k": 1})
    output = build(config, seed=0)(*_text(config))
    assert output.balance_loss == 1.0
    assert output.router_entropy == 0.0
    assert output.load_LE.tolist() == [[256], [256]]


def test_attention_sees_relative_positions_only() -> None:
    # With equal tokens before it, a token's logits may depend on distance, never on where the sequence starts.
    attention = Attention(NANO).double()
    for weights in attention.parameters():
        torch.nn.init.normal_(weights, std=0.1)

    x = torch.randn(1, 32, NANO.d_model, dtype=torch.float64)
    early, late = (rotary(NANO, torch.arange(start, start + 32), torch.float64) for start in (0, 32))
    torch.testing.assert_close(attention(x, early), attention(x, late), rtol=1e-6, atol=1e-6)


def test_weights_come_from_the_seed_and_their_own_name() -> None:
    torch.manual_seed(1)
    first = _named(build(NANO, seed=3))
    torch.manual_seed(2)
    assert all(torch.equal(weights, first[name]) for name, weights in _named(build(NANO, seed=3)).items())
    assert not torch.equal(_named(build(NANO, seed=4))["embedding"], first["embedding"])

    more_experts = _named(build(apply(NANO, {"num_experts": 8}), seed=3))
    changed = {name for name, weights in more_experts.items() if not torch.equal(weights, first[name])}
    assert {name.split(".", 3)[3] for name in changed} == {"router", "experts.w_in", "experts.w_out"}


def test_initial_weights_have_the_declared_spread() -> None:
    config = apply(NANO, {"init_std": 0.05})
    weights = _named(build(config, seed=0))
    assert weights["embedding"].std() == pytest.approx(0.05, rel=0.05)
    assert weights["blocks.0.feed_forward.experts.w_out"].std() == pytest.approx(
        0.05 / 2, rel=0.1
    )  # sqrt(2 * 2 layers)
    assert weights["norm.scale"].tolist() == [1.0] * config.d_model


def _text(config: Config) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(config.vocab_size, (config.batch_size, config.seq_len + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _gradients(config: Config, tokens: Tensor, targets: Tensor, size: int) -> list[Tensor]:
    model = build(config, seed=0)
    for part in zip(torch.split(tokens, size), torch.split(targets, size), strict=True):
        torch.autograd.backward(model(*part).loss * (size / len(tokens)))

    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _named(model: MoE) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
