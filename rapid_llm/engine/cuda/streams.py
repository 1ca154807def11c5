"""CUDA streams beside the one that passes run on: for captures, and for copies of KV."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Streams(NamedTuple):
    """Streams of a device.

    Attributes:
        captures: stream for all captures; only one, as cuBLAS keeps 32 MiB for each stream.
        copies: stream for all copies between the device and the host.
    """

    captures: torch.cuda.Stream
    copies: torch.cuda.Stream


@cache
def streams_of(device: torch.device) -> Streams:
    """The streams of a device, made at the first use.

    They are made together, because PyTorch hands out the same 32 streams in turn: the stream of a
    later copy could be that of captures, and a capture records whatever is launched on its stream.
    """
    return Streams(torch.cuda.Stream(device), torch.cuda.Stream(device))
