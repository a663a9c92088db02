"""The errors users may want to catch; each message says what was expected, what came and what to do."""


class DataError(ValueError):
    """The data set, its labels or its loader cannot be used as they are."""


class ModelError(ValueError):
    """The model cannot be copied, run or matched with the labels."""


class StateError(ValueError):
    """A saved state belongs to other data or other settings, or cannot be written or read."""
