"""The most that a device computes, by its name: what MFU is a share of.

Dense bf16 products with fp32 sums; fp16 on cards without bf16 (T4, V100). From the makers' data sheets, of
GeForce cards from the white papers of their architectures. NVIDIA gives most figures "with sparsity", which
are twice these. MI250X is one of its two dies, since each is a device of its own.
"""

from __future__ import annotations

import re

import torch

PEAK_BF16_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIE": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "5090": 209.5e12,
    "4090": 165.2e12,
    "3090": 71e12,
    "V100": 125e12,
    "V100 PCIE": 112e12,
    "T4": 65e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,
}
"""Operations a second, by words of the name that torch gives the device; of several, the most words win."""

_ONLY_A_PART = {"MIG", "LAPTOP", "D"}
"""Names of a card's slice, or of a slower card, with that of a whole one in it."""


def peak_flops(device: torch.device) -> float | None:
    """Operations a second at most; None where that is not known, as on CPU."""
    return peak_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_by_name(name: str) -> float | None:
    """name: as torch gives it: "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "Tesla T4", ..."""
    words = set(re.split(r"[\s\-_]+", name.upper()))
    known = [key for key in PEAK_BF16_FLOPS if set(key.split()) <= words]
    if not known or words & _ONLY_A_PART:
        return None
    return PEAK_BF16_FLOPS[max(known, key=lambda key: len(key.split()))]
