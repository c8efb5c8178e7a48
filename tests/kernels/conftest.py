"""The kernel tests run on a GPU if there is one, else on the CPU in Triton's interpreter; the files are the same."""

import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch

# Triton's own functions are made for the interpreter, or not, as triton is imported: too late for a fixture.
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "triton was imported before tests/kernels could choose its interpreter: set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")

SLOW_ON_CPU = [pytest.mark.slow] if DEVICE.type == "cpu" else []
"""For what the interpreter repeats in another dtype."""

# (forward, gradient) ceilings of the relative error in norm.
CEILINGS = {torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 1e-2), torch.bfloat16: (4e-3, 1e-2)}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Every value of every parameter by default, and their products in CI's second step: see tests/few.py."""
    item.add_marker("few")


Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
Compare = Callable[[Function, Function, Function, Sequence[torch.Tensor]], None]
Step = Callable[..., dict[str, torch.Tensor]]
CompareSteps = Callable[[Step, Step, Step, Mapping[str, torch.Tensor | None]], None]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(
    scope="session",
    ids=["fp32", "fp16", "bf16"],
    params=[
        torch.float32,
        pytest.param(torch.float16, marks=SLOW_ON_CPU),
        pytest.param(
            torch.bfloat16,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    DEVICE.type == "cpu" or not torch.cuda.is_bf16_supported(including_emulation=False),
                    reason="Triton's interpreter truncates to bf16 instead of rounding; before sm_80 there is no bf16",
                ),
            ],
        ),
    ],
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an element that no kernel writes is noticed."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def run(function: Function, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and gradients of the inputs that require them for fixed random upstream gradients of odd strides."""
    generator = torch.Generator().manual_seed(1)
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    upstream = []
    for out in outputs:
        wide = torch.randn((*out.shape[:-1], out.shape[-1] + 3), generator=generator).half()
        upstream.append(wide.to(out.device, out.dtype)[..., 1:-2])
    before = [grad.clone() for grad in upstream]
    grads = torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], upstream)
    assert all(map(torch.equal, before, upstream)), "an incoming gradient was modified"
    return [out.detach() for out in outputs], list(grads)


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return float((actual.cpu().double() - truth).norm() / truth.norm().clamp_min(1e-30))


def strided_copy(x: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides: `clone` would close gaps between rows."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x.detach())


def assert_no_worse(actual: torch.Tensor, other: torch.Tensor, exact: torch.Tensor, ceiling: float) -> None:
    """`actual` is as near to the exact values as `other` is, nearly."""
    assert (actual.dtype, actual.shape) == (other.dtype, other.shape)
    assert actual.isfinite().all()
    mine = error(actual, exact)
    # A norm over few roundings scatters: 1.107x over 224 bf16 values was seen on an H100.
    slack = 1.25 if exact.numel() < 1000 else 1.0
    assert mine <= slack * (1.1 * error(other, exact) + 1e-6)
    assert mine <= slack * ceiling
    if exact.numel():  # and no single element is far off
        assert (actual.cpu().double() - exact).abs().max() <= 4 * ceiling * exact.abs().max() + 1e-6


@pytest.fixture(scope="session")
def compare_steps() -> CompareSteps:
    """Check the plain steps of a manual backward against their formula in fp64, as `compare` checks operations.

    A step is given copies of the tensors, which it may write over, and returns all that it is said to leave.
    """

    def check(op: Step, eager: Step, formula: Step, tensors: Mapping[str, torch.Tensor | None]) -> None:
        def copies() -> dict[str, torch.Tensor | None]:
            return {name: None if x is None else strided_copy(x) for name, x in tensors.items()}

        ours, again, theirs = op(**copies()), op(**copies()), eager(**copies())
        truth = formula(**{n: None if x is None else x.detach().cpu().double() for n, x in tensors.items()})
        dtype = max((x.dtype for x in tensors.values() if x is not None), key=lambda dtype: torch.finfo(dtype).eps)
        assert set(ours) == set(theirs) == set(truth)
        for name, exact in truth.items():
            assert torch.equal(ours[name], again[name]), f"{name}: two runs differ"
            ceiling = CEILINGS[dtype][name.startswith("d")]
            assert_no_worse(ours[name], theirs[name], exact.detach(), ceiling)

    return check


@pytest.fixture(scope="session")
def compare() -> Compare:
    """Check an operation against its formula in fp64, no worse than eager PyTorch, and everything else it promises."""

    def check(op: Function, eager: Function, formula: Function, inputs: Sequence[torch.Tensor]) -> None:
        before = [x.detach().clone() for x in inputs]
        ours, again = run(op, inputs), run(op, inputs)
        assert all(map(torch.equal, before, inputs)), "an input was modified"
        theirs = run(eager, inputs)
        # .cpu().double() keeps the rounded values: the truth starts from the same inputs.
        truth = run(formula, [x.detach().cpu().double().requires_grad_(x.requires_grad) for x in inputs])
        ceilings = CEILINGS[max((x.dtype for x in inputs), key=lambda dtype: torch.finfo(dtype).eps)]
        for kind, ceiling in enumerate(ceilings):
            for actual, repeated, other, exact in zip(ours[kind], again[kind], theirs[kind], truth[kind], strict=True):
                assert torch.equal(actual, repeated), "two runs differ"
                assert_no_worse(actual, other, exact, ceiling)

    return check


@pytest.fixture
def huge(device: torch.device) -> Callable[[Sequence[int], Sequence[int]], torch.Tensor]:
    """Make an fp16 tensor whose strides are far larger than its data, to overflow any offset that is not int64."""

    def make(shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if device.type == "cuda":
            if torch.cuda.mem_get_info()[0] < 3 * elements:
                pytest.skip(f"needs {2 * elements / 2**30:.0f} GiB of GPU memory")
            buffer = torch.zeros(elements, dtype=torch.float16, device=device)
        else:
            # Pages of this mapping exist once they are touched. The interpreter reads CPU storages in place.
            map_noreserve = 0x4000
            pages = mmap.mmap(-1, 2 * elements, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve)
            buffer = torch.frombuffer(pages, dtype=torch.float16)
        return buffer.as_strided(shape, strides).copy_(torch.randn(*shape))

    return make
