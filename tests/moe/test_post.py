"""What is done to trained weights: how exact it is, what it leaves alone, and the run that measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from moe.config import Config, ConfigError, apply
from moe.evaluate import evaluate
from moe.fingerprint import fingerprint
from moe.metrics import METRICS
from moe.model import MoE
from moe.observe import Setting
from moe.post.__main__ import post
from moe.post.prune import STACKS, merge, shrink, watch_routing
from moe.post.quantize import Packed, matrices, quantize, quantize_model, weight_bytes
from moe.post.serve import served_loss
from moe.post.stages import as_served, as_trained, needs_post
from moe.presets import PRESETS
from moe.probe import judge_changes
from moe.routing import TokenChoice
from moe.train import train
from tests.moe.conftest import MakeRun
from tests.moe.runs import read_json

NANO = apply(PRESETS["nano"], {"budget_tokens": 512 * 4, "eval_tokens": 1024})


def build(config: Config) -> MoE:
    model = MoE(config)
    model.init_weights(seed=1)
    return model.requires_grad_(False).eval()


def some_tokens() -> torch.Tensor:
    return torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 64), (4, 16)])
@pytest.mark.parametrize("shape", [(5, 96), (3, 4, 33)])
def test_no_weight_moves_by_more_than_half_a_step(bits: Literal[8, 4], group: int | None, shape: tuple[int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[..., 0, :] = 0.0
    packed = quantize(weight, bits, group, torch.float32)
    size = packed.codes.shape[-1] * 8 // bits
    step = packed.scales.float().expand(*packed.scales.shape[:-1], size).flatten(-2)[..., : shape[-1]]
    meant = packed.weights(torch.float32)
    # The scale is rounded to half precision: the largest code may stand for a 1,000th less than the largest weight.
    assert bool(((meant - weight).abs() <= 0.5 * step + weight.abs() * 2**-10).all())
    assert bool((meant[..., 0, :] == 0.0).all())
    assert packed.stored_bytes == packed.scales.numel() * (2 + size * bits // 8)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8)])
def test_a_quantized_model_computes_with_the_weights_that_its_codes_stand_for(
    bits: Literal[8, 4], group: int | None
) -> None:
    config = apply(NANO, {"first_k_dense": 1, "num_shared_experts": 1, "qk_norm": True})
    packed, plain = build(config), build(config)
    quantize_model(packed, bits, group, torch.float32)
    for ours, theirs in zip(matrices(packed), matrices(plain), strict=True):
        assert isinstance(ours.weight, Packed)
        theirs.weight.copy_(ours.weight.weights(torch.float32))

    tokens = some_tokens()
    for rows in (4, 1):  # experts padded together, and one after another
        torch.testing.assert_close(packed.logits(tokens[:rows]), plain.logits(tokens[:rows]))

    packed.compute = torch.bfloat16
    assert packed.logits(tokens).isfinite().all()


def test_bytes_are_those_of_the_stored_tensors() -> None:
    model = build(NANO)
    whole = weight_bytes(model)
    inside = sum(matrix.weight.numel() for matrix in matrices(model))
    channels = sum(matrix.weight.shape[:-1].numel() for matrix in matrices(model))
    assert whole == 4 * sum(parameter.numel() for parameter in model.parameters())
    quantize_model(model, 8, None, torch.float32)
    assert weight_bytes(model) == whole - 3 * inside + 2 * channels


def test_an_expert_that_nobody_chooses_is_pruned_without_a_trace() -> None:
    config = apply(NANO, {"balance_bias_rate": 0.1, "prune_experts": 1})
    model = build(config)
    for mixture in model.mixtures:
        mixture.balance_bias[2] = -100.0

    smaller = shrink(model, config, watch_routing(model, [some_tokens()]))
    assert smaller.mixtures[0].experts.w_in.shape[0] == 3
    torch.testing.assert_close(smaller.logits(some_tokens()), model.logits(some_tokens()))


def test_pruned_are_those_with_the_least_gate_mass() -> None:
    config = apply(NANO, {"prune_experts": 2})
    model = build(config)
    _, routings = model.hidden(some_tokens())
    smaller = shrink(model, config, watch_routing(model, [some_tokens()[:1], some_tokens()[1:]]))
    for layer, routing in enumerate(routings):
        assert isinstance(routing, TokenChoice)
        mass = {expert: float(routing.gates_NK[routing.experts_NK == expert].sum()) for expert in range(4)}
        kept = sorted(sorted(mass, key=mass.__getitem__)[2:])
        assert torch.equal(smaller.mixtures[layer].router, model.mixtures[layer].router[kept])
        assert torch.equal(smaller.mixtures[layer].experts.w_out, model.mixtures[layer].experts.w_out[kept])


@pytest.mark.parametrize("kind", ["swiglu", "mlp"])
def test_twins_are_merged_without_a_trace_whatever_the_order_of_their_hidden_units(kind: str) -> None:
    config = apply(NANO, {"expert_kind": kind, "top_k": 1, "merge_experts": 1})
    model = build(config)
    order = torch.randperm(config.d_expert, generator=torch.Generator().manual_seed(3))
    for mixture in model.mixtures:
        mixture.router[3] = mixture.router[1]
        w_in, w_out = mixture.experts.w_in, mixture.experts.w_out
        w_in[3] = torch.cat([half[order] for half in w_in[1].chunk(2 if kind == "swiglu" else 1)])
        w_out[3] = w_out[1][:, order]

    smaller = shrink(model, config, watch_routing(model, [some_tokens()]))
    assert smaller.mixtures[0].router.shape[0] == 3
    torch.testing.assert_close(smaller.logits(some_tokens()), model.logits(some_tokens()))


def test_merged_experts_weigh_as_much_as_they_were_used() -> None:
    config = apply(NANO, {"merge_experts": 1})
    model = build(config)
    [usage, _] = watch_routing(model, [some_tokens()])
    stacks = {name: model.state_dict()[f"blocks.0.feed_forward.{name}"] for name in STACKS[:1] + STACKS[3:]}
    merged, joint = merge(stacks, usage, config)
    assert float(joint.load_E.sum()) == float(usage.load_E.sum()) == 4 * 64 * 2
    changed = [row for row in merged["router"] if not any(torch.equal(row, other) for other in stacks["router"])]
    assert len(changed) == 1
    candidates = [
        (usage.load_E[i] * stacks["router"][i] + usage.load_E[j] * stacks["router"][j])
        / (usage.load_E[i] + usage.load_E[j])
        for i in range(4)
        for j in range(i)
    ]
    assert any(torch.allclose(changed[0], candidate.float(), atol=1e-6) for candidate in candidates)


def test_what_cannot_be_left_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="must leave top_k=2 of num_experts=4"):
        apply(NANO, {"prune_experts": 2, "merge_experts": 1})

    with pytest.raises(ConfigError, match="need tokens that choose their experts"):
        apply(NANO, {"routing": "hash", "prune_experts": 1})


def test_training_knows_nothing_of_what_comes_after() -> None:
    treated = apply(NANO, {"quantize": "int8", "prune_experts": 1})
    assert fingerprint("train", treated, "cpu") == fingerprint("train", NANO, "cpu")
    assert as_trained(treated) == NANO
    assert (needs_post("val_bpb", NANO, treated), needs_post("val_bpb", NANO)) == (True, False)
    assert needs_post("weight_bytes", NANO, apply(NANO, {"lr": 0.02}))
    assert (as_served(treated).num_experts, as_served(treated).quantize) == (3, "int8")


@pytest.mark.parametrize(
    ("treatment", "acts"),
    [
        ({"quantize": "int8"}, True),
        ({"quantize": "int4"}, True),
        ({"prune_experts": 1}, True),
        ({"merge_experts": 1}, True),
        ({"quantize_group": 16}, False),
    ],
    ids=str,
)
def test_a_probe_sees_each_knob_act(treatment: dict[str, Any], acts: bool, data_dir: Path) -> None:
    setting = Setting(data_dir, torch.device("cpu"), seed=0)
    [seen] = judge_changes(apply(NANO, treatment), NANO, setting).values()
    assert seen["acts"] is acts, seen


def test_the_group_acts_on_int4(data_dir: Path) -> None:
    losses = [served_loss(apply(NANO, {"quantize": "int4", "quantize_group": group}), data_dir, 0) for group in (8, 16)]
    assert losses[0] != losses[1]


def test_a_post_run_scores_what_it_made_of_a_checkpoint(make_run: MakeRun) -> None:
    trained = make_run(NANO, name="trained")
    train(trained)
    evaluate(trained)
    plain = score_of(make_run, NANO, "plain", trained)
    small = score_of(make_run, apply(NANO, {"quantize": "int4", "prune_experts": 1}), "small", trained)
    assert plain["val_bpb"] == read_json(trained / "score.json")["val_bpb"]
    assert plain["weight_bytes"] == 4 * plain["parameters"]
    assert small["weight_bytes"] < 0.5 * plain["weight_bytes"]
    assert small["parameters"] < plain["parameters"]
    assert small["val_bpb"] != plain["val_bpb"]
    assert abs(small["val_bpb"] - plain["val_bpb"]) < 0.1
    assert all(plain[name] > 0 for name, metric in METRICS.items() if metric.by == "post")


def test_a_post_run_says_what_it_lacks(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs `checkpoint`"):
        post(make_run(NANO, name="none", kind="post"))

    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt is missing"):
        post(make_run(NANO, name="gone", kind="post", checkpoint=str(tmp_path / "nowhere")))

    ahead = apply(NANO, {"routing": "expert_choice"})
    with pytest.raises(ConfigError, match="cannot generate"):
        post(make_run(ahead, name="ahead", kind="post", checkpoint=str(tmp_path / "nowhere")))


def score_of(make_run: MakeRun, config: Config, name: str, trained: Path) -> dict[str, Any]:
    directory = make_run(config, name=name, kind="post", checkpoint=str(trained))
    post(directory)
    return read_json(directory / "score.json")


def test_the_largest_weight_has_the_largest_code() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert quantize(weight, 8, None, torch.float32).codes.abs().flatten(1).amax(dim=1).tolist() == [127] * 3
