"""Completions of one prompt are read in one row behind it, so that the prompt is computed once for all of them."""

from __future__ import annotations

from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftcore_trainers._fused_head import base_of

WORTH = 1 / 8
"""Part of the tokens that is spared at least, or the rows stay as they are."""
IGNORED = -100


class Tree(NamedTuple):
    """Rows `prompt + completion` as one row of beginnings and branches, on the host."""

    ids: list[int]
    positions: list[int]
    targets: list[int]
    """The token that follows each, where it is one of a completion."""
    beginnings: list[int]
    branches: list[list[int]]
    places: list[int]
    """Where in `[rows, width]` each target is, in the order of the targets."""
    rows: list[int]
    """Where in the row each target is asked for."""


def tree_of(prompts: list[list[int]], completions: list[list[int]], width: int) -> Tree | None:
    """The tree, or None where it is not worth it, or a prompt has no token besides its last.

    A branch begins with the last token of the prompt, which says the first one of the completion: it has as many tokens
    as the completion, and one for a completion of none.

    :param width: Columns of the completions' matrix.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(number)
    spared = sum((len(prompt) - 1) * (len(rows) - 1) for prompt, rows in groups.items())
    if min(map(len, groups)) < 2 or spared < WORTH * sum(map(len, (*prompts, *completions))):
        return None
    ids, positions, targets, branches, places, asked = [], [], [], [], [], []
    for prompt in groups:
        ids += prompt[:-1]
        positions += range(len(prompt) - 1)
    targets += [IGNORED] * len(ids)
    for prompt, numbers in groups.items():
        branches.append([max(len(completions[number]), 1) for number in numbers])
        for number in numbers:
            completion = completions[number]
            asked += range(len(ids), len(ids) + len(completion))
            places += range(number * width, number * width + len(completion))
            ids += [prompt[-1], *completion[:-1]]
            positions += range(len(prompt) - 1, len(prompt) - 1 + max(len(completion), 1))
            targets += completion or [IGNORED]
    return Tree(ids, positions, targets, [len(prompt) - 1 for prompt in groups], branches, places, asked)


class SharedPrompts:
    """A base to put before GRPOTrainer or RLOOTrainer, whose log-probabilities are those of padded rows.

    Where it does not apply they stay TRL's: images, a router's loss, TRL's own head, attention that has no kernel for
    branches, or prompts that are nearly all different.
    """

    model: Any
    accelerator: Any
    share_prompts: bool
    """Whether it may; only where the model has a head of ours, which takes branches."""

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **media: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        plain = not compute_aux_loss and all(value is None for value in media.values())
        size = batch_size or len(input_ids)
        trees = None
        if plain and self.share_prompts:
            trees = self._trees(input_ids, attention_mask, logits_to_keep, size)
        if trees is None:
            found: tuple[Tensor, Tensor | None, Tensor | None]
            found = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **media,
            )
            return found
        parts = [self._read(model, tree, rows, logits_to_keep, input_ids.device) for tree, rows in trees]
        logps, entropies = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return logps, entropies if compute_entropy else None, None

    def _trees(self, ids: Tensor, mask: Tensor, width: int, size: int) -> list[tuple[Tree, int]] | None:
        """The tree of every `size` rows, and their number; None if one of them is not worth it, or cannot be."""
        from ftcore_kernels.layers.decoder.attention import takes_branches

        backbone = base_of(self.model).base_model
        if not takes_branches(backbone, 1):
            return None
        rows, seen = ids.tolist(), mask.bool().tolist()
        at = ids.shape[1] - width
        kept = [list(compress(row, reals)) for row, reals in zip(rows, seen, strict=True)]
        lengths = [sum(reals[:at]) for reals in seen]
        prompts = [row[:length] for row, length in zip(kept, lengths, strict=True)]
        completions = [row[length:] for row, length in zip(kept, lengths, strict=True)]
        trees = []
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            tree = tree_of(prompts[part], completions[part], width)
            if tree is None or not takes_branches(backbone, len(tree.ids)):
                return None
            trees.append((tree, len(rows[part])))
        return trees

    def _read(self, model: Any, tree: Tree, rows: int, width: int, device: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies `[rows, width]`, 0 behind the ends of completions."""
        from ftcore_kernels.layers.decoder.attention import Branches

        ids, positions, targets, places, asked = (torch.tensor(part, device=device) for part in tree[:3] + tree[5:])
        with self.accelerator.autocast():
            out = model(
                input_ids=ids[None],
                position_ids=positions[None],
                labels=targets[None],
                shift_labels=targets[None],
                supervised=asked,
                begins=Branches.of(tree.beginnings, tree.branches, device),
                fused_lm_head=True,
                use_cache=False,
            )
        found = []
        for values in (out.log_probs, out.entropy):
            flat = values.reshape(-1)[asked]
            found.append(flat.new_zeros(rows * width).index_copy(0, places, flat).view(rows, width))
        return found[0], found[1]
