"""What knobs are called elsewhere (Hugging Face, DeepSeek, nanoGPT, torchtitan): an unknown name is answered with ours.

They are never accepted in its place: one thing has one name here.
"""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = {
    "d_model": "hidden_size n_embd dim model_dim embed_dim embedding_dim hidden_dim",
    "n_layers": "n_layer num_hidden_layers depth num_layers",
    "n_heads": "n_head num_attention_heads num_heads head_dim",
    "gqa_group_size": "n_kv_heads num_key_value_heads num_kv_heads kv_heads num_query_groups n_head_kv",
    "seq_len": (
        "block_size context_length max_seq_len max_position_embeddings sequence_length context_size n_ctx ctx_len"
    ),
    "rope_base": "rope_theta rotary_base rope_scaling",
    "qk_norm": "qk_layernorm use_qk_norm",
    "tie_embeddings": "tie_word_embeddings weight_tying share_embeddings_and_output_weights",
    "logit_softcap": "final_logit_softcapping logit_cap",
    "init_std": "initializer_range init_method_std",
    "num_experts": "n_experts n_routed_experts num_local_experts moe_num_experts num_moe_experts n_expert",
    "top_k": (
        "experts_per_token num_experts_per_tok moe_router_topk moe_k n_activated_experts "
        "num_activated_experts active_experts"
    ),
    "d_expert": (
        "expert_width intermediate_size moe_intermediate_size ffn_hidden_size moe_ffn_hidden_size ffn_dim "
        "expert_dim expert_hidden_dim expert_hidden_size expert_ffn_dim mlp_ratio"
    ),
    "expert_kind": "hidden_act activation hidden_activation activation_function act_fn mlp_type ffn_type",
    "num_shared_experts": "n_shared_experts shared_experts shared_expert",
    "first_k_dense": "first_k_dense_replace n_dense_layers num_dense_layers",
    "moe_every": "moe_layer_freq decoder_sparse_step moe_frequency moe_layer_frequency interleave_moe_layer_step",
    "dense_scale": "d_ff d_ffn",
    "routing": "router_type routing_type router hash_routing expert_choice",
    "router_score": (
        "scoring_func score_func gating gate gating_function gate_type gate_activation router_activation "
        "moe_router_score_function scoring_function use_sigmoid"
    ),
    "normalize_gates": "norm_topk_prob normalize_topk norm_topk route_norm renormalize",
    "noisy_top_k": "noisy_gating jitter_noise router_jitter_noise router_noise moe_input_jitter_eps",
    "load_balance_weight": (
        "aux_loss_coef aux_loss_weight router_aux_loss_coef load_balance_coeff aux_loss aux_loss_alpha "
        "moe_aux_loss_coeff aux_weight balance_loss_weight lb_loss_weight load_balancing_loss_weight "
        "balancing_loss lbl_weight"
    ),
    "router_z_weight": "z_loss router_z_loss router_z_loss_coef z_loss_weight z_loss_coef moe_z_loss_coeff z_weight",
    "balance_bias_rate": (
        "expert_bias bias_update_rate bias_update_speed moe_router_bias_update_rate router_bias_update_rate "
        "moe_router_enable_expert_bias bias_lr aux_loss_free"
    ),
    "capacity_factor": "expert_capacity capacity moe_expert_capacity_factor drop_tokens dropless token_dropping",
    "router_precision": "router_dtype moe_router_dtype",
    "router_init_scale": "router_init_std",
    "router_lr_scale": "router_lr freeze_router",
    "optimizer": "opt optimizer_name optim",
    "lr": "learning_rate peak_lr initial_lr max_lr step_size",
    "schedule": "lr_schedule lr_scheduler_type lr_decay_style scheduler lr_scheduler",
    "decay_fraction": "cooldown_fraction decay_ratio wsd_decay_fraction",
    "min_lr_ratio": "min_lr lr_min final_lr_fraction min_lr_factor",
    "warmup_fraction": "warmup_steps warmup_ratio warmup warmup_iters num_warmup_steps lr_warmup_steps",
    "weight_decay": "wd",
    "beta1": "adam_beta1 beta_1",
    "beta2": "adam_beta2 beta_2",
    "muon_momentum": "momentum",
    "muon_steps": "ns_steps newton_schulz_steps",
    "grad_clip": "max_grad_norm clip_grad gradient_clipping clip_grad_norm max_norm gradient_clip_val",
    "batch_size": "train_batch_size global_batch_size total_batch_size",
    "batch_doublings": "batch_size_rampup batch_size_warmup rampup_batch_size",
    "length_doublings": "sequence_length_warmup seqlen_warmup curriculum",
    "ema_decay": "ema ema_rate ema_beta",
    "corpus": "dataset dataset_name",
    "budget_tokens": "max_steps train_steps num_steps max_iters max_tokens train_tokens num_train_epochs epochs",
    "budget_seconds": "time_limit",
    "replicate": "seed",
    "micro_batch_size": "per_device_train_batch_size gradient_accumulation_steps grad_accum_steps",
    "activation_checkpointing": "gradient_checkpointing activation_recompute",
    "precision": "dtype torch_dtype mixed_precision",
    "prune_experts": "pruning num_pruned_experts expert_pruning",
    "merge_experts": "expert_merging merging num_merged_experts",
    "quantize": "quantization bits num_bits weight_bits load_in_8bit load_in_4bit",
    "quantize_group": "quant_group_size group_size",
}

ALIASES: Mapping[str, str] = {name: knob for knob, names in _NAMES.items() for name in names.split()}
"""Our knob by the name that it has elsewhere."""
