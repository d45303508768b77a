"""Which bundle each running partition shall have: follows `model-bundles`, loads, prepares beside the stream, and switches.

All of it but the switch itself happens in a thread of its own: a bundle is fetched and loaded while the live one works, and
the entries of a capped partition are grouped by its clusters while the partition runs. The loop asks at a batch boundary
which partitions are ready, and commits their switch. A bundle that cannot be had changes nothing: the live one stays.

A partition goes on in the bundle that its changelog says, and is switched to one that was announced later, never back to one
that was announced before it. A worker that cannot load a partition's own bundle takes it straight to such a later one, or
else declines to run it (BundleMissing).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping

from models.model import PairModel
from state.errors import StateError, StoreClosed
from state.partition import Partition
from state.regroup import Regrouping, sweep
from stream.bundles import Announced, Announcement, known_to, told
from stream.errors import TldrError
from stream.kafka import MissingRight
from stream.logs import at
from stream.metrics import Metrics

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
# A bundle that could not be loaded is tried again after this long.
TRY_AGAIN_AFTER_S = 10.0
IDLE_S = 0.2
# A full disk fails five times a second.
SAY_AGAIN_AFTER_S = 60.0
# How often who waits for a bundle looks whether he is still wanted.
LOOK_UP_S = 0.1
# A restore waits so long for whoever is looking. A fetch takes longer, and other restores want the thread meanwhile.
PATIENCE_S = 0.3

Cancelled = Callable[[], bool]
Load = Callable[[Announcement, Cancelled], PairModel]


class BundleMissing(Exception):
    """The bundle that a partition runs with cannot be loaded here now, and no newer one either."""


class BundleComing(BundleMissing):
    """It may be had once the bundle is here that is being fetched now."""


class BundleSwitch:
    """The bundles of one worker.

    base      the model that it began with; every other one is of its space
    announced what is announced; None: this worker stays with its base (--bundle)
    load      the model of an announced bundle; gives up when told so
    running   the partitions that run now
    capped    whether pairs compete in cells, so that entries are to be grouped
    """

    def __init__(
        self,
        base: PairModel,
        topic: str,
        stream: str,
        announced: Announced | None,
        load: Load,
        running: Callable[[], Mapping[int, Partition]],
        capped: bool,
        metrics: Metrics,
        models: dict[str, PairModel],
        forget: Callable[[set[str]], None] = lambda used: None,
    ) -> None:
        """topic  of the raw pairs; models  version → model, which is kept up to date here and read by whoever reduces.

        forget  is told the versions that are used, so that what is on the disk of others can go
        """
        self._forget = forget
        self.base, self.topic, self.stream, self.capped, self.metrics = base, topic, stream, capped, metrics
        self.models = models
        self.models[base.version] = base
        self._target = base if announced is None else None
        self._announced = announced
        self._load, self._running = load, running
        # Grouped by this bundle up to the last commit or so, for this epoch: an abort goes back to the one before.
        self._ready: dict[int, tuple[Partition, str, int]] = {}
        self._straight: dict[int, PairModel] = {}  # partitions that begin with a switch
        self._failed: dict[str, tuple[str, float]] = {}  # version → why it cannot be had, when to try again
        self._refused: set[str] = set()
        self._trouble: dict[int, tuple[str, float]] = {}  # partition → why it cannot be prepared, when that was told
        self._looked_at = -LOOK_EVERY_S
        self._told: dict[str, Announcement] = {}  # what this stream was told, in order
        self._known: dict[str, Announcement] = {}  # … and what others were, of bundles that it was not told of
        self._place: dict[str, int] = {}  # version → its place in the order of what this stream was told
        self._one_at_a_time = threading.Lock()
        self._looking = threading.Lock()
        # Neither is the epoch begun for which the thread is grouping, nor is grouped for another one what is being begun.
        self._epochs = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bundles", daemon=True)

    def start(self) -> None:
        """Begins to follow. The announcements that are there already are known afterwards. Raises Unavailable.

        What they announce is fetched in the thread: a worker joins, and hears signals, however long that takes.
        Without the right to read them, the worker stays with the bundle that it has, and says which right that is.
        """
        if self._announced is None:
            return
        try:
            self._look_now()
        except MissingRight as missing:
            log.warning("announced bundles are not followed: %s", missing)
            self._announced = None
        else:
            self._thread.start()

    def close(self) -> None:
        """Ends the thread; what it prepared stays in the stores."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- for the loop --------------------------------------------------------------------------------------------------

    @property
    def target(self) -> PairModel:
        """The newest announced bundle that this worker could load; before there is one, what it began with."""
        return self._target or self.base

    def ready(self, running: Mapping[int, Partition]) -> list[int]:
        """The running partitions that can be switched to the target now."""
        target = self.target.version
        found = []
        for number, partition in running.items():
            if self._wants(partition, target) and self._is_grouped(partition, target):
                found.append(number)
        return found

    def pending(self, running: Mapping[int, Partition]) -> bool:
        """Whether one of these partitions is still to be switched, or to be once the newest bundle is fetched.

        One that cannot be had, or a partition prepared for, is tried again, but nobody knows whether that ever succeeds: it is
        not waited for.
        """
        versions, newest = {self.target.version}, self._newest()
        if newest is not None and newest.version not in self._failed:
            versions.add(newest.version)
        waited_for = [p for number, p in running.items() if number not in self._trouble and _is_committed(p)]
        return any(self._wants(p, version) for p in waited_for for version in versions)

    def has(self, partition: Partition) -> bool:
        """Whether the bundle that a partition runs with is loaded here."""
        return partition.bundle is None or partition.bundle in self.models

    def adopt(self, partition: Partition) -> bool:
        """Begins the epoch of the target in a partition whose open transaction is empty; whether that is a switch.

        What was kept since the thread last looked is grouped here, in memory: entries of a commit or two.
        """
        with self._epochs:
            return self._adopt(partition)

    def _adopt(self, partition: Partition) -> bool:
        target, switch = self.target, partition.switch
        # Another target may have come since it was asked which partitions are ready.
        is_ready = self._wants(partition, target.version) and self._is_grouped(partition, target.version)
        if switch is None or not is_ready:
            return False
        until, tail = switch.input_offset if partition.next_offset is None else partition.next_offset, None
        if self.capped:
            store, epoch = partition.store, switch.epoch + 1
            tail = Regrouping(store, epoch, target.version, target.assign, until, alone=True).tail()
        epoch = partition.adopt(target.version, target.space, until, tail)
        self._ready.pop(partition.partition, None)
        log.info(
            "partition %d: epoch %d begins at offset %d, with bundle %s",
            partition.partition, epoch, until, target.version[:12],
            extra=at("switch", self.topic, {partition.partition: (until, until)}, epoch=epoch, bundle=target.version),
        )  # fmt: skip
        return partition.switching

    def begin(self, partition: Partition, next_offset: int) -> None:
        """The bundle of a restored partition: its own, or where it has none yet the target."""
        with self._epochs:
            straight = self._straight.pop(partition.partition, None)
            if partition.switch is None or straight is not None:
                model = straight or self.target
                partition.adopt(model.version, model.space, next_offset)
                return
        if self._announced is None and partition.bundle != self.base.version:
            raise TldrError(_another(partition.bundle or "", self.base.version))

    def keep_only_what_is_used(self) -> bool:
        """Forgets the bundles that no partition runs with; False: one is being fetched, which the loop does not wait for.

        Not to be called while a partition is restored: its bundle may just be loaded.
        """
        if not self._one_at_a_time.acquire(blocking=False):
            return False
        try:
            used = {self.base.version, self.target.version, *(p.bundle or "" for p in self._running().values())}
            for version in self.models.keys() - used:
                del self.models[version]
            self._forget(used)
            return True
        finally:
            self._one_at_a_time.release()

    def _wants(self, partition: Partition, target: str) -> bool:
        """Whether a partition is to be switched: never to a bundle that was announced before its own one."""
        switch = partition.switch
        return switch is not None and self._place.get(switch.bundle, -1) < self._place.get(target, -1)

    def _is_grouped(self, partition: Partition, target: str) -> bool:
        return not self.capped or self._ready.get(partition.partition) == (partition, target, partition.epoch + 1)

    # -- for the threads that restore ----------------------------------------------------------------------------------

    def make_ready(self, partition: Partition, next_offset: int, cancelled: Cancelled) -> bool:
        """Loads what a restored partition runs with, and groups its entries where that is not done; False: cancelled.

        Raises BundleMissing (BundleComing: ask again soon), StateError.
        """
        self._straight.pop(partition.partition, None)  # of a restore that came to nothing
        switch = partition.switch
        if switch is None:
            return True
        if self._announced is None:
            if switch.bundle != self.base.version:
                raise TldrError(_another(switch.bundle, self.base.version))
            model, epoch, until = self.base, switch.epoch, switch.input_offset
        else:
            # What is loaded is not forgotten while a partition is restored, and whoever fetches another one may take long.
            found = self.models.get(switch.bundle)
            if found is None:
                if not self._let_in(cancelled, PATIENCE_S):
                    if cancelled():
                        return False
                    raise BundleComing(f"it runs with bundle {switch.bundle[:12]}, and another one is being fetched")
                try:
                    self._look_now()
                    found = self._model(switch.bundle, cancelled)
                    if found is None:
                        self._choose(cancelled)
                finally:
                    self._one_at_a_time.release()
                if cancelled():
                    return False
            elif self._wants(partition, self.target.version):
                self._look_now()  # another worker may have switched it back, by an announcement that is not known here yet
            if found is not None:
                model, epoch, until = found, switch.epoch, switch.input_offset
            elif self._wants(partition, self.target.version):
                model, epoch, until = self.target, switch.epoch + 1, next_offset
                self._straight[partition.partition] = model
            else:
                why = self._failed.get(switch.bundle, ("it was never announced", 0.0))[0]
                raise BundleMissing(f"it runs with bundle {switch.bundle[:12]}, which cannot be loaded here: {why}")
        if not self.capped or partition.store.grouped(epoch, model.version, until):
            return True
        return Regrouping(partition.store, epoch, model.version, model.assign, until, alone=True).finish(cancelled)

    def _let_in(self, cancelled: Cancelled, patience_s: float = math.inf) -> bool:
        """Whether the caller may look and load now, who is then to release `_one_at_a_time`; False: cancelled, or too late."""
        too_late = time.monotonic() + patience_s
        while not self._one_at_a_time.acquire(timeout=LOOK_UP_S):
            if cancelled() or time.monotonic() > too_late:
                return False
        return True

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            busy = False
            try:
                if began - self._looked_at >= LOOK_EVERY_S:
                    self._look()
                busy = self._prepare()
            except Exception as error:  # a broker or a disk that is away for a while must not end the following
                log.warning("following the announced bundles: %s; trying on", error)
                self._looked_at = time.monotonic()
            # Half of the time at most: the stream comes first.
            self._stop.wait(max(time.monotonic() - began, 0.001) if busy else IDLE_S)

    def _look(self) -> None:
        if not self._let_in(self._stop.is_set):
            return
        try:
            self._look_now()
            self._looked_at = time.monotonic()
            self._refuse_others()
            self._choose(self._stop.is_set)
        finally:
            self._one_at_a_time.release()

    def _look_now(self) -> None:
        with self._looking:
            if self._announced is not None:
                everything = self._announced.look()
                self._told, self._known = told(everything, self.stream), known_to(everything, self.stream)
                self._place = {version: place for place, version in enumerate(self._told)}

    def _newest(self) -> Announcement | None:
        """The last announcement that fits the stream."""
        fitting = [one for one in self._told.values() if one.space == self.base.space]
        return fitting[-1] if fitting else None

    def _refuse_others(self) -> None:
        """Tells, once of each, which announcements do not fit the stream."""
        for announcement in self._told.values():
            if announcement.space != self.base.space and announcement.version not in self._refused:
                self._refused.add(announcement.version)
                log.log(
                    logging.WARNING if announcement.stream else logging.INFO,
                    "bundle %s has another encoder, codebook or gate, so this stream cannot switch to it: start another "
                    "--stream on the same raw topic with it, which is then reduced from its beginning",
                    announcement.version[:12],
                )  # fmt: skip

    def _choose(self, cancelled: Cancelled) -> None:
        """Makes the newest fitting bundle the target, if it can be loaded."""
        newest = self._newest()
        if newest is None:
            self._target = None
            return
        model = self._model(newest.version, cancelled)
        if cancelled():
            return
        self.metrics.bundle_missing.set(model is None)
        if model is not None and model is not self._target:
            self._target = model
            self._ready.clear()
            self.metrics.bundle.info({"version": model.version})

    def _model(self, version: str, cancelled: Cancelled) -> PairModel | None:
        """The model of a bundle; None: it cannot be had now, which is told once, or the caller is no longer wanted."""
        if version in self.models:
            return self.models[version]
        announcement = self._known.get(version)  # a partition may run with one that only another stream was told of
        if announcement is None:
            return None
        before, again_at = self._failed.get(version, ("", 0.0))
        if time.monotonic() < again_at:
            return None
        try:
            model = self._load(announcement, cancelled)
            if (model.version, model.space) != (version, self.base.space):
                raise TldrError(f"{announcement.uri} holds bundle {model.version[:12]}: announce it again")
        except Exception as error:  # whatever is wrong with it, the live one can go on
            if cancelled():
                return None
            why = " ".join(str(error).split())
            self._failed[version] = why, time.monotonic() + TRY_AGAIN_AFTER_S
            if why != before:
                log.error("bundle %s cannot be loaded, so the live one stays: %s", version[:12], why)
            return None
        self._failed.pop(version, None)
        self.models[version] = model
        log.info("bundle %s is loaded beside the live one, from %s", version[:12], announcement.uri)
        return model

    def _prepare(self) -> bool:
        """A step for each running partition; whether there is more to do."""
        if not self.capped:
            return False
        busy, target = False, self.target
        for number, partition in self._running().items():
            try:
                with self._epochs:
                    busy |= self._step(number, partition, target)
                self._trouble.pop(number, None)
            except StoreClosed:  # it was taken back
                continue
            except Exception as error:  # whatever is wrong with one, the others go on
                self._tell(number, f"cannot be prepared for bundle {target.version[:12]}: {_said(error)}")
        return busy

    def _tell(self, number: int, trouble: str) -> None:
        """Says what is wrong with a partition: once, and again where it is something else or still so after a while."""
        before, told_at = self._trouble.get(number, ("", 0.0))
        if trouble != before or time.monotonic() - told_at >= SAY_AGAIN_AFTER_S:
            self._trouble[number] = trouble, time.monotonic()
            log.warning("partition %d %s; trying on", number, trouble)

    def _step(self, number: int, partition: Partition, target: PairModel) -> bool:
        switch, store = partition.switch, partition.store
        if switch is None or store.room_wanted or number in self._straight or target is not self.target:
            return False
        model = self.models.get(switch.bundle)
        if model is not None and not store.grouped(switch.epoch, switch.bundle, switch.input_offset):
            return Regrouping(store, switch.epoch, switch.bundle, model.assign, switch.input_offset).step()
        if not self._wants(partition, target.version):
            return sweep(store)
        # An abort would go back to before the present epoch, and leave behind what is grouped for the one after it.
        if not _is_committed(partition):
            return False
        more = Regrouping(store, switch.epoch + 1, target.version, target.assign).step()
        if not more and self._target is target:
            self._ready[number] = partition, target.version, switch.epoch + 1
        return more


def _is_committed(partition: Partition) -> bool:
    """Whether the present epoch of a partition is; one that has nothing committed has nothing to lose."""
    return partition.committed is None or partition.committed.epoch == partition.epoch


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, StateError) else f"{type(error).__name__}: {text}"


def _another(live: str, given: str) -> str:
    return (
        f"the stream runs with bundle {live[:12]} and this worker has {given[:12]}: give it that one with --bundle, leave "
        "--bundle out so that it follows what is announced, or start another --stream"
    )
