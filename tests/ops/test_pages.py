"""Packed weights lie on huge pages where the system has them."""

from pathlib import Path

import pytest
import torch

from helpers import needs_kernels
from mllama.ops import pack_weight

MAPS = Path("/proc/self/smaps")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@needs_kernels
@pytest.mark.skipif(not SETTING.exists() or not MAPS.exists(), reason="no huge pages here")
def test_huge_pages_are_asked_for():
    packed = pack_weight(torch.zeros(4096, 1024, device="cpu"), "f32")  # 16 MiB
    middle, flags = packed.data_ptr() + packed.numel() // 2, []
    for line in MAPS.read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and ":" not in name:
            start, end = (int(part, 16) for part in name.split("-"))
            inside = start <= middle < end
        elif name == "VmFlags:" and inside:
            flags = rest.split()
    assert "hg" in flags
