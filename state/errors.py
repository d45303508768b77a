"""Errors of state/, each in one line that says what to do."""


class StateError(Exception):
    """Base of every error that a user of state/ can cause."""


class BadSetting(StateError):
    """A setting of a stream that cannot be: a ratio above 1, a cap of 0, a rule that nobody wrote down."""


class SettingsDiffer(StateError):
    """A worker was started with other settings than its stream has."""


class StateDirectoryInUse(StateError):
    """Another worker holds the state directory."""


class UnsuitableFileSystem(StateError):
    """LMDB needs a local file system with working locks and memory maps; this one is a network file system."""


class StoreFull(StateError):
    """The disk under the store is full, or the store may not grow further. Nothing is lost: the changelog has it."""


class StoreCorrupt(StateError):
    """The store cannot be read; it can be rebuilt from the changelog by removing its directory."""


class StoreClosed(StateError):
    """The store was closed (its partition was taken back) while something was still to be grouped in it."""


class RoomWanted(StateError):
    """The store's map is too small for a step beside the running stream; its user enlarges it (`make_room`)."""


class UnknownRecord(StateError):
    """A changelog record that this version cannot read: written by a newer one, or not by us at all."""
