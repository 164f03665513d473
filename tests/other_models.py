"""Tiny models whose checkpoints have something that no decoder of `tiny_models` has."""

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

_SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
)
OTHER_MODELS = {
    # A router bias that stays in fp32 whatever the dtype.
    "deepseek-v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_SIZES,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
        )
    ),
    # A model of models, whose parts are renamed.
    "gemma3-vision": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=dict(**_SIZES, head_dim=16),
            vision_config=dict(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=28,
                patch_size=14,
            ),
            mm_tokens_per_image=4,
        )
    ),
    # Three tied tensors, and no generation head that is called lm_head alone.
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
    "classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**_SIZES, pad_token_id=0)),
}
