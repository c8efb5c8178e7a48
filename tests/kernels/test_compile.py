"""Every kernel compiles for the oldest and the newest GPU we support; this needs a compiler, not a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

# Runs the operations on CPU tensors with a driver that only knows the target, and stops each launch after compiling it.
SCRIPT = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from ftcore_kernels.ops import (
    _launch, adamw_8bit, add_rms_norm, cross_entropy, fp8_linear, geglu, layer_norm, linear_cross_entropy,
    linear_logprobs, lora_add, lora_glu, lora_grads, lora_rope, nf4_dequantize, norm_steps, rms_norm, rope, swiglu,
)
from ftcore_kernels.reference.adamw_8bit import Tensors as AdamTensors, Update as AdamUpdate
from ftcore_kernels.reference.lora_rope import HeadNorm, Heads, Update
from ftcore_kernels.reference.norm_steps import Norm

arch = int(sys.argv[1])
dtype = getattr(torch, sys.argv[2])

class Driver:
    get_current_device = get_current_stream = lambda *args: 0
    get_current_target = lambda self: GPUTarget("cuda", arch, 32)

run = JITFunction.run
kernels = []

def compile_only(self, *args, grid, warmup, **options):
    kernels.append(run(self, *args, grid=grid, warmup=True, **options))

triton.runtime.driver.set_active(Driver())
JITFunction.run = compile_only
_launch.INTERPRETED = True
_launch.shared_memory = lambda device: int(sys.argv[3])

def tensor(*shape):
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)

rms_norm.rms_norm(tensor(2, 4096), tensor(4096), 1e-6).sum().backward()
rms_norm.rms_norm(tensor(5, 3, 100), tensor(100).detach(), 1e-6, 1.0, "gemma").sum().backward()
for interleaved in (False, True):
    tables = torch.zeros(2, 1, 5, 96)
    sum(x.sum() for x in rope.rope(tensor(2, 32, 5, 128), tensor(2, 8, 5, 128), *tables, interleaved)).backward()
for round_silu in (False, True):
    swiglu.swiglu(*tensor(3, 2 * 14336).chunk(2, -1), round_silu).sum().backward()
for approximate in ("tanh", "none"):
    for round_gelu in (False, True):
        geglu.geglu(*tensor(3, 2 * 14336).chunk(2, -1), approximate, round_gelu).sum().backward()
sum(x.sum() for x in add_rms_norm.add_rms_norm(tensor(2, 4096), tensor(2, 4096), tensor(4096), 1e-6)).backward()
add_rms_norm.add_rms_norm(tensor(5, 100), tensor(5, 100), tensor(100), 1e-6, 1.0, "gemma")[1].sum().backward()
layer_norm.layer_norm(tensor(2, 4096), tensor(4096), tensor(4096), 1e-6).sum().backward()
layer_norm.layer_norm(tensor(5, 100), tensor(100).detach(), None, 1e-6).sum().backward()
labels = torch.zeros(3, dtype=torch.int64)
cross_entropy.cross_entropy(tensor(3, 128256), labels)[0].sum().backward()
sum(x.sum() for x in cross_entropy.cross_entropy(tensor(3, 1000), labels, -100, 30.0, 0.5, 0.1)).backward()
form = cross_entropy.Form(-100, 30.0, 1.0, 0.0)
cross_entropy.losses(torch.zeros(3, 1000), labels, form, *torch.zeros(2, 3), torch.zeros(3).bool(), torch.zeros(3))
if "few" in sys.argv:
    assert len(kernels) == 33 and all(kernel.asm["cubin"] for kernel in kernels), len(kernels)
    print(json.dumps([(kernel.name, kernel.metadata.shared) for kernel in kernels]))
    sys.exit()
head = tensor(3, 64), tensor(1000, 64), labels
linear_cross_entropy.linear_cross_entropy(*head, normalizer=3.0).backward()
linear_logprobs.linear_logprobs(*head, temperature=0.7).sum().backward()
packed, absmax = torch.zeros(50, dtype=torch.uint8), torch.zeros(2)
state = nf4_dequantize.AbsmaxState(torch.zeros(256), torch.zeros(1), torch.zeros(()))
nf4_dequantize.nf4_dequantize(packed, absmax, (10, 10), dtype=dtype)
nf4_dequantize.nf4_dequantize(packed, absmax.byte(), (10, 10), dtype=dtype, absmax_state=state)
# There is a conversion to e4m3 from sm_89 on; older GPUs, and Triton's interpreter, round with integers.
fp8_linear._converts = lambda device: arch >= 89
fp8_linear.quantize_rows(tensor(3, 28672))
fp8_linear.quantize_rows(tensor(3, 100), torch.zeros(100))
assert all(("cvt.rn.satfinite.e4m3x2.f32" in kernel.asm["ptx"]) == (arch >= 89) for kernel in kernels[-2:])
def update(rows, width, rank, blocks):
    return rank and Update(tensor(rows, (max(blocks) + 1) * rank), tensor(width, rank), blocks)
for rank, blocks, gemma, dim, rotated in (
    (None, None, None, 128, 128), (16, (0, 1, 2), None, 128, 128), (64, (0, 1, 2), False, 128, 128),
    (32, (0, 0, 0), None, 96, 72), (64, (0, 1, 2), True, 256, 256), (16, (0, 1, 2), False, 80, 32),
):
    heads, tables = Heads(8, 2, dim), torch.zeros(2, 1, 5, rotated)
    more = update(10, 12 * dim, rank, blocks), gemma is not None and HeadNorm(*tensor(2, dim), 1e-6, 0.0, gemma) or None
    qkv, grads = tensor(10, 12 * dim), (tensor(2, 8, 5, dim), tensor(2, 2, 5, dim), tensor(2, 2, 5, dim))
    lora_rope.lora_rope(qkv, *tables, heads, *more)
    lora_rope.lora_rope_backward(*grads, *tables, heads, qkv, *more, more[1] is not None)
for activation, rank, down in (("silu", None, 64), ("silu", 64, 64), ("gelu_tanh", 16, None), ("gelu", 32, 16)):
    gate_up, more = tensor(3, 2 * 14336), update(3, 2 * 14336, rank, (0, 1))
    lora_glu.lora_glu(gate_up, activation, more)
    below = down and (tensor(3, down), tensor(down, 14336)) or ()
    lora_glu.lora_glu_backward(tensor(3, 14336), gate_up, activation, more, *below)
# Triton makes a constant of an argument of 1.
lora_glu.lora_glu(tensor(3, 2), "silu", update(3, 2, 16, (0, 1)))
lora_glu.lora_glu_backward(tensor(3, 1), tensor(3, 2), "silu", update(3, 2, 16, (0, 1)), tensor(3, 16), tensor(16, 1))
lora_add.lora_add(tensor(3, 4096), tensor(3, 4096))
lora_add.lora_add(tensor(3, 4096), tensor(3, 4096), tensor(3, 16), tensor(4096, 16))
lora_add.lora_add(None, tensor(3, 100), tensor(3, 64), tensor(100, 64))
lora_grads.lora_grads(tensor(3, 100), tensor(3, 16), tensor(100, 16), (100,), (2.0,))
lora_grads.lora_grads(tensor(3, 6144), tensor(3, 3 * 64), tensor(6144, 64), (4096, 1024, 1024), (2.0, 2.0, 2.0))
for width, gemma in ((4096, False), (100, True)):
    norm, rstd = Norm(tensor(width), 1e-6, float(gemma), gemma), torch.zeros(3)
    norm_steps.norm(tensor(3, width), norm)
    norm_steps.add_norm(tensor(3, width), tensor(3, width), norm)
    rows = tensor(3, width), tensor(3, width), rstd, norm, tensor(3, width)
    norm_steps.norm_backward(*rows, normed=True, weight_grad=gemma)
def state(number, scales=False, of=dtype):
    codes = torch.uint8 if scales else torch.float32
    moments = torch.zeros(number, dtype=codes), torch.zeros(number, dtype=codes)
    absmax = (torch.zeros(-(-number // 256)), torch.zeros(-(-number // 256))) if scales else ()
    return AdamTensors(torch.zeros(number, dtype=of), torch.zeros(number, dtype=of), *moments, *absmax)
adamw_8bit.adamw_8bit([state(4096, True), state(300, True), state(2048)], AdamUpdate(1, 0.1), torch.ones(()))
adamw_8bit.adamw_8bit([state(4096, True, torch.float32)], AdamUpdate(1, 0.1))
adamw_8bit.adamw_8bit([state(4096, True, torch.bfloat16)], AdamUpdate(1, 0.1, rounding=2**32 - 1))
adamw_8bit.adamw_8bit([state(4096, True, torch.bfloat16)], AdamUpdate(2, 0.1, rounding=1))
assert kernels[-1] is kernels[-2]  # every step has other noise, and must not be compiled anew
assert len(kernels) == 82 and all(kernel.asm["cubin"] for kernel in kernels), len(kernels)
print(json.dumps([(kernel.name, kernel.metadata.shared) for kernel in kernels]))
"""


SHARED = {75: 64, 80: 163, 86: 99, 90: 227}
"""KiB of shared memory that a program may have, by architecture."""


@pytest.mark.parametrize(
    ("arch", "dtype", "more"),
    [
        pytest.param(75, "float16", ["few"], id="75-float16-without products"),
        *(
            pytest.param(arch, dtype, [], id=f"{arch}-{dtype}", marks=pytest.mark.slow)
            for arch, dtype in zip(
                (75, 80, 86, 86, 90, 90),
                ("float16", "bfloat16", "bfloat16", "float32", "bfloat16", "float32"),
                strict=True,
            )
        ),
    ],
)
def test_kernels_compile_and_find_the_memory_that_they_share(arch, dtype, more, tmp_path):
    """A program that shares more memory than there is compiles, and fails when it is launched."""
    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this build of triton has no ptxas")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = tmp_path / "script.py"  # a file: triton reads the source of kernels, and python -c would hide it
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(arch), dtype, str(SHARED[arch] * 1024), *more],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    over = [f"{name}: {shared}" for name, shared in json.loads(done.stdout) if shared > SHARED[arch] * 1024]
    assert not over
