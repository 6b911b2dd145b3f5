"""Names, sizes and axes of messages."""

import pytest

from parallel.layout import Layout
from training.timeline.messages import Axes, axis_of, kind, traced_bytes, traced_elements


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("c10d::allreduce_", "all_reduce"),
        ("c10d::_allgather_base_", "all_gather"),
        ("c10d::allgather_into_tensor_coalesced_", "all_gather"),
        ("c10d::_reduce_scatter_base_", "reduce_scatter"),
        ("c10d::reduce_", "reduce"),
        ("c10d::alltoall_base_", "all_to_all"),
        ("c10d::recv_", "receive"),
        ("_c10d_functional::all_to_all_single", "all_to_all"),
        ("_c10d_functional::reduce_scatter_tensor", "reduce_scatter"),
        ("_c10d_functional::wait_tensor", None),
        ("_c10d_functional::_wrap_tensor_autograd", None),
        ("aten::scatter_", None),
        ("fsdp::all_gather_copy_in", None),
    ],
)
def test_what_an_operation_is_called(operation, expected):
    assert kind(operation) == expected


def test_elements_are_those_of_the_input_not_of_the_result():
    gathering = {"Input Dims": [[528], [264], [], []], "Input type": ["float", "float", "", ""]}
    assert traced_elements("c10d::_allgather_base_", gathering) == 264
    listed = {"Input Dims": [[[16, 4]], [[8, 4], [3]], []]}
    assert traced_elements("c10d::allgather_into_tensor_coalesced_", listed) == 35
    assert (
        traced_elements("_c10d_functional::all_gather_into_tensor", {"Input Dims": [[5, 4]]}) == 20
    )
    assert traced_elements("c10d::allreduce_", {}) is None


def test_bytes_need_a_known_type():
    assert traced_bytes({"Input Dims": [[8, 4]], "Input type": ["c10::BFloat16"]}) == 64
    assert traced_bytes({"Input Dims": [[2]], "Input type": ["double"]}) == 16
    assert traced_bytes({"Input Dims": [[2]], "Input type": ["secret"]}) is None


def test_the_axes_of_a_group_are_those_on_which_its_ranks_differ():
    layout = Layout(fsdp=2, tp=2)
    assert axis_of(layout, [0, 1]) == "tp"
    assert axis_of(layout, [1, 3]) == "fsdp"
    assert axis_of(layout, [0, 1, 2, 3]) == "fsdp×tp"
    assert axis_of(layout, [2]) is None


def test_messages_are_found_again_by_kind_size_and_order():
    axes = Axes(Layout(fsdp=2, tp=2))
    axes.saw("all_reduce", 10, [0, 1])
    axes.saw("all_reduce", 10, [0, 2])
    axes.saw("all_reduce", 7, [0, 2])
    assert [axes.take("all_reduce", 10) for _ in range(3)] == ["tp", "fsdp", None]
    assert [axes.take("all_reduce", 7) for _ in range(2)] == ["fsdp", "fsdp"]  # all were alike
    assert axes.take("all_gather", 10) is None


def test_where_there_is_one_axis_it_is_known_without_having_watched():
    assert Axes(Layout(tp=2)).take("all_reduce", None) == "tp"
