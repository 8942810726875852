"""Tables and indices: rounding, caching, windows, stacks, refusals, saving, compiling."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from fastflow.dynamics import CPS, DDIM, ODE, DanceSDE, FlowSDE, TableSDE, Transitions, sigma_schedule, sub_grid
from fastflow.dynamics import columns as col

SIGMAS = sigma_schedule(6, shift=3.0)
TR = FlowSDE(0.7).transitions(SIGMAS)
OTHER = DanceSDE(0.3).transitions(SIGMAS)


def test_table_is_rounded_once_from_float64() -> None:
    exact, table = TR.table(torch.float64), TR.table()
    assert exact.shape == (6, 16) and table.dtype == torch.float32 and torch.equal(table, exact.float())
    std = TR.std
    assert torch.equal(exact[:, col.C0], -std.log() - 0.5 * math.log(2 * math.pi))
    assert torch.equal(exact[:, col.W], 0.5 / (std * std))
    assert torch.equal(exact[:, 13:], torch.zeros(6, 3).double())
    for name, number in zip(col.NAMES, range(13), strict=True):
        if name not in ("c0", "w"):
            assert torch.equal(getattr(TR, name), exact[:, number])


def test_columns_cannot_be_written_through() -> None:
    before = TR.hash
    TR.a.zero_()
    TR.state_dict()["table"].zero_()
    assert TR.hash == before and float(TR.a.abs().sum()) > 0


def test_tables_are_built_once_per_device_and_dtype() -> None:
    assert TR.table() is TR.table(torch.float32, "cpu") and TR.table() is not TR.table(torch.float64)


def test_a_table_first_used_under_inference_mode_serves_autograd() -> None:
    with torch.inference_mode():
        tr = FlowSDE(0.5).transitions(SIGMAS)
        tr.at(0).rows("cpu")
    velocity = torch.ones(1, requires_grad=True)
    (velocity * tr.at(0).rows("cpu")[:, col.B]).sum().backward()
    assert velocity.grad is not None


def test_a_host_index_is_a_view_of_its_row() -> None:
    for i in range(-6, 6):
        at = TR.at(i)
        rows = at.rows("cpu")
        assert at.batch is None and at.fault is None
        assert rows.data_ptr() == TR.table()[i].data_ptr() and torch.equal(rows[0], TR.table()[i])
        assert float(at.std) == float(TR.std[i]) and float(at.sigma_next) == float(TR.sigma_next[i])
    assert TR.at(2).rows("cpu", torch.float64).dtype == torch.float64 and TR.at(2).score == "gaussian"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_tensor_index_gives_a_row_each(dtype: torch.dtype) -> None:
    index = torch.tensor([5, 0, 0, 3], dtype=dtype)
    at = TR.at(index)
    assert at.batch == 4 and at.fault is None and torch.equal(at.rows("cpu"), TR.table()[index.long()])
    assert torch.equal(at.a, TR.a[index.long()])
    one = TR.at(torch.tensor(3))
    assert one.batch is None and torch.equal(one.rows("cpu"), TR.table()[3:4])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (6, IndexError, "index: wanted 0 to 5, got 6"),
        (-7, IndexError, "got -7"),
        (torch.tensor([1, 6, -1]), IndexError, r"index: rows \[1, 2\] hold \[6, -1\], outside \[0, 6\)"),
        (True, TypeError, "index: wanted an int or an int tensor"),
        (1.0, TypeError, "index: wanted an int or an int tensor, got float"),
        (torch.tensor([1.0]), TypeError, "index: wanted an int64 tensor"),
        (torch.tensor([[1]]), TypeError, "index: wanted an int64 tensor"),
        (torch.tensor([True]), TypeError, "index: wanted an int64 tensor"),
    ],
)
def test_bad_index(index: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TR.at(index)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: an index that only the device knows")
def test_a_device_index_is_clamped_and_flagged() -> None:
    at = TR.at(torch.tensor([5, 6, -1], device="cuda"))
    rows = at.rows("cuda")
    assert at.fault is not None and at.fault.tolist() == [False, True, True]
    assert torch.equal(rows.cpu(), TR.table()[[5, 5, 0]])
    stacked = Transitions.stack([TR, OTHER]).at(at._index, table=torch.tensor([0, 1, 2], device="cuda"))
    assert stacked.fault is not None and stacked.fault.tolist() == [False, False, True]


def test_windows_become_euler_bit_for_bit() -> None:
    dt = SIGMAS[1:] - SIGMAS[:-1]
    for dynamics in (FlowSDE(0.7), CPS(0.7)):
        whole, part = dynamics.transitions(SIGMAS), dynamics.transitions(SIGMAS, steps=[1, 3])
        for i in range(6):
            if i in (1, 3):
                assert torch.equal(part.table(torch.float64)[i], whole.table(torch.float64)[i])
            else:
                assert float(part.a[i]) == 1.0 and float(part.b[i]) == float(dt[i]) and float(part.std[i]) == 0.0
                assert part.table()[i, [col.C0, col.W]].tolist() == [0.0, 0.0]
        assert part.score == whole.score
    assert torch.equal(FlowSDE(0.7).transitions(SIGMAS, steps=range(0)).b, dt)


@pytest.mark.parametrize(
    ("steps", "message"),
    [([6], r"steps: wanted indices from 0 to 5, got \[6\]"), ([-1], "got"), ([1, 1], "every index once")],
)
def test_bad_window(steps: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowSDE(0.7).transitions(SIGMAS, steps=steps)


def test_where() -> None:
    mask = torch.tensor([True, False, True, False, False, True])
    mixed = TR.where(mask, OTHER)
    assert torch.equal(mixed.std, torch.where(mask, TR.std, OTHER.std)) and len(mixed) == 6
    assert TR.where(mask, TR) == TR and mixed != TR
    window = CPS(0.7).transitions(SIGMAS).where(mask, ODE("dpmpp", 2).transitions(SIGMAS))
    assert window.score == "square" and (window.history < 0.0).tolist() == [i in (3, 4) for i in range(6)]
    for bad in (mask[:5], mask.int()):
        with pytest.raises(ValueError, match=r"mask: wanted bool \[6\]"):
            TR.where(bad, OTHER)
    with pytest.raises(ValueError, match="other: wanted 6 steps"):
        TR.where(mask, FlowSDE(0.7).transitions(SIGMAS[1:]))
    with pytest.raises(ValueError, match="name one with score="):
        TR.where(mask, CPS(0.7).transitions(SIGMAS))
    assert TR.where(mask, CPS(0.7).transitions(SIGMAS), score="square").score == "square"


def test_stack() -> None:
    short = FlowSDE(0.9).transitions(sub_grid(SIGMAS, 2, 3))
    stack = Transitions.stack([TR, OTHER, short])
    assert len(stack) == 3 and stack[2] is short
    index, table = torch.tensor([0, 5, 2, 1]), torch.tensor([0, 1, 2, 0])
    at = stack.at(index, table=table)
    wanted = torch.stack(
        [[TR, OTHER, short][t].table()[i] for i, t in zip(index.tolist(), table.tolist(), strict=True)]
    )
    assert at.batch == 4 and torch.equal(at.rows("cpu"), wanted)
    assert torch.equal(stack.at(1, table=table).rows("cpu")[2], short.table()[1])
    assert torch.equal(stack.at(index, table=1).rows("cpu"), OTHER.table()[index])
    assert torch.equal(stack.at(2, table=-1).rows("cpu"), short.table()[2:3])
    assert torch.equal(pickle.loads(pickle.dumps(stack)).at(index, table).rows("cpu"), wanted)
    with pytest.raises(IndexError, match=r"index: rows \[2\] hold \[3\]"):
        stack.at(torch.tensor([0, 5, 3, 1]), table=table)
    with pytest.raises(IndexError, match="table: wanted 0 to 2, got 3"):
        stack.at(0, table=3)
    with pytest.raises(IndexError, match="index: wanted 0 to 2, got 3"):
        stack.at(3, table=2)
    with pytest.raises(ValueError, match="index, table: wanted one shape"):
        stack.at(index[:2], table=table)
    with pytest.raises(ValueError, match="name one with score="):
        Transitions.stack([TR, CPS(0.7).transitions(SIGMAS)])
    with pytest.raises(TypeError, match="at least one Transitions"):
        Transitions.stack([])


def test_saving_copying_and_equality() -> None:
    for tr in (TR, CPS(0.5).transitions(SIGMAS), ODE("dpmpp", 2).transitions(SIGMAS)):
        tr.table(torch.float32)
        for other in (Transitions.from_state_dict(tr.state_dict()), pickle.loads(pickle.dumps(tr)), copy.deepcopy(tr)):
            assert other == tr and other.hash == tr.hash and hash(other) == hash(tr) and other.score == tr.score
            assert torch.equal(other.table(), tr.table())
        assert all(isinstance(value, torch.Tensor) for value in tr.state_dict().values())
    assert b"_cache" not in pickle.dumps(TR) or pickle.loads(pickle.dumps(TR))._cache == {}
    assert TR != OTHER and TR != "TR" and TR.hash != OTHER.hash and "FlowSDE(noise_level=0.7)" in repr(TR)


def test_tables_that_no_backend_can_serve_are_refused_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"FlowSDE\(noise_level=1.6\), step 0 \(sigma 1 -> .*\): std is 1.6, above 1.5"
    ):
        FlowSDE(1.6).transitions(SIGMAS)
    with pytest.raises(ValueError, match=r"TableSDE.*step 4 .*std is"):
        TableSDE([0.1] * 4 + [9.0, 0.1]).transitions(SIGMAS)
    with pytest.raises(ValueError, match=r"DDIM.*step 0 \(sigma 1 -> 0\): a is inf"):
        DDIM([0.5, 0.0]).transitions([1, 0])
    with pytest.raises(ValueError, match=r"std is 2.5e-21, and 1 / \(2 std\^2\) overflows float32"):
        DanceSDE(1e-20).transitions(SIGMAS)
    rows = TR.state_dict()["table"]
    for value, message in ((float("nan"), "std is nan"), (-0.1, "std is -0.1"), (1.51, "std is 1.51")):
        rows[3, col.STD] = value
        with pytest.raises(ValueError, match=f"transitions, step 3 .*{message}"):
            Transitions(rows)
    with pytest.raises(ValueError, match="score: wanted one of gaussian"):
        Transitions(TR.state_dict()["table"], score="cubic")
    with pytest.raises(ValueError, match=r"rows: wanted float64 \[T, 16\]"):
        Transitions(torch.zeros(3, 16))


def test_rows_inside_compiled_functions() -> None:
    tr = FlowSDE(0.7).transitions(SIGMAS)
    at, each = tr.at(2), tr.at(torch.tensor([1, 4]))
    x = torch.ones(3)
    for made in (at, each):
        compiled = torch.compile(lambda x, made=made: made.rows(x.device) * x.sum(), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), made.rows("cpu") * 3.0) and torch.equal(compiled(x), made.rows("cpu") * 3.0)
    inside = torch.compile(lambda x, i: tr.at(i).rows(x.device) * x.sum(), fullgraph=True, backend="eager")
    for i in range(6):
        assert torch.equal(inside(x, i), tr.table()[i : i + 1] * 3.0)
    stack = Transitions.stack([tr, OTHER])
    stacked = torch.compile(lambda x, i, k: stack.at(i, k).rows(x.device), fullgraph=True, backend="eager")
    pick = torch.tensor([1, 3]), torch.tensor([1, 0])
    assert torch.equal(stacked(x, *pick), stack.at(*pick).rows("cpu"))


def test_what_a_tracer_cannot_raise_is_clamped_and_flagged() -> None:
    """The path of an index on a device, taken by the host's under a tracer."""
    stack = Transitions.stack([TR, FlowSDE(0.9).transitions(sub_grid(SIGMAS, 2, 3))])

    @torch.compile(fullgraph=True, backend="eager")
    def one(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        at = TR.at(index)
        return at.rows("cpu"), at.fault

    @torch.compile(fullgraph=True, backend="eager")
    def many(index: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        at = stack.at(index, table)
        return at.rows("cpu"), at.fault

    rows, fault = one(torch.tensor([0, 9, -1, 5]))
    assert torch.equal(rows, TR.table()[[0, 5, 0, 5]])
    assert fault is not None and fault.tolist() == [False, True, True, False]
    rows, fault = many(torch.tensor([5, 3, 2, 0]), torch.tensor([0, 1, 1, 2]))
    assert torch.equal(
        rows, torch.stack([TR.table()[5], stack[1].table()[2], stack[1].table()[2], stack[1].table()[0]])
    )
    assert fault is not None and fault.tolist() == [False, True, False, True]


def test_a_fake_table_does_not_stay() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tr = FlowSDE(0.3).transitions(SIGMAS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tr.table()
    assert type(tr.table()) is torch.Tensor and float(tr.table()[0, 0]) == pytest.approx(float(tr.a[0]))
