"""Errors of models/: what is wrong with an image, a bundle or a corpus, each in one line that says what to do.

`Reason` is the whole list of why a raw record becomes a dead letter. It stands here, in the lowest package that needs it,
since decoding an image finds half of the reasons; stream/ finds the rest, and docs/reference.md shows the list.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a raw record is a dead letter: a short name that never changes, and what it means.

    They are labels of a metric and headers of records, so a name that was once given out stays.
    """

    meaning: str

    def __new__(cls, name: str, meaning: str = "") -> Reason:
        member = str.__new__(cls, name)
        member._value_ = name
        member.meaning = meaning
        return member

    NOT_AN_IMAGE = "not-an-image", "the bytes begin like no image format that is decoded"
    TRUNCATED = "truncated", "the image ends before it is whole"
    CORRUPT = "corrupt", "a decoder cannot read the image"
    TOO_LARGE = "too-large", "over the pixel limit by its header, or a kept form that its topic could not take"
    TOO_SMALL = "too-small", "a side under 16 pixels"
    NO_IMAGE = "no-image", "neither image bytes nor an image URI"
    BAD_IMAGE = "bad-image", "the image field holds neither bytes nor text"
    BAD_BASE64 = "bad-base64", "the image's text is neither base64 nor a URI"
    NO_CAPTION = "no-caption", "no caption where one was expected"
    EMPTY_CAPTION = "empty-caption", "the caption is empty or blank"
    CAPTION_NOT_TEXT = "caption-not-text", "the caption is something else than UTF-8 text"
    NOT_UNICODE = "not-unicode", "a text holds half a character"
    NO_ID = "no-id", "neither the record nor its key has an id"
    ID_TOO_LONG = "id-too-long", "an id over 8,192 bytes"
    NOT_AVRO = "not-avro", "neither single-object encoding nor Confluent's wire format"
    NOT_CONFLUENT = "not-confluent", "not Confluent's wire format, with `--raw-format confluent`"
    UNKNOWN_SCHEMA = "unknown-schema", "written with a schema that is not known here: `--schemas`, `--schema-registry`"
    NO_REGISTRY = "no-registry", "written with a registry's schema, and no `--schema-registry` was given"
    DAMAGED_AVRO = "damaged-avro", "bytes that do not fit their schema"
    SEVERAL_RECORDS = "several-records", "an Avro container of other than one record"
    DAMAGED_JSON = "damaged-json", "not JSON, with `--raw-format json`"
    NOT_A_RECORD = "not-a-record", "a value that is no object with fields"
    URI_NOT_ALLOWED = "uri-not-allowed", "an image URI outside `--fetch-allow`"
    URI_PRIVATE_ADDRESS = "uri-private-address", "an image URI whose host has no public address"
    IMAGE_TOO_LARGE = "image-too-large", "a fetched image over `--fetch-bytes-max`"
    FETCH_FAILED = "fetch-failed", "an image that could not be fetched, in three attempts where it seemed to pass"


class ModelError(Exception):
    """Base of every error that a user of models/ can cause."""


class BadImage(ModelError):
    """An image that cannot be decoded or must not be: its pair becomes a dead letter.

    detail  one sentence for a person
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BundleError(ModelError):
    """A bundle that is incomplete, damaged, or made for another version of this software."""


class ShapeError(ModelError):
    """Tensors that do not belong together, such as an encoder and a codebook of different widths."""


class CorpusError(ModelError):
    """Too little or unusable training data."""
