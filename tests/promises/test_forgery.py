"""Promise 17: messages have no authority. Whoever connects to a socket of ours and says what he likes, to the
right process with the right numbers or in no language at all, changes nothing.

Paths of sockets exist until the worker has connected; so strangers connect while the zygote is kept waiting,
and speak then, and again while tasks run. Some of what they say makes libzmq hang up: each of these has a
connection of his own.

    .up    our PULL    where workers report      he is a PUSH
    .down  our PUSH    where leases are told     he is a PULL, that speaks (and takes every other hint)
    .ctl   our XPUB    the control word          he is a SUB; what he says are subscriptions
"""

from __future__ import annotations

import struct
from collections import Counter
from contextlib import ExitStack

import recording
from recording import START
from strangers import COMMAND, LONG, MORE, Peer, frame, waiting_runtime
from watching import all_ready, settled

from runtime import wire

KINDS = {".up": b"PUSH", ".down": b"PULL", ".ctl": b"SUB"}
TALKING = 170  # messages of the stranger who keeps to the rules
RUDE = 30  # strangers who do not
TASKS = 400


def hint(draw, dispatcher):
    """A message as ours: of a process that is there, that was, or that never will be."""
    slot = draw.choice([0, 0, 1, 1, 2, 5, 2**32 - 1])
    there = dispatcher.incarnation(slot) if slot < 2 else 1
    incarnation = draw.choice([there, there, there, there + 1, 0, 2**64 - 1])
    return wire.encode_hint(draw.choice(list(wire.HintKind)), slot, incarnation)


def well_framed(draw, ending, dispatcher):
    """(a ZMTP frame that libzmq delivers, whether the host has to count it as no hint at all)."""
    data = hint(draw, dispatcher)
    how = draw.choice(["forged", "forged", "truncated", "longer", "mutated", "random", "empty", "parts"])
    if how == "truncated":
        data = data[: draw.randrange(1, len(data))]
    elif how == "longer":
        data += draw.randbytes(draw.randrange(1, 8))
    elif how == "mutated":
        at = draw.randrange(8)
        data = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    elif how == "random":
        data = draw.randbytes(draw.randrange(1, 33))
    elif how == "empty":
        data = b""
    if ending == ".ctl":
        data = draw.choice([b"\x01", b"\x01", b"\0", b""]) + data
    try:
        wire.decode_hint(data)
        strange = False
    except wire.WireError:
        strange = True
    if how == "parts":
        return frame(data, MORE) + frame(data), 2 * strange
    return frame(data), strange


def rude(draw, dispatcher):
    """What breaks the protocol below ours: half a message, a wrong length, a strange command."""
    data = hint(draw, dispatcher)
    return draw.choice(
        [
            frame(data)[: draw.randrange(1, len(data))],
            struct.pack(">BQ", LONG, 2**63) + data,
            struct.pack(">BQ", LONG, 5_000_000) + data,
            frame(b"\x05ERROR\x04evil", COMMAND),
            frame(draw.randbytes(20), COMMAND),
            frame(b"\x09SUBSCRIBE" + data, COMMAND),
            bytes([0xF8]) + draw.randbytes(40),
            frame(data, MORE),
            frame(bytes(100_000)),
            draw.randbytes(300),
        ]
    )


def speak(tally, talkers, share, dispatcher):
    """The next `share` of what each has to say. How much of it the host's PULL has to count as strange."""
    strange = 0
    for peer, ending, sent in talkers:
        for _ in range(share):
            data, counts = well_framed(tally.random, ending, dispatcher)
            assert peer.send(data), f"the host has hung up on a message that keeps to ZMTP: {data!r}"
            sent[peer] += 1
            strange += counts if ending == ".up" else 0
    return strange


def one_round(tally, factory, folder):
    draw, sent = tally.random, Counter()
    with ExitStack() as stack, waiting_runtime(factory, folder) as waiting:
        rt, dispatcher = waiting.rt, waiting.rt._core.dispatcher
        talkers, early, late = [], [], []
        for ending, kind in KINDS.items():
            for path in waiting.paths(ending):
                talkers.append((Peer(path, kind), ending, sent))
                # Each PULL that stays takes its share of what is meant for the worker: one does.
                at = RUDE if ending == ".down" else RUDE // 2
                strangers = [Peer(path, kind) for _ in range(RUDE)]
                early += strangers[:at]
                late += strangers[at:]
        for peer in [peer for peer, _, _ in talkers] + early + late:
            stack.callback(peer.close)
        strange = speak(tally, talkers, TALKING // 2, dispatcher)
        for peer in early:
            peer.send(rude(draw, dispatcher))
            peer.close()
        ledger = str(folder / "ledger")
        waiting.go.touch()
        futures = [rt.submit(recording.recorded, ledger, i) for i in range(TASKS)]
        first = all_ready(rt)
        strange += speak(tally, talkers, TALKING // 4, dispatcher)
        futures += [rt.submit(recording.recorded, ledger, i) for i in range(TASKS, 2 * TASKS)]
        strange += speak(tally, talkers, TALKING - TALKING // 2 - TALKING // 4, dispatcher)
        for peer in late:
            peer.send(rude(draw, dispatcher))
        results = rt.map(recording.recorded, [ledger] * TASKS, range(2 * TASKS, 3 * TASKS))
        # No effect: each task ran once, in a worker that was there from the beginning, and has its result.
        assert [f.result(60) for f in futures] + list(results) == list(range(3 * TASKS))
        ran = Counter(entry.key for entry in recording.entries(ledger) if entry.what == START)
        assert ran == Counter(range(3 * TASKS))
        assert all_ready(rt) == first, "a worker was replaced"
        settled(rt)
        stats = rt.stats()
        assert (stats.done, stats.failed, stats.cancelled) == (3 * TASKS, 0, 0)
        assert dispatcher.malformed == 0
        assert rt._core.link.strangers >= strange > 0, "not all that was strange has been counted"
        assert set(sent.values()) == {TALKING}
    rt.shutdown()
    tally.counts["messages on each"] += TALKING + RUDE
    tally.counts["messages"] += 6 * (TALKING + RUDE)


def test_forged_messages_have_no_effect(tally, runtime_factory, tmp_path, monkeypatch):
    while tally.more():
        folder = tmp_path / str(tally.counts["messages"])
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder))
            one_round(tally, runtime_factory, folder)
