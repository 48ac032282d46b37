"""Every way a user's input can be wrong, one class and one exit code for each kind.

The library raises these; only `cli.main` catches them and prints the message without a traceback.
A message says what is wrong with the quoted value, where, what was expected and what to try next.
Any other exception is a bug of ours and keeps its traceback.
"""


class AbliterateError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 1


class UsageError(AbliterateError):
    """An argument does not make sense, or an output would be overwritten."""

    exit_code = 2


class CheckpointError(AbliterateError):
    """A checkpoint on disk is missing, incomplete or malformed."""

    exit_code = 3


class UnsupportedError(AbliterateError):
    """A checkpoint is understood, and refused: its architecture or format cannot be edited exactly."""

    exit_code = 4


class PromptError(AbliterateError):
    """A prompt set is missing, empty, unreadable or unfit to contrast."""

    exit_code = 5


class ResourceError(AbliterateError):
    """There is not enough disk or memory; found out before the work starts."""

    exit_code = 6


class VerifyError(AbliterateError):
    """What was computed cannot be trusted: NaN or infinity, files that changed meanwhile, a judge that fails."""

    exit_code = 7


class NoRefusalError(AbliterateError):
    """The base model refuses almost nothing, so there is no refusal direction to find."""

    exit_code = 8


class HubError(AbliterateError):
    """A model or data set could not be had from the hub."""

    exit_code = 9
