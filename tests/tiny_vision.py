"""A tiny vision-language model and its processor."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests import tiny

IMAGE = "w35"
"""The word that stands for an image."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<bos> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '" + IMAGE + " ' }}{% endfor %}{% endif %}"
    " <eos> {% endfor %}{% if add_generation_prompt %}<bos> assistant{% endif %}"
)


def llava() -> LlavaForConditionalGeneration:
    """A LLaVA with the weights of the tiny Llama as its language model."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    llama = tiny.llama()
    token = tiny.tokenizer().convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=vision,
        text_config=llama.config,
        image_token_id=token,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(llama.model.state_dict())
    model.lm_head.load_state_dict(llama.lm_head.state_dict())
    return model


def processor() -> LlavaProcessor:
    """Its processor: images of 8 × 8 pixels, as 4 tokens."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", image_token=IMAGE,
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def prompts(*, images: bool) -> Dataset:
    """Conversations, with an image for each if requested."""
    columns: dict[str, Any] = tiny.prompts(chat=True).to_dict()
    if images:
        columns["image"] = [Image.new("RGB", (8, 8), (10 * i, 0, 0)) for i in range(len(columns["prompt"]))]
    return Dataset.from_dict(columns)
