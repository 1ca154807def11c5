"""The errors rapid-llm raises. Each message names the value, the limit and the remedy."""


class RapidError(Exception):
    """Base class of every error this library raises on purpose."""


class InvalidParameterError(RapidError, ValueError):
    """A parameter is outside its range, or names something that does not exist."""


class DocumentError(RapidError, ValueError):
    """A document (or question) is empty, unreadable, or not text."""


class ContextWindowError(RapidError, ValueError):
    """A prompt and the tokens asked for do not fit into a model's context window."""


class ModelError(RapidError):
    """A model cannot be found or loaded, or its architecture is not supported."""


class OutdatedKVError(ModelError):
    """KV was read by other weights, another adapter or another rotary embedding than it is now."""


class TokenizerMismatchError(ModelError, ValueError):
    """Drafter and target do not share a tokenizer, so draft tokens would mean other text."""


class GenerationTimeoutError(RapidError, TimeoutError):
    """``SamplingParams.timeout`` seconds passed before the answer was finished."""


class NumericalError(RapidError, ArithmeticError):
    """A model produced NaN logits."""


class MissingDependencyError(RapidError, ImportError):
    """An optional package is needed and not installed."""


class DataError(RapidError, ValueError):
    """An evaluation's data is missing, unreadable, too little, or lacks a field."""


class JudgeError(RapidError):
    """The model that judges answers cannot be reached, or gave no rating."""
