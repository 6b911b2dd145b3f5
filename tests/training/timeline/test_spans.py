"""Traces written by hand, in microseconds, and the spans they mean."""

import pytest

from parallel.layout import Layout
from training.timeline.messages import Axes
from training.timeline.spans import spans

MAIN, WORKER, AUTOGRAD, STREAM = 1, 2, 3, 7


def event(name, start, end, tid=MAIN, cat="cpu_op", **args):
    return {
        "ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid,
        "args": {key.replace("_", " "): value for key, value in args.items()},
    }  # fmt: skip


def mark(name, start, end):
    return event(name, start, end, cat="user_annotation")


def found(events, layout=None):
    result = spans(events, Axes(layout or Layout(tp=2)))
    return [(s.kind, s.name, round(s.start * 1e6), round(s.end * 1e6)) for s in result]


PHASES = [mark("step: data", 1000, 1100), mark("step: model", 1100, 2000)]
BLOCK = [
    mark("block: 0", 1200, 1400),
    event("aten::mm", 1100, 1200),
    event("aten::mm", 1210, 1400, Sequence_number=5),
]


def test_time_is_named_by_phase_and_block_and_starts_at_zero():
    backward = event("autograd::engine::evaluate_function: Mm", 1500, 1900, Sequence_number=5)
    computed = found([*PHASES, *BLOCK, event("aten::sum", 1400, 1500), backward])
    assert computed == [
        ("compute", "data", 0, 100),
        ("compute", "forward", 100, 200),
        ("compute", "forward 0", 200, 400),
        ("compute", "forward", 400, 500),
        ("compute", "backward 0", 500, 900),
        ("compute", "backward", 900, 1000),
    ]


def test_a_second_micro_batch_goes_forward_again():
    backward = event("autograd::engine::evaluate_function: Mm", 1500, 1600, Sequence_number=5)
    again = [mark("block: 0", 1650, 1750), event("aten::log_softmax", 1750, 1850)]
    names = [name for _, name, *_ in found([*PHASES, *BLOCK, backward, *again])]
    assert names == [
        "data", "forward", "forward 0", "forward", "backward 0", "backward", "forward 0", "forward",
    ]  # fmt: skip


def test_waiting_for_a_tensor_is_cut_out_of_computing():
    waits = event("_c10d_functional::wait_tensor", 1300, 1350)
    computed = found([*PHASES, *BLOCK, waits])
    assert ("wait", "wait", 300, 350) in computed
    assert ("compute", "forward 0", 200, 300) in computed
    assert ("compute", "forward 0", 350, 400) in computed


def test_a_message_carried_by_gloo_has_the_name_of_who_asked():
    asked = event(
        "c10d::_reduce_scatter_base_", 1150, 1160, Input_Dims=[[4], [8]], Input_type=["float"] * 2
    )
    carried = event(
        "gloo:all_reduce", 1170, 1250, WORKER, "user_annotation",
        Input_Dims=[[2, 4]], Input_type=["float"],
    )  # fmt: skip
    message = next(
        s for s in spans([*PHASES, *BLOCK, asked, carried], Axes(Layout(tp=2)))
        if s.kind == "collective"
    )  # fmt: skip
    assert (message.name, message.axis, message.bytes) == ("reduce_scatter", "tp", 32)
    assert message.start == pytest.approx(170e-6)


def test_a_functional_collective_counts_once_though_it_calls_another():
    asked = [
        event("_c10d_functional::all_reduce", 1150, 1170, Input_Dims=[[8]]),
        event("c10d::allreduce_", 1155, 1165, Input_Dims=[[[8]]]),
    ]
    carried = [
        event(f"gloo:{n}", s, s + 10, WORKER, Input_Dims=[[8]], Input_type=["float"])
        for n, s in (("all_reduce", 1180), ("unasked", 1200))
    ]
    names = [name for kind, name, *_ in found([*PHASES, *asked, *carried]) if kind == "collective"]
    assert names == ["all_reduce", "unasked"]


def test_a_pause_in_which_a_message_ends_is_waiting_until_then():
    # A work handle's wait leaves no trace: no operation from 1400 to 1900, a message to 1800.
    carried = event("gloo:all_reduce", 1350, 1800, WORKER, Input_Dims=[[8]], Input_type=["float"])
    after = event("aten::add", 1900, 2000)
    waits = [s for s in found([*PHASES, *BLOCK, carried, after]) if s[0] == "wait"]
    assert waits == [("wait", "wait", 400, 800)]
    beside = event("gloo:all_reduce", 1350, 1950, WORKER, Input_Dims=[[8]], Input_type=["float"])
    # One that goes on beside the next operation held nobody up.
    assert not [s for s in found([*PHASES, *BLOCK, beside, after]) if s[0] == "wait"]


def test_what_lies_outside_the_step_is_left_out():
    outside = event("_c10d_functional::wait_tensor", 2100, 2300)
    assert max(end for *_, end in found([*PHASES, *BLOCK, outside])) == 1000
    assert found([event("aten::mm", 0, 5)]) == []


def test_on_a_gpu_kernels_compute_and_nccl_s_carry_messages():
    host = [
        *PHASES,
        mark("block: 0", 1200, 1400),
        event("aten::mm", 1210, 1220, External_id=1, Sequence_number=5),
        event("autograd::engine::evaluate_function: Mm", 1500, 1600, AUTOGRAD, Sequence_number=5),
        event("aten::mm", 1510, 1520, AUTOGRAD, External_id=2),
    ]
    device = [
        event("gemm", 1300, 1500, STREAM, "kernel", External_id=1),
        event("gemm", 1700, 2100, STREAM, "kernel", External_id=2),
        event(
            "ncclDevKernel_AllReduce_Sum", 1450, 1650, 9, "kernel", Collective_name="allreduce",
            In_msg_nelems=64, dtype="BFloat16", Process_Group_Ranks="[0, 2]",
        ),
    ]  # fmt: skip
    result = spans([*host, *device], Axes(Layout(fsdp=2, tp=2)))
    assert [(s.kind, s.name, round(s.start * 1e6), round(s.end * 1e6)) for s in result] == [
        ("compute", "forward 0", 300, 500),
        ("collective", "all_reduce", 450, 650),
        ("wait", "wait", 500, 650),
        ("compute", "backward 0", 700, 1100),
    ]
    message = result[1]
    assert (message.axis, message.bytes) == ("fsdp", 128)
