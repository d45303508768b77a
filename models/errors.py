"""Errors of models/: what is wrong with an image, a bundle or a corpus, each in one line that says what to do."""


class ModelError(Exception):
    """Base of every error that a user of models/ can cause."""


class BadImage(ModelError):
    """An image that cannot be decoded or must not be: its pair becomes a dead letter.

    reason  a short stable slug for metrics and dead letters, e.g. "truncated", "too-large", "too-small", "not-an-image"
    detail  one sentence for a person
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BundleError(ModelError):
    """A bundle that is incomplete, damaged, or made for another version of this software."""


class ShapeError(ModelError):
    """Tensors that do not belong together, such as an encoder and a codebook of different widths."""


class CorpusError(ModelError):
    """Too little or unusable training data."""
