"""transformers' Trainer with CSM's two losses, each a mean over the whole step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from ftcore_trainers._lean_loop import LeanLoop
from ftcore_trainers._utterances import IGNORED


class VoiceTrainer(LeanLoop, Trainer):
    """Takes batches of `Utterances`."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The backbone's loss a frame, and the depth decoder's a code; of the step's frames, or of the batch's.

        :param num_items_in_batch: Frames of the step.
        """
        labels, codes = inputs["labels"], inputs["codes"]
        base = getattr(self.accelerator.unwrap_model(model), "get_base_model", lambda: model)()
        frames = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        output = model(
            inputs_embeds=embedded(base, inputs["input_ids"], codes),
            labels=codes,
            num_items_in_batch=torch.as_tensor(frames),
            use_cache=False,
        )
        # Both are sums by the number of frames, of which each has a code of the backbone and all others of the decoder.
        loss = output.backbone_loss + output.depth_decoder_loss / (codes.shape[-1] - 1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean of the gradients
        return (loss, output) if return_outputs else loss


def embedded(model: Any, ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Token ids `[B, S]` and codes `[B, S, C]` -> `[B, S, H]`: frames are embedded by their codes, the rest as text.

    What CsmForConditionalGeneration does with recordings, once their codes are known.
    """
    frames = codes[..., 0] != IGNORED
    hidden: torch.Tensor = model.embed_text_tokens(ids)
    spoken = model.backbone_model.embed_tokens(codes[frames].unsqueeze(0))[0]
    return hidden.masked_scatter(frames.unsqueeze(-1), spoken.to(hidden.dtype))
