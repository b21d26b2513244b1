"""Tiny random models of every family that layer selection must work on, and a tokenizer and a processor for them."""

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

DEPTH, VOCABULARY = 4, 60
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
_TEXT = """user assistant : what colour red green blue is the square a dog cat runs sleeps sky sun moon shines over
water yes no and then good bad film text of one two three four five six seven"""
WORDS = [*SPECIAL, *_TEXT.split()]

_COMMON = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}


def _gpt2():
    config = tf.GPT2Config(
        n_embd=16, n_layer=DEPTH, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config)


def _llava():
    # the vision tower is as deep as the language model: they must not be mixed up
    vision = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**_GROUPED), image_token_index=4)
    )


DECODERS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED, sliding_window=8)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_GROUPED, head_dim=4)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GROUPED, head_dim=4, sliding_window=8)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED, head_dim=4)),
    "gpt2": _gpt2,
    "llama-bare": lambda: tf.LlamaModel(tf.LlamaConfig(**_GROUPED)),
    "llava": _llava,
}
ENCODERS = {
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_COMMON, type_vocab_size=1)),
    "deberta-v3": lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**_COMMON, **_DEBERTA)),
    "deberta-conv": lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**_COMMON, **_DEBERTA, conv_kernel_size=3)),
}
FAMILIES = {**DECODERS, **ENCODERS}


def tiny_tokenizer(encoder=False):
    """Words to ids; for an encoder "<s> text </s>", else no special tokens are added."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if encoder:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_processor():
    """A LLaVA processor for 8 x 8 images of 4 patches, with a chat template."""
    template = (
        "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return tf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
