"""The typed errors of hf_hadacore.

Every error derives from `HadaCoreError` and from the builtin that a caller would
expect (`ValueError`, `RuntimeError`, ...), so both `except` clauses work. Messages
name the tensor, layer, file or option, what was found and what would be right.
"""


class HadaCoreError(Exception):
    """Root of every error that hf_hadacore raises on purpose."""


class ConfigError(HadaCoreError, ValueError):
    """An option of `HadaCoreConfig` is unknown, has a wrong type or an unusable value."""


class UnsupportedError(HadaCoreError, NotImplementedError):
    """What was asked for is valid but not supported here (yet)."""


class FormatError(HadaCoreError, ValueError):
    """A tensor does not follow the int4 format (see `hf_hadacore.int4`)."""


class QuantizationError(HadaCoreError, ValueError):
    """A weight cannot be quantized: NaN or infinite values, or scales beyond the dtype."""


class ShardingError(HadaCoreError, ValueError):
    """A weight cannot be divided among this number of ranks."""


class CheckpointError(HadaCoreError, RuntimeError):
    """A checkpoint is missing files or tensors, is truncated, or contradicts its config."""


class EvaluationError(HadaCoreError, ValueError):
    """A text, a task or a result does not fit what is to be evaluated or compared."""


class MissingPackageError(HadaCoreError, ImportError):
    """An optional package is needed and not installed."""


class CalibrationError(HadaCoreError, ValueError):
    """Calibration data cannot be read, holds too little text, or does not fit the model."""


class HubError(HadaCoreError, RuntimeError):
    """The Hub cannot be reached, refuses, or holds something that would be overwritten."""
