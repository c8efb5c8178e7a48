"""Every kernel compiles for the oldest and the newest GPU we support; this needs a compiler, not a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

# Runs the operations on CPU tensors with a driver that only knows the target, and stops each launch after compiling it.
SCRIPT = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from ftcore_kernels.ops import (
    _launch, add_rms_norm, cross_entropy, geglu, layer_norm, linear_cross_entropy, linear_logprobs, nf4_dequantize,
    rms_norm, rope, swiglu,
)

arch = int(sys.argv[1])
dtype = torch.float16 if arch < 80 else torch.bfloat16

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
head = tensor(3, 64), tensor(1000, 64), labels
linear_cross_entropy.linear_cross_entropy(*head, normalizer=3.0).backward()
linear_logprobs.linear_logprobs(*head, temperature=0.7).sum().backward()
packed, absmax = torch.zeros(50, dtype=torch.uint8), torch.zeros(2)
state = nf4_dequantize.AbsmaxState(torch.zeros(256), torch.zeros(1), torch.zeros(()))
nf4_dequantize.nf4_dequantize(packed, absmax, (10, 10), dtype=dtype)
nf4_dequantize.nf4_dequantize(packed, absmax.byte(), (10, 10), dtype=dtype, absmax_state=state)
assert len(kernels) == 39 and all(kernel.asm["cubin"] for kernel in kernels), len(kernels)
"""


@pytest.mark.parametrize("arch", [75, 90])
def test_kernels_compile(arch, tmp_path):
    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this build of triton has no ptxas")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = tmp_path / "script.py"  # a file: triton reads the source of kernels, and python -c would hide it
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(arch)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
