"""Exception classes. Each message names the value, the limit and the remedy."""


class RapidError(Exception):
    """Base class of all errors that this library raises on purpose."""


class InvalidParameterError(RapidError, ValueError):
    """A parameter is outside its range, or names something that does not exist."""


class DocumentError(RapidError, ValueError):
    """A document (or question) is empty, unreadable, or not text."""


class ContextWindowError(RapidError, ValueError):
    """A prompt and the tokens asked for do not fit into a model's context window."""


class ModelError(RapidError):
    """A model cannot be found or loaded, or its architecture is not supported."""


class OutdatedKVError(ModelError):
    """The KV cache was computed with other weights, adapter or rotary scaling than the current."""


class TokenizerMismatchError(ModelError, ValueError):
    """Drafter and target do not share a tokenizer, so a draft token would mean another text."""


class GenerationTimeoutError(RapidError, TimeoutError):
    """``SamplingParams.timeout`` seconds passed before the answer was finished."""


class ForkedProcessError(RapidError, RuntimeError):
    """A forked process used models or a store that its parent process had opened."""


class NumericalError(RapidError, ArithmeticError):
    """A model produced NaN logits."""


class MissingDependencyError(RapidError, ImportError):
    """A needed optional package is not installed."""


class DataError(RapidError, ValueError):
    """The data of an evaluation is missing, unreadable, too small, or lacks a field."""


class ServerError(RapidError):
    """A server of models cannot be reached, refuses a request for its own reasons, or failed."""


class JudgeError(RapidError):
    """The model that rates answers cannot be reached, or gave no rating."""


class RankError(RapidError, RuntimeError):
    """A process of a sharded model has ended, or runs another call than the others."""
