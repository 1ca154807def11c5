"""Disk tier: KV of long prompts in files, shared by all processes that load the same model."""

from __future__ import annotations

import hashlib
import threading
import warnings
from pathlib import Path
from weakref import WeakKeyDictionary

from safetensors import SafetensorError

from rapid_llm.engine.kv_cache import KVCache, KVOrigin
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache import file_format
from rapid_llm.engine.prefix_cache.chain import PassChain, TokenIds
from rapid_llm.engine.prefix_cache.fingerprint import fingerprint
from rapid_llm.engine.prefix_cache.folder import SUFFIX, Folder, Version, version_of
from rapid_llm.engine.prefix_cache.host import COVERED
from rapid_llm.engine.prefix_cache.index import PrefixIndex
from rapid_llm.engine.rounding import rounding
from rapid_llm.folders import is_read_only


class KVFiles:
    """KV files of any number of models in a folder; safe to use from several threads.

    Damaged files and failures to write are reported in a warning and otherwise ignored. A folder
    that is read-only at first is read from, and never written to. A file is
    valid for a model with the same bytes of all weights, adapters and settings. Their fingerprint
    is computed once, and again before a file is written or loaded. Each rank of a model that is
    divided among processes has files of its own. There are no files for models with offloaded
    weights, tensor subclasses, hooks, or methods and classes of the user's own, because tensors and
    settings do not determine their results; a warning says so.

    A file's name begins with digests of the model and of the first pass of the prefill, so that
    only headers of files that may serve are read, and each only once.

    Args:
        directory: the folder, created with the first file, with access for its owner only.
        budget: maximum number of bytes of all files, see :class:`.folder.Folder`.
    """

    def __init__(self, directory: Path, budget: int | None = None) -> None:
        self._folder = Folder(directory, budget)
        self._read_only = is_read_only(directory)
        if self._read_only:
            warnings.warn(
                f"kv_cache_dir='{directory}' is read-only: kept KV is read from it, and that of "
                "other prompts is not kept there",
                stacklevel=2,
            )
        self._contents: WeakKeyDictionary[ModelRunner, dict[int, str | None]] = WeakKeyDictionary()
        # The version of each file seen, with its header; None for a file that is not usable.
        self._seen: dict[Path, tuple[Version, file_format.Header | None]] = {}
        self._index: PrefixIndex[Path] = PrefixIndex()
        self._lock = threading.RLock()  # of the two above

    @property
    def nbytes(self) -> int:
        """Bytes of all files at this moment."""
        return self._folder.nbytes

    def find(
        self, runner: ModelRunner, chain: PassChain, origin: KVOrigin
    ) -> tuple[Path | None, int]:
        """Find the file that shares the longest reusable prefix with a prefill.

        Args:
            runner: the model.
            chain: passes of the prefill.
            origin: current state of the model.

        Returns:
            The file and the length of the prefix in tokens; None and 0 if there is none.
        """
        model = self._model(runner, origin)
        if model is None or not chain.ends:
            return None, 0
        with self._lock:
            for name in self._folder.names(_group(model, chain)):
                listed = self._folder.path / name
                _, header = self._seen.get(listed, (None, None))
                if header is None:
                    self._look(listed, runner)
            while True:
                path, shared = self._index.longest(model, chain)
                if path is None or version_of(path) == self._seen[path][0]:
                    return path, shared
                self._look(path, runner)

    def load(
        self, path: Path, runner: ModelRunner, origin: KVOrigin, length: int, capacity: int
    ) -> KVCache | None:
        """Load the first ``length`` tokens of a file from :meth:`find` into a new cache.

        Args:
            path: the file.
            runner: the model.
            origin: state of the model at the call of :meth:`find`.
            length: number of tokens to load.
            capacity: capacity of the cache in tokens.

        Returns:
            The cache; None if the file is damaged, or the model has changed.
        """
        version, header = self._seen.get(path, (None, None))
        if version is None or header is None or not self._is_unchanged(runner, origin):
            return None
        try:
            cache = file_format.read(path, header, runner, origin, length, capacity)
        except (SafetensorError, OSError, ValueError) as error:
            self._reject(path, version, error)
            return None
        self._folder.use(path)
        with self._lock:
            if (used := version_of(path)) and self._seen.get(path) == (version, header):
                self._seen[path] = used, header
        return cache

    def save(self, runner: ModelRunner, tokens: TokenIds, chain: PassChain, cache: KVCache) -> None:
        """Write the KV of a prefill to a file, unless an existing file has most of it.

        Known files of which it has most in turn, as of a conversation's earlier turns, are deleted.

        Args:
            runner: the model.
            tokens: tokens of the prefill.
            chain: passes of the prefill.
            cache: cache that begins with all of them.
        """
        if self._read_only:
            return
        assert cache.origin is not None
        model = self._model(runner, cache.origin)
        if (
            model is None
            or self.find(runner, chain, cache.origin)[1] >= COVERED * len(tokens)
            or not self._is_unchanged(runner, cache.origin)
        ):
            return
        content = hashlib.sha256(model.encode() + tokens.tobytes()).hexdigest()
        name = f"{_group(model, chain)}-{content[:16]}{SUFFIX}"
        with self._lock:
            covered = self._index.covered(model, chain, COVERED)
        try:
            written = self._folder.write(
                name,
                file_format.nbytes_at_most(model, tokens, cache),
                lambda path: file_format.write(path, model, tokens, cache),
            )
            for path in covered if written else ():
                if path.name != name:
                    self._folder.discard(path)
        except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
            warnings.warn(
                f"the KV of {len(tokens)} tokens could not be written to "
                f"{self._folder.path / name}: {error}; free some space or choose another "
                "directory, or this prompt is read again in the next process",
                stacklevel=2,
            )

    def _look(self, path: Path, runner: ModelRunner) -> None:
        """Read the header of a file that is new or has changed; a file that is gone is forgotten.

        A file that was not usable is looked at again if its version has changed.
        """
        version = version_of(path)
        if version is not None and self._seen.get(path, (None, None))[0] == version:
            return
        self._index.discard(path)
        self._seen.pop(path, None)
        if version is None:
            return
        try:
            found = file_format.read_header(path)
        except (SafetensorError, OSError, ValueError) as error:
            self._reject(path, version, error)
            return
        self._seen[path] = version, found and found[0]
        if found is not None:
            header, tokens = found
            # A file of another model may have other passes, but its key differs too.
            self._index.add(path, header.model, PassChain.of(tokens, runner.prefill_sizes))

    def _reject(self, path: Path, version: Version, error: Exception) -> None:
        with self._lock:
            self._index.discard(path)
            self._seen[path] = version, None
        warnings.warn(
            f"the KV file {path} is damaged or unreadable, and ignored: {error}; delete it, or "
            "let it be replaced when its prompt is read again",
            stacklevel=2,
        )

    def _model(self, runner: ModelRunner, origin: KVOrigin) -> str | None:
        """Key of files for a model; None if it cannot have files.

        It includes everything on which KV depends: the model's fingerprint, its rotary scale, the
        rounding of its passes (with the number of ranks), the rank, and the sizes of prefill
        passes.
        """
        known = self._contents.setdefault(runner, {})
        if origin.number not in known:
            known[origin.number] = fingerprint(runner.model, runner.state)
            if known[origin.number] is None:
                warnings.warn(
                    f"kv_cache_dir has no effect for {runner.name}, whose weights are offloaded or "
                    "in a format of their own, or which has hooks, so that no file can be told to "
                    "be its own: leave kv_cache_dir out, or load plain weights",
                    stacklevel=2,
                )
        name = known[origin.number]
        rank = "" if runner.ranks is None else f" of rank {runner.ranks.rank}"
        passes = f"{rounding(runner)}, {runner.prefill_sizes}"
        return name and f"{name}{rank} beyond {origin.scale}, {passes}"

    def _is_unchanged(self, runner: ModelRunner, origin: KVOrigin) -> bool:
        """Whether the fingerprint still matches: some edits of weights are not detected."""
        now = fingerprint(runner.model, runner.state)
        if self._contents[runner][origin.number] == now:
            return True
        runner.state.renew()
        return False


def _group(model: str, chain: PassChain) -> str:
    """Beginning of the names of a model's files whose prefills begin with the same pass."""
    return f"{model[:16]}-{chain.digests[0].hex()[:16]}"
