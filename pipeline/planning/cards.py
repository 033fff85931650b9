"""Graphics cards by name, as their vendors' data sheets have them, and quantities as flags write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nuteprune.errors import UserError


@dataclass(frozen=True)
class Card:
    """One card.

    Args:
        name: as `--gpu` takes it.
        memory: bytes.
        flops, single: peak FLOP/s of dense products in bfloat16 with fp32 sums, and in float32 without tensor cores.
        bandwidth: bytes/s of its memory.
        link, host: bytes/s one way to its neighbours in the node, and to host memory.
        nic: bytes/s one way to other nodes.
    """

    name: str
    memory: float
    flops: float
    single: float
    bandwidth: float
    link: float
    host: float
    nic: float


_PCIE_4, _PCIE_5 = 32e9, 64e9
"""PCIe x16, one way."""
_ETHERNET = 1.5e9
"""100 Gbit/s of a node, shared by eight cards: assumed where the vendor names no network for a card."""
CARDS = {
    card.name: card
    for card in (
        # DGX H100, DGX H200 and MI300X platform: 400 Gbit/s a card; DGX A100: 200. NVLink 900 and 600 GB/s both ways.
        Card("h100", 80e9, 989e12, 67e12, 3.35e12, 450e9, _PCIE_5, 50e9),
        Card("h200", 141e9, 989e12, 67e12, 4.8e12, 450e9, _PCIE_5, 50e9),
        Card("h100-pcie", 80e9, 756e12, 51e12, 2.0e12, _PCIE_5, _PCIE_5, _ETHERNET),
        Card("a100", 80e9, 312e12, 19.5e12, 2.039e12, 300e9, _PCIE_4, 25e9),
        Card("a100-40", 40e9, 312e12, 19.5e12, 1.555e12, 300e9, _PCIE_4, 25e9),
        Card("l40s", 48e9, 362e12, 91.6e12, 864e9, _PCIE_4, _PCIE_4, _ETHERNET),
        Card("a10", 24e9, 125e12, 31.2e12, 600e9, _PCIE_4, _PCIE_4, _ETHERNET),
        Card("4090", 24e9, 165.2e12, 82.6e12, 1.008e12, _PCIE_4, _PCIE_4, _ETHERNET),
        Card("3090", 24e9, 71e12, 35.6e12, 936e9, _PCIE_4, _PCIE_4, _ETHERNET),
        # Infinity Fabric: seven links of 128 GB/s both ways.
        Card("mi300x", 192e9, 1307.4e12, 163.4e12, 5.3e12, 448e9, _PCIE_5, 50e9),
    )
}
UNNAMED = CARDS["3090"]
"""What a card that is given by its memory alone is computed as: the slowest of them."""


def card_named(name: str) -> Card:
    """The card of that name, whatever its case; raises `UserError` with all names."""
    card = CARDS.get(name.lower())
    if card is None:
        raise UserError(
            f"--gpu {name}: not known; use one of {', '.join(CARDS)}, or --gpu-memory, --flops, --intra-bandwidth, … "
            "for another card"
        )
    return card


_UNITS = {
    "bytes": (r"B", "80GB or 80GiB"),
    "rate": (r"B/s", "450GB/s"),
    "flops": (r"FLOP/s|FLOPS", "990TFLOP/s"),
}
_PREFIXES = {"": 1.0} | {p: 1e3 ** (i + 1) for i, p in enumerate("KMGTP")}
_PREFIXES |= {f"{p}i": 1024.0 ** (i + 1) for i, p in enumerate("KMGTP")}


def quantity(flag: str, text: str, kind: str) -> float:
    """The number behind a flag's value such as "80GB", "450GB/s" or "990TFLOP/s", in bytes, bytes/s or FLOP/s.

    Raises:
        UserError: no number, an unknown unit, or nothing above zero.
    """
    unit, example = _UNITS[kind]
    match = re.fullmatch(r"\s*([0-9.eE+-]*[0-9.])\s*([A-Za-z/]*)\s*", text)
    digits, suffix = match.groups() if match else ("", "")
    try:
        number = float(digits)
    except ValueError:
        raise UserError(f"{flag} '{text}': not a number with a unit; write it like {example}") from None
    prefix = re.fullmatch(rf"((?:[KMGTP]i?)?)(?:{unit})", suffix)
    if prefix is None:
        raise UserError(f"{flag} '{text}': unknown unit '{suffix}'; write it like {example}")
    if number <= 0:
        raise UserError(f"{flag} '{text}': must be greater than 0")
    return number * _PREFIXES[prefix[1]]
