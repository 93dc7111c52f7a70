"""The protocols of a device tier in plain Python, for ``interleavings``: with leases, as ``tiers.device`` has it, and
with look-ups by the device, which no code has yet.

``docs/architecture.md`` describes them. Threads of the host queue work; each stream of the device is a thread that does
its own queue in order. Records have the numbers of their experts, from 1 on; slots have numbers from 1 on, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from interleavings import Load, Store, Swap, Thread

# kinds of work; each takes up to two numbers
LOOK_UP, USE, PUBLISH, RECORD, WAIT, COPY = range(1, 7)
TORN = 14  # content of a slot or a buffer while it is being written
FILLING = 15  # holder of a slot whose promotion has not ended
Pairs = Sequence[tuple[int, int]]  # (number of the pair, expert)


def work(kind: int, first: int, second: int = 0) -> int:
    """Return work for a queue as a number."""
    return kind << 8 | first << 4 | second


# -- the device --------------------------------------------------------------------------------------------------------


def stream(name: str) -> Thread:
    """Do the work of one queue, in order."""
    place = 0
    while True:
        queued = yield Load((name, place))
        if queued:
            kind, first, second = queued >> 8, queued >> 4 & 15, queued & 15
            if kind == LOOK_UP:
                yield from look_up(first, second)
            elif kind == USE:
                yield from use(first, second)
            elif kind == PUBLISH:
                yield Store(("table", first), second)
            elif kind == RECORD:
                yield Store(("event", first), 1)
            elif kind == WAIT:
                yield from wait(first)
            else:
                yield from copy(first, second)
            place += 1


def wait(event: int) -> Thread:
    """Wait for an event, as a stream or as a thread of the host."""
    while not (yield Load(("event", event))):
        pass


def look_up(pair: int, expert: int) -> Thread:
    """Find the slot of a pair's record, and tell the host if there is none."""
    slot = yield Load(("table", expert))
    yield Store(("found", pair), slot)
    yield Store(("missing", pair), 0 if slot else expert)  # in page-locked memory of the host


def use(pair: int, expert: int) -> Thread:
    """Compute with the record of a pair, if it was found."""
    slot = yield Load(("found", pair))
    if slot:
        for _ in range(2):  # its first bytes, and its last
            record = yield Load(("slot", slot))
            assert record == expert, f"expert {expert} is computed with what slot {slot} holds: {record}"
        yield Store(("output", pair), expert)


def copy(buffer: int, slot: int) -> Thread:
    """Copy a record from a buffer to a slot."""
    first = yield Load(("buffer", buffer))
    yield Store(("slot", slot), TORN)
    last = yield Load(("buffer", buffer))
    yield Store(("slot", slot), last if first == last else TORN)


# -- threads of the host, with look-ups by the device ------------------------------------------------------------------


def lock() -> Thread:
    """Take the tier's lock. The ends of queues, the holders of slots and the events of buffers change under it."""
    while not (yield Swap("lock", 0, 1)):
        pass


def unlock() -> Thread:
    """Give the tier's lock back."""
    yield Store("lock", 0)


def queue(name: str, *all_work: int) -> Thread:
    """Queue work on a stream. The caller holds the lock."""
    end = yield Load((name, "end"))
    for one in all_work:
        yield Store((name, end), one)
        end += 1
    yield Store((name, "end"), end)


def compute(blocks: Sequence[Pairs], slots: int, events: Sequence[int]) -> Thread:
    """Compute blocks one after the other. ``events``: numbers of events that no other thread uses."""
    for block in blocks:
        looked, *events = events
        yield from lock()
        yield from queue("computing", *launch(block), work(RECORD, looked))
        yield from unlock()
        yield from wait(looked)
        if (yield from some_missing(block)):
            events = yield from complete(block, slots, events)


