"""Tiny vision-language models with their processors, and rows that hold no, one or two images."""

import torch
from families import vision_language_model
from models import CHAT_TEMPLATE, VOCABULARY, WORDS, words
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE = "<image>"
SIDE, PATCH = 16, 8
OF_IMAGES = ["<end_of_utterance>", "<global-img>", "<fake_token_around_image>", "<video>", IMAGE]

# That of the text models, with the parts of a content one after the other.
TEMPLATE = (
    "{% macro text(content) %}{% for part in content %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endmacro %}"
    + CHAT_TEMPLATE.replace("message['content']", "text(message['content'])")
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def vision_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer, with tokens of images as its last words."""
    known = [*WORDS[: VOCABULARY - len(OF_IMAGES)], *OF_IMAGES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    )
    fast.add_special_tokens({"additional_special_tokens": OF_IMAGES})
    return fast


def llava(template=TEMPLATE):
    """Pixels stacked image by image."""
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images, vision_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="full",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip
    model = vision_language_model("llava")
    model.config.vision_feature_select_strategy = "full"
    return model, processor


def idefics3(template=TEMPLATE):
    """Pixels stacked row by row, each filled up to the row with most images."""
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    processor = Idefics3Processor(images, vision_tokenizer(), image_seq_len=1, chat_template=template)
    text = vision_language_model("llava").config.text_config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        "idefics3", text_config=text, vision_config=vision, image_token_id=VOCABULARY - 1, scale_factor=2
    )
    return AutoModelForImageTextToText.from_config(config), processor


class TokenizerOnly(ProcessorMixin):
    """A processor that has a tokenizer and nothing else: the collator sees to the images."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)


class PatchCollator:
    """
    Rows for Qwen2-VL: patches of all images in one tensor, as many of each as its size has. Its processor needs
    torchvision for videos, so the few lines that matter are here.
    """

    def __init__(self, places: bool = False):
        self.images = Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=SIDE**2, max_pixels=4 * SIDE**2)
        self.tokenizer = vision_tokenizer()
        self.places = places

    def __call__(self, examples):
        rows, images = [], []
        for example in examples:
            own = self.images(images=example["images"], return_tensors="pt") if example["images"] else None
            images += [own] if own is not None else []
            tokens = (own["image_grid_thw"].prod(-1) // 4).tolist() if own is not None else []
            user, answer = (message["content"][-1]["text"] for message in example["messages"])
            seen = [token for count in tokens for token in [VOCABULARY - 1] * count + [3]]
            rows.append(([*seen, *self.tokenizer(user)["input_ids"]], self.tokenizer(answer + " </s>")["input_ids"]))
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in rows:
            fill = width - len(prompt) - len(answer)
            batch["input_ids"].append([*prompt, *answer, *[0] * fill])
            batch["attention_mask"].append([1] * (width - fill) + [0] * fill)
            batch["labels"].append([-100] * len(prompt) + answer + [-100] * fill)
        batch = {name: torch.tensor(values) for name, values in batch.items()}
        batch["mm_token_type_ids"] = batch["input_ids"].eq(VOCABULARY - 1).long()
        if images:
            batch |= {name: torch.cat([own[name] for own in images]) for name in ("pixel_values", "image_grid_thw")}
        if self.places:  # text, height and width, here all the same
            batch["position_ids"] = torch.arange(width).expand(3, len(rows), width).contiguous()
        return batch


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
