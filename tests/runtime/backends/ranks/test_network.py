"""Ranks that share no memory: threads of one process with TCP connections between them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from seekforge.common.errors import EngineError
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.backends.ranks import network, nodes
from seekforge.runtime.backends.ranks.host import launched
from seekforge.runtime.backends.ranks.message import Message
from seekforge.runtime.backends.ranks.network import Network, linked_pairs, prove
from seekforge.runtime.backends.ranks.nodes import SECRET, Meeting, come, gather, link, listening, local_number
from seekforge.runtime.backends.ranks.shared_memory import Memory, SharedMemory

KNOWN = b"what only the ranks of this test know"


def connected() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    return here, there


def together(
    parallelism: Parallelism, work: Callable[[int, Network], Any], alarm: Callable[[], None] = lambda: None
) -> list[Any]:
    """Return what each rank makes of `work(rank, collectives)`."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(parallelism.num_ranks)]
    for low, high in linked_pairs(parallelism):
        ends[low][high], ends[high][low] = connected()
    ranks = [Network(parallelism, rank, links, alarm) for rank, links in enumerate(ends)]
    try:
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(work, range(len(ranks)), ranks))
    finally:
        for rank in ranks:
            rank.close()


def test_sums_have_the_bits_that_ranks_of_one_machine_have() -> None:
    rng = np.random.default_rng(0)
    parts = (rng.standard_normal((3, 10, 7, 512)) * 10.0 ** rng.integers(-6, 6, (3, 10, 7, 512))).astype(np.float32)
    memory = Memory(Parallelism(tp=3))
    shared = [SharedMemory(memory, rank, lambda: None) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        expected, *_ = pool.map(lambda rank: shared[rank].sum(parts[rank]), range(3))
    memory.close()
    assert not np.array_equal(expected, parts[0] + (parts[1] + parts[2])), "the order is seen in these numbers"
    for result in together(Parallelism(tp=3), lambda rank, ranks: ranks.sum(parts[rank])):
        np.testing.assert_array_equal(result, expected)


def test_stages_add_up_among_themselves_and_one_rank_alone_has_its_part() -> None:
    results = together(Parallelism(tp=2, pp=2), lambda rank, ranks: ranks.sum(np.array([10.0**rank], np.float32)))
    assert [float(result[0]) for result in results] == [11, 11, 1100, 1100]
    part = np.ones(3, np.float32)
    assert all(result is part for result in together(Parallelism(pp=2), lambda rank, ranks: ranks.sum(part)))


def test_every_rank_gets_what_rank_0_broadcasts_however_long() -> None:
    sent = [np.arange(count, dtype=np.int64) for count in (0, 5, 400_000, 1)]

    def work(rank: int, ranks: Network) -> list[np.ndarray]:
        messages = [Message({"number": number}, {"x": x}) for number, x in enumerate(sent)]
        received = [ranks.broadcast(None if rank else message) for message in messages]
        assert [message.values["number"] for message in received] == list(range(len(sent)))
        return [message.arrays["x"] for message in received]

    for result in together(Parallelism(tp=2, pp=2), work):
        for one, expected in zip(result, sent, strict=True):
            np.testing.assert_array_equal(one, expected)


def test_stages_send_to_the_next_and_to_rank_0() -> None:
    def work(rank: int, ranks: Network) -> float:
        if rank < 2:
            ranks.send(Message({"x": rank + 0.5}), source=rank, target=rank + 2)
            return float(ranks.send(None, source=2, target=0).values["x"]) if rank == 0 else 0.0
        came = float(ranks.send(None, source=rank - 2, target=rank).values["x"])
        if rank == 2:
            ranks.send(Message({"x": 7}), source=2, target=0)
        return came

    assert together(Parallelism(tp=2, pp=2), work) == [7, 0, 0.5, 1.5]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            lambda ranks: ranks.sum(np.zeros(3, np.float32)),
            lambda ranks: ranks.sum(np.zeros(4, np.float32)),
            "rank 1 adds",
        ),
        (lambda ranks: ranks.sum(np.zeros(3, np.float32)), lambda ranks: ranks.sum(np.zeros(3, np.int32)), "int32"),
        (lambda ranks: ranks.broadcast(Message()), lambda ranks: ranks.sum(np.zeros(1, np.float32)), "waits for a sum"),
    ],
)
def test_ranks_that_are_in_different_steps_are_named(first: Any, second: Any, words: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(network, "_LAST_WORDS_S", 0.0)

    def work(rank: int, ranks: Network) -> str:
        try:
            (second if rank else first)(ranks)
        except EngineError as error:
            ranks.close()  # as the end of its process does
            return str(error)
        return ""

    said = "".join(together(Parallelism(tp=2), work))
    assert words in said and ("not in the same step" in said)


def test_a_message_that_was_left_out_is_seen_by_its_number() -> None:
    here, there = connected()
    sender, reader = network._Link(0, 1, here, lambda: None), network._Link(1, 0, there, lambda: None)
    sender._sent = 1  # as if one had been lost
    sender.send(b"b", Message().pack())
    with pytest.raises(EngineError, match=r"waits for a broadcast, message 1, and rank 0 sends a broadcast, message 2"):
        reader.receive(b"b")
    sender.close()
    reader.close()


def test_a_rank_that_waits_asks_whether_the_others_live_and_one_whose_peer_is_gone_says_so(monkeypatch: Any) -> None:
    monkeypatch.setattr(network, "_LAST_WORDS_S", 0.05)
    here, there = connected()
    lost: list[str] = []

    def alarm() -> None:
        if lost:
            raise EngineError(lost[0])

    reader = network._Link(0, 1, here, alarm)
    threading.Timer(0.3, lambda: lost.append("rank 1 was ended by signal 9")).start()
    with pytest.raises(EngineError, match="signal 9"):
        reader.receive(b"b")
    lost.clear()
    there.close()
    with pytest.raises(EngineError, match="rank 0 lost its connection to rank 1"):
        reader.receive(b"b")
    reader.close()


@pytest.mark.parametrize("knows", [True, False])
def test_both_ends_show_that_they_know_the_secret(knows: bool) -> None:
    here, there = connected()
    with here, there, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(prove, there, KNOWN, b"rank 1", asks=False)
        assert prove(here, KNOWN if knows else b"x" * 32, b"rank 1", asks=True) is knows
        assert answer.result(10) is knows


def test_what_one_end_said_is_worth_nothing_from_another() -> None:
    """Neither given back to who said it, nor for another rank than it was said of."""
    here, there = connected()
    with here, there, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(prove, there, KNOWN, b"rank 1", asks=False)
        here.sendall(here.recv(32))  # its own number
        here.sendall(bytes(32))
        assert answer.result(10) is False and here.recv(32) == bytes(32)
    here, there = connected()
    with here, there, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(prove, there, KNOWN, b"rank 2", asks=False)
        assert prove(here, KNOWN, b"rank 1", asks=True) is False and answer.result(10) is False


def meeting() -> tuple[Meeting, socket.socket]:
    server = listening()
    return Meeting("127.0.0.1", server.getsockname()[1], KNOWN), server


def test_ranks_meet_and_link_whoever_else_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_STRANGER_S", 0.2)
    layout, (place, server) = Parallelism(tp=2, pp=2), meeting()
    strangers = [socket.create_connection(("127.0.0.1", place.port)) for _ in range(4)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
    strangers[1].sendall(b"rank 1 99\n" + bytes(64))
    strangers[2].close()

    def rank(number: int) -> list[int]:
        with listening() as own:
            control = come(place, number, own)
            addresses = {int(k): tuple(v) for k, v in json.loads(control.makefile().readline()).items()}
            return sorted(link(layout, number, addresses, own, KNOWN))  # pyright: ignore[reportArgumentType]

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(rank, number) for number in (3, 1, 2)]
        arrivals = gather(place, 4, server)
        assert [one.rank for one in arrivals] == [1, 2, 3]
        addresses = {one.rank: one.address for one in arrivals} | {0: ("127.0.0.1", place.port)}
        for one in arrivals:
            one.connection.sendall(json.dumps(addresses).encode() + b"\n")
        assert sorted(link(layout, 0, addresses, server, KNOWN)) == [1, 2, 3]
        assert [one.result(20) for one in others] == [[0, 1, 2], [0, 3], [0, 3]]
    server.close()
    for one in strangers:
        one.close()


def test_a_rank_with_another_secret_is_sent_away_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_MEETING_S", 1.0)
    place, server = meeting()
    with ThreadPoolExecutor(1) as pool, server:
        waiting = pool.submit(gather, place, 2, server)
        with listening() as own, pytest.raises(EngineError, match=f"knows another {SECRET}"):
            come(Meeting(place.address, place.port, b"y" * 32), 1, own)
        with pytest.raises(EngineError, match="rank 1 did not come within 1 s"):
            waiting.result(20)


def test_a_rank_that_comes_twice_is_refused() -> None:
    place, server = meeting()
    with ThreadPoolExecutor(1) as pool, server, listening() as own:
        waiting = pool.submit(gather, place, 3, server)
        ends = [come(place, 1, own) for _ in range(2)]
        with pytest.raises(EngineError, match="rank 1 came twice"):
            waiting.result(20)
        for one in ends:
            one.close()


VARIABLES = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_a_rank_has_the_gpu_of_its_place_on_its_machine() -> None:
    assert local_number(9, VARIABLES | {"LOCAL_RANK": "1"}) == 1
    assert local_number(1, VARIABLES | {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == 1
    assert local_number(3, {}) == 3 and local_number(3, VARIABLES | {"LOCAL_RANK": "x"}) == 3


def test_variables_of_several_machines_say_where_ranks_meet() -> None:
    place = launched(VARIABLES | {SECRET: "x" * 16})
    assert place is not None and place.across == Meeting("host", 29501, b"x" * 16)
    assert "x" * 16 not in repr(place.across), "what is written of it is no secret"


@pytest.mark.parametrize(
    "odd", [{}, {SECRET: "short"}, {SECRET: "x" * 16, "MASTER_ADDR": ""}, {"MASTER_PORT": "70000"}]
)
def test_without_an_address_or_a_secret_they_do_not(odd: dict[str, str]) -> None:
    with pytest.raises(EngineError, match=f"{SECRET}|MASTER_ADDR") as error:
        launched(VARIABLES | odd)
    assert "\n" not in str(error.value)
