"""Draws a token from each row of logits in two launches: one over parts of the rows, one that joins the parts.

The noise is that of the plain twin, bit for bit where the device's logarithm is.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops._hash import mix, spread

_BLOCK = 1024
_PART = 8192
"""Tokens of a program."""


def draw(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    counts: torch.Tensor,
    temperature: float,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row, and its log-probability.

    :param logits: `[B, V]`, rows contiguous.
    :param seeds: Int64 `[B]`, of which the low 32 bits count.
    :param counts: Int64 `[B]`: how many tokens the row has drawn.
    :param temperature: Divides the logits; 0 takes the largest.
    :param allowed: Bool `[B, V]` contiguous: the tokens that may be drawn, or None for all.
    :returns: Int64 `[B]`, and fp32 `[B]` in nats at this temperature (at 1 for 0), over all tokens.
    """
    if logits.stride(1) != 1 or (allowed is not None and not allowed.is_contiguous()):
        raise ValueError("rows of logits must be contiguous, and what is allowed too")
    rows, width = logits.shape
    parts = triton.cdiv(width, _PART)
    best = torch.empty((4, rows, parts), dtype=torch.float32, device=logits.device)
    place = torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    given = logits if allowed is None else allowed.view(torch.uint8)
    with torch.cuda.device_of(logits):
        _part_kernel[(rows * parts,)](
            logits, given, seeds, counts, best, place, logits.stride(0), width, rows * parts,
            1.0 if temperature == 0 else 1.0 / temperature,
            NOISE=temperature != 0, MASKED=allowed is not None, PARTS=parts, PART=_PART, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
        _join_kernel[(rows,)](
            best, place, token, logprob, rows * parts, PARTS=parts, ROUND=triton.next_power_of_2(parts), num_warps=1
        )
    return token, logprob


@triton.jit
def _part_kernel(
    logits_ptr, allowed_ptr, seeds_ptr, counts_ptr, best_ptr, place_ptr, stride, width, all_parts, inverse,
    NOISE: tl.constexpr, MASKED: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and part: the best score, its logit and token, and the part of the log-sum-exp."""
    program = tl.program_id(0).to(tl.int64)
    row, first = program // PARTS, program % PARTS * PART
    key = tl.zeros((), tl.uint32)
    if NOISE:
        seed = tl.load(seeds_ptr + row).to(tl.uint32)
        key = mix(mix(seed) + tl.load(counts_ptr + row).to(tl.uint32) * 0x9E3779B9)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    chosen = tl.full((BLOCK,), float("-inf"), tl.float32)
    at_best = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, PART, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        mask = at < width
        logit = tl.load(logits_ptr + row * stride + at, mask=mask, other=float("-inf")).to(tl.float32) * inverse
        raised = tl.maximum(highest, logit)
        usable = raised > float("-inf")
        total = tl.where(usable, total * tl.exp(highest - raised) + tl.exp(logit - raised), 0.0)
        highest = raised
        score = logit
        if NOISE:
            uniform = ((spread(key, at) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
            score -= tl.log(-tl.log(uniform))
        if MASKED:
            mask &= tl.load(allowed_ptr + row * width + at, mask=mask, other=0) != 0
        better = mask & (score > best)
        best, chosen = tl.where(better, score, best), tl.where(better, logit, chosen)
        at_best = tl.where(better, at, at_best)
    top = tl.max(highest, 0)
    lane = tl.argmax(best, 0)
    mine = tl.arange(0, BLOCK) == lane
    tl.store(best_ptr + program, tl.max(best, 0))
    tl.store(best_ptr + all_parts + program, tl.max(tl.where(mine, chosen, float("-inf")), 0))
    tl.store(best_ptr + 2 * all_parts + program, top)
    tl.store(best_ptr + 3 * all_parts + program,
             tl.sum(tl.where(highest > float("-inf"), total * tl.exp(highest - top), 0.0), 0))  # fmt: skip
    tl.store(place_ptr + program, tl.sum(tl.where(mine, at_best, 0), 0))


@triton.jit
def _join_kernel(best_ptr, place_ptr, token_ptr, logprob_ptr, all_parts, PARTS: tl.constexpr, ROUND: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, ROUND)
    at, there = row * PARTS + part, part < PARTS
    best = tl.load(best_ptr + at, mask=there, other=float("-inf"))
    chosen = tl.load(best_ptr + all_parts + at, mask=there, other=float("-inf"))
    highest = tl.load(best_ptr + 2 * all_parts + at, mask=there, other=float("-inf"))
    total = tl.load(best_ptr + 3 * all_parts + at, mask=there, other=0.0)
    mine = part == tl.argmax(best, 0)
    top = tl.max(highest, 0)
    whole = tl.sum(tl.where(highest > float("-inf"), total * tl.exp(highest - top), 0.0), 0)
    tl.store(token_ptr + row, tl.sum(tl.where(mine, tl.load(place_ptr + at, mask=there, other=0), 0), 0))
    tl.store(logprob_ptr + row, tl.max(tl.where(mine, chosen, float("-inf")), 0) - top - tl.log(whole))
