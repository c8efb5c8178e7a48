"""Images: the processor that belongs to a tokenizer, rows with images as tokens, and images as a model's inputs."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.chat import Rendered, chat_encoder, training_texts
from ftcore.companions import saved_beside
from ftcore.errors import Exit, Problem, Refused
from ftcore.manager import import_function
from ftcore.specs import ModelFamily, Shape, Vision
from ftcore.tokens import IGNORED, RowTokenizer

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

PROCESSOR = "ftcore_processor"
"""Attribute of a tokenizer with the processor that it belongs to."""
PICTURES = "pictures"
"""Column of a tokenized row with its images, each `{"path": ..., "bytes": ...}` with one of the two filled."""
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor makes of a text."""


def processor_of(tokenizer: Any) -> Any:
    """The processor that :func:`attach` left on the tokenizer, or None."""
    return vars(tokenizer).get(PROCESSOR)


def attach(tokenizer: PreTrainedTokenizerBase, folder: str, family: ModelFamily, revision: str | None = None) -> None:
    """Load a checkpoint's processor around the tokenizer, and leave it there.

    Without its part for videos, which needs torchvision and which nothing here uses; and with Pillow's way of resizing,
    so that an image is the same wherever torchvision happens to be installed.
    """
    import transformers

    assert family.vision is not None
    images = getattr(transformers, family.vision.image_processor).from_pretrained(folder, revision=revision)
    cls = import_function(family.vision.processor, "model")
    given = _written(folder, revision)
    _attach(tokenizer, family.vision, images, {key: given[key] for key in _settings(cls) if key in given})


def template(folder: str, revision: str | None = None) -> Any:
    """The chat template that a checkpoint's processor brings, or None."""
    return _written(folder, revision).get("chat_template")


def _written(folder: str, revision: str | None) -> dict[str, Any]:
    from transformers.processing_utils import ProcessorMixin

    given: dict[str, Any] = ProcessorMixin.get_processor_dict(folder, revision=revision)[0]
    return given


def attach_tiny(tokenizer: Any, vision: Vision) -> None:
    """A processor for a tiny random model; the tokenizer gets the tokens that it needs."""
    import transformers

    tokenizer.add_special_tokens({"additional_special_tokens": list(vision.tokens)}, replace_extra_special_tokens=False)
    if "bos_token" in vision.names:
        tokenizer.bos_token = vision.names["bos_token"]
    tokenizer._set_model_specific_special_tokens(special_tokens=dict(vision.names))
    images = getattr(transformers, vision.image_processor)(**vision.tiny)
    _attach(tokenizer, vision, images, vision.settings)


def _attach(tokenizer: Any, vision: Vision, images: Any, settings: Mapping[str, Any]) -> None:
    cls: Any = import_function(vision.processor, "model")
    parts = {"image_processor": images, "tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    if "video_processor" in inspect.signature(cls.__init__).parameters:
        cls, parts = _without_videos(cls), parts | {"video_processor": None}
    processor = cls(**parts, **settings)
    setattr(tokenizer, PROCESSOR, processor)
    saved_beside(tokenizer, partial(_save, processor))


def _without_videos(cls: Any) -> Any:
    """The class with nothing in the place of what reads videos."""

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else cls.check_argument_for_proper_class(self, name, part)

    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": check, "__init__": cls.__init__})


def _settings(cls: Any) -> list[str]:
    """Names of the processor's own arguments, besides its parts."""
    parts = ("image_processor", "tokenizer", "video_processor", "chat_template")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(cls.__init__).parameters.items()
    return [name for name, parameter in found if parameter.kind in kinds and name not in ("self", *parts)]


def open_gates(model: torch.nn.Module) -> None:
    """Move projections and gates of a random model off the zero that they start at: no image would pass them."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.endswith("bias") and (weight.ndim > 1 or weight.numel() == 1) and not weight.any():
                weight.normal_(0, 0.5 if weight.numel() == 1 else 0.05)


def _save(processor: Any, folder: Path) -> None:
    """Write a processor in the files in which checkpoints are published, all but its tokenizer."""
    name = type(processor).__name__
    processor.image_processor.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    text = json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"processor_class": name}, indent=2)
    file.write_text(text, encoding="utf-8")
    own = {key: getattr(processor, key) for key in _settings(type(processor)) if hasattr(processor, key)}
    if own:
        text = json.dumps({"processor_class": name, **own}, indent=2)
        (folder / "processor_config.json").write_text(text, encoding="utf-8")


def opened(source: Any) -> Image:
    """An image in RGB, turned as its camera was held: transformers' own reading of files.

    :param source: path, bytes, `{"path": ..., "bytes": ...}` as `datasets` keeps it, or a PIL image.
    """
    import PIL.Image
    from transformers.image_utils import load_image

    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        source = PIL.Image.open(io.BytesIO(source))
    elif isinstance(source, (str, Path)):
        source = PIL.Image.open(source)
    image: Image = load_image(source)
    return image


def reference(source: Any) -> dict[str, Any]:
    """An image as a row keeps it until its batch: by its path, or the bytes that it came in; PIL's as PNG.

    What is not there is empty and not None, for a table to know its type.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, (str, Path)):
        return {"path": str(source), "bytes": b""}
    if not isinstance(source, bytes):
        buffer = io.BytesIO()
        source.save(buffer, format="PNG")
        source = buffer.getvalue()
    return {"path": "", "bytes": source}


