"""Hundreds of connections: those that are taken in are answered, others are told when to come back, /health always."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from pymllm.server import connections
from pymllm.server.limits import Limits
from tests.processes import SECONDS
from tests.server.by_hand import LONG, connect, get, held_steps, post, send, wait_until
from tests.server.conftest import serve


async def ask(served, body, told=None, leave=None):
    """Post a body on a connection of its own.  told: is called with the status.  leave: close it once that is set."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")
        writer.write(f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if leave is not None:
            await leave.wait()
            return None
        head, _, text = (await reader.read()).partition(b"\r\n\r\n")
        status, headers = int(head.split()[1]), head.decode().lower()
        if told is not None:
            told(status)
        return status, headers, json.loads(text)
    finally:
        writer.close()


def test_of_400_connections_at_once_as_many_are_answered_as_there_are_places_and_none_is_lost(llm):
    body = {"max_tokens": 3, "temperature": 0}
    prompts = [f"x = {number}\n" for number in range(8)]
    free = len(llm.engine.cache.free)
    alone = [llm.generate(prompt, llm.default_params(**body))[0].text for prompt in prompts]
    with serve(llm, max_running=12, max_waiting=20) as served, held_steps(llm) as gate:
        refused = []

        async def crowd():
            asking = [
                asyncio.ensure_future(
                    ask(
                        served,
                        {**body, "prompt": prompts[number % 8]},
                        lambda status: status == 503 and refused.append(1),
                    )
                )
                for number in range(400)
            ]
            while len(refused) < 400 - 32:
                await asyncio.sleep(0.01)
            health = [await asyncio.to_thread(get, served, "/health", method) for method in ("GET", "HEAD")]
            gate.let(math.inf)
            return health, await asyncio.gather(*asking)

        health, answers = asyncio.run(asyncio.wait_for(crowd(), SECONDS))
        assert [status for status, _, _ in health] == [200, 200] and health[1][1] == b""
        good = [(index, text) for index, (status, _, text) in enumerate(answers) if status == 200]
        assert len(good) == 32
        assert all(text["choices"][0]["text"] == alone[index % 8] for index, text in good)
        for status, headers, text in answers:
            assert status in (200, 503)
            if status == 503:
                assert text["error"]["code"] == "overloaded" and "\r\nretry-after: " in headers
        traffic = served.app.state.traffic
        wait_until(lambda: traffic.under_way == 0)
        assert traffic.worker.places.free == 32 and len(llm.engine.cache.free) == free
        assert traffic.refused["line_full"] + traffic.refused["reading"] == 368


def test_clients_that_leave_at_any_time_take_nothing_with_them(llm):
    free = len(llm.engine.cache.free)
    with serve(llm, max_running=16, max_waiting=64) as served, held_steps(llm) as gate:
        expected = llm.default_params(temperature=0, max_tokens=5)

        async def crowd():
            leave = asyncio.Event()
            leaving = [
                asyncio.ensure_future(ask(served, {**LONG, "stream": number % 2 == 0}, leave=leave))
                for number in range(40)
            ]
            staying = [
                asyncio.ensure_future(ask(served, {"prompt": "y", "max_tokens": 5, "temperature": 0}))
                for _ in range(20)
            ]
            places = served.app.state.traffic.worker.places
            while places.free > 20:
                await asyncio.sleep(0.01)
            gate.let(4)
            while gate.begun < 5:
                await asyncio.sleep(0.01)
            leave.set()
            await asyncio.gather(*leaving)
            gate.let(math.inf)
            return await asyncio.gather(*staying)

        answers = asyncio.run(asyncio.wait_for(crowd(), SECONDS))
        texts = {text["choices"][0]["text"] for status, _, text in answers if status == 200}
        traffic = served.app.state.traffic
        wait_until(lambda: traffic.under_way == 0)
        assert len(answers) == 20
        assert traffic.worker.places.free == 80
        wait_until(lambda: llm.engine.idle)
        assert len(llm.engine.cache.free) == free
    assert texts == {llm.generate("y", expected)[0].text}


def test_the_connection_that_has_been_idle_for_longest_makes_room_for_a_new_one(llm, monkeypatch):
    monkeypatch.setattr(connections, "QUIET_SECONDS", -1.0)
    with serve(llm, limits=Limits(connections=8)) as served:
        idle = [connect(served) for _ in range(8)]
        traffic = served.app.state.traffic
        wait_until(lambda: traffic.connections == 8)
        assert get(served, "/health")[0] == 200
        assert idle[0].recv(1) == b""
        wait_until(lambda: traffic.connections == 7)
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle[-1].recv(100).startswith(b"HTTP/1.1 200")
        for connection in idle:
            connection.close()


def test_where_no_connection_is_idle_a_new_one_is_refused_but_for_health(llm):
    with serve(llm, limits=Limits(connections=1)) as served, held_steps(llm) as gate:
        traffic = served.app.state.traffic
        with send(served, {**LONG, "max_tokens": 3}) as busy:
            wait_until(lambda: traffic.worker.live)
            status, answer, headers = post(served, {"prompt": "x", "max_tokens": 1})
            assert (status, answer["error"]["code"]) == (503, "overloaded")
            assert int(headers["Retry-After"]) > 0 and headers["Connection"] == "close"
            assert get(served, "/health")[0] == 200
            traffic.ceiling = 1
            with connect(served) as unread:
                assert unread.recv(1000).startswith(b"HTTP/1.1 503")
            gate.let(math.inf)
            assert busy.recv(100).startswith(b"HTTP/1.1 200")
        assert traffic.refused["connections"] == 2


def test_bodies_that_arrive_together_are_bounded(llm):
    limits = Limits(body_bytes=4000)
    with serve(llm, limits=limits) as served:
        senders = [connect(served) for _ in range(65)]
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000\r\n\r\n"
        traffic = served.app.state.traffic
        for sender in senders[:64]:
            sender.sendall(head + b" " * 3999)
        wait_until(lambda: traffic.arriving == 64 * 3999)
        senders[64].sendall(head + b" " * 3999)
        answer = senders[64].recv(1000)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: " in answer
        for sender in senders:
            sender.close()
        wait_until(lambda: traffic.arriving == 0 and traffic.under_way == 0)


@pytest.mark.parametrize(
    ("told", "given_back", "expected"), [(7.5, 0, "8"), (None, 0, "5"), (None, 3, "20"), (None, 64, "1")]
)
def test_a_refused_client_is_told_how_long_the_line_takes(llm, told, given_back, expected):
    with serve(llm, max_running=8, max_waiting=8, limits=Limits(retry_after=told)) as served:
        traffic = served.app.state.traffic
        places, now = traffic.worker.places, [100.0]
        places._clock = lambda: now[0]
        places.take(16)
        for _ in range(given_back):
            places.give_back()
            places.free -= 1
            now[0] += 2.5 / given_back if given_back == 3 else 0.001
        # 16 places at 2 in 2.5 seconds
        assert traffic.retry_after() == expected
