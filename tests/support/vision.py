"""Tiny vision-language models with their processors, and rows that hold no, one or two images."""

import torch
from families import vision_language_model
from models import CHAT_TEMPLATE, VOCABULARY, WORDS, words
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

IMAGE, VIDEO = "<image>", "<video>"
SIDE, PATCH = 16, 8

# That of the text models, with the parts of a content one after the other.
TEMPLATE = (
    "{% macro text(content) %}{% for part in content %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endmacro %}"
    + CHAT_TEMPLATE.replace("message['content']", "text(message['content'])")
)


def vision_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer, with tokens for images and videos as its last words."""
    vocabulary = {word: i for i, word in enumerate([*WORDS[: VOCABULARY - 2], VIDEO, IMAGE])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    )
    fast.add_special_tokens({"additional_special_tokens": [VIDEO, IMAGE]})
    fast.image_token, fast.image_token_id = IMAGE, VOCABULARY - 1
    fast.video_token, fast.video_token_id = VIDEO, VOCABULARY - 2
    return fast


def llava():
    """Pixels stacked image by image."""
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images, vision_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="full",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    model = vision_language_model("llava")
    model.config.vision_feature_select_strategy = "full"
    return model, processor


def qwen2_vl():
    """Patches of all images in one tensor, as many of each image as its size has."""
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=SIDE**2, max_pixels=4 * SIDE**2)
    return vision_language_model("qwen2_vl"), Qwen2VLProcessor(images, vision_tokenizer(), chat_template=TEMPLATE)


def image_rows(n: int, seed: int = 0, counts=(0, 1, 2)) -> list[dict]:
    """Conversations about images; row i has `counts[i % len(counts)]` of them, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        size = (SIDE * (1 + i % 2), SIDE)
        images = [
            Image.fromarray(torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())
            for _ in range(counts[i % len(counts)])
        ]
        user = [{"type": "image"} for _ in images] + [{"type": "text", "text": words(generator, 3, 6)}]
        answer = [{"type": "text", "text": words(generator, 2, 4)}]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": images})
    return rows
