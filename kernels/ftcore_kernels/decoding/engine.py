"""Writes completions: the model as it is now, what it may take, and what its calls are given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from ftcore import Completions, Role, Sampling
from ftcore_kernels.decoding import layers, modules, weights
from ftcore_kernels.decoding.cache import Cache, row_bytes
from ftcore_kernels.decoding.kept import Kept
from ftcore_kernels.decoding.layers import Layers
from ftcore_kernels.decoding.modules import Own
from ftcore_kernels.decoding.recording import fixed_rope, other_angles, recordable
from ftcore_kernels.decoding.requests import Request
from ftcore_kernels.decoding.run import Run
from ftcore_kernels.layers.experts.products import one_by_one
from ftcore_kernels.layers.uncovered import Uncovered

Call = TypeVar("Call", bound=Callable[..., Any])

UNPACKED = 0.5
"""Part of the memory that 4-bit weights may fill unpacked; the cache has the rest."""


@dataclass(frozen=True)
class Limits:
    """What an engine may take."""

    rows: int
    """Completions at a time."""
    prompt_tokens: int
    """Of one pass over prompts; a longer prompt has a pass of its own."""
    memory: Callable[[], int] | None = None
    """Bytes that cache and unpacked weights may take now; None leaves it to `rows`."""


def _on_its_device(call: Call) -> Call:
    """With the engine's GPU as the current one: kernels are launched, and recorded, on that."""

    @functools.wraps(call)
    def made(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            return call(self, *args, **kwargs)

    return cast("Call", made)


class Engine:
    """Completions by a `...ForCausalLM`, in evaluation mode, with or without PEFT's layers in it."""

    def __init__(self, base: Any, roles: Sequence[Role], limits: Limits) -> None:
        self._base, self._roles, self._limits = base, roles, limits
        self._device: torch.device = base.device
        self._layers: Layers | Own | None = None
        self._dtype = base.get_input_embeddings().weight.dtype
        self.no_steps: str | None = None
        """Why the model's own layers compute, where they do."""
        self.rows = 0
        """Completions that the last call wrote, or tried to write, at a time."""
        self.may_record = recordable(base.config, self._device) and not (
            any(role.name == "experts" for role in roles) and one_by_one(self._device, self._dtype)
        )
        """Whether a step may be a CUDA graph, until it turns out that it may not."""
        self.other_angles = other_angles(base.config)
        """Tokens beyond which a row's keys would have to be computed again."""
        self._routed = "output_router_logits" in inspect.signature(type(base).forward).parameters

    @torch.no_grad()
    def open(self) -> None:
        """Take the weights as they are now. Raises Uncovered if layers or their attention are not computed here."""
        if self._layers is not None:
            return
        try:
            role = next((role for role in self._roles if role.name == "decoder_layer"), None)
            if role is None:
                raise Uncovered("the family declares no decoder layer")
            self._layers, self.no_steps = Layers(layers.read(self._base, role, self._device)), None
        except Uncovered as reason:
            self._layers, self.no_steps = modules.read(self._base, self._roles, self._device, self._call), str(reason)

    def _prepare(self, wanted: int) -> None:
        """The layers' weights for so many completions."""
        if isinstance(self._layers, Layers):
            room = 0 if self._limits.memory is None else int(UNPACKED * self._limits.memory())
            weights.prepare(self._layers.places, self._dtype, room, min(self._limits.rows, wanted))

    def _call(self) -> None:
        token = torch.zeros((1, 1), dtype=torch.int64, device=self._device)
        self.logits(token, token, attention_mask=self.no_mask(1))

    def close(self) -> None:
        """Give everything back."""
        self._layers = None

    @torch.no_grad()
    @_on_its_device
    def run(self, requests: Sequence[Request], sampling: Sampling, ends: Sequence[int]) -> Completions:
        """The completions of all requests, in the order of their index. Raises Uncovered for what is not computed."""
        self.open()
        self._prepare(len(requests))
        assert self._layers is not None
        written: list[tuple[list[int], list[float]]] = [([], [])] * len(requests)
        if requests:
            for index, ids, logprobs in Run(self, self._layers, requests, sampling, ends).results():
                written[index] = ids, logprobs
        return Completions(ids=[ids for ids, _ in written], logprobs=[logprobs for _, logprobs in written])

    @torch.no_grad()
    @_on_its_device
    def stream(
        self,
        request: Request,
        sampling: Sampling,
        ends: Sequence[int],
        show: Callable[[list[int]], None],
        kept: Kept | None = None,
    ) -> list[int]:
        """The completion of one request; `show` is given what is new at every look. Raises Uncovered as `run`.

        :param kept: What was kept of the calls before: it is gone on from, and holds this one afterwards.
        """
        if request.media is not None or not fixed_rope(self._base.config):
            kept = None  # the same ids may have other keys: of other images, or in a longer row
        self.open()
        self._prepare(1)
        assert self._layers is not None
        run, written = Run(self, self._layers, [request], sampling, ends, kept), list[int]()
        for _ in run.looks():
            if new := run.written(len(written)):
                written += new
                if kept is not None:  # before anybody is shown it, who may end it; the last token is not read yet
                    kept.ids = [*request.prompt, *written[:-1]]
                show(new)
            run.ended()
        return written

    def cache(self, length: int, wanted: int) -> Cache:
        """For as many rows as are wanted and have room; one at least."""
        assert self._layers is not None
        shapes, tails = self._layers.shapes, self._layers.tails
        rows = min(self._limits.rows, wanted)
        if self._device.type == "cpu" and rows in (2, 3):
            rows = min(self._limits.rows, 4)  # 2 or 3 rows take MKL longer than 4 do, by up to 1.9 times
        if self._limits.memory is not None:
            rows = max(1, min(rows, self._limits.memory() // row_bytes(shapes, length, self._dtype, tails)))
        self.rows = rows
        return Cache(shapes, rows, length, self._dtype, self._device, tails)

    def logits(self, ids: torch.Tensor, positions: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """`[B, S, V]` by the class's own forward: what somebody bound to the instance is for training."""
        if self._routed:  # a checkpoint may ask for the router's loss in every pass
            options["output_router_logits"] = False
        out = type(self._base).forward(
            self._base, input_ids=ids, position_ids=positions, use_cache=False, return_dict=True, **options
        )
        found: torch.Tensor = out.logits
        return found

    def shown(self, ids: torch.Tensor, media: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[1, 1, V]` of a prompt with images, and int64 `[1]`: how far its positions are ahead of its tokens.

        An image takes fewer positions than tokens where those have three axes (M-RoPE); the model says how many.
        """
        given = {name: x.to(self._device) if isinstance(x, torch.Tensor) else x for name, x in media.items()}
        counting = [module for module in self._base.modules() if "rope_deltas" in vars(module)]
        before = [module.rope_deltas for module in counting]
        try:
            logits = self.logits(ids, None, logits_to_keep=1, **given)
            found = [m.rope_deltas for m, old in zip(counting, before, strict=True) if m.rope_deltas is not old]
        finally:
            for module, old in zip(counting, before, strict=True):
                module.rope_deltas = old
        ahead = found[0].reshape(-1)[:1].to(ids) if found else ids.new_zeros(1)
        return logits, ahead

    def no_mask(self, rows: int) -> torch.Tensor:
        """Four dimensions: transformers hands it on, and asks nobody which tokens are packed."""
        return torch.ones((rows, 1, 1, 1), dtype=torch.bool, device=self._device)

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        return int(self._base.config.get_text_config().vocab_size)

    @property
    def prompt_tokens(self) -> int:
        """Of one pass over prompts."""
        return self._limits.prompt_tokens

    @property
    def device(self) -> torch.device:
        """Where it all happens."""
        return self._device
