"""Tensor parallelism: models sharded over the processes (ranks) that ``torchrun`` has started.

transformers shards the weights (``DistributedConfig(tp_size=N)``), and each rank's KV cache holds
its own KV heads. Every rank makes the same calls and decodes the same tokens. Three rules ensure
this, and that no rank waits forever:

- Before each pass all ranks agree that they are about to run the same one, of a call with the same
  arguments. A rank that ends its call (last token, closed stream or error), or refuses its
  arguments, announces it, and the others raise RankError.
- Logits, and choices that depend on measured times or on memory, are those of rank 0. Each rank
  keeps KV by itself, and all reuse what every one of them has.
- A rank that dies is noticed at once, and one that does not join a pass after
  :data:`PASS_SECONDS`.

The ranks agree through rank 0, over gloo, separate from the collectives of the passes: a rank that
waits for another in a chain could not tell which one has failed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rapid_llm.errors import InvalidParameterError, ModelError, RankError
from rapid_llm.tensor_parallel_plan import require_divisible

PASS_SECONDS = 25
"""Seconds within which all ranks must join a pass, and each of its collectives."""

_CALL_SECONDS = 600
"""Seconds within which all ranks must begin a call, and find kept KV: each may do other work first,
and one may load what another has in memory."""

_GROUP_SECONDS = 86_400  # of waiting for input that rank 0 reads, such as a typed question

_PASS, _DONE, _CLOSED, _FAILED, _OUT_OF_STEP = range(5)
_REASONS = {
    _DONE: "has ended its call sooner",
    _CLOSED: "has closed its stream",
    _FAILED: "has failed",
    _OUT_OF_STEP: "is at another pass or call",
}

_T = TypeVar("_T")


def processes() -> int:
    """Number of processes that ``torchrun`` has started together, 1 without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def processes_here() -> int:
    """Number of these processes on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes() > 1 else 1


def is_sharded(model: Any) -> bool:
    """Whether a model's weights are divided among processes."""
    return (getattr(model, "_tp_size", None) or 1) > 1


