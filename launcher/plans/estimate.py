"""From one rank's step to its time on a GPU: what each resource takes by itself, and the bounds.

Every figure is a lower bound of the time: full arithmetic rate, full bandwidth, no latency. With
everything overlapped a step takes as long as its busiest resource; with nothing, their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plans.build import Cost
from launcher.plans.gpus import Gpu
from parallel.layout import AXES, Layout

HEADROOM = 0.9
"""The share of a GPU's memory that a plan may fill: the rest is the driver's, the communication
library's and what the allocator loses to fragments."""


@dataclass
class Estimate:
    """Seconds of one step; bytes of the rank that needs most.

    seconds: resource → what it takes by itself: `arithmetic`, `memory traffic` of matrix products
        and attention, `links` within a node, `network` between nodes.
    unfused: seconds of all memory traffic, if nothing is fused.
    bubble: how long a pipeline's rank is idle, as a share of the time that it works.
    """

    layout: Layout
    micro_batch: int
    micro_batches: int
    costs: list[Cost]
    seconds: dict[str, float]
    unfused: float
    bubble: float
    gpu: Gpu
    model_flops: float

    @property
    def worst(self) -> Cost:
        """The rank that needs most memory."""
        return max(self.costs, key=lambda cost: cost.memory)

    @property
    def fits(self) -> bool:
        return self.worst.memory <= HEADROOM * self.gpu.memory

    @property
    def limit(self) -> str:
        """The busiest resource."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def overlapped(self) -> float:
        """Seconds of a step if everything overlaps and all but products is fused away."""
        return max(self.seconds.values()) * (1 + self.bubble)

    @property
    def exposed(self) -> float:
        """Seconds of a step if no message overlaps with computing and nothing is fused."""
        products = max(self.seconds["arithmetic"], self.seconds["memory traffic"])
        rest = self.unfused - self.seconds["memory traffic"]
        messages = self.seconds["links"] + self.seconds["network"]
        return (products + rest + messages) * (1 + self.bubble)

    def utilisation(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step that takes so long."""
        return self.model_flops / (seconds * self.layout.world * self.gpu.flops)


def send_rate(axis: str, layout: Layout, gpu: Gpu) -> tuple[str, float]:
    """Which wire an axis uses, and the bytes a second that each of its ranks can send.

    Ranks are numbered node by node. A group that spans nodes is bound by its members' adapters:
    those it has on one node share what leaves it.
    """
    ranks = members(axis, layout)
    nodes = {rank // gpu.per_node for rank in ranks}
    if len(nodes) == 1:
        return "links", gpu.link
    return "network", min(gpu.link, len(ranks) / len(nodes) * gpu.network)


def members(axis: str, layout: Layout) -> list[int]:
    """The ranks of rank 0's group along an axis, or along several joined by ×."""
    names = AXES if axis in ("world", "other") else tuple(axis.split("×"))
    ranks = [0]
    stride = 1
    for name, size in reversed(list(zip(AXES, layout.shape, strict=True))):
        if name in names:
            ranks = [rank + index * stride for index in range(size) for rank in ranks]
        stride *= size
    return sorted(ranks)


def estimate(
    costs: list[Cost],
    layout: Layout,
    gpu: Gpu,
    *,
    micro_batch: int,
    micro_batches: int,
    bubble: float,
    model_flops: float,
    bf16: bool,
) -> Estimate:
    """The bounds of a step whose ranks cost `costs`; the slowest counts for each resource."""
    rate = gpu.flops if bf16 else gpu.float32
    seconds = dict.fromkeys(("arithmetic", "memory traffic", "links", "network"), 0.0)
    unfused = 0.0
    for cost in costs:
        own = dict.fromkeys(seconds, 0.0)
        own["arithmetic"] = cost.flops / rate
        own["memory traffic"] = cost.products / gpu.bandwidth
        unfused = max(unfused, cost.touched / gpu.bandwidth)
        for axis, taken in axis_seconds(cost, layout, gpu).items():
            own[send_rate(axis, layout, gpu)[0]] += taken
        seconds = {name: max(value, own[name]) for name, value in seconds.items()}
    return Estimate(
        layout, micro_batch, micro_batches, costs, seconds, unfused, bubble, gpu, model_flops
    )


def axis_seconds(cost: Cost, layout: Layout, gpu: Gpu) -> dict[str, float]:
    """Axis → the seconds that this rank's messages along it take by themselves."""
    found: dict[str, float] = {}
    for (axis, _, _), (_, _, sent) in cost.messages.items():
        found[axis] = found.get(axis, 0.0) + sent / send_rate(axis, layout, gpu)[1]
    return found