def replay(blocks: Sequence[Pairs], slots: int, events: Sequence[int]) -> Thread:
    """Compute blocks by one graph, and from the first one on that lacks a record as ``compute`` does."""
    looked, *events = events
    yield from lock()
    yield from queue("computing", *[one for block in blocks for one in launch(block)], work(RECORD, looked))
    yield from unlock()
    yield from wait(looked)
    for number, block in enumerate(blocks):
        if (yield from some_missing(block)):
            events = yield from complete(block, slots, events)
            yield from compute(blocks[number + 1 :], slots, events)
            return


def launch(block: Pairs) -> list[int]:
    """Return the work that computes a block as far as its records are in slots."""
    return [work(kind, pair, expert) for kind in (LOOK_UP, USE) for pair, expert in block]


def some_missing(block: Pairs) -> Thread:
    """Return whether the look-up of a block missed a record."""
    missing = 0
    for pair, _ in block:
        missing |= yield Load(("missing", pair))
    return bool(missing)


def complete(block: Pairs, slots: int, events: Sequence[int]) -> Thread:
    """Fill slots with the records that a block lacks, and compute it. Return the events that are left.

    The lock is held, so the records of the block that are in slots stay there.
    """
    yield from lock()
    wanted = [expert for _, expert in block]
    for _, expert in block:
        slot, evicted = yield from choose(expert, wanted, slots)
        if slot:
            used, copied, *events = events
            yield from begin_fill(slot, evicted, used)
            yield from bring(expert, 1)
            yield Store("copied", copied)
            yield from queue("copying", work(COPY, 1, slot), work(RECORD, copied))
            yield from queue("computing", work(WAIT, copied), work(PUBLISH, expert, slot))
            yield Store(("holder", slot), expert)
    yield from queue("computing", *launch(block))
    yield from unlock()
    return events


def choose(expert: int, keep: Sequence[int], slots: int) -> Thread:
    """Return a slot for a record, and the record that it has; 0 and 0 if a slot has the record or is filled with it."""
    chosen = evicted = 0
    for slot in range(1, slots + 1):
        holder = yield Load(("holder", slot))
        if holder == expert:
            return 0, 0
        if holder != FILLING and holder not in keep and not chosen:
            chosen, evicted = slot, holder
    return chosen, evicted


def begin_fill(slot: int, evicted: int, used: int) -> Thread:
    """Let copies that are queued from now on come after all uses of a slot, which look-ups no longer find."""
    if evicted:
        yield from queue("computing", work(PUBLISH, evicted, 0))
    yield from queue("computing", work(RECORD, used))
    yield from queue("copying", work(WAIT, used))


def bring(expert: int, buffer: int) -> Thread:
    """Copy a record from the arena, where its owner may replace it, to a buffer that no queued copy needs any more."""
    copied = yield Load("copied")
    if copied and buffer == 1:
        yield from wait(copied)
    before = yield Load("generation")
    held = yield Load("arena")  # as the arena's directory says
    yield Store(("buffer", buffer), TORN)
    record = yield Load("arena")
    yield Store(("buffer", buffer), record)
    after = yield Load("generation")
    if held != expert or before & 1 or before != after:  # the record is read again from another place
        yield Store(("buffer", buffer), expert)


def promote(expert: int, slots: int, used: int, copied: int) -> Thread:
    """Bring a record to the device beside the computing thread, in a buffer of its own."""
    yield from lock()
    slot, evicted = yield from choose(expert, (), slots)
    if slot:
        yield from begin_fill(slot, evicted, used)
        yield Store(("holder", slot), FILLING)
    yield from unlock()
    if slot:
        yield from bring(expert, 2)
        yield from lock()
        yield from queue("copying", work(COPY, 2, slot), work(RECORD, copied))
        yield from unlock()
        yield from wait(copied)
        yield from lock()
        yield from queue("computing", work(PUBLISH, expert, slot))
        yield Store(("holder", slot), expert)
        yield from unlock()


# -- threads of the host, with leases ----------------------------------------------------------------------------------