class ImageRowTokenizer(RowTokenizer):
    """Token ids and labels of conversations with images.

    Every image stands as the tokens that the family's processor writes for one of its size. They are read and not
    trained, wherever they stand.

    :raises Refused: when the family reads no images.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vision: Vision | None, max_length: int) -> None:
        super().__init__(tokenizer, Shape.MESSAGES, max_length)
        processor = processor_of(tokenizer)
        if vision is None or processor is None:
            raise Refused(Problem("data", "the rows have images, which this model does not read", "select another"))
        self._processor, self._vision = processor, vision
        self._untrained = set(tokenizer.convert_tokens_to_ids([*vision.tokens]))
        self._image = tokenizer.convert_tokens_to_ids(vision.image)
        self._expansions: dict[tuple[int, int], str] = {}
        self._chat = chat_encoder(tokenizer)

    def __call__(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The training rows of one row: ids, labels, and the images of each, in `pictures`.

        :param row: `images` and `messages`, whose contents are lists of parts.
        :raises Refused: when an image cannot be read, lies beyond `max_length`, or has no place in the text.
        """
        images = [self._opened(image) for image in row["images"]]
        kept = [reference(image) for image in row["images"]]
        made, most = [], 0
        assert self._chat is not None
        for rendered in training_texts(self._chat, row["messages"], row.get("tools")):
            count = rendered.text.count(self._vision.mark)
            most = max(most, count)
            if count <= len(images):
                ids, labels = self._closed(self._expanded(rendered, images))
                made.append(self._cut(ids, labels) | {PICTURES: kept[:count]})
        if most != len(images):
            message = f"the chat template gives {most} places to {len(images)} images"
            raise Refused(Problem("data", message, "name the places with <image>, or set data.template", Exit.DATA))
        return made

    def _opened(self, source: Any) -> Image:
        import PIL.Image

        try:
            return opened(source)
        # What PIL raises, and what a file that went since raises.
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise Refused(Problem("data", f"an image cannot be read: {error}", "replace it", Exit.DATA)) from error

    def _expanded(self, rendered: Rendered, images: Sequence[Image]) -> Rendered:
        """The text with what the processor writes in the place of each mark, and the ranges moved with it."""
        if not self._vision.expands:
            return rendered
        pieces = rendered.text.split(self._vision.mark)
        longer = [self._expansion(image) for _, image in zip(pieces[1:], images, strict=False)]
        places, at = [], 0
        for piece, text in zip(pieces, longer, strict=False):
            at += len(piece)
            places.append((at, len(text) - len(self._vision.mark)))
            at += len(self._vision.mark)

        def moved(place: int) -> int:
            return place + sum(more for start, more in places if start < place)

        text = "".join(part for pair in zip(pieces, [*longer, ""], strict=True) for part in pair)
        return replace(rendered, text=text, spans=tuple((moved(a), moved(b)) for a, b in rendered.spans))

    def _expansion(self, image: Image) -> str:
        """What the processor writes for an image: it asks for its size alone."""
        if image.size not in self._expansions:
            try:
                made = self._processor(images=[image], text=[self._vision.mark], add_special_tokens=False)
            except ValueError as error:  # such as of a side 200 times as long as the other
                message = f"the model does not read an image of {image.width} x {image.height} pixels: {error}"
                raise Refused(Problem("data", message, "crop it, or take the row out", Exit.DATA)) from error
            ids = [int(token) for token in made["input_ids"][0]]
            text = str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            if self.tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
                message = f"{type(self.tokenizer).__name__} does not read back what the processor writes for an image"
                raise Refused(Problem("model", message, "use the checkpoint's own tokenizer"))
            self._expansions[image.size] = text
        return self._expansions[image.size]

    def _cut(self, ids: list[int], labels: list[int]) -> dict[str, list[int]]:
        if self._image in ids[self.max_length :]:
            message = f"{len(ids)} tokens, and an image lies beyond trainer.max_length={self.max_length}"
            fix = f"set trainer.max_length={len(ids)}, or give smaller images"
            raise Refused(Problem("data", message, fix, Exit.DATA))
        trained = [IGNORED if token in self._untrained else label for token, label in zip(ids, labels, strict=True)]
        return {"input_ids": ids[: self.max_length], "labels": trained[: self.max_length]}


def image_inputs(processor: Any, images: Sequence[Sequence[Image]], ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the processor makes of the images, in the order of the rows: pixel values and what belongs to them."""
    made = processor(images=[image for row in images for image in row], return_tensors="pt")
    return {name: value for name, value in made.items() if name not in OF_TEXT}
