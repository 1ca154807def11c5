"""Memory of models and their KV: on several devices, and in the tiers of kept KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rapid_llm.bench.speed_model import MEMORY_FRACTION, Device, ModelSize

DEVICE_COUNTS = (1, 2, 4, 8)

_KEPT = 0.25  # share of a device's memory for kept KV: the default of kv_cache_bytes
# Bytes/s at which KV is restored: from pinned host memory as measured on an H100 (PCIe 5), from an
# NVMe disk as assumed.
_HOST, _DISK = 55e9, 3e9
_UNITS = (("host", 100 * 10**9, _HOST), ("disk", 10**12, _DISK))


@dataclass(frozen=True)
class Spread:
    """A number of equal devices, and the memory used on the fullest of them.

    Attributes:
        devices: number of devices.
        mapped: bytes with a device map, where layers are on one device each.
        mapped_fits: whether these leave room for activations; None where the memory is unknown.
        sharded: bytes in tensor parallel; None where the models' heads do not divide.
        sharded_fits: likewise.
    """

    devices: int
    mapped: int
    mapped_fits: bool | None
    sharded: int | None
    sharded_fits: bool | None


@dataclass(frozen=True)
class Tier:
    """A tier in which the KV of documents is kept, so that the next question need not read them.

    Attributes:
        name: device, host or disk.
        nbytes: bytes of the tier: a device's default budget, a unit of host memory or of disk.
        documents: number of documents whose KV fits into the tier.
        seconds: time to restore the KV of one document to the device.
    """

    name: str
    nbytes: int
    documents: int
    seconds: float


def spreads(
    models: Sequence[tuple[ModelSize, int]],
    caches: Sequence[tuple[ModelSize, int]],
    device: Device,
    copied: int = 0,
) -> list[Spread]:
    """Memory used on each number of devices in :data:`DEVICE_COUNTS`.

    Args:
        models: loaded models, each with the number of tokens in its cache.
        caches: further caches of these models, for a model that drafts for itself.
        device: one of the devices.
        copied: bytes of a quantized copy, which is made only of a model on one device.
    """

    def fits(nbytes: int | None) -> bool | None:
        if nbytes is None or device.memory is None:
            return None
        return nbytes <= MEMORY_FRACTION * device.memory

    found = []
    for count in DEVICE_COUNTS[:1] if copied else DEVICE_COUNTS:
        mapped = copied + sum(size.mapped_bytes(count, tokens) for size, tokens in models)
        shards = [size.sharded_bytes(count, tokens) for size, tokens in models]
        for size, tokens in caches:
            mapped += size.mapped_bytes(count, tokens) - size.mapped_bytes(count, 0)
            more, none = size.sharded_bytes(count, tokens), size.sharded_bytes(count, 0)
            shards.append(None if more is None or none is None else more - none)
        known = [share for share in shards if share is not None]
        sharded = copied + sum(known) if len(known) == len(shards) else None
        found.append(Spread(count, mapped, fits(mapped), sharded, fits(sharded)))
    return found


def tiers(size: ModelSize, context: int, device: Device) -> list[Tier]:
    """Tiers with the number of documents of ``context`` tokens that each keeps.

    Args:
        size: the target.
        context: tokens of a document.
        device: the device; a CPU has no separate host tier.
    """
    kv = size.kv_bytes_per_token * context
    found = []
    if device.memory is not None:
        budget = round(_KEPT * device.memory)
        found.append(Tier("device", budget, budget // kv, 0.0))
    units = _UNITS if device.is_gpu else _UNITS[1:]
    return found + [Tier(name, unit, unit // kv, kv / rate) for name, unit, rate in units]
