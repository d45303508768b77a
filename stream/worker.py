"""The loop of a worker: it polls, hands batches to the model, commits by time, and settles before a partition leaves.

One loop owns poll, commit and shutdown; all else is told when to start and when to end. Decisions are made in reduce.py,
written in transaction.py. The model works in a thread of its own, a transaction is sent and stored in another one while the
next batches are decided, and the loop polls meanwhile. What else happens to partitions and stores happens between two
batches, in the loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from state.changelog import Totals
from state.partition import Fate, Partition
from stream.allocator import give_back
from stream.assignment import Assignment, Restore
from stream.broker_errors import fenced_member, refuses_entry, says_fenced
from stream.bundle_switch import BundleSwitch
from stream.dead_share import DeadShare
from stream.drift_watch import DriftWatch, watched
from stream.errors import Stopped, TldrError, Unavailable
from stream.intake import Intake
from stream.logs import at, offsets_of, place
from stream.metrics import Metrics
from stream.murmur2 import partitions_of
from stream.reduce import Cancelled, CodesColumns, Effects, Reduction, reduce_batch
from stream.restore import Restored
from stream.transaction import Aborted, Outlet, ProducerLost, Sealed, Undelivered, keep, seal, send, write

log = logging.getLogger(__name__)

POLL_WAIT_S = 0.2
# How long a look at the batch in the model may keep the loop from polling.
PENDING_WAIT_S = 0.05
# How long a poll may keep the loop from what became of the transaction that is being sent.
SENDING_WAIT_S = 0.01
# Effects are committed early when they weigh this much: they wait in memory until then. 100,000 small records, which may be a
# second of them, weigh about as much.
EFFECT_BYTES_MAX = 48 * 1024 * 1024
# A partition that is taken away waits this long for the batch in the model; then the batch is given up. Below
# max.poll.interval.ms, which bounds how long the group waits for us.
REVOKE_BUDGET_S = 20.0
# /healthz: a loop that has not turned for this long is stuck, or a disk that has not taken a commit.
STUCK_AFTER_S = 120.0
GAUGES_EVERY_S = 1.0
# What libraries have freed goes back to the kernel this often; it takes a few milliseconds.
GIVE_BACK_EVERY_S = 5.0
# A look at the sizes of all cells takes about a millisecond for 3,000 of them.
CELLS_EVERY_S = 10.0
# librdkafka reports a broker that is away many times a second.
SAY_AGAIN_AFTER_S = 30.0
# A rebalance or a broker that moves aborts one or two; what aborts this many will abort the next one too.
ABORTS_MAX = 10
# A broker that starts may not know its users yet: so long after a refusal it is asked again, and then believed.
KNOCK_AFTER_S = 3.0


@dataclass(frozen=True)
class Pace:
    """How a worker shares its time.

    commit_interval_s  between commits; batch_pairs  raw records in one batch; revoke_budget_s  for a batch in the model when
    its partition is taken away
    """

    commit_interval_s: float
    batch_pairs: int
    stop_at_end: bool = False
    revoke_budget_s: float = REVOKE_BUDGET_S


@dataclass(frozen=True)
class _Sending:
    """A transaction on its way to Kafka and to the stores."""

    sealed: Sealed
    spans: dict[int, tuple[int, int]]  # partition → its first and last offset in it
    since: float
    done: Future[None]


class Worker:
    """A consumer group member that reduces the partitions it is given, until told to stop."""

    def __init__(
        self,
        consumer: Consumer,
        topic: str,
        using: Reduction,
        outlet: Outlet,
        restore: Restore,
        adopt: Callable[[Restored], None],
        pace: Pace,
        buffer_bytes: int,
        metrics: Metrics,
        new_producer: Callable[[], Producer],
        group_has_gap: Callable[[], bool],
        dead_share: DeadShare,
        reach: Callable[[], None],
        switch: BundleSwitch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.consumer, self.topic, self.using, self.outlet = consumer, topic, using, outlet
        self.pace, self.metrics = pace, metrics
        self.intake = Intake(consumer, topic, buffer_bytes, clock)
        self.assignment = Assignment(self.intake, restore, self._restored)
        self._adopt = adopt
        self._new_producer = new_producer
        self._group_has_gap = group_has_gap
        self._joined_again = 0
        self._dead_share = dead_share
        self._reach = reach
        self.has_run = False  # whether a partition has ever been running here
        self._knocking: Future[None] | None = None
        self._knock_thread = ThreadPoolExecutor(1, "knock")
        self._switch = switch
        self._superseded = False  # whether a switch has left a bundle behind that nobody may need any more
        self._drift = DriftWatch(metrics, clock)
        self._clock = clock
        self._effects = Effects()
        self._effects_since: float | None = None
        self._pending: Future[Effects] | None = None
        self._give_up = threading.Event()
        self._sending: _Sending | None = None
        self._writing_since: float | None = None  # the stores, by the sending thread
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._send_thread = ThreadPoolExecutor(1, "send")
        self._stopping = threading.Event()
        self._trouble: BaseException | None = None
        self._turned_at = clock()
        self._gauged_at = 0.0
        self._gave_back_at = 0.0
        self._cells_at: float | None = None
        self._warned_of_keys = False
        self._aborted_in_a_row = 0
        self._said_at: dict[int, float] = {}  # code of an error → when it was last said
        self._counted_bytes = 0  # of the payload, that the metrics know of
        self._received_bytes = 0
        self._committed: dict[int, tuple[int, Totals]] = {}  # partition → next offset and totals, as committed

    # -- what others may ask -------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain: finish the batch in the model, commit, leave. From a signal handler or another thread."""
        self._stopping.set()

    @property
    def healthy(self) -> bool:
        """Neither the loop nor a disk is stuck."""
        writing_since, now = self._writing_since, self._clock()
        return now - self._turned_at < STUCK_AFTER_S and (writing_since is None or now - writing_since < STUCK_AFTER_S)

    @property
    def ready(self) -> bool:
        """Joined the group, and every partition that it gave is running."""
        assignment = self.assignment
        settled = assignment.joined and not assignment.restoring and not assignment.waiting
        return settled and not self._stopping.is_set()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Works until `stop`. Raises Fenced, DataLoss, Stopped or TldrError where it cannot go on."""
        try:
            self._subscribe([self.topic])
            while not self._stopping.is_set():
                self._turn()
            log.info("draining")
            self._settle()
        except BaseException:
            # Only a drain commits: leaving the group settles too, and half a batch must not become visible by that.
            self._drop_batch()
            self._effects, self._effects_since = Effects(), None
            # What Kafka takes of what is on its way comes from the changelog when the partitions are restored.
            self._sending = None
            raise
        finally:
            self._close()

    def _subscribe(self, topics: list[str]) -> None:
        self.consumer.subscribe(topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def _join_again(self) -> None:
        """Makes the group look again at who has what: telling it of a partition that we hold now starts a rebalance."""
        log.warning("a partition of %s belongs to no member of the group: joining it again", self.topic)
        self._joined_again += 1
        # librdkafka joins again only if the subscription reads differently: the same topic, as a name and as a pattern.
        pattern = f"^{self.topic.replace('.', '[.]')}$"
        self._subscribe([self.topic, pattern] if self._joined_again % 2 else [self.topic])

    def _turn(self) -> None:
        self._turned_at = self._clock()
        came = self.intake.poll(self._poll_wait_s())
        if self._trouble is not None:
            raise self._trouble
        if self.intake.out_of_range:
            # What there is of it is settled; the restore then finds the gap, and says so or passes over it.
            self._settle()
            self.assignment.restore_again(self.intake.out_of_range)
        if self.assignment.joined and self._group_has_gap():
            self._join_again()
        self.assignment.start_restored()
        if came:  # here, since the model works meanwhile
            self._check_keys(came)
        if self._pending is not None:
            wait([self._pending], PENDING_WAIT_S)
            if self._pending.done():
                self._collect()
        # The batch in the model changes the open transaction, so a commit waits for it: it ends at a batch boundary.
        if self._pending is None:
            if self._sending is not None and self._sending.done.done():
                self._end_commit()
            self._forget_superseded()
            for partition in self.assignment.running.values():
                partition.store.make_room()
            if ready := self._switch.ready(self.assignment.running):
                self._switch_over(ready)
            if self._commit_is_due():
                self._begin_commit()
            if self._is_full():
                # Two transactions' worth of effects is what memory was meant for.
                wait([self._sending.done] if self._sending else [], PENDING_WAIT_S)
            elif batch := self.intake.take(self.pace.batch_pairs):
                self._submit(batch)
            elif self.pace.stop_at_end and self._at_end():
                self._stopping.set()
        self._update_gauges()

    def _poll_wait_s(self) -> float:
        if self._pending is not None or len(self.intake) or self.assignment.restoring:
            return 0.0 if not self.assignment.restoring or len(self.intake) else PENDING_WAIT_S
        if self._sending is not None:
            return SENDING_WAIT_S
        if self._effects_since is not None:
            return max(0.0, min(POLL_WAIT_S, self._effects_since + self.pace.commit_interval_s - self._clock()))
        return POLL_WAIT_S

    def _submit(self, batch: list[Any]) -> None:
        if log.isEnabledFor(logging.DEBUG):
            spans = _spans_of(batch)
            log.debug("batch of %d: %s", len(batch), place(self.topic, spans), extra=at("batch", self.topic, spans))
        self._give_up.clear()
        running = dict(self.assignment.running)
        self._pending = self._model_thread.submit(self._reduce, batch, running)

    def _reduce(self, batch: list[Any], running: dict[int, Partition]) -> Effects:
        began = self._clock()
        effects = self._effects
        reduce_batch(batch, running, self.using, effects, self._give_up.is_set)
        self.metrics.batch_seconds.observe(self._clock() - began)
        return effects

    def _collect(self) -> None:
        """Takes over what the model's thread has done. Raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Cancelled:
            # An abort would forget what is on its way, too.
            self._end_commit()
            self._abort_effects()
            self._go_back()
            return
        except Exception as error:
            log.exception("the model failed")
            raise Stopped(
                f"a batch failed in the model ({type(error).__name__}: {error}): nothing of it was counted"
            ) from error
        if self._effects_since is None and not self._effects.empty:
            self._effects_since = self._clock()
        self._dead_share.take(self._effects)
        self.metrics.dead_share.set(float(self._dead_share.share or 0))
        self._dead_share.refuse_above_limit(self.topic)

    def _commit_is_due(self) -> bool:
        if self._effects_since is None or self._sending is not None:
            return False
        late = self._clock() - self._effects_since >= self.pace.commit_interval_s
        return late or self._effects.value_bytes >= EFFECT_BYTES_MAX

    def _is_full(self) -> bool:
        return self._sending is not None and self._effects.value_bytes >= EFFECT_BYTES_MAX

    def _commit(self) -> None:
        """Commits all that is decided, and waits for it."""
        self._end_commit()
        self._begin_commit()
        self._end_commit()

    def _begin_commit(self) -> None:
        """Sends what is decided, while the next batches are decided on top of it."""
        effects, self._effects, self._effects_since = self._effects, Effects(), None
        if effects.empty:
            return
        since = self._clock()
        spans = self._open_spans()
        sealed = seal(effects, self.assignment.running, self.outlet)
        self._dead_share.seal()
        done = self._send_thread.submit(self._send, sealed, dict(self.assignment.running))
        self._sending = _Sending(sealed, spans, since, done)

    def _send(self, sealed: Sealed, partitions: dict[int, Partition]) -> None:
        send(sealed, self.outlet)
        self._writing_since = self._clock()
        try:
            write(sealed, partitions)
        finally:
            self._writing_since = None

    def _end_commit(self) -> None:
        """Waits for what becomes of the transaction that is being sent, and takes it over. At a batch boundary."""
        sending, self._sending = self._sending, None
        if sending is None:
            return
        try:
            sending.done.result()
        except Aborted as error:
            self.metrics.transactions.labels("aborted").inc()
            self._abort_effects()
            if isinstance(error, Undelivered):
                self._knock()
            self._aborted_in_a_row += 1
            if self._aborted_in_a_row >= ABORTS_MAX:
                raise Stopped(
                    f"{ABORTS_MAX} transactions in a row were aborted, the last one since: {error}"
                ) from error
            log.warning(
                "transaction aborted (%s): going back to what was committed, before %s",
                error, place(self.topic, sending.spans), extra=at("abort", self.topic, sending.spans),
            )  # fmt: skip
            self._go_back()
            return
        except ProducerLost as error:
            self.metrics.transactions.labels("aborted").inc()
            self._dead_share.abort()
            self._effects, self._effects_since = Effects(), None
            log.warning(
                "the producer is lost (%s): making a new one and restoring; what became of %s the changelog tells",
                error, place(self.topic, sending.spans), extra=at("producer lost", self.topic, sending.spans),
            )  # fmt: skip
            self.outlet = self.outlet._replace(producer=self._new_producer())
            self.assignment.restore_again(self.assignment.running)
            return
        keep(sending.sealed, self.assignment.running)
        self._superseded |= bool(sending.sealed.effects.switched)
        self._aborted_in_a_row = 0
        self._dead_share.commit()
        took = self._clock() - sending.since
        self.metrics.commit_seconds.observe(took)
        self.metrics.transactions.labels("committed").inc()
        self._count(sending.sealed.effects)
        self._remember_committed()
        self._look_at_cells()
        self._say_committed(sending.sealed.effects, sending.spans, took)

    def _forget_superseded(self) -> None:
        """Lets go of the bundles that no partition runs with.

        Not while a switch is sent, whose abort goes back to the bundle that it came from, and not while a partition is
        restored, whose bundle may just be loaded.
        """
        if self._superseded and self._sending is None and not self.assignment.restoring:
            self._superseded = not self._switch.keep_only_what_is_used()

    def _open_spans(self) -> dict[int, tuple[int, int]]:
        """The offsets of the open transaction, by partition."""
        spans = {}
        for number, partition in self.assignment.running.items():
            first, behind = self._committed[number][0], partition.next_offset or 0
            if behind > first:
                spans[number] = first, behind - 1
        return spans

    def _say_committed(self, effects: Effects, spans: dict[int, tuple[int, int]], took_s: float) -> None:
        """One line a transaction: for a person only where something in it died, else with --verbose."""
        level = logging.INFO if effects.dead else logging.DEBUG
        if not log.isEnabledFor(level):
            return
        text, more = "", {}
        if effects.dead:
            reasons = {str(reason): n for reason, n in Counter(letter.reason for letter in effects.dead).most_common()}
            where = _spans_of([letter.message for letter in effects.dead])
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            text = f"; dead letters between {place(self.topic, where)}: {counts}"
            more = {"dead": reasons, "dead_offsets": offsets_of(where)}
        log.log(
            level, "committed %d records of %s in %.3f s%s", effects.records, place(self.topic, spans), took_s, text,
            extra=at("commit", self.topic, spans, records=effects.records, seconds=round(took_s, 4), **more),
        )  # fmt: skip

    def _switch_over(self, ready: list[int]) -> None:
        """Begins the next epoch of these partitions, in a transaction that holds nothing else."""
        self._commit()  # what is open belongs to the epochs before
        began = self._clock()
        running = self.assignment.running
        self._effects.switched = {p for p in ready if p in running and self._switch.adopt(running[p])}
        self._begin_commit()
        self.metrics.switch_seconds.observe(self._clock() - began)

    def _settle(self, budget_s: float | None = None) -> None:
        """Finishes the batch in the model and commits. After `budget_s` the batch is given up, and nothing of it happened."""
        if self._pending is not None:
            wait([self._pending], budget_s)
            self._give_up.set()  # looked at between two stages
            wait([self._pending])
            self._collect()
        self._commit()

    def _drop_batch(self) -> None:
        """Gives up the batch in the model, whatever it says; the open transaction is then half done and must be dropped."""
        self._give_up.set()
        if self._pending is not None:
            wait([self._pending])
            self._pending = None

    def _abort_effects(self) -> None:
        """Forgets what is not committed."""
        self._dead_share.abort()
        self._effects, self._effects_since = Effects(), None
        for partition in self.assignment.running.values():
            partition.abort()

    def _go_back(self) -> None:
        """Consumes again what is not committed.

        A partition begins anew, bundle and all, where it never committed anything or went straight to a bundle from one that
        this worker cannot load.
        """
        running = self.assignment.running
        anew = [
            n for n, partition in running.items() if partition.next_offset is None or not self._switch.has(partition)
        ]
        if anew:
            self.assignment.restore_again(anew)
        for number, partition in self.assignment.running.items():
            self.intake.go_back(number, partition.next_offset or 0)

    def _close(self) -> None:
        self._give_up.set()
        self._model_thread.shutdown(wait=True)
        self._send_thread.shutdown(wait=True)
        self._stopping.set()  # nobody is asked any more either
        self._knock_thread.shutdown(wait=False, cancel_futures=True)
        # A consumer that was fenced may refuse to leave; there is nothing left to lose.
        with contextlib.suppress(Exception):
            self.consumer.close()
        self.assignment.close()

    # -- the group's callbacks: they run inside poll, and must not raise -------------------------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Acknowledges the rebalance; each partition is consumed once its store is restored.
        consumer.incremental_assign([])
        self.assignment.assigned([tp.partition for tp in partitions])

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [tp.partition for tp in partitions]
        try:
            self._settle(self.pace.revoke_budget_s)
            told = self.assignment.revoked(numbers)
        except BaseException as error:
            self._trouble = error
            told = self.assignment.revoked(numbers, lost=True)
        if not told:
            consumer.incremental_unassign([])

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """The group took us for dead: another worker may own them already, so nothing more is committed."""
        told = False
        self.assignment.joined = False  # until the group answers again: not ready, though nothing is restoring
        try:
            self._drop_batch()
            self._end_commit()  # refused, unless Kafka took it before
            self._abort_effects()
            told = self.assignment.revoked([tp.partition for tp in partitions], lost=True)
            self._go_back()
        except BaseException as error:
            self._trouble = error
        if not told:
            consumer.incremental_unassign([])

    def _restored(self, number: int, restored: Restored) -> None:
        self._adopt(restored)
        self.has_run = True
        totals = restored.partition.totals
        # The loss counts once it is committed: a restore may be repeated before that.
        self._committed[number] = restored.next_offset, totals._replace(lost=totals.lost - restored.lost)
        self.metrics.restore_seconds.observe(restored.seconds)
        self.metrics.restored_records.inc(restored.records)

    # -- watching ------------------------------------------------------------------------------------------------------

    def _at_end(self) -> bool:
        running = self.assignment.running
        settled = self._effects.empty and self._sending is None
        done = bool(running) and self.ready and settled and running.keys() <= self.intake.at_end.keys()
        return done and not self._switch.pending(running)

    def _check_keys(self, batch: list[Any]) -> None:
        """Counts records outside their key's murmur2 partition: ids are known only within a partition."""
        keys = [message.key() for message in batch]
        try:
            homes = partitions_of(keys, self.outlet.partition_count).tolist()
        except TypeError:  # one has no key
            batch = [message for message in batch if message.key() is not None]
            homes = partitions_of([message.key() for message in batch], self.outlet.partition_count).tolist()
        numbers = [message.partition() for message in batch]
        if homes == numbers:
            return
        elsewhere = np.array(homes) != np.array(numbers)
        # A takedown goes to every partition.
        misplaced = sum(batch[at].value() is not None for at in np.flatnonzero(elsewhere).tolist())
        if misplaced:
            self.metrics.misplaced_keys.inc(misplaced)
            if not self._warned_of_keys:
                self._warned_of_keys = True
                log.warning(
                    "%s holds keys outside their murmur2 partition: duplicates are found within a partition only; "
                    "produce with `partitioner=murmur2_random`",
                    self.topic,
                )

    def _count(self, effects: Effects) -> None:
        metrics = self.metrics
        for codes in effects.codes.values():
            for fate, count in zip(Fate, np.bincount(codes.fates, minlength=len(Fate)).tolist(), strict=True):
                if count:
                    metrics.fates.labels(fate.name.lower()).inc(count)
            metrics.removed.inc(codes.removed)
        metrics.fates.labels("dead").inc(len(effects.dead))
        for letter in effects.dead:
            metrics.dead_letters.labels(letter.reason).inc()
        metrics.images.inc(effects.images)
        metrics.captions.inc(effects.captions)
        for stage, seconds in effects.seconds.items():
            metrics.stage_seconds.labels(stage).inc(seconds)
        metrics.itm_raw.observe(effects.itm_raw)
        metrics.itm_kept.observe(effects.itm_kept)
        metrics.itm_refined.observe(effects.itm_refined)
        self._watch_drift(effects.codes.values())

    def _watch_drift(self, committed: Iterable[CodesColumns] = ()) -> None:
        """Now and then without anything new, so that an idle stream's last pairs show."""
        partition = watched(self.assignment.running.values(), self._switch.target.version)
        if partition is not None:
            self._drift.take(committed, self.using.model_of(partition))

    def _update_gauges(self) -> None:
        now = self._clock()
        if now - self._gauged_at < GAUGES_EVERY_S:
            return
        self._gauged_at = now
        if now - self._gave_back_at >= GIVE_BACK_EVERY_S:
            self._gave_back_at = now
            give_back()
        self._watch_drift()
        metrics, intake = self.metrics, self.intake
        metrics.buffer_bytes.set(intake.buffered_bytes)
        metrics.payload_bytes.inc(intake.received_bytes - self._counted_bytes)
        self._counted_bytes = intake.received_bytes
        metrics.partitions.labels("running").set(len(self.assignment.running))
        metrics.partitions.labels("restoring").set(len(self.assignment.restoring))
        metrics.partitions.labels("waiting_for_bundle").set(len(self.assignment.waiting))
        metrics.lag.clear()
        metrics.reduced_set.clear()
        metrics.store_bytes.clear()
        metrics.epoch.clear()
        # What was committed last, remembered: the store itself belongs to the model's thread while that works.
        for number, (next_offset, totals) in self._committed.items():
            if number not in self.assignment.running:
                continue
            label = str(number)
            metrics.epoch.labels(label).set(self.assignment.running[number].epoch)
            metrics.reduced_set.labels(label).set(totals.kept - totals.evicted - totals.removed)
            with contextlib.suppress(OSError):
                metrics.store_bytes.labels(label).set((self._store_file(number)).stat().st_blocks * 512)
            with contextlib.suppress(Exception):  # not known before the first fetch
                _, end = self.consumer.get_watermark_offsets(TopicPartition(self.topic, number), cached=True)
                metrics.lag.labels(label).set(max(0, end - next_offset))

    def _remember_committed(self) -> None:
        positions = {number: partition.committed for number, partition in self.assignment.running.items()}
        for number, position in positions.items():
            if position:
                self.metrics.lost_records.inc(position.totals.lost - self._committed[number][1].lost)
        self._committed = {
            number: (position.next_offset, position.totals) if position else self._committed[number]
            for number, position in positions.items()
        }

    def _look_at_cells(self) -> None:
        """Now and then, right behind a commit: the stores then hold everything and the model's thread does not need them."""
        now = self._clock()
        if self._cells_at is not None and now - self._cells_at < CELLS_EVERY_S:
            return
        self._cells_at = now
        running = self.assignment.running.values()
        cells = [partition.store.cells_of_epoch(partition.epoch) for partition in running]
        counts = np.concatenate([np.zeros((0, 4), np.int64), *cells])
        counted, sizes = counts[counts[:, 0] > 0][:, [0, 3]].T
        self.metrics.cell_counted.set(counted)
        self.metrics.cell_reservoir.set(sizes)
        self.metrics.largest_cell.set(counted.max(initial=0))

    def _store_file(self, number: int) -> Path:
        return Path(self.assignment.running[number].store.path) / "data.mdb"

    def on_statistics(self, text: str) -> None:
        """librdkafka's own count of what it received: refetches show here (the Kafka setting statistics.interval.ms)."""
        received = json.loads(text).get("rx_bytes", 0)
        self.metrics.received_bytes.inc(max(0, received - self._received_bytes))
        self._received_bytes = received

    def on_error(self, error: KafkaError) -> None:
        """Broker trouble, said when it comes and now and then; the clients go on trying by themselves."""
        if says_fenced(error):
            self._trouble = fenced_member(error)
            return
        if refuses_entry(error) and (self._knocking is None or self._knocking.done()):
            self._knocking = self._knock_thread.submit(self._knock, KNOCK_AFTER_S)
        if self._clock() - self._said_at.get(error.code(), -SAY_AGAIN_AFTER_S) >= SAY_AGAIN_AFTER_S:
            self._said_at[error.code()] = self._clock()
            log.warning("Kafka: %s; trying on", error.str())

    def _knock(self, after_s: float = 0.0) -> None:
        """Asks with a new connection whether the broker lets us work: librdkafka tries for ever, and one broker is not all."""
        if after_s and self._stopping.wait(after_s):
            return
        try:
            self._reach()
        except Unavailable:
            pass  # away is not refused
        except TldrError as error:
            self._trouble = Stopped(f"{error}; nothing that is committed is lost")


def _spans_of(messages: Iterable[Any]) -> dict[int, tuple[int, int]]:
    """The first and the last offset of messages (each partition's in their order), by partition."""
    spans: dict[int, tuple[int, int]] = {}
    for message in messages:
        number, offset = message.partition(), message.offset()
        spans[number] = spans[number][0] if number in spans else offset, offset
    return spans
