"""AdamW with 8-bit moments: the twin against its formula and bitsandbytes, Triton against the twin, bit for bit."""

import copy
import itertools
import math

import pytest
import torch

from ftcore_kernels.optim import adamw_8bit as optim
from ftcore_kernels.optim.adamw_8bit import AdamW8bit
from ftcore_kernels.optim.choice import optimizer as choose
from ftcore_kernels.reference import adamw_8bit as twin
from ftcore_kernels.reference.adamw_8bit import Tensors, Update, decode, dynamic_map, encode, midpoints

SIZES = (1, 255, 256, 257, 1024, 4096, 5000, 8192)


def random_tensors(
    number: int, device: torch.device, param: torch.dtype, grad: torch.dtype, eight_bit: bool = True
) -> Tensors:
    p, g = torch.randn(number).to(device, param), (torch.randn(number) * torch.randn(number).exp()).to(device, grad)
    if not eight_bit:
        return Tensors(p, g, torch.randn(number).to(device), torch.rand(number).to(device))
    codes = (torch.randint(0, 256, (number,), dtype=torch.uint8).to(device) for _ in range(2))
    return Tensors(p, g, *codes, *(torch.rand(-(-number // 256)).to(device) for _ in range(2)))


def cloned(tensors: list[Tensors]) -> list[Tensors]:
    return [Tensors(*(x if x is None else x.clone() for x in each)) for each in tensors]


def assert_same(ours: list[Tensors], theirs: list[Tensors]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name, x, y in zip(Tensors._fields, mine, other, strict=True):
            if x is not None:
                assert torch.equal(x.isnan(), y.isnan()), name
                assert torch.equal(x.nan_to_num(), y.nan_to_num()) if x.is_floating_point() else torch.equal(x, y), name


@pytest.fixture
def op(device):
    return pytest.importorskip("ftcore_kernels.ops.adamw_8bit")


@pytest.fixture
def with_triton(monkeypatch, op):
    monkeypatch.setattr(optim, "runs_triton", lambda device: True)


@pytest.mark.parametrize("signed", [True, False])
def test_the_tables_are_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes(signed):
    theirs = pytest.importorskip("bitsandbytes.backends.triton.kernels_optim")
    x = torch.randn(64, 256) * 10 ** (-7 * torch.rand(64, 256))
    x = x if signed else x.square()
    # Its plain PyTorch: the CPU kernel of 0.50 searches a coarse table, and misses zero by four codes.
    with torch.compiler.set_stance("force_eager"):
        codes, absmax = theirs._quantize_blockwise_pytorch(x, dynamic_map(signed), 256)
    ours = encode(x.view(-1), absmax, signed).view_as(codes).int()
    # Only its GPU kernel keeps signs: elsewhere a negative number nearest to zero becomes zero.
    kept = (x < 0) & (codes == 127) if signed else torch.zeros_like(x).bool()
    assert torch.equal(torch.where(kept, 126, codes.int()), ours)
    assert not signed or kept.any()


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_wins_and_a_tie_goes_down(signed):
    table, middle = dynamic_map(signed), midpoints(signed)
    x = torch.cat((table, middle, torch.nextafter(middle, torch.tensor(2.0)), torch.rand(5000)))
    x = torch.cat((x, -x, 1e-5 * x)) if signed else torch.cat((x, 1e-5 * x))
    codes = encode(x, torch.ones(-(-x.numel() // 256)), signed).long()
    distance = (x[:, None].double() - table.double()).abs()
    nearest = distance.argmin(1)  # the first of equal ones
    mine = distance.gather(1, codes[:, None])[:, 0]
    sign_kept = (x < 0) & (nearest == 127) & (codes == 126) if signed else torch.zeros_like(codes).bool()
    assert torch.all((mine <= distance.amin(1) + 2e-7 * x.abs()) | sign_kept)
    assert torch.equal(encode(table, torch.ones(1), signed), torch.arange(256, dtype=torch.uint8))
    below = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(encode(middle, torch.ones(1), signed), below)


def test_one_step_is_that_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes.backends.triton.kernels_optim")
    ours = random_tensors(4096, torch.device("cpu"), torch.float32, torch.float32)
    [theirs] = cloned([ours])
    with torch.compiler.set_stance("force_eager"):
        bitsandbytes.optimizer_update_8bit_blockwise_pytorch(
            theirs.param, theirs.grad, theirs.m, theirs.v, 0.9, 0.999, 0.0, 0.0, 1e-8, 3, 1e-2, dynamic_map(True),
            dynamic_map(False), theirs.absmax_m, theirs.absmax_v, 0.1, 1.0, False, optimizer_name="adam",
        )  # fmt: skip
    twin.adamw_8bit([ours], Update(3, 1e-2, weight_decay=0.1))
    torch.testing.assert_close(ours.param, theirs.param, rtol=1e-5, atol=1e-6)
    for mine, other in ((ours.m, theirs.m), (ours.v, theirs.v)):
        difference = (mine.int() - other.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-2  # roundings, and kept signs
    torch.testing.assert_close((ours.absmax_m, ours.absmax_v), (theirs.absmax_m, theirs.absmax_v), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [600, 8192])
def test_fifty_steps_stay_near_adamw(size):
    start, steps = torch.randn(size), 50
    exact = start.double().requires_grad_()
    adamw = torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1)
    ours = torch.nn.Parameter(start.clone())
    mine = AdamW8bit([ours], lr=1e-2, weight_decay=0.1, min_8bit_size=1)
    scale = torch.randn(size).exp()
    for _ in range(steps):
        grad = scale * (torch.randn(size) + 0.5)
        exact.grad, ours.grad = grad.double(), grad
        adamw.step()
        mine.step()
    error = (ours - exact).norm() / (exact - start).norm()
    assert error < 0.05
    full = torch.nn.Parameter(start.clone())
    twin_of_32 = AdamW8bit([full], lr=1e-2, weight_decay=0.1, min_8bit_size=10**9)
    full.grad = torch.ones(size)
    twin_of_32.step()
    expected = start * (1 - 1e-3) - 1e-2
    torch.testing.assert_close(full.detach(), expected)


def test_state_of_32_bits_is_adamw():
    start = torch.randn(300)
    pair = [torch.nn.Parameter(start.double()), torch.nn.Parameter(start.clone())]
    both = [torch.optim.AdamW(pair[:1], lr=1e-2), AdamW8bit(pair[1:], lr=1e-2)]
    for _ in range(50):
        grad = torch.randn(300)
        for parameter, each in zip(pair, both, strict=True):
            parameter.grad = grad.to(parameter.dtype)
            each.step()
    torch.testing.assert_close(pair[1].detach().double(), pair[0].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [None, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
def test_triton_is_the_twin(op, device, dtype, grad, shared, monkeypatch):
    """Many tensors in one launch, of odd sizes, blocks of zeros and blocks that are lost, for some steps."""
    monkeypatch.setattr(op, "_SHARED", shared)
    ours = [random_tensors(size, device, dtype, grad or dtype) for size in SIZES]
    ours += [random_tensors(size, device, dtype, grad or dtype, False) for size in (3, 1024, 2000)]
    ours[4].grad[300] = torch.nan
    ours[5].grad[:256], ours[6].grad[4999] = 0, torch.inf
    ours[5].absmax_m[0] = ours[5].absmax_v[0] = 0
    theirs, table = cloned(ours), op.Table()
    for step in range(1, 4):
        update = Update(step, 1e-2 * step, weight_decay=0.1 * step)
        scale = torch.tensor(0.5, device=device) if step == 2 else None
        op.adamw_8bit(ours, update, scale, table)
        twin.adamw_8bit(theirs, update, scale)
        assert_same(ours, theirs)
    assert ours[4].param.isnan().sum() == 256 and ours[4].param[256:512].isnan().all()
    assert ours[6].param.isnan().sum() == 5000 % 256
    assert len(table.groups) == 2


@pytest.mark.parametrize("rounding", [1, 2**32 - 1])
def test_triton_rounds_by_chance_as_the_twin(op, device, rounding):
    ours = [random_tensors(size, device, torch.bfloat16, torch.bfloat16) for size in SIZES]
    ours += [random_tensors(700, device, torch.float32, torch.bfloat16), random_tensors(3, device, torch.bfloat16,
             torch.bfloat16, False)]  # fmt: skip
    ours[4].grad[300] = torch.nan
    ours[5].param[:4] = torch.tensor([torch.inf, -torch.inf, 3.38e38, 0.0])
    theirs, table = cloned(ours), op.Table()
    for step in range(1, 4):
        update = Update(step, 1e-4, rounding=rounding)
        op.adamw_8bit(ours, update, None, table)
        twin.adamw_8bit(theirs, update)
        assert_same(ours, theirs)
    nearest = cloned(ours)
    twin.adamw_8bit(nearest, Update(4, 1e-3))
    op.adamw_8bit(ours, Update(4, 1e-3, rounding=rounding), None, table)
    assert (ours[7].param != nearest[7].param).float().mean() > 0.05
    assert torch.equal(ours[8].param, nearest[8].param)  # fp32, which nothing rounds


@pytest.mark.parametrize("value", [1.0, -0.3, 1e-30, 6e4])
def test_rounding_by_chance_is_right_on_average(value):
    """To one of two neighbours, with odds that make the mean what was to be written."""
    number = 2**18
    x = torch.full((number,), value) * (1 + 2.0**-10)  # a quarter of bf16's step above some value, or near it
    rounded = twin.by_chance(x, 77)
    assert torch.equal(rounded, rounded.bfloat16().float())
    low, high = rounded.min().double(), rounded.max().double()
    assert low < x[0] < high and len(rounded.unique()) == 2
    share = float((x[0].double() - low) / (high - low))
    assert abs(float((rounded == high).double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / number)


def test_noise_is_new_for_every_step_parameter_and_place():
    def rounded(step: int, number: int = 0, rounding: int = 5) -> torch.Tensor:
        each = [Tensors(torch.ones(4096).bfloat16(), torch.ones(4096), torch.zeros(4096), torch.zeros(4096))
                for _ in range(number + 1)]  # fmt: skip
        twin.adamw_8bit(each, Update(step, 1e-3, rounding=rounding))
        return each[-1].param != 1

    first = rounded(1).float()
    assert torch.equal(first, rounded(1).float()) and 0.1 < first.mean() < 0.9
    for other in (rounded(2), rounded(1, number=1), rounded(1, rounding=6), first.roll(1), first.roll(256)):
        together = torch.stack((first, other.float()))
        assert torch.corrcoef(together)[0, 1].abs() < 0.08


def test_low_rates_are_not_lost_in_bf16(device):
    start = torch.ones(8192, device=device)
    kept, lost = (torch.nn.Parameter(start.bfloat16()) for _ in range(2))
    for parameter, rounding in ((kept, 0), (lost, None)):
        optimizer = AdamW8bit([parameter], lr=1e-5, weight_decay=0.0, rounding=rounding)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert torch.equal(lost.float(), start)
    assert float((1 - kept.detach().float()).mean()) == pytest.approx(100 * 1e-5, rel=0.1)


def test_what_an_older_version_saved_rounds_as_it_did():
    parameter = torch.nn.Parameter(torch.ones(5000).bfloat16())
    optimizer = AdamW8bit([parameter], lr=1e-5, rounding=3)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["rounding"]
    optimizer.load_state_dict(saved)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, torch.ones_like(parameter))


def test_triton_encodes_every_boundary(op, device):
    """Every code, every midpoint and their neighbours, through one step that leaves the moments as they are."""
    for signed in (True, False):
        x = torch.cat((dynamic_map(signed), midpoints(signed)))
        x = torch.cat((x, torch.nextafter(x, torch.tensor(2.0)), torch.nextafter(x, torch.tensor(-2.0))))
        x = (
            torch.cat((x, -x, 10 ** (-8 * torch.rand(4000))))
            if signed
            else torch.cat((x, 10 ** (-8 * torch.rand(4000))))
        )
        x[x.abs() < 1e-30] = 0  # a GPU's division takes denormal numbers for zero
        x = torch.nn.functional.pad(x.clamp(-1 if signed else 0, 1), (0, -x.numel() % 255)).view(-1, 255)
        x = torch.cat((torch.ones(len(x), 1), x), 1).view(-1)  # the scale of every block is 1
        n, blocks = x.numel(), x.numel() // 256
        zeros = torch.zeros(n, dtype=torch.uint8)
        grad = x if signed else x.double().sqrt().float()
        ours = [Tensors(*(t.to(device) for t in (torch.zeros(n), grad, zeros, zeros, *torch.zeros(2, blocks))))]
        ours = cloned(ours)  # each of the zeros its own
        theirs = cloned(ours)
        op.adamw_8bit(ours, Update(1, 1e-3, (0.0, 0.0)))
        twin.adamw_8bit(theirs, Update(1, 1e-3, (0.0, 0.0)))
        assert_same(ours, theirs)
        if signed:
            assert torch.equal(ours[0].m.cpu(), encode(x, torch.ones(blocks), True))


def test_moved_tensors_are_found(op, device):
    ours = [random_tensors(size, device, torch.float32, torch.float32) for size in (4096, 700)]
    theirs, table = cloned(ours), op.Table()
    for step in range(1, 5):
        if step == 2:  # new gradients only
            ours = [each._replace(grad=each.grad.clone() * 2) for each in ours]
            theirs = [each._replace(grad=each.grad * 2) for each in theirs]
        if step == 3:  # all of it, and no vector starts where it should
            buffer = [torch.cat((each.param[:1], each.param)) for each in ours]
            ours = [each._replace(param=moved[1:]) for each, moved in zip(cloned(ours), buffer, strict=True)]
        if step == 4:
            ours, theirs = ours[1:], theirs[1:]
        op.adamw_8bit(ours, Update(step, 1e-2), None, table)
        twin.adamw_8bit(theirs, Update(step, 1e-2))
        assert_same(ours, theirs)


def test_wrong_tensors_are_refused(device):
    right = random_tensors(512, device, torch.float32, torch.float32)
    for wrong, error in (
        (right._replace(param=right.param.long()), TypeError),
        (right._replace(m=right.m.float()), TypeError),
        (right._replace(absmax_v=None), TypeError),
        (right._replace(absmax_m=right.absmax_m[:1]), ValueError),
        (right._replace(grad=right.grad[:1]), ValueError),
        (right._replace(v=torch.stack((right.v, right.v), 1)[:, 0]), ValueError),
    ):
        with pytest.raises(error):
            twin.check(wrong)


def parameters(device: torch.device, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(*s).to(device, dtype)) for s in ((70, 100), (64,), (5000,), (3, 4096))]


def test_lots_that_are_updated_apart_have_noise_of_their_own():
    seeds = [optim.seed_of(rounding, group, part) for rounding in range(8) for group in range(8) for part in range(8)]
    assert len(set(seeds)) == 512
    assert optim.seed_of(None, 1, 1) is None


def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("triton", [False, True])
def test_resumed_is_uninterrupted(device, dtype, triton, request, tmp_path):
    if triton:
        request.getfixturevalue("with_triton")
    ours = parameters(device, dtype)
    optimizer = AdamW8bit(ours, lr=1e-2)
    steps(optimizer, 0, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    middle = [parameter.detach().clone() for parameter in ours]
    steps(optimizer, 3, 6)
    resumed = [torch.nn.Parameter(parameter.clone()) for parameter in middle]
    again = AdamW8bit(resumed, lr=1.0)
    steps(again, 9, 10)
    for parameter, saved in zip(resumed, middle, strict=True):
        parameter.data.copy_(saved)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    kept = again.state[resumed[0]]
    assert (kept["m"].dtype, kept["absmax_m"].dtype, kept["step"]) == (torch.uint8, torch.float32, 3)
    steps(again, 3, 6)
    assert all(map(torch.equal, ours, resumed))
    for mine, other in zip(ours, resumed, strict=True):
        assert optimizer.state[mine].keys() == again.state[other].keys()
        for name, value in optimizer.state[mine].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[other][name])), name


def test_optimizer_is_the_same_with_triton(op, device, monkeypatch):
    ours = parameters(device, torch.float32)
    theirs = copy.deepcopy(ours)
    for triton, each in ((True, ours), (False, theirs)):
        monkeypatch.setattr(optim, "runs_triton", lambda device, triton=triton: triton)
        each[0].data = each[0].data.t().contiguous().t()  # a parameter that is not contiguous
        optimizer = AdamW8bit([{"params": each[:2]}, {"params": each[2:3], "lr": 0.1, "weight_decay": 0.5}], lr=1e-2)
        steps(optimizer, 0, 2)
        optimizer.add_param_group({"params": each[3:]})
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.clip_coefficient = torch.tensor(0.25, device=device)
        steps(optimizer, 2, 3)
        assert optimizer.clip_coefficient is None
        each[2].grad = None
        before = each[2].detach().clone()
        optimizer.step()
        assert torch.equal(before, each[2])
        steps(optimizer, 4, 6)  # now with different step numbers in one group
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("triton", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(device, triton, request, monkeypatch):
    if triton:
        request.getfixturevalue("with_triton")
    ours = parameters(device, torch.float32)
    theirs = copy.deepcopy(ours)
    optimizer, other = AdamW8bit(ours, lr=1e-2, weight_decay=0.1), AdamW8bit(theirs, lr=1e-2, weight_decay=0.1)
    steps(optimizer, 0, 2)
    steps(other, 0, 2)
    for parameter in ours:
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert optimizer.found_inf is None
    optimizer.uncount_step()
    assert all(map(torch.equal, ours, theirs))
    optimizer.found_inf = torch.tensor(0.0, device=device)
    steps(optimizer, 2, 4)
    steps(other, 2, 4)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)
        for name, value in optimizer.state[mine].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[its][name])), name


def test_learning_rate_decay_and_zero_gradients(device):
    parameter = torch.nn.Parameter(torch.ones(5000, device=device))
    optimizer = AdamW8bit([parameter], lr=0.0, weight_decay=0.5)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, torch.ones_like(parameter))
    fresh = AdamW8bit([parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.zeros_like(parameter)
    fresh.step()
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.95))
    assert not decode(fresh.state[parameter]["m"], fresh.state[parameter]["absmax_m"], True).any()
    assert fresh.step(lambda: torch.tensor(7.0)) == 7


def test_wrong_settings_are_refused():
    for wrong in ({"lr": -1}, {"eps": -1}, {"weight_decay": -1}, {"betas": (1.0, 0.9)}):
        with pytest.raises(ValueError, match="must be"):
            AdamW8bit([torch.nn.Parameter(torch.ones(3))], **wrong)


def test_a_model_learns(device):
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 32)).to(device)
    x = torch.randn(128, 32, device=device)
    y = x.flip(1).sin()
    optimizer = AdamW8bit(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert {state["m"].dtype for state in optimizer.state.values()} == {torch.uint8, torch.float32}


class _Device:
    kind, capability = "cuda", (9, 0)


class _Plan:
    """What the hook reads of a plan."""

    def __init__(self, optimizer: str = "adamw_8bit", kind: str = "cuda", **args: object) -> None:
        from ftcore.config import Optimizer, TrainerConfig

        self.device = _Device()
        self.device.kind = kind
        self.run = type("Run", (), {})()
        self.run.trainer = TrainerConfig(
            optimizer=Optimizer(optimizer), learning_rate=3e-4, weight_decay=0.1, args=dict(args)
        )


def test_the_hook_has_the_groups_of_transformers():
    pytest.importorskip("triton")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.weight.requires_grad_(False)
    made = choose(_Plan(adam_beta2=0.95), model)
    assert isinstance(made, AdamW8bit)
    decayed, plain = made.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["lr"]) == (0.1, 0.0, 3e-4)
    assert decayed["betas"] == (0.9, 0.95)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in plain["params"])
    assert not any("norm" in names[id(p)] or "bias" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names) - 1
    assert decayed["rounding"] == plain["rounding"] == 42  # `trainer.seed`
    for other in (_Plan("adamw_torch"), _Plan("paged_adamw_8bit"), _Plan(kind="cpu"), _Plan(optim_args="x=1")):
        assert choose(other, model) is None


def test_who_watches_the_parameters_sees_a_step(op, device):
    tensors = [
        random_tensors(300, device, torch.float32, torch.float32),
        random_tensors(5, device, torch.float32, torch.float32),
    ]
    before = [each.param._version for each in tensors]
    op.adamw_8bit(tensors, Update(step=1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0))
    assert all(each.param._version > version for each, version in zip(tensors, before, strict=True))
