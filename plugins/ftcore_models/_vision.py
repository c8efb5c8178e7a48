"""A chat template for tokenizers of families that read images and bring none, tiny random ones among them."""

from __future__ import annotations


def chatml(image: str, begin: str = "") -> str:
    """ChatML for messages whose contents are texts or lists of parts, with `image` in the place of each image.

    :param begin: what stands in front of the conversation.
    """
    return (
        begin + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
