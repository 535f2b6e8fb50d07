"""Checkpoints with the published configurations: as many tensors and parameters as their publishers have."""

import pytest

from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.weights import read_weight_headers
from tests.skeletons import write_skeleton

QWEN = {"rms_norm_eps": 1e-06, "vocab_size": 151936, "use_sliding_window": False, "max_window_layers": 28}
YARN = {"type": "yarn", "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
MODELS = {
    "Mixtral-8x7B": ("mixtral", 995, 46_702_792_704, 45_097_156_608, {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        "rms_norm_eps": 1e-05, "rope_theta": 1e6, "sliding_window": None, "router_aux_loss_coef": 0.02,
    }),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", 4659, 14_315_784_192, 12_457_082_880, {
        **QWEN, "hidden_size": 2048, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "rope_theta": 1e6, "sliding_window": 32768,
    }),
    "Qwen3-30B-A3B": ("qwen3_moe", 18867, 30_532_122_624, 28_991_029_248, {
        **QWEN, "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "rope_theta": 1e6, "rope_scaling": None, "attention_bias": False,
    }),
    "OLMoE-1B-7B": ("olmoe", 3219, 6_919_161_856, 6_442_450_944, {
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
        "vocab_size": 50304, "clip_qkv": None, "rope_theta": 1e4,
    }),
    "DeepSeek-V2-Lite": ("deepseek_v2", 5291, 15_706_484_224, 14_394_851_328, {
        "hidden_size": 2048, "moe_intermediate_size": 1408, "intermediate_size": 10944,
        "num_hidden_layers": 27, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_shared_experts": 2,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "num_attention_heads": 16,
        "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400, "rms_norm_eps": 1e-06,
        "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 1.0, "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1,
        "rope_scaling": {**YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
    }),
    "Phi-3.5-MoE": ("phimoe", 1957, 41_873_153_344, 40_265_318_400, {
        "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2, "vocab_size": 32064,
        "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01, "rope_theta": 1e4,
        "sliding_window": 131072, "max_position_embeddings": 131072,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "short_mscale": 1.2431,
            "long_mscale": 1.2431, "original_max_position_embeddings": 4096,
        },
    }),
    "gpt-oss-20b": ("gpt_oss", 411, 20_914_757_184, 19_116_933_120, {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "vocab_size": 201088, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "sliding_window": 128, "rope_theta": 150000, "attention_bias": True, "swiglu_limit": 7.0,
        "rope_scaling": {**YARN, "rope_type": "yarn", "factor": 32.0, "truncate": False},
    }),
    "DBRX": ("dbrx", 323, 131_596_523_520, 126_835_752_960, {
        "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768, "vocab_size": 100352,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    }),
    "Granite-1b-a400m": ("granitemoe", 218, 1_334_628_352, 1_207_959_552, {
        "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8, "vocab_size": 49155,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.015625, "logits_scaling": 6.0,
    }),
    "Llama-3.1-8B": ("llama", 291, 8_030_261_248, 5_637_144_576, {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }),
    "Qwen2.5-7B": ("qwen2", 339, 7_615_616_512, 5_703_204_864, {
        **QWEN, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "rope_theta": 1e6, "sliding_window": 131072,
    }),
    "Qwen3-8B": ("qwen3", 399, 8_190_735_360, 5_435_817_984, {
        **QWEN, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 1e6, "attention_bias": False,
    }),
}  # fmt: skip
"""Family, tensors, parameters in all and of experts, and the keys of `config.json` that tell of them."""


@pytest.mark.parametrize("name", MODELS)
def test_published_model_is_accounted_for(name, tmp_path):
    family, num_tensors, parameters, expert_parameters, config = MODELS[name]
    folder = write_skeleton(tmp_path / "model", family, {"model_type": family, **config})
    opened = open_checkpoint(LocalFolder(folder))
    assert [finding for finding in opened.findings if finding.level != "note"] == []
    assert len(read_weight_headers(opened.repository)) == num_tensors
    assert (opened.expert_bytes + opened.other_bytes) // 2 == parameters
    assert opened.expert_bytes // 2 == expert_parameters