def compute_leased(blocks: Sequence[Pairs], slots: int, events: Sequence[int]) -> Thread:
    """Compute blocks one after the other: first with leases of the records in slots, together, and then of each other.

    ``events`` are used by no other thread.
    """
    for block in blocks:
        together, missing = list[tuple[int, int, int]](), list[tuple[int, int]]()
        yield from lock()
        for pair, expert in block:
            slot, holder = yield from find(expert, slots)
            if holder == expert:
                yield Store(("pinned", slot), 1)
                together.append((pair, expert, slot))
            else:
                missing.append((pair, expert))
        yield from unlock()
        if together:
            events = yield from use_leased(together, events)
        for pair, expert in missing:
            copied, *events = events
            slot = yield from lease(expert, slots, copied)
            events = yield from use_leased([(pair, expert, slot)], events)


def use_leased(leases: Sequence[tuple[int, int, int]], events: Sequence[int]) -> Thread:
    """Compute pairs with leased records in slots, and end the leases. Return the events that are left."""
    used, *events = events
    for pair, expert, slot in leases:
        yield Store(("found", pair), slot)
        ready = yield Load(("ready", slot))
        yield from queue("computing", *([work(WAIT, ready)] if ready else []), work(USE, pair, expert))
    yield from lock()
    yield from queue("computing", work(RECORD, used))
    for _, _, slot in leases:
        yield Store(("used", slot), used)
        yield Store(("pinned", slot), 0)
    yield from unlock()
    return events


def lease(expert: int, slots: int, copied: int) -> Thread:
    """Return a slot that has a record or will have it when its copy has ended, and pin it."""
    while True:
        yield from lock()
        slot, holder = yield from find(expert, slots)
        if holder == expert:
            yield Store(("pinned", slot), 1)
            yield from unlock()
            return slot
        filling = yield Load("filling")
        if not filling and slot:
            break
        yield from unlock()
    yield from fill(slot, expert, copied, 1)
    return slot


def promote_leased(expert: int, slots: int, copied: int) -> Thread:
    """Bring a record to the device beside the computing thread."""
    yield from lock()
    slot, holder = yield from find(expert, slots)
    filling = yield Load("filling")
    if holder == expert or filling or not slot:
        yield from unlock()
        return
    yield from fill(slot, expert, copied, 0)
    yield from wait(copied)


def find(expert: int, slots: int) -> Thread:
    """Return the slot of a record and the record; or else an empty slot, or one that is not pinned; 0 if all are."""
    chosen = evicted = 0
    for slot in range(1, slots + 1):
        holder = yield Load(("holder", slot))
        if holder == expert:
            return slot, holder
        pinned = yield Load(("pinned", slot))
        if not (pinned or holder == FILLING) and (not chosen or (evicted and not holder)):
            chosen, evicted = slot, holder
    return chosen, evicted


def fill(slot: int, expert: int, copied: int, pins: int) -> Thread:
    """Fill a slot through the ring, which has one buffer here. The caller holds the lock, which this gives back."""
    yield Store(("holder", slot), FILLING)
    yield Store("filling", 1)
    yield from unlock()
    used = yield Load(("used", slot))
    if used:
        yield from queue("copying", work(WAIT, used))
    yield from bring(expert, 1)
    yield from queue("copying", work(COPY, 1, slot), work(RECORD, copied))
    yield Store("copied", copied)
    yield from lock()
    yield Store(("ready", slot), copied)
    yield Store(("used", slot), 0)
    yield Store(("holder", slot), expert)
    yield Store(("pinned", slot), pins)
    yield Store("filling", 0)
    yield from unlock()


# -- the owner of the arena --------------------------------------------------------------------------------------------


def replace_record(record: int) -> Thread:
    """Replace the record in the arena, as its owner does."""
    yield Store("generation", 1)
    yield Store("arena", record)
    yield Store("generation", 2)
