"""Speed, utilisation and memory.

Peak figures are dense bf16 floating-point operations a second, from the makers' data sheets.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

PEAK_FLOPS = {
    "V100": 125e12,  # fp16: it has no bf16
    "A10G": 70e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "MI250X": 383e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's peak; None where it is not known, as on every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_FLOPS if all(part in name for part in key.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class Meter:
    """Counts units (tokens or images) and the time that training steps took.

    Validation and saving are outside the steps, so they do not count.

    Args:
        unit: what is counted, in the plural.
        device: whose memory and peak are meant.
        devices: how many devices share the work.
    """

    def __init__(self, unit: str, device: torch.device, devices: int):
        self.unit, self.device = unit, device
        self.peak = peak_flops(device)
        self.devices = devices
        self.flops_per_unit: float | None = None
        """Forward and backward operations; set where they can be counted."""
        self._units = 0
        self._seconds = 0.0
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def finish(self, units: int) -> None:
        """The step is over: its results have been read, so the device is done."""
        self._seconds += time.perf_counter() - self._began
        self._units += units

    def read(self) -> dict[str, float]:
        """Rates since the last reading, and the peak of memory in GB (10⁹ bytes)."""
        rate = self._units / self._seconds if self._seconds else 0.0
        self._units, self._seconds = 0, 0.0
        record = {f"{self.unit}_per_second": rate, "memory_gb": memory(self.device) / 1e9}
        if self.flops_per_unit is not None:
            speed = rate * self.flops_per_unit / self.devices
            record["tflops_per_device"] = speed / 1e12
            if self.peak is not None:
                record["mfu"] = speed / self.peak
        return record


def memory(device: torch.device) -> int:
    """The most bytes this process has held so far: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes elsewhere