class Ranks:
    """All processes of a sharded model, and their agreement on each pass.

    One per process, see :func:`ranks`. Every rank makes the same calls in the same order, one at a
    time.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self) -> None:
        _start()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._control = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=_GROUP_SECONDS), group_desc="rapid-llm"
        )
        self._sent: list[tuple[Any, Tensor]] = []  # kept until they were read
        self._call, self._step, self._key, self._open = 0, 0, 0, False
        self._broken = ""

    @contextmanager
    def call(self, *arguments: Any) -> Iterator[None]:
        """Context of a call that all ranks make.

        Args:
            arguments: values that must be equal on all ranks; their ``repr`` must be stable.

        Raises:
            RankError: another rank makes another call, or an earlier pass has failed.
            InvalidParameterError: another call has not ended yet.
        """
        if self._open:
            raise InvalidParameterError(
                "a sharded model answers one call at a time: end or close the first stream, or ask "
                "many questions by generate_many"
            )
        if self._broken:  # ranks that have not noticed must not wait
            self._refuse()
            raise self._no_more()
        self._begin(arguments)
        self._open, ended = True, _FAILED
        try:
            yield
            ended = _DONE
        except GeneratorExit:
            ended = _CLOSED
            raise
        finally:
            self._open = False
            self._tell_others(ended)

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Context in which a call's arguments are checked.

        A rank that refuses them counts the call, and ends it on ranks that have begun it.
        """
        try:
            yield
        except Exception:
            if not self._open:  # or no rank begins it
                self._refuse()
            raise

    def _refuse(self) -> None:
        """Count a call that this rank does not begin, and end it on the others."""
        self._begin(())
        self._tell_others(_FAILED)

    def _begin(self, arguments: tuple[Any, ...]) -> None:
        self._call, self._step = self._call + 1, 0
        self._key = zlib.crc32(repr(arguments).encode())

    def agree(self, *details: int, least: int = 0, seconds: int | None = None) -> int:
        """Wait until all ranks are at this point of the call.

        Args:
            details: at most three numbers that must be the same on all ranks.
            least: this rank's number; the minimum over all ranks is returned.
            seconds: seconds within which all must come; None is :data:`PASS_SECONDS`, or more at
                the beginning of a call.

        Raises:
            RankError: another rank has ended its call, is at another point, or does not respond.
        """
        self._require_whole()
        first, self._step = self._step == 0, self._step + 1
        own = [_PASS, self._call, self._step, self._key, *(*details, 0, 0, 0)[:3], least]
        limit = seconds or (_CALL_SECONDS if first else PASS_SECONDS)
        if self.rank == 0:
            for other in range(1, self.size):
                theirs = self._receive(other, limit)
                if theirs[0] != _PASS or theirs[1:-1] != own[1:-1]:
                    code = theirs[0] or _OUT_OF_STEP
                    self._tell_others(code, of=other)
                    if code == _OUT_OF_STEP:  # a message on the call that it is at
                        self._send(other, [code, theirs[1], *[0] * 6])
                    raise self._stopped(other, code)
                least = min(least, theirs[-1])
            if not first:  # the other ranks have read all earlier messages
                self._sent.clear()
            for other in range(1, self.size):
                self._send(other, [*own[:-1], least])
            return least
        self._send(0, own)
        # Rank 0 may be waiting for yet another rank.
        code, *_, of, least = self._receive(0, limit + 2)
        if code != _PASS:
            raise self._stopped(of, code)
        self._sent.clear()
        return least

    def least_kept(self, tokens: int) -> int:
        """Number of a prompt's tokens whose KV every rank has kept, of ``tokens`` on this one."""
        return self.agree(least=tokens, seconds=_CALL_SECONDS)

    def from_first(self, value: _T) -> _T:
        """Rank 0's value, for values that may differ between ranks."""
        self.agree()
        return self._broadcast(value)

    def shared(self, read: Callable[[], _T]) -> _T:
        """Result or error of a function that only rank 0 calls; the other ranks wait for it."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = read(), None
            except Exception as error:
                outcome = None, error
        value, failed = self._broadcast(outcome)
        if failed is not None:
            raise failed
        return value

    @contextmanager
    def running(
        self, model: Any, place: torch.device, tokens: int, length: int, keep: int
    ) -> Iterator[None]:
        """Context of a pass that all ranks run, after they have agreed on it.

        If the pass fails on one rank, the others wait in a collective until its time limit. Later
        collectives would not match, so all ranks must be restarted.

        Args:
            model: the model.
            place: the model's device.
            tokens, length, keep: numbers of new tokens, of tokens in the cache, and of rows of
                logits.

        Raises:
            RankError: the ranks do not agree, or another rank has failed during the pass.
        """
        self.agree(tokens, length, keep)
        try:
            with _limited(model, place):
                yield
        except BaseException as error:
            reason = str(error).strip().splitlines() or [repr(error)]
            self._broken = f"a pass has failed on rank {self.rank} ({reason[0][:200]})"
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                raise self._no_more() from error  # most likely an error of a collective
            raise

    def first_logits(self, logits: Tensor) -> Tensor:
        """Rank 0's logits, because other hardware or kernels may round differently."""
        logits = logits.contiguous()
        dist.broadcast(logits, 0)
        return logits

    def _broadcast(self, value: _T) -> _T:
        box = [value]
        with self._guarded(0):
            dist.broadcast_object_list(box, 0, group=self._control)
        return box[0]

    def _tell_others(self, code: int, of: int | None = None) -> None:
        """Announce that this call has ended; ranks that still run it read the message.

        A rank that is gone needs no message: it may have ended its last call, and its script.
        """
        message = [code, self._call, self._step, self._key, 0, 0, 0, 0]
        message[6] = self.rank if of is None else of
        for other in range(1, self.size) if self.rank == 0 else (0,):
            if other != of:
                with suppress(RankError):
                    self._send(other, message)

    def _send(self, to: int, message: list[int]) -> None:
        tensor = torch.tensor(message, device="cpu")
        with self._guarded(to):
            self._sent.append((dist.isend(tensor, to, group=self._control), tensor))

    def _receive(self, source: int, seconds: int) -> list[int]:
        """The next message on the current call."""
        while True:
            tensor = torch.zeros(8, dtype=torch.long, device="cpu")
            with self._guarded(source, seconds):
                work = dist.irecv(tensor, source, group=self._control)
                assert work is not None
                work.wait(timedelta(seconds=seconds))
            message: list[int] = tensor.tolist()
            if message[1] >= self._call:  # earlier calls have ended here too
                return message

    @contextmanager
    def _guarded(self, who: int, seconds: int | None = None) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            late = seconds is not None and "timed out" in str(error).lower()
            what = f"did not come within {seconds} s" if late else "has ended"
            if self.rank == 0 and not self._broken:
                with suppress(RuntimeError, ValueError):  # of other ranks that have ended
                    self._tell_others(_FAILED, of=who)
            self._broken = f"rank {who} {what}"
            raise self._no_more() from error

    def _stopped(self, rank: int, code: int) -> RankError:
        return RankError(
            f"rank {rank} {_REASONS[code]}, and rank {self.rank} ended its own call: all ranks "
            "must make the same calls, in the same order, and end them alike"
        )

    def _no_more(self) -> RankError:
        return RankError(f"{self._broken}: start all ranks anew")

    def _require_whole(self) -> None:
        if self._broken:
            raise self._no_more()


@cache
def ranks() -> Ranks:
    """The processes that ``torchrun`` has started; all of them must make the first call."""
    return Ranks()


def ranks_of(name: str, model: Any) -> Ranks | None:
    """The processes over which a loaded model is sharded; None for a model of this process alone.

    Args:
        name: name of the model in errors.
        model: the model.

    Raises:
        ModelError: they cannot share its heads evenly, or are only some of those started.
    """
    if not is_sharded(model):
        return None
    require_divisible(name, model.config, model._tp_size)
    found = ranks()
    if found.size != model._tp_size:
        raise ModelError(
            f"{name} is sharded over {model._tp_size} of {found.size} processes; shard it over all "
            "of them (tp_size), or start fewer"
        )
    return found


def shared(read: Callable[[], _T]) -> _T:
    """Result of a function that only rank 0 calls; without ``torchrun`` it is simply called."""
    return read() if processes() == 1 else ranks().shared(read)


def _start() -> None:
    """Join the process group, as transformers would."""
    if dist.is_initialized():
        return
    place = torch.accelerator.current_accelerator() or torch.device("cpu")
    own = None
    if place.type == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
    # Some ranks may take much longer than others to load their weights.
    dist.init_process_group(
        "gloo" if own is None else "nccl", timeout=timedelta(hours=2), device_id=own
    )


@contextmanager
def _limited(model: Any, place: torch.device) -> Iterator[None]:
    """Context with a time limit on the collectives of a pass; the caller's are not changed."""
    groups: list[Any] = [dist.group.WORLD]
    if is_sharded(model):
        mesh = model._device_mesh
        groups.append(mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp"))
    backends = [group._get_backend(place) for group in groups]
    before = [backend.options._timeout for backend in backends]
    for backend in backends:
        backend._set_default_timeout(timedelta(seconds=PASS_SECONDS))
    try:
        yield
    finally:
        for backend, timeout in zip(backends, before, strict=True):
            backend._set_default_timeout(timeout)
