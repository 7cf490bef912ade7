"""The kinds of decoder that transformers has, tiny and random: those that are right, and those that are refused."""

import inspect

import torch
import transformers
from tiny import VOCAB
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

OLD = transformers.__version__ < '5'

# Whatever of these a config knows, under its own name for it.
SIZES = {
    **dict.fromkeys(('hidden_size', 'd_model', 'n_embd', 'embed_dim', 'embedding_size', 'emb_dim'), 16),
    **dict.fromkeys(('num_hidden_layers', 'n_layer', 'n_layers', 'num_layers', 'decoder_layers'), 2),
    **dict.fromkeys(('num_attention_heads', 'n_head', 'n_heads', 'num_heads', 'decoder_attention_heads'), 2),
    **dict.fromkeys(('intermediate_size', 'ffn_dim', 'n_inner', 'ffn_hidden_size', 'decoder_ffn_dim', 'dff'), 24),
    **dict.fromkeys(('max_position_embeddings', 'n_positions', 'max_seq_len', 'n_ctx'), 64),
    **dict.fromkeys(('num_local_experts', 'num_experts', 'n_routed_experts', 'moe_num_experts'), 2),
    **dict.fromkeys(('moe_intermediate_size', 'shared_expert_intermediate_size', 'shared_intermediate_size'), 8),
    **dict.fromkeys(('encoder_layers', 'num_experts_per_tok', 'num_key_value_heads'), 1),
    **dict.fromkeys(('mamba_d_state', 'state_size'), 4),
    **dict.fromkeys(('head_dim', 'kv_channels', 'mamba_chunk_size', 'chunk_size'), 8),
    'vocab_size': len(VOCAB),
    'pad_token_id': 0,
    'bos_token_id': 2,
    'eos_token_id': 2,
}
SSM = {'mamba_n_heads': 2, 'mamba_d_head': 16}
TEXT = {key: SIZES[key] for key in ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads')} | {
    key: SIZES[key] for key in ('num_key_value_heads', 'head_dim', 'intermediate_size', 'max_position_embeddings')
}
TEXT |= {key: SIZES[key] for key in ('pad_token_id', 'bos_token_id', 'eos_token_id')}
SEEN = {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 16, 'image_size': 28}
SEEN |= {'patch_size': 14}

