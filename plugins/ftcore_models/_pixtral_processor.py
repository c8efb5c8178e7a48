"""Pixtral's processor without torchvision, which transformers' module of the same name imports for another purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PixtralProcessor:
    """What transformers' `PixtralProcessor` makes of images and texts, by the same arguments and names."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
    ) -> None:
        self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, chat_template
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_token, self.image_break_token = image_token, image_break_token
        self.image_end_token = image_end_token

    def __call__(
        self, images: Sequence[Any], text: Sequence[str] = (), return_tensors: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Pixel values and sizes of the images; token ids of texts, whose marks stand for the images in their order."""
        side = self.patch_size * self.spatial_merge_size
        made = dict(self.image_processor(list(images), patch_size=side, return_tensors=return_tensors))
        if not text:
            return made
        left = [self._tokens(int(height) // side, int(width) // side) for height, width in made["image_sizes"]]
        texts = []
        for one in text:
            first, *rest = one.split(self.image_token)
            texts.append(first + "".join(left.pop(0) + piece for piece in rest))
        return made | dict(self.tokenizer(texts, return_tensors=return_tensors, **options))

    def _tokens(self, rows: int, columns: int) -> str:
        """A token for each patch; each row of patches is closed, and the last one otherwise than the others."""
        row = self.image_token * columns
        return self.image_break_token.join([row] * rows) + self.image_end_token
