"""AdamW with moments of 8 bits in the format of bitsandbytes, all parameters of one dtype in one launch.

A program owns a few blocks of 256 elements, a warp to a block: it decodes both moments, makes the step in fp32, writes
the parameter and encodes the moments by their new scales. Which tensor it works on comes from a map of programs to
tensors, and where that lies from a table of addresses, both on the device and made anew when a tensor moves.

The codes of a moment x in [0, 1] are, but for the steps between decades, u(x) rounded, with u the least of seven lines:
decade i has twice the numbers of the one below on ten times the length, so u is concave. The guess and one comparison
with the midpoint above it give the code without a search.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops._hash import mix, spread
from ftcore_kernels.reference.adamw_8bit import BLOCK, Tensors, Update, check, dynamic_map, midpoints

_BLOCKS = 4  # of a program
_WARPS = 4
_SHARED = False  # whether maps are read through shared memory instead of the first-level cache
_EXACT = True  # whether the quotient and the root of the step are rounded exactly, as the twin does; moments always are

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Table:
    """Where tensors lie, kept from step to step: give the same table with the same tensors, in the same order."""

    def __init__(self) -> None:
        self.groups: dict[tuple[torch.dtype, torch.dtype, bool], _Group] = {}


class _Group(NamedTuple):
    """Tensors of one dtype on the device."""

    fixed: list[int]
    grads: list[int]
    addresses: torch.Tensor
    grad_addresses: torch.Tensor
    full: torch.Tensor
    ragged: torch.Tensor
    aligned: bool
    tile: int


@torch.no_grad()
def adamw_8bit(
    tensors: Sequence[Tensors],
    update: Update,
    grad_scale: torch.Tensor | None = None,
    table: Table | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Make one step of AdamW, in place, in fp32 with one rounding of the parameter.

    A launch for every combination of dtypes, and another for the ragged ends of tensors, if there are any. Nothing
    waits for the device.

    :param tensors: Any number of parameters on one device, in any mix of dtypes; the noise of a rounding depends on
        their order.
    :param update: The step's numbers.
    :param grad_scale: One fp32 number on the device that every gradient is multiplied by: the factor of a clipped norm.
    :param table: Spares the addresses that stayed the same since the last call with it.
    :param found_inf: One fp32 number on the device; nothing is written unless it is 0.
    """
    table = Table() if table is None else table
    groups: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {}
    for number, each in enumerate(tensors):
        if each.param.numel():
            key = (each.param.dtype, each.grad.dtype, each.absmax_m is not None)
            groups.setdefault(key, []).append(number)
    for key, numbers in groups.items():
        group = table.groups[key] = _place([tensors[n] for n in numbers], numbers, table.groups.get(key))
        _step(key, group, update, grad_scale, found_inf)
    # The kernel writes by address: whoever watches a tensor's version, as autograd does, is to see it.
    torch.autograd.graph.increment_version([each.param for each in tensors])


