"""Tiny configurations of every family: what its config.json can say and we must compute alike."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# Family -> what is called -> keys of its config on top of those of `tiny.SIZES`.
VARIANTS: dict[str, dict[str, dict]] = {
    "qwen2_moe": {
        "plain": {},
        "tied, renormalised, every second layer dense": {
            "tie_word_embeddings": True,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
        "without bias, first layer dense, yarn": {
            "qkv_bias": False,
            "mlp_only_layers": [0],
            "rope_parameters": YARN | {"rope_theta": 5e3},
        },
        "with a sliding window in even layers": {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
        },
    },
    "qwen3_moe": {
        "plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "tied, renormalised, biased, linear rope": {
            "tie_word_embeddings": True,
            "norm_topk_prob": True,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        },
        "with a sliding window, last layer dense": {
            "use_sliding_window": True,
            "sliding_window": 5,
            "mlp_only_layers": [1],
        },
    },
    "qwen3_next": {
        "plain, every fourth layer attends by softmax": {
            "num_hidden_layers": 4,
            "layer_types": None,
        },
        "tied, biased, not renormalised, half of each head turns, as many keys as values": {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "norm_topk_prob": False,
            "layer_types": ["full_attention", "linear_attention"],
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 3,
            "rope_parameters": YARN | {"rope_theta": 5e3, "partial_rotary_factor": 0.5},
        },
        "two linear layers in a row, the first dense, three value heads to one key head": {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "mlp_only_layers": [0],
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 3,
        },
    },
    "mixtral": {
        "with a sliding window": {"sliding_window": 4},
        "tied, wide heads": {"tie_word_embeddings": True, "head_dim": 16},
    },
    "olmoe": {
        "plain": {},
        "clipped, biased, renormalised": {
            "clip_qkv": 0.4,
            "attention_bias": True,
            "norm_topk_prob": True,
            "num_key_value_heads": 4,
        },
    },
    "deepseek_v2": {
        "greedy, first layer dense": {"first_k_dense_replace": 1},
        "narrow queries, groups, biased, scaled, yarn with mscale": {
            "q_lora_rank": 20,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 1,
            "rope_parameters": YARN
            | {"rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16},
        },
    },
    "deepseek_v3": {
        "one group, direct queries, not renormalised": {"norm_topk_prob": False},
        "groups, narrow queries, biased, yarn with mscale, last layer sparse": {
            "first_k_dense_replace": 1,
            "q_lora_rank": 20,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        "rotary pairs half a head apart": {"rope_interleave": False, "n_shared_experts": 1},
    },
    "glm4_moe": {
        "plain, first layer dense": {"first_k_dense_replace": 1},
        "biased, normalised, groups, tied, linear rope": {
            "attention_bias": True,
            "use_qk_norm": True,
            "n_group": 2,
            "topk_group": 1,
            "tie_word_embeddings": True,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    "glm4_moe_lite": {
        "plain, layers as transformers has them by default": {"mlp_layer_types": None},
        "groups, narrow queries, biased, yarn with mscale, tied, last layer dense": {
            "mlp_layer_types": ["sparse", "dense"],
            "q_lora_rank": 20,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        "rotary pairs half a head apart": {"rope_interleave": False, "norm_topk_prob": False},
    },
    "dots1": {
        "a window shorter than the text in the second layer": {},
        "groups, biased, tied, renormalised, first layer dense, all windows, yarn": {
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "layer_types": ["sliding_attention", "sliding_attention"],
            "rope_parameters": YARN | {"rope_theta": 1e4},
        },
    },
    "gpt_oss": {
        "a window shorter than the text in even layers, yarn": {},
        "tied, without attention bias, windows in odd layers, plain rope, another activation": {
            "tie_word_embeddings": True,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention"],
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}

# Family -> the configuration that is pruned and exported: two layers of experts, dense ones if the
# family has any, every width a multiple of a 4-bit group, experts of 96 channels.
EXPORTED: dict[str, dict] = {
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "qwen3_next": {
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "shared_expert_intermediate_size": 64,
    },
    "mixtral": {"intermediate_size": 96},
    "olmoe": {"intermediate_size": 96},
    "deepseek_v2": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
    },
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "kv_lora_rank": 32,
        "n_group": 2,
        "topk_group": 1,
    },
    "glm4_moe": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "glm4_moe_lite": {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "n_shared_experts": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
    },
    "dots1": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"intermediate_size": 96, "rms_norm_eps": 1e-5},
}