# What these need besides, by their names in transformers.
RIGHT = {
    'arcee': {},
    'aria_text': {'moe_num_experts': 2, 'moe_topk': 1, 'moe_num_shared_experts': 1},
    'bamba': {**SSM, 'attn_layer_indices': [1]},
    'bert-generation': {'is_decoder': True},
    'biogpt': {},
    'bitnet': {},
    'bloom': {},
    'codegen': {'n_head': 4, 'rotary_dim': 4},
    'ctrl': {},
    'deepseek_v3': {'num_key_value_heads': 2, 'n_routed_experts': 4, 'n_group': 2, 'topk_group': 1}
    | {'num_experts_per_tok': 2, 'kv_lora_rank': 8, 'q_lora_rank': 8, 'qk_rope_head_dim': 4, 'v_head_dim': 8}
    | {'qk_nope_head_dim': 4, 'first_k_dense_replace': 1},
    'diffllama': {'num_key_value_heads': 2},
    'dots1': {'n_shared_experts': 1, 'first_k_dense_replace': 1},
    'falcon': {},
    'falcon_mamba': {},
    'fuyu': {'text_config': {**TEXT, 'model_type': 'persimmon'}},
    'gemma': {},
    'gemma3': {'text_config': TEXT, 'vision_config': SEEN, 'mm_tokens_per_image': 4, 'image_token_index': 5},
    'gemma3_text': {},
    'glm': {},
    'glm4': {},
    'gpt2': {},
    'gpt_bigcode': {},
    'gpt_neo': {'attention_types': [[['global', 'local'], 1]]},
    'gpt_neox': {},
    'gpt_neox_japanese': {},
    'gptj': {'rotary_dim': 4},
    'granite': {},
    'granitemoe': {},
    'granitemoehybrid': {**SSM, 'layer_types': ['mamba', 'attention']},
    'granitemoeshared': {},
    'helium': {},
    'jamba': {'attn_layer_period': 2, 'attn_layer_offset': 1, 'use_mamba_kernels': False},
    'jetmoe': {'num_key_value_heads': 2, 'num_experts_per_tok': 1},
    'llama': {},
    'llama4_text': {'intermediate_size_mlp': 24, 'attention_chunk_size': 32},
    'mamba': {},
    'mamba2': {'num_heads': 4, 'n_groups': 1},
    'minimax': {'block_size': 8, 'layer_types': ['linear_attention', 'full_attention']},
    'mistral': {},
    'mixtral': {},
    'moshi': {'ffn_dim': 24},
    'mpt': {},
    'nemotron': {},
    'olmo': {},
    'olmo2': {},
    'olmoe': {},
    'openai-gpt': {},
    'opt': {},
    'persimmon': {},
    'phi': {},
    'phi3': {},
    'phimoe': {},
    'qwen2': {},
    'qwen2_moe': {},
    'qwen3': {},
    'qwen3_moe': {},
    'rwkv': {'attention_hidden_size': 16},
    'smollm3': {},
    'stablelm': {},
    'starcoder2': {},
    'xglm': {},
    'zamba': {'num_hidden_layers': 5, 'attn_layer_period': 2, 'attn_layer_offset': 1, 'use_mamba_kernels': False}
    | {'num_key_value_heads': 2},
    'zamba2': {'layers_block_type': ['mamba', 'hybrid'], 'n_mamba_heads': 2, 'num_key_value_heads': 2}
    | {'adapter_rank': 4, 'head_dim': 16},
}
SHAPES = {
    'opt-350m': ('opt', {'word_embed_proj_dim': 8, 'do_layer_norm_before': False}),
    'falcon-alibi': ('falcon', {'alibi': True}),
    'llama-tied': ('llama', {'tie_word_embeddings': True}),
    'mistral-window': ('mistral', {'sliding_window': 4}),
}
TWO_KINDS = {'layer_types': ['linear_attention', 'full_attention']}
DELTA = {'linear_num_key_heads': 2, 'linear_num_value_heads': 2, 'linear_key_head_dim': 8, 'linear_value_head_dim': 8}
GEMMA_4 = {'hidden_size_per_layer_input': 8, 'vocab_size_per_layer_input': len(VOCAB), 'global_head_dim': 8}
GEMMA_4 |= {'layer_types': ['sliding_attention', 'full_attention']}
# Those that transformers 4.53 does not know, or cannot build of a config alone.
NEW = {
    'afmoe': {},
    'apertus': {},
    'cwm': {},
    'dbrx': {'attn_config': {'kv_n_heads': 1, 'rope_theta': 10000.0, 'clip_qkv': 8.0}}
    | {'ffn_config': {'ffn_hidden_size': 16, 'moe_num_experts': 2}},
    'deepseek_v2': {**RIGHT['deepseek_v3'], 'head_dim': 4},
    'deepseek_v4': {},
    'ernie4_5': {},
    'ernie4_5_moe': {},
    'exaone4': {},
    'flex_olmo': {},
    'gemma4': {
        'text_config': {**TEXT, **GEMMA_4},
        'vision_config': {**SEEN, 'num_key_value_heads': 1, 'head_dim': 8},
        'audio_config': None,
    },
    'gemma4_text': GEMMA_4,
    'glm4_moe': {},
    'gpt_oss': {},
    'granite_swa': {},
    'hunyuan_v1_dense': {},
    'lfm2': {'layer_types': ['conv', 'full_attention']},
    'lfm2_moe': {'layer_types': ['conv', 'full_attention'], 'num_dense_layers': 1},
    'llama4': {
        'text_config': {**TEXT, 'intermediate_size_mlp': 24, 'num_local_experts': 2, 'num_experts_per_tok': 1},
        'vision_config': {**SEEN, **dict.fromkeys(('projector_input_dim', 'projector_output_dim'), 16)}
        | {'vision_output_dim': 16},
    },
    'mimo_v2_flash': {},
    'minimax_m2': {},
    'ministral': {},
    'ministral3': {},
    'nemotron_h': {},
    'olmo3': {},
    'olmo_hybrid': {},
    'qwen3_5': {
        'text_config': {**TEXT, **TWO_KINDS, **DELTA},
        'vision_config': dict.fromkeys(('hidden_size', 'intermediate_size', 'out_hidden_size'), 16)
        | {'depth': 1, 'num_heads': 2},
    },
    'qwen3_5_moe_text': {**TWO_KINDS, **DELTA},
    'qwen3_5_text': {**TWO_KINDS, **DELTA},
    'qwen3_next': {**TWO_KINDS, **DELTA},
    'seed_oss': {},
    'solar_open': {},
}
NEW = {} if OLD else {kind: more for kind, more in NEW.items() if kind in CONFIG_MAPPING}
KINDS = {kind: (kind, more) for kind, more in {**RIGHT, **NEW}.items()} | SHAPES
# Those that have to run without padding; others may, or are refused.
UNPADDED = ['arcee', 'gemma', 'gemma3', 'gemma3_text', 'gpt2', 'granite', 'llama', 'llama4_text', 'mistral']
UNPADDED += ['mistral-window', 'mixtral', 'olmo2', 'phi3', 'qwen2', 'qwen3', 'qwen3_moe', 'smollm3', 'starcoder2']
UNPADDED += [kind for kind in ('gemma4_text', 'llama4', 'ministral3', 'olmo3') if kind in NEW]
# The number of tokens of an expert rounds its products.
EXPERTS = {'deepseek_v3', 'olmoe', 'aria_text', 'dots1', 'granitemoe', 'granitemoehybrid', 'granitemoeshared'}
EXPERTS |= {'jamba', 'jetmoe', 'llama4_text', 'minimax', 'mixtral', 'phimoe', 'qwen2_moe', 'qwen3_moe'}
ALL = 'later tokens move its earlier states'
LAYERS = 'more layers between its decoder and its LM head'
NO_EXPORT = 'so no export of it could be loaded'
REFUSED = {
    'bart': ({}, NO_EXPORT),
    'bert': ({}, ALL),
    'bert as a decoder': ({'is_decoder': True}, LAYERS),
    'bert-generation': ({}, ALL),
    'camembert': ({}, ALL),
    'cohere': ({}, 'its logits are not lm_head(hidden): its config sets logit_scale 0.0625'),
    'cohere2': ({}, 'its config sets logit_scale 0.0625'),
    'electra': ({}, ALL),
    'ernie': ({}, ALL),
    'falcon_h1': ({**SSM, 'mamba_d_ssm': 32, 'lm_head_multiplier': 0.5}, 'its config sets lm_head_multiplier 0.5'),
    'gemma2': ({}, 'its config sets final_logit_softcapping 30.0'),
    'granite': ({'logits_scaling': 8.0}, 'its config sets logits_scaling 8.0'),
    'gemma3n_text': (
        {'num_hidden_layers': 4, 'layer_types': ['sliding_attention', 'full_attention'] * 2, 'laurel_rank': 4}
        | {'activation_sparsity_pattern': [0.0] * 4, 'num_kv_shared_layers': 2, 'hidden_size_per_layer_input': 8}
        | {'vocab_size_per_layer_input': len(VOCAB)},
        'others without a cache than with one' if OLD else 'final_logit_softcapping 30.0',
    ),
    'megatron-bert': ({}, ALL),
    'mixtral': ({'output_router_logits': True}, 'adds the auxiliary loss of its router'),
    'pegasus': ({}, NO_EXPORT),
    'recurrent_gemma': ({'num_hidden_layers': 3, 'lru_width': 16}, 'its config sets logits_soft_cap 30.0'),
    'rembert': ({'input_embedding_size': 16, 'output_embedding_size': 16}, ALL),
    'roberta': ({}, ALL),
    'roberta as a decoder': ({'is_decoder': True}, LAYERS),
    'roformer': ({'is_decoder': True}, LAYERS),
    'trocr': ({}, NO_EXPORT),
    'whisper': ({}, NO_EXPORT),
    'xlm': ({}, ALL),
    'xlnet': ({'d_inner': 24}, ALL),
}
if OLD:
    REFUSED['dbrx'] = (
        {'attn_config': {'kv_n_heads': 1}, 'ffn_config': {'ffn_hidden_size': 16, 'moe_num_experts': 2}},
        'transformers cannot read its config again',
    )
LEFT_MOVES = {'rwkv'}  # it runs the padding like any token


def tiny_config(kind, more):
    made = CONFIG_MAPPING[kind]
    aliases = getattr(made, 'attribute_map', {})
    known = set(inspect.signature(made.__init__).parameters) | set(aliases)
    sizes = {key: value for key, value in SIZES.items() if key in known and aliases.get(key) not in SIZES}
    return made(**{**sizes, **more})


def tiny_backbone(kind, more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, more))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model