def _step(
    key: tuple[torch.dtype, torch.dtype, bool],
    group: _Group,
    update: Update,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    """Launch the kernel over the tiles of a group, and over the ragged ones."""
    param, grad, eight_bit = key
    beta1, beta2 = map(float, update.betas)
    device = group.addresses.device
    by_chance = update.rounding is not None and param == torch.bfloat16
    # As a signed number, so that its type is the same in every step.
    noise = (update.noise + 2**31) % 2**32 - 2**31 if by_chance else 0
    for programs, ragged in ((group.full, False), (group.ragged, True)):
        if programs.numel():
            with torch.cuda.device_of(group.addresses):
                _adamw_kernel[(programs.numel(),)](
                    group.addresses, group.grad_addresses, programs, _maps(device), grad_scale, found_inf,
                    update.keep, beta1, 1 - beta1, beta2, 1 - beta2, update.step_size, update.corrected_eps, noise,
                    P=_TYPES[param], G=_TYPES[grad], EIGHT_BIT=eight_bit, RAGGED=ragged, ALIGNED=group.aligned,
                    BY_CHANCE=by_chance, BLOCKS=group.tile // BLOCK, BLOCK=BLOCK, SHARED=_SHARED, EXACT=_EXACT,
                    num_warps=_WARPS,
                    # Fused multiplications and additions would round once where the twin rounds twice.
                    enable_fp_fusion=False,
                )  # fmt: skip


@triton.jit(do_not_specialize=["noise"])
def _adamw_kernel(
    table_ptr, grads_ptr, programs_ptr, maps_ptr, grad_scale_ptr, found_inf_ptr,
    keep, beta1, rest1, beta2, rest2, step_size, eps, noise,
    P: tl.constexpr, G: tl.constexpr, EIGHT_BIT: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr,
    BY_CHANCE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program per tile of BLOCKS x BLOCK elements of the tensor in programs [N] int32; table [T, 8] int64:

    where parameter, m, v and their scales lie, how many elements there are, its number and its first program.
    """
    TILE: tl.constexpr = BLOCKS * BLOCK
    if found_inf_ptr is not None:  # noqa: SIM102  Triton would load from None
        if tl.load(found_inf_ptr) != 0:
            return
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(programs_ptr + program)
    table_ptr += tensor * 8
    param_ptr = tl.load(table_ptr).to(tl.pointer_type(P))
    grad_ptr = tl.load(grads_ptr + tensor).to(tl.pointer_type(G))
    m_address, v_address = tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    if EIGHT_BIT:
        m_ptr, v_ptr = m_address.to(tl.pointer_type(tl.uint8)), v_address.to(tl.pointer_type(tl.uint8))
    else:
        m_ptr, v_ptr = m_address.to(tl.pointer_type(tl.float32)), v_address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        # Eight codes a load, so that a thread has the same eight elements of every tensor.
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 8), tl.multiple_of(v_ptr, 8)
    if RAGGED:
        number = tl.load(table_ptr + 5)
        tile = number // TILE
    else:
        tile = program - tl.load(table_ptr + 7)
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    at = tile * TILE + tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = at < number if RAGGED else None
    block_mask = block * BLOCK < number if RAGGED else None
    p = tl.load(param_ptr + at, mask=mask).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=mask, other=0 if RAGGED else None).to(tl.float32)
    m = tl.load(m_ptr + at, mask=mask, other=0 if RAGGED else None)
    v = tl.load(v_ptr + at, mask=mask, other=0 if RAGGED else None)
    if grad_scale_ptr is not None:
        g *= tl.load(grad_scale_ptr)
    if EIGHT_BIT:
        absmax_m_ptr = tl.load(table_ptr + 3).to(tl.pointer_type(tl.float32)) + block
        absmax_v_ptr = tl.load(table_ptr + 4).to(tl.pointer_type(tl.float32)) + block
        m = _look_up(maps_ptr, m.to(tl.int32), SHARED) * tl.load(absmax_m_ptr, mask=block_mask)[:, None]
        v = _look_up(maps_ptr + 512, v.to(tl.int32), SHARED) * tl.load(absmax_v_ptr, mask=block_mask)[:, None]
    m = m * beta1 + g * rest1
    v = v * beta2 + g * rest2 * g
    if EIGHT_BIT:
        if RAGGED:
            m, v = tl.where(mask, m, 0.0), tl.where(mask, v, 0.0)
        absmax_m, absmax_v = _absmax(m), _absmax(v)
        # 2^126: from there on the reciprocal is no normal number. In bits, so that infinity and NaN are above it too.
        lost = (absmax_m >= 0x7E800000) | (absmax_v >= 0x7E800000)
        nan = float("nan")
        absmax_m = tl.where(lost, nan, absmax_m.to(tl.float32, bitcast=True))
        absmax_v = tl.where(lost, nan, absmax_v.to(tl.float32, bitcast=True))
        step_size = tl.where(lost, nan, step_size)[:, None]
        tl.store(absmax_m_ptr, absmax_m, mask=block_mask)
        tl.store(absmax_v_ptr, absmax_v, mask=block_mask)
        tl.store(m_ptr + at, _encode_signed(m * _inverse(absmax_m)[:, None], maps_ptr + 256, SHARED), mask=mask)
        tl.store(v_ptr + at, _encode_unsigned(v * _inverse(absmax_v)[:, None], maps_ptr + 768, SHARED), mask=mask)
    else:
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
    step = tl.div_rn(m, tl.sqrt_rn(v) + eps) if EXACT else m / (tl.sqrt(v) + eps)
    p = p * keep - step * step_size
    if BY_CHANCE:
        p = _by_chance(p, mix(noise.to(tl.uint32) + tl.load(table_ptr + 6).to(tl.uint32) * 0x9E3779B9), at)
    tl.store(param_ptr + at, p.to(P), mask=mask)


@triton.jit
def _by_chance(x, key, at):
    """x rounded to a neighbour that bf16 has, by the noise at its place: 16 bits below the last one that is kept."""
    bits = x.to(tl.uint32, bitcast=True) + (spread(key, at) >> 16)
    return tl.where(x == x, (bits >> 16 << 16).to(tl.float32, bitcast=True), x)


@triton.jit
def _absmax(x):
    """The largest magnitude of every row, as the bits of an fp32 number: as integers, NaN is the largest."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _inverse(absmax):
    """1 / absmax, or 0 where that would be no normal number: below 2^-126."""
    return tl.where(absmax < 1.1754943508222875e-38, 0.0, tl.div_rn(1.0, absmax))


@triton.jit
def _encode_signed(x, midpoints_ptr, SHARED: tl.constexpr):
    """The code next to x in [-1, 1] in the signed map; a negative x gets a negative number. NaN gives 254."""
    line = _rounded(_line(tl.abs(x)))
    negative = x < 0
    # Code 127 is zero, 127 + n the n-th number above it, and 127 - n that below it, of which there are 127 only.
    below = tl.maximum(tl.where(negative, 127 - line, 126 + line), 0)
    code = below + (x > _look_up(midpoints_ptr, below, SHARED)).to(tl.int32)
    return tl.where(negative, tl.minimum(code, 126), code).to(tl.uint8)


@triton.jit
def _encode_unsigned(x, midpoints_ptr, SHARED: tl.constexpr):
    """The code next to x in [0, 1] in the unsigned map, which has twice the numbers. NaN gives 254."""
    below = _rounded(_line(x) * 2) - 2
    return (below + (x > _look_up(midpoints_ptr, below, SHARED)).to(tl.int32)).to(tl.uint8)


@triton.jit
def _line(x):
    """Where x in [0, 1] lies among the numbers of the signed map, in [8 / 9, 128]: number n of it at n + 0.5.

    Decade i is the line 2^i 10^(6 - i) / 0.9 x + 8 / 9 2^i. The boundary between n and n + 1 is at n + 1, moved by 0.2
    at most, and the last at 127.75: roundings here, even a fused multiplication, never matter.
    """
    u = tl.minimum(tl.fma(x, 1111111.1, 0.8888889), tl.fma(x, 222222.22, 1.7777778))
    u = tl.minimum(u, tl.fma(x, 44444.443, 3.5555556))
    u = tl.minimum(u, tl.fma(x, 8888.889, 7.111111))
    u = tl.minimum(u, tl.fma(x, 1777.7778, 14.222222))
    u = tl.minimum(u, tl.fma(x, 355.55554, 28.444445))
    u = tl.minimum(u, tl.fma(x, 71.111115, 56.88889))
    return tl.minimum(u, 128.0)  # the other operand where one is NaN


@triton.jit
def _rounded(x):
    """A number below 2^9 rounded to int32, without the slow conversion: by adding 1.5 * 2^23."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) & 0x1FF


@triton.jit
def _look_up(map_ptr, at, SHARED: tl.constexpr):
    """Entries of a map of 256 numbers, at [R, C] int32."""
    if SHARED:
        number: tl.constexpr = at.shape[0] * at.shape[1]
        found = tl.gather(tl.load(map_ptr + tl.arange(0, 256)), tl.reshape(at, (number,)), 0)
        return tl.reshape(found, at.shape)
    else:
        return tl.load(map_ptr + at)


def _place(tensors: list[Tensors], numbers: list[int], known: _Group | None) -> _Group:
    """The addresses of tensors on the device: those known, with only the gradients' copied, or all of them."""
    grads = [each.grad.data_ptr() for each in tensors]
    # Addresses of another size may come back once memory is freed, so the size is part of what is compared.
    fixed = [value for number, each in zip(numbers, tensors, strict=True) for value in (*_fixed(each), number)]
    if known is not None and known.fixed == fixed and known.tile == _BLOCKS * BLOCK:
        if known.grads == grads:
            return known
        aligned = _aligned(tensors)
        known.grad_addresses.copy_(_pinned(grads, known.addresses.device), non_blocking=True)
        return known._replace(grads=grads, aligned=aligned)
    for each in tensors:
        check(each)
        _launch.check(param=tensors[0].param, grad=each.grad)
    device, tile = tensors[0].param.device, _BLOCKS * BLOCK
    sizes = torch.tensor([each.param.numel() for each in tensors])
    tiles = sizes // tile
    first = tiles.cumsum(0) - tiles
    index = torch.arange(len(tensors), dtype=torch.int32)
    return _Group(
        fixed,
        grads,
        torch.cat((torch.tensor(fixed).view(-1, 7), first[:, None]), 1).to(device),
        _pinned(grads, device).to(device, copy=True),
        torch.repeat_interleave(index, tiles).to(device),
        index[sizes % tile > 0].to(device),
        _aligned(tensors),
        tile,
    )


def _fixed(tensors: Tensors) -> tuple[int, ...]:
    """What the kernel reads of a tensor in the table, but for its first program."""
    written = tensors.param, *tensors[2:]
    return *(0 if tensor is None else tensor.data_ptr() for tensor in written), tensors.param.numel()


def _aligned(tensors: list[Tensors]) -> bool:
    """Whether all that is read in vectors starts where vectors may: not so for slices of a larger buffer."""
    return not any(tensor.data_ptr() % 16 for each in tensors for tensor in each[:4] if tensor is not None)


def _pinned(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Numbers in memory that the device copies from without a wait; PyTorch keeps it until it has."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")


_all_maps: dict[torch.device, torch.Tensor] = {}


def _maps(device: torch.device) -> Any:
    """The signed map, its midpoints, the unsigned map and its midpoints, `[4, 256]` on `device`, copied there once."""
    if device not in _all_maps:
        parts = [torch.nn.functional.pad(x(s), (0, 256 - x(s).numel())) for s in (True, False)
                 for x in (dynamic_map, midpoints)]  # fmt: skip
        _all_maps[device] = torch.stack(parts).to(device)
    return _all_maps[device]
