"""What the bare loops are fed."""

from __future__ import annotations

from typing import Any

from stepbench.works import Work, token_ids

IGNORED = -100


def inputs(work: Work, steps: int) -> list[dict[str, Any]]:
    """The model's arguments for each step, on the work's device: random tokens, and random images before them."""
    ids = token_ids(work)[:steps]
    if not work.images:
        return [{"input_ids": one, "labels": one} for one in ids.to(work.device)]
    return _with_images(work, ids)


def _with_images(work: Work, ids: Any) -> list[dict[str, Any]]:
    """Rows that start with their images, in the layout of Qwen2-VL and its successors; images are not trained.

    The pixels are the same in every step: `[rows * images * patches², channels * frames * patch²]`, float32.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(work.folder)
    tower, image = config.vision_config, config.image_token_id
    marks = [config.vision_start_token_id, config.vision_end_token_id, image, config.video_token_id]
    ids[torch.isin(ids, torch.tensor(marks))] = 0
    tokens = (work.patches // tower.spatial_merge_size) ** 2
    block = torch.tensor([marks[0], *[image] * tokens, marks[1]] * work.images)
    if len(block) >= work.length:
        raise SystemExit(f"{work.images} images take {len(block)} tokens of a row's {work.length}: raise --length")
    ids[..., : len(block)] = block
    labels = ids.clone()
    labels[..., : len(block)] = IGNORED
    count, width = work.rows * work.images, tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    pixels = torch.randn((count * work.patches**2, width), generator=torch.Generator().manual_seed(2))
    pictures = {
        "pixel_values": pixels.to(work.device),
        "image_grid_thw": torch.tensor([[1, work.patches, work.patches]] * count, device=work.device),
        "mm_token_type_ids": (ids[0] == image).long().to(work.device),
    }
    rows = zip(ids.to(work.device), labels.to(work.device), strict=True)
    return [{"input_ids": one, "labels": trained, **pictures} for one, trained in rows]
