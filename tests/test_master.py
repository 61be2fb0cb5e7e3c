"""The master and its workers: real forks, real signals, real clients."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import http_wire
import kernel
import needs
import origins
import pytest
import running
import wait
import wire

PATIENT = ("keepalive_timeout=60", "head_timeout=60")  # no timeout makes room


def get(
    gateway: running.Gateway, origin: origins.Origin | bytes = http_wire.DENIED
) -> int:
    """Ask by a connection of its own; return the status."""
    with gateway.connect() as client:
        return http_wire.exchange(client, http_wire.request(origin)).status


def refuses(address: tuple[str, int]) -> bool:
    """Say whether nobody listens there."""
    try:
        socket.create_connection(address, 10).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # closed while it was in the queue
        return False
    return False


def one_is_left(gateway: running.Gateway) -> None:
    """Wait until a gateway that stops has told everybody, and only one is busy."""
    said = "natwork: stopping: sessions that have "
    lines = gateway.said
    wait.until(lambda: any(x.startswith(said) and x.endswith(": 1") for x in lines()))
    wait.until(lambda: len(gateway.workers()) == 1)


def silent(client: socket.socket) -> bool:
    """Say whether nothing has come: no byte, and no end."""
    return not select.select([client], [], [], 0)[0]


# Spares and the limit.


def test_spares_are_kept_ahead_of_the_clients(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("spare_workers=3"), origin(origins.echo)
    gateway.ready(3)
    with contextlib.ExitStack() as clients:
        for busy in range(1, 5):
            clients.enter_context(http_wire.tunnel(gateway, server))
            wait.until(lambda want=busy + 3: len(gateway.workers()) == want)
            gateway.ready(3)


def test_the_policy_of_the_scheduler_is_batch_or_somebodys_choice(
    natwork: running.Start,
) -> None:
    gateway = natwork("spare_workers=2")
    for pid in (gateway.process.pid, *gateway.ready(2)):
        assert os.sched_getscheduler(pid) == os.SCHED_BATCH
    gateway.stop()
    before = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        chosen = natwork("spare_workers=2")
        for pid in (chosen.process.pid, *chosen.ready(2)):
            assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


def test_all_missing_spares_are_forked_at_once(natwork: running.Start) -> None:
    gateway = natwork("spare_workers=40")  # trap 23: one a second would take 40 s
    pids = gateway.ready(40)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait.until(lambda: len(set(gateway.idle()) - set(pids)) == 40)


@needs.root
def test_a_full_house_is_told_also_in_the_first_minute_after_a_boot(
    natwork: running.Start, origin: origins.Start
) -> None:
    since_boot = int(time.monotonic()) - 5
    early = ["unshare", "--time", f"--monotonic=-{since_boot}"]
    if subprocess.run([*early, "true"], check=False, timeout=10).returncode:
        needs.unavailable("no time namespaces here")
    program = [*early, sys.executable, str(running.ROOT / "natwork.py")]
    gateway = natwork("spare_workers=1", "max_workers=1", program=program)
    with http_wire.tunnel(gateway, origin(origins.echo)), gateway.connect():
        wait.until(lambda: "all 1 workers are busy" in gateway.errors.read_text())


def test_beyond_max_workers_clients_wait_and_are_served_later(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("spare_workers=1", "max_workers=2"), origin(origins.echo)
    with (
        http_wire.tunnel(gateway, server) as first,
        http_wire.tunnel(gateway, server) as second,
    ):
        with gateway.connect() as third, gateway.connect() as fourth:
            for client in (third, fourth):
                wire.send(
                    client, http_wire.request(http_wire.DENIED, b"Connection: close")
                )
            wait.until(lambda: "all 2 workers are busy" in gateway.errors.read_text())
            assert len(gateway.workers()) == 2
            assert silent(third) and silent(fourth)
            first.close()
            assert http_wire.read_answer(third).status == 403
            third.close()  # or it would be lingered for
            assert http_wire.read_answer(fourth).status == 403
        assert wire.echoes(second)


@pytest.mark.parametrize("opening", [None, b"", b"G", b"\5"])
def test_a_full_house_of_silent_clients_lets_the_next_one_in(
    natwork: running.Start, opening: bytes | None
) -> None:
    """They are kept alive, or have said nothing, or half of what they want."""
    gateway = natwork("spare_workers=1", "max_workers=3", *PATIENT)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(gateway.connect())
            if opening is None:
                assert (
                    http_wire.exchange(
                        client, http_wire.request(http_wire.DENIED)
                    ).status
                    == 403
                )
            else:
                client.sendall(opening)
        for _ in range(4):
            newcomer = stack.enter_context(gateway.connect(timeout=5))
            assert (
                http_wire.exchange(newcomer, http_wire.request(http_wire.DENIED)).status
                == 403
            )
            assert len(gateway.workers()) <= 3
    said = gateway.errors.read_text()
    assert said.count("\nnatwork: all 3 workers are busy and clients wait") <= 1
    assert said.count("max_workers") == 1, said


def test_a_client_that_sends_on_after_its_end_keeps_no_room_from_others(
    natwork: running.Start,
) -> None:
    gateway = natwork("spare_workers=1", "max_workers=2", *PATIENT)
    over = threading.Event()

    def upload(client: socket.socket) -> None:
        """Be refused, and send what is read and thrown away, as fast as it goes."""
        client.sendall(b"no HTTP at all\r\n\r\n")
        with contextlib.suppress(OSError):
            while not over.is_set():
                client.sendall(bytes(65536))

    with gateway.connect() as rude, gateway.connect() as quiet:
        sender = threading.Thread(target=upload, args=[rude])
        sender.start()
        try:
            wait.until(lambda: any(gateway.lines()))  # it lingers
            quiet.sendall(b"G")
            assert get(gateway) == 403
        finally:
            over.set()
            sender.join()


def test_a_head_in_two_pieces_does_not_make_room(natwork: running.Start) -> None:
    def is_answered() -> bool:
        gateway = natwork("spare_workers=1", "max_workers=1", *PATIENT)
        gateway.ready(1)
        with gateway.connect() as client, gateway.connect():
            head = http_wire.request(http_wire.DENIED)
            client.sendall(head[:9])
            time.sleep(0.3)  # the master looks for room meanwhile
            with contextlib.suppress(OSError):
                client.sendall(head[9:])
                return client.recv(12) == b"HTTP/1.1 403"
        return False

    assert any(is_answered() for _ in range(3))  # this machine may have been busy


@pytest.mark.parametrize("opening", [b"\0", b"\4\0\0\1\x7f\0\0\3\0"])
def test_a_client_that_goes_on_after_a_refusal_makes_room(
    natwork: running.Start, opening: bytes
) -> None:
    gateway = natwork("spare_workers=1", "max_workers=2", *PATIENT)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(gateway.connect()) for _ in range(2)]
        for client in clients:
            client.sendall(opening)
            assert client.recv(2) in (b"HT", b"\0\x5b")  # 400, or refused by SOCKS 4
        newcomer = stack.enter_context(gateway.connect(timeout=0.5))
        newcomer.sendall(http_wire.request(http_wire.DENIED))

        def is_served() -> bool:
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sendall(b"\0")  # for this a lingering close goes on
            with contextlib.suppress(TimeoutError):
                return newcomer.recv(12) == b"HTTP/1.1 403"
            return False

        wait.until(is_served)


def test_a_full_house_does_not_disturb_who_is_served(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("spare_workers=1", "max_workers=2", *PATIENT)
    with (
        http_wire.tunnel(gateway, origin(origins.echo)) as busy,
        gateway.connect() as quiet,
    ):
        assert (
            http_wire.exchange(quiet, http_wire.request(http_wire.DENIED)).status == 403
        )
        for _ in range(3):
            assert get(gateway) == 403
            assert wire.echoes(busy)
        assert wire.at_end(quiet)  # it was the one to make room, and gracefully


def test_a_client_wakes_one_worker(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("spare_workers=6"), origin(origins.echo)  # trap 21

    def sleeps(pids: list[int]) -> list[str]:
        """How often each has gone to sleep, once they all stay asleep."""
        seen: list[list[str]] = [[]]

        def quiet() -> bool:
            seen.append([kernel.status(pid, "voluntary_ctxt_switches") for pid in pids])
            return seen[-1] == seen[-2]

        wait.until(quiet)
        return seen[-1]

    with contextlib.ExitStack() as clients:
        for _ in range(4):
            pids = gateway.ready(6)
            before = sleeps(pids)
            client = clients.enter_context(http_wire.tunnel(gateway, server))
            busy = gateway.worker_of(client)
            gateway.ready(6)
            after = sleeps(pids)
            woken = [p for p, was, now in zip(pids, before, after) if was != now]
            assert woken == [busy]


def test_short_clients_meet_few_workers(natwork: running.Start) -> None:
    gateway = natwork("spare_workers=8")
    for _ in range(20):
        gateway.ready(8)  # on a busy machine the last one may not be idle again yet
        assert get(gateway) == 403
    assert len({line["pid"] for line in gateway.lines(20)}) <= 5


def test_the_kernel_asks_no_worker_with_a_tunnel_to_take_a_client(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("spare_workers=1")

    def awaited(pid: int) -> int:
        """How many descriptors the epoll of a worker has: the lifeline is one."""
        (fd,) = kernel.opened(pid, "anon_inode:[eventpoll]")
        return kernel.read(pid, f"fdinfo/{fd}").count("tfd:")

    (idle,) = gateway.ready(1)
    assert awaited(idle) == 2
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        assert wire.echoes(client)
        assert awaited(gateway.worker_of(client)) == 1


CLIENTS = 10 * len(os.sched_getaffinity(0))


def test_idle_workers_that_are_killed_are_replaced(natwork: running.Start) -> None:
    gateway = natwork("spare_workers=8")
    for _ in range(3):
        for pid in gateway.ready(8):
            os.kill(pid, signal.SIGKILL)
        assert get(gateway) == 403


def test_clients_of_a_slow_server_do_not_wait_for_each_other(
    natwork: running.Start, origin: origins.Start
) -> None:
    come = threading.Barrier(CLIENTS, timeout=10)

    def slow(connection: socket.socket, _: origins.Origin) -> None:
        """Answer once all have asked."""
        http_wire.read_head(connection)
        come.wait()
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    gateway, server = natwork(), origin(slow)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(gateway.connect()) for _ in range(CLIENTS)]
        for client in clients:
            client.sendall(http_wire.request(server))
        assert [http_wire.read_answer(client).status for client in clients] == [
            204
        ] * len(clients)


def test_a_session_has_a_title_once_it_lasts(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, script = natwork("spare_workers=1", "max_workers=1"), http_wire.Held()
    server = origin(script)
    (worker,) = gateway.ready(1)
    with gateway.connect() as client:
        client.sendall(http_wire.request(server))
        wait.until(lambda: kernel.title(worker).endswith(" http 127.0.0.1"))
        script.go.set()
        assert http_wire.read_answer(client).status == 200


def test_clients_per_worker_of_one_gives_each_client_a_process(
    natwork: running.Start,
) -> None:
    gateway = natwork("clients_per_worker=1", "spare_workers=2")
    assert [get(gateway) for _ in range(10)] == [403] * 10
    assert len({line["pid"] for line in gateway.lines(10)}) == 10


def test_a_worker_serves_no_more_than_clients_per_worker(
    natwork: running.Start,
) -> None:
    settings = ("clients_per_worker=3", "spare_workers=1", "max_workers=1")
    gateway = natwork(*settings)
    assert [get(gateway) for _ in range(9)] == [403] * 9
    pids = [line["pid"] for line in gateway.lines(9)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3]


def test_two_hundred_clients_leave_no_descriptor_and_no_zombie(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = (
        natwork("clients_per_worker=1", "spare_workers=4"),
        origin(http_wire.Script()),
    )
    master = gateway.process.pid
    gateway.ready(4)
    before = kernel.descriptors(master)
    for _ in range(200):
        assert get(gateway, server) == 200
    gateway.ready(4)
    assert kernel.descriptors(master) == before
    wait.until(lambda: len(gateway.workers()) == 4)  # zombies would be among them


def test_a_worker_leaks_no_descriptor(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("spare_workers=1", "max_workers=1")
    server = origin(http_wire.Script())
    (worker,) = gateway.ready(1)
    before = kernel.descriptors(worker)
    for _ in range(50):
        assert get(gateway, server) == 200
        with http_wire.tunnel(gateway, origin(origins.echo)) as client:
            assert wire.echoes(client)
    gateway.ready(1)
    # A kept pipe may be among them for a moment.
    wait.until(lambda: kernel.descriptors(worker) == before)


# Leaving.


def test_term_drains(daemon: running.Start, origin: origins.Start) -> None:
    gateway, server = daemon(spare_workers="3"), origin(origins.echo)
    with (
        http_wire.tunnel(gateway, server) as client,
        gateway.connect() as kept,
        gateway.connect() as mute,
    ):
        assert (
            http_wire.exchange(kept, http_wire.request(http_wire.DENIED)).status == 403
        )
        assert len(gateway.lines(1)) == 1  # that session is over
        busy = gateway.worker_of(client)
        wait.until(lambda: kernel.title(gateway.process.pid).endswith(" 3 busy"))
        gateway.process.terminate()
        assert wire.at_end(kept) and wire.at_end(mute)
        one_is_left(gateway)  # only that has a session
        assert gateway.workers() == [busy]
        wait.until(lambda: kernel.title(gateway.process.pid).endswith(" 0 idle 1 busy"))
        assert refuses(gateway.address)
        assert wire.echoes(client) and gateway.process.poll() is None
    assert gateway.process.wait(10) == 0
    assert [line["outcome"] for line in gateway.lines(2)][1:] == ["closed"]


def test_drain_timeout_ends_the_rest(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, held = natwork("drain_timeout=1"), http_wire.Held()
    with (
        http_wire.tunnel(gateway, origin(origins.echo)) as client,
        gateway.connect() as asking,
    ):
        wire.send(asking, http_wire.request(origin(held)))
        assert held.asked.wait(10)
        gateway.process.terminate()
        assert gateway.process.wait(20) == 0
        assert wire.read_all(client) == b"" and b" 200 " not in wire.read_all(asking)
    assert [line["outcome"] for line in gateway.lines(2)] == ["drained"] * 2


def test_two_signals_that_come_together_are_two(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon()
    with http_wire.tunnel(gateway, origin(origins.echo)):
        os.kill(gateway.process.pid, signal.SIGSTOP)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            os.kill(gateway.process.pid, number)
        assert gateway.process.wait(20) == 0  # drain_timeout is 30
    assert gateway.lines(1)[0]["outcome"] == "operator"


def test_a_storm_of_hangups_does_not_keep_term_waiting(daemon: running.Start) -> None:
    gateway = daemon()
    over = threading.Event()

    def storm() -> None:
        """Send HUP, sooner again than a reload takes."""
        deadline = time.monotonic() + 20
        while not over.is_set() and time.monotonic() < deadline:
            gateway.process.send_signal(signal.SIGHUP)

    sender = threading.Thread(target=storm)
    sender.start()
    try:
        time.sleep(0.5)  # the storm itself
        gateway.process.terminate()
        assert gateway.process.wait(10) == 0
    finally:
        over.set()
        sender.join()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(
    natwork: running.Start, origin: origins.Start, second: signal.Signals
) -> None:
    gateway = natwork("drain_timeout=300")
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        gateway.process.terminate()
        one_is_left(gateway)
        assert wire.echoes(client)
        gateway.process.send_signal(second)
        assert gateway.process.wait(10) == 0
    (line,) = gateway.lines(1)
    assert line["outcome"] == "operator"


def test_ctrl_c_in_a_terminal_drains(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork()
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        os.killpg(gateway.process.pid, signal.SIGINT)  # the whole group, as a tty does
        one_is_left(gateway)
        assert wire.echoes(client)
    assert gateway.process.wait(10) == 0
    assert [line["outcome"] for line in gateway.lines(1)] == ["closed"]


def test_a_hangup_of_the_terminal_ends_no_session(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("user=root")
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        os.killpg(gateway.process.pid, signal.SIGHUP)
        wait.until(lambda: "reloaded" in gateway.errors.read_text())
        assert wire.echoes(client)


def test_an_answer_in_progress_at_term_says_close(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, held = natwork(), http_wire.Held()
    with gateway.connect() as client:
        wire.send(client, http_wire.request(origin(held)))
        assert held.asked.wait(10)
        gateway.process.terminate()
        one_is_left(gateway)
        held.go.set()
        answer = http_wire.read_answer(client)
        assert answer.body == b"at last" and answer.closes
        assert wire.at_end(client)
    assert gateway.process.wait(10) == 0


def test_who_was_in_the_queue_at_term_is_not_lost_to_a_passed_socket(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("spare_workers=1", "max_workers=1")
    with http_wire.tunnel(gateway, origin(origins.echo)), gateway.connect() as queued:
        wire.send(queued, http_wire.request(http_wire.DENIED))
        gateway.process.terminate()
        one_is_left(gateway)
        assert silent(queued)  # whoever takes the socket over serves it
    assert gateway.process.wait(10) == 0
    gateway.listener.accept()[0].close()


# Reloading.


def test_after_hup_new_requests_are_under_the_new_rules(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway, server, held = daemon(), origin(origins.echo), http_wire.Held()
    slow = origin(held)
    with (
        http_wire.tunnel(gateway, server) as old,
        gateway.connect() as kept,
        gateway.connect() as asking,
    ):
        assert (
            http_wire.exchange(kept, http_wire.request(http_wire.DENIED)).status == 403
        )
        wire.send(asking, http_wire.request(slow))
        assert held.asked.wait(10)
        assert gateway.hangup(rules="deny to *").endswith("configuration reloaded")
        assert wire.at_end(kept)
        wait.until(lambda: get(gateway, server) == 403)
        assert [get(gateway, server) for _ in range(10)] == [403] * 10
        assert wire.echoes(old)  # under the rules it began with
        held.go.set()
        answer = http_wire.read_answer(asking)
        assert answer.body == b"at last" and answer.closes and wire.at_end(asking)
        assert gateway.listening() == [gateway.address]  # said once, never closed


def test_a_client_who_has_not_spoken_yet_survives_a_reload(
    daemon: running.Start,
) -> None:
    gateway = daemon()
    master = gateway.process.pid
    wait.until(lambda: kernel.title(master).endswith(" 0 busy"))
    with gateway.connect() as client:
        wait.until(lambda: kernel.title(master).endswith(" 1 busy"))
        gateway.hangup()
        wait.until(lambda: len(gateway.workers()) <= 9)
        wire.send(client, http_wire.request(http_wire.DENIED))
        assert http_wire.read_answer(client).status == 403


def answering(connection: socket.socket, origin: origins.Origin) -> None:
    while http_wire.read_request(connection):
        connection.sendall(http_wire.OK)


def test_a_reload_loses_no_request_of_who_asks_on(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway, server, over = daemon(), origin(answering), threading.Event()
    post = http_wire.request(
        server, b"Content-Length: 5", method=b"POST", body=b"hello"
    )
    ends: list[str] = []

    def ask_on() -> None:
        while not over.is_set():
            with gateway.connect() as client:
                answer = http_wire.exchange(client, post)
                while not answer.closes and not over.is_set():
                    answer = http_wire.exchange(client, post)
                ends.append("closes" if answer.closes else "over")

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask_on) for _ in range(8)]
        for _ in range(12):
            gateway.hangup()
        over.set()
        for one in asking:
            one.result(20)  # an end without an answer would raise here
    assert ends.count("closes") >= 12


def test_no_page_of_ours_keeps_a_connection_over_a_reload(
    daemon: running.Start,
) -> None:
    gateway, held = daemon(), http_wire.Held()
    page = b"GET /proxy.pac HTTP/1.1\r\nHost: a\r\n\r\n"
    others = (
        page,
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        http_wire.request(http_wire.DENIED),
    )
    for number, asked in enumerate(others):
        with origins.Origin(held).listener as listener, gateway.connect() as client:
            server = b"127.0.0.1:%d" % listener.getsockname()[1]
            wire.send(
                client, http_wire.request(server) + asked * 2
            )  # while the first is answered
            assert held.asked.wait(10)
            assert gateway.hangup(rules=f"deny port {number + 1}").endswith("reloaded")
            held.go.set()
            assert http_wire.read_answer(client).closes and wire.at_end(client)
        held = http_wire.Held()
        gateway.hangup(rules="allow to 127.0.0.0/8")


def test_who_pipelines_pages_meets_the_new_rules(daemon: running.Start) -> None:
    gateway = daemon()
    page = b"GET /proxy.pac HTTP/1.1\r\nHost: a\r\n\r\n"
    with gateway.connect() as client:
        assert http_wire.exchange(client, page).status == 200
        sender = threading.Thread(target=lambda: wire.send(client, page * 20_000))
        sender.start()
        assert http_wire.read_answer(client).status == 200
        gateway.hangup(rules="deny to *")
        while not http_wire.read_answer(client).closes:
            pass
        sender.join(20)


def test_the_port_is_free_soon_after_the_master_was_killed(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon(drain_timeout="20", spare_workers="2")
    gateway.expected = -signal.SIGKILL
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        gateway.process.kill()
        gateway.process.wait(10)
        wait.until(lambda: refuses(gateway.address))
        assert wire.echoes(client)  # which goes on for a while


def test_reloaded_is_said_when_the_new_rules_hold(daemon: running.Start) -> None:
    gateway = daemon(spare_workers="8", rules="deny port 79")
    for port in range(80, 90):
        gateway.hangup(rules=f"deny port {port}")
        with gateway.connect() as client:
            answer = http_wire.exchange(
                client, http_wire.request(http_wire.DENIED + b":%d" % port)
            )
        assert b"rule 1" in answer.values(b"Proxy-Status")[0], port


@pytest.mark.parametrize(
    "name, value, why",
    [
        ("spare_workers", "1_0", "spare_workers = 1_0: is not a whole number"),
        ("rules", "permit to *", "rules = permit to *: "),
        ("listen", "127.0.0.1:http", "listen = 127.0.0.1:http: "),
        ("listen", "192.0.2.7:0", "cannot listen on 192.0.2.7:0: "),
        ("nonsense", "1", "nonsense = 1: there is no such setting"),
        ("log", "/nowhere/log", "cannot open the access log /nowhere/log: no such"),
    ],
)
def test_a_bad_reload_changes_nothing(
    daemon: running.Start, origin: origins.Start, name: str, value: str, why: str
) -> None:
    gateway, server = daemon(), origin(origins.echo)
    gateway.ready(8)
    with http_wire.tunnel(gateway, server) as client, gateway.connect() as kept:
        assert (
            http_wire.exchange(kept, http_wire.request(http_wire.DENIED)).status == 403
        )
        files = kernel.descriptors(gateway.process.pid)
        before, pids = len(gateway.said()), set(gateway.workers())
        answer = gateway.hangup(**{"spare_workers": "3", name: value})
        assert answer.startswith("natwork: configuration not reloaded, ")
        assert why in answer and len(gateway.said()) == before + 1
        assert pids <= set(gateway.workers())
        assert wire.echoes(client)
        assert (
            http_wire.exchange(kept, http_wire.request(http_wire.DENIED)).status == 403
        )
        assert get(gateway) == 403
        assert kernel.descriptors(gateway.process.pid) == files


def test_a_bad_reload_can_be_mended(daemon: running.Start) -> None:
    gateway = daemon(spare_workers="2")
    assert "not reloaded" in gateway.hangup(spare_workers="x")
    assert gateway.hangup(spare_workers="4").endswith("configuration reloaded")
    gateway.ready(4)


def test_a_reload_that_finds_no_old_worker_alive_is_no_error(
    daemon: running.Start,
) -> None:
    gateway = daemon(spare_workers="1")
    (old,) = gateway.ready(1)
    master = gateway.process.pid
    os.kill(master, signal.SIGSTOP)
    os.kill(master, signal.SIGHUP)
    os.kill(old, signal.SIGKILL)
    wait.until(lambda: kernel.status(old, "State")[:1] == "Z")
    os.kill(master, signal.SIGCONT)
    wait.until(lambda: "natwork: configuration reloaded" in gateway.said())
    assert not [line for line in gateway.said() if "error" in line]
    assert get(gateway) == 403


def test_reloads_under_load_lose_no_client(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway, server = daemon(spare_workers="4"), origin(http_wire.Script())
    gateway.ready(4)
    before = kernel.descriptors(gateway.process.pid)
    failures: list[object] = []
    served, over = [0, 0, 0], threading.Event()

    def ask(number: int) -> None:
        while not over.is_set():
            try:
                assert get(gateway, server) == 200
                served[number] += 1
            except (OSError, AssertionError) as failure:
                failures.append(failure)

    askers = [threading.Thread(target=ask, args=[n]) for n in range(len(served))]
    for thread in askers:
        thread.start()
    for _ in range(10):
        count = sum(served)
        assert gateway.hangup().endswith("configuration reloaded")
        wait.until(lambda: failures or sum(served) > count + 5)  # noqa: B023
    over.set()
    for thread in askers:
        thread.join()
    assert not failures, failures
    assert len(gateway.lines(sum(served))) == sum(served)
    wait.until(lambda: len(kernel.descriptors(gateway.process.pid)) == len(before))


def test_twenty_reloads_at_100_requests_a_second_fail_nobody(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon(listen="127.0.0.1:0 127.0.0.2:0", spare_workers="4")
    server, goes = origin(http_wire.Script()), gateway.listening()[1]
    began, over = time.monotonic(), threading.Event()
    wrong: list[object] = []
    served = [0, 0, 0, 0]

    def ask(number: int) -> None:
        """Begin a request every 40 ms, or as soon as the one before has ended."""
        while not over.wait(began + 0.04 * served[number] - time.monotonic()):
            try:
                assert get(gateway, server) == 200
            except (OSError, AssertionError) as failure:
                wrong.append(failure)
            served[number] += 1

    askers = [threading.Thread(target=ask, args=[n]) for n in range(len(served))]
    for thread in askers:
        thread.start()
    try:
        for number in range(20):
            if number % 5 == 0:
                gateway.log.rename(gateway.folder / f"rotated.{number}")
            if number == 7:
                assert "not reloaded" in gateway.hangup(spare_workers="x")
                gateway.settings["spare_workers"] = "4"
            elif number == 12:
                gateway.hangup(listen="127.0.0.1:0 127.0.0.3:0")
                wait.until(lambda: refuses(goes))
                with socket.create_connection(gateway.listening()[-1], 10) as client:
                    assert (
                        http_wire.exchange(
                            client, http_wire.request(http_wire.DENIED)
                        ).status
                        == 403
                    )
            else:
                assert gateway.hangup().endswith("configuration reloaded")
            assert gateway.log.exists() or number == 7
            time.sleep(0.1)
    finally:
        over.set()
        for thread in askers:
            thread.join()
    assert not wrong, wrong
    logs = [gateway.log, *gateway.folder.glob("rotated.*")]
    assert len(logs) == 5

    def lines() -> int:
        return sum(log.read_text().count("\n") for log in logs)

    wait.until(lambda: lines() == sum(served) + 1)  # and the one at the new listener
    assert sum(served) > 60 * (time.monotonic() - began), "too slow to be a test"


def test_listeners_come_and_go_with_a_reload(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway, server = daemon(listen="127.0.0.1:0 127.0.0.2:0"), origin(origins.echo)
    stays, goes = gateway.listening()
    gateway.address = goes
    with http_wire.tunnel(gateway, server) as client:
        gateway.hangup(listen="127.0.0.3:0 127.0.0.1:0")
        comes = gateway.listening()[-1]
        wait.until(lambda: refuses(goes))
        for gateway.address in (stays, comes):
            assert get(gateway) == 403
        assert len(gateway.listening()) == 3 and comes[0] == "127.0.0.3"
        assert wire.echoes(client)  # it came by the listener that is gone
    with socket.create_server(goes):  # and its port is free again
        pass


def test_who_waits_at_a_listener_that_goes_is_served(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon(
        listen="127.0.0.1:0 127.0.0.2:0", spare_workers="1", max_workers="1"
    )
    stays, goes = gateway.listening()
    with http_wire.tunnel(gateway, origin(origins.echo)) as busy:
        queued = [socket.create_connection(goes, 10) for _ in range(3)]
        gateway.hangup(listen="127.0.0.1:0", max_workers="2")
        for client in queued:
            wire.send(client, http_wire.request(http_wire.DENIED, b"Connection: close"))
            assert http_wire.read_answer(client).status == 403
            client.close()
        wait.until(lambda: refuses(goes))
        assert wire.echoes(busy)
        for pid in gateway.ready(1):
            os.kill(pid, signal.SIGKILL)
        assert get(gateway) == 403  # who is forked later knows nothing of it


def test_a_listener_may_come_back_while_clients_wait_at_it(
    daemon: running.Start, origin: origins.Start
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        second = "127.0.0.1:%d" % free.getsockname()[1]
    gateway = daemon(listen=f"127.0.0.1:0 {second}", max_workers="1")
    host, _, port = second.partition(":")
    with http_wire.tunnel(gateway, origin(origins.echo)):
        with socket.create_connection((host, int(port)), 20) as waiting:
            waiting.sendall(http_wire.request(http_wire.DENIED))
            for listen in ("127.0.0.1:0", f"127.0.0.1:0 {second}"):
                said = gateway.hangup(listen=listen)
                assert said.endswith("configuration reloaded")
    with socket.create_connection((host, int(port)), 20) as client:
        assert (
            http_wire.exchange(client, http_wire.request(http_wire.DENIED)).status
            == 403
        )


def test_the_limits_follow_a_reload(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway, server = daemon(spare_workers="4", max_workers="8"), origin(origins.echo)
    gateway.ready(4)
    with (
        http_wire.tunnel(gateway, server) as first,
        http_wire.tunnel(gateway, server) as second,
    ):
        gateway.hangup(spare_workers="1", max_workers="2")
        wait.until(lambda: len(gateway.workers()) <= 3)
        first.close()
        assert get(gateway) == 403
        assert wire.echoes(second)
        gateway.hangup(spare_workers="6", max_workers="2048")
        gateway.ready(6)
        assert wire.echoes(second)


def test_a_lowered_limit_counts_those_above_it(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway, server = daemon(spare_workers="2", max_workers="8"), origin(origins.echo)
    with contextlib.ExitStack() as opened:
        clients = [
            opened.enter_context(http_wire.tunnel(gateway, server)) for _ in range(6)
        ]
        gateway.hangup(spare_workers="2", max_workers="3")
        wait.until(
            lambda: kernel.title(gateway.process.pid).endswith("master 0 idle 6 busy")
        )
        for client in clients[:3]:
            client.close()
        wait.until(
            lambda: kernel.title(gateway.process.pid).endswith("master 0 idle 3 busy")
        )
        with gateway.connect() as waiting:  # three are served, and no fourth
            waiting.sendall(http_wire.request(http_wire.DENIED))
            assert not select.select([waiting], [], [], 1.5)[0]
            clients[5].close()
            assert http_wire.read_answer(waiting).status == 403
        assert all(wire.echoes(client) for client in clients[3:5])


def test_hup_opens_a_rotated_log_anew(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon()
    with http_wire.tunnel(gateway, origin(origins.echo)):
        assert get(gateway) == 403
        old = gateway.lines(1)
        rotated = gateway.log.rename(gateway.log.with_suffix(".1"))
        gateway.hangup()
        wait.until(gateway.log.exists)

        def arrives() -> bool:
            assert get(gateway) == 403
            return bool(gateway.log.read_text())

        wait.until(arrives)
        assert len(gateway.lines(1)) >= 1
    assert rotated.read_text().startswith(f"time={old[0]['time']} pid={old[0]['pid']} ")


# Dying.


def test_term_to_a_worker_ends_that_session_only(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("spare_workers=2"), origin(origins.echo)
    with (
        http_wire.tunnel(gateway, server) as one,
        http_wire.tunnel(gateway, server) as other,
    ):
        assert wire.echoes(one, b"12345")
        pid = gateway.worker_of(one)
        os.kill(pid, signal.SIGTERM)
        (line,) = gateway.lines(1)
        assert (line["pid"], line["outcome"]) == (str(pid), "operator")
        assert (line["up"], line["status"]) == ("5", "200")
        assert wire.echoes(other)
        gateway.ready(2)


def test_a_session_that_is_ended_in_mid_answer_keeps_its_status(
    natwork: running.Start, origin: origins.Start
) -> None:
    def handle(connection: socket.socket, origin: origins.Origin) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 203 Well\r\nContent-Length: 100\r\n\r\nhalf")
        connection.recv(1)

    gateway = natwork()
    with gateway.connect() as client:
        client.sendall(http_wire.request(origin(handle)))
        wait.until(lambda: client.recv(4096, socket.MSG_PEEK).endswith(b"half"))
        os.kill(gateway.worker_of(client), signal.SIGTERM)
        (line,) = gateway.lines(1)
    assert (line["outcome"], line["status"]) == ("operator", "203")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_killed_worker_harms_nobody_else(
    natwork: running.Start, origin: origins.Start, how: signal.Signals
) -> None:
    gateway, server = natwork("spare_workers=2"), origin(origins.echo)
    with (
        http_wire.tunnel(gateway, server) as one,
        http_wire.tunnel(gateway, server) as other,
    ):
        pid = gateway.worker_of(one)
        os.kill(pid, how)
        (line,) = gateway.lines(1)
        assert (line["pid"], line["outcome"]) == (str(pid), "killed")
        assert wire.echoes(other) and get(gateway) == 403
        gateway.ready(2)
        assert pid not in gateway.workers()


def test_who_is_killed_while_the_server_thinks_has_sent_what_he_sent(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, held = natwork(), http_wire.Held()
    server = origin(held)
    with gateway.connect() as client:
        client.sendall(http_wire.request(server))
        wait.until(lambda: server.received)
        sent, pid = sum(map(len, server.received)), gateway.worker_of(client)
        wait.until(lambda: kernel.status(pid, "State")[:1] == "S")  # and has noted it
        os.kill(pid, signal.SIGKILL)
        (line,) = gateway.lines(1)
    assert (line["outcome"], int(line["up"]), line["down"]) == ("killed", sent, "0")


def test_for_memory_the_kernel_kills_a_worker_and_not_the_master(
    natwork: running.Start,
) -> None:
    gateway = natwork("user=root")  # whose processes it may change, as the service's
    wanted = int(kernel.read(gateway.process.pid, "oom_score_adj")) + 100
    for pid in gateway.ready(8):
        wait.until(lambda pid=pid: int(kernel.read(pid, "oom_score_adj")) == wanted)


def test_killed_idle_workers_are_replaced_and_leave_no_line(
    natwork: running.Start,
) -> None:
    gateway = natwork("spare_workers=3")
    for count, pid in enumerate(gateway.ready(3), 1):
        os.kill(pid, signal.SIGKILL)
        assert get(gateway) == 403
        gateway.lines(count)  # that worker is idle again, or will be
    gateway.ready(3)
    assert [line["outcome"] for line in gateway.lines(3)] == ["denied-inside"] * 3


def test_no_worker_outlives_a_killed_master(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon(drain_timeout="1")
    gateway.expected = -signal.SIGKILL
    with (
        http_wire.tunnel(gateway, origin(origins.echo)) as client,
        gateway.connect() as kept,
    ):
        assert (
            http_wire.exchange(kept, http_wire.request(http_wire.DENIED)).status == 403
        )
        busy = gateway.worker_of(client)
        gateway.process.kill()
        gateway.process.wait(10)
        assert wire.at_end(kept)
        wait.until(lambda: alive(gateway) in ([busy], []))
        wait.until(lambda: not alive(gateway))
        assert wire.read_all(client) == b""
    assert gateway.lines(2)[-1]["outcome"] == "drained"
    with socket.create_server(gateway.address):  # free for the next one
        pass


def alive(gateway: running.Gateway) -> list[int]:
    """Return the processes of a gateway, also after the master's death."""
    return kernel.group(gateway.process.pid)


def test_a_busy_worker_finishes_after_its_master_died(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon()
    gateway.expected = -signal.SIGKILL
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        busy = gateway.worker_of(client)
        gateway.process.kill()
        wait.until(lambda: alive(gateway) == [busy])  # the idle ones leave at once
        assert wire.echoes(client)
    wait.until(lambda: not alive(gateway))
    assert [line["outcome"] for line in gateway.lines(1)] == ["closed"]


# What the kernel refuses: trap 22.


def limit(pid: int, kind: str, soft: int | str) -> None:
    """Set a soft limit of a running process, as the user that it runs as."""
    user, group = (kernel.number(pid, name) for name in ("Uid", "Gid"))
    ids = {"user": user, "group": group} if os.geteuid() == 0 else {}
    command = ["prlimit", f"--pid={pid}", f"--{kind}={soft}:"]
    subprocess.run(command, check=True, timeout=10, **ids)


def calm(*pids: int) -> bool:
    """Watch processes for a second; say whether they use little CPU."""
    before = sum(kernel.ticks(pid) for pid in pids)
    time.sleep(1)  # the observation itself
    return sum(kernel.ticks(pid) for pid in pids) - before < 0.25 * kernel.TICK


def test_a_worker_without_descriptors_serves_when_they_return(
    natwork: running.Start,
) -> None:
    gateway = natwork("spare_workers=1", "max_workers=1")
    (worker,) = gateway.ready(1)
    limit(worker, "nofile", 3)
    with gateway.connect() as client:
        wire.send(client, http_wire.request(http_wire.DENIED))
        words = "natwork: cannot accept a client: cannot open more files (limit 3)\n"
        wait.until(lambda: words in gateway.errors.read_text())
        assert calm(worker, gateway.process.pid)
        assert silent(client)
        assert gateway.errors.read_text().count(words) <= 5  # one a second
        limit(worker, "nofile", 1024)
        assert http_wire.read_answer(client).status == 403
    assert gateway.workers() == [worker]


def test_workers_without_descriptors_do_not_multiply(natwork: running.Start) -> None:
    gateway = natwork("spare_workers=2", "max_workers=40")
    workers = gateway.ready(2)
    for worker in workers:
        limit(worker, "nofile", 3)
    with gateway.connect() as client:
        wire.send(client, http_wire.request(http_wire.DENIED))
        words = "natwork: cannot accept a client: cannot open more files (limit 3)\n"
        wait.until(lambda: words in gateway.errors.read_text())
        time.sleep(1.5)  # the observation itself
        assert sorted(gateway.workers()) == sorted(workers)
        for worker in workers:
            limit(worker, "nofile", 1024)
        assert http_wire.read_answer(client).status == 403


def test_no_descriptor_for_the_server_is_an_answer(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = (
        natwork("spare_workers=1", "max_workers=1"),
        origin(http_wire.Script()),
    )
    (worker,) = gateway.ready(1)
    free = min(set(range(64)) - set(kernel.descriptors(worker)))
    with gateway.connect() as client:
        denied = http_wire.request(http_wire.DENIED)
        assert http_wire.exchange(client, denied).status == 403
        limit(worker, "nofile", free + 1)  # one for the client, and no more
        answer = http_wire.exchange(client, http_wire.request(server))
        assert answer.status == 503 and answer.values(b"Retry-After")
    limit(worker, "nofile", 1024)
    assert get(gateway, server) == 200
    assert [line["outcome"] for line in gateway.lines(3)][1:] == ["overload", "ok"]
    said = "natwork: a session had to end: "
    assert any(said in line and "(limit " in line for line in gateway.said())


def test_a_failing_fork_is_said_once_and_tried_again(daemon: running.Start) -> None:
    # The limit is for ordinary users only.
    gateway = daemon(spare_workers="2", user="nobody")
    master, words = gateway.process.pid, "natwork: cannot fork a worker: "
    pids = gateway.ready(2)
    limit(master, "nproc", 1)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    with gateway.connect() as client:
        wire.send(client, http_wire.request(http_wire.DENIED))
        wait.until(lambda: words in gateway.errors.read_text())
        assert calm(master) and silent(client)
        assert gateway.errors.read_text().count(words) == 1
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        limit(master, "nproc", "unlimited" if hard < 0 else hard)
        assert http_wire.read_answer(client).status == 403
    gateway.ready(2)


@contextlib.contextmanager
def ordinary(user: str) -> Iterator[running.Gateway]:
    """Run a gateway with four spares as a user whose processes are limited."""
    if os.geteuid():
        pytest.skip("needs root, and a user that is not")
    with running.public_folder() as folder:
        gateway = running.Gateway.configured(folder, spare_workers="4", user=user)
        try:
            yield gateway
        finally:
            gateway.stop()


def test_a_reload_that_cannot_fork_takes_effect_when_it_can() -> None:
    with ordinary("nobody") as gateway:
        master, old = gateway.process.pid, gateway.ready(4)
        limit(master, "nproc", 1)
        gateway.process.send_signal(signal.SIGHUP)
        wait.until(lambda: any("cannot fork" in line for line in gateway.said()))
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        limit(master, "nproc", "unlimited" if hard < 0 else hard)
        wait.until(lambda: any("reloaded" in line for line in gateway.said()))
        wait.until(lambda: not set(old) & set(gateway.workers()))
        assert get(gateway) == 403


def test_a_reload_takes_effect_where_the_old_workers_hold_all_the_room() -> None:
    with ordinary("daemon") as gateway:
        gateway.ready(4)
        limit(gateway.process.pid, "nproc", 5)
        assert get(gateway, http_wire.CLOSED) == 502
        assert "configuration reloaded" in gateway.hangup(rules="")
        assert get(gateway, http_wire.CLOSED) == 403
        gateway.ready(4)


def test_a_reload_in_a_full_house_leaves_nothing_open(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway, server = daemon(spare_workers="1", max_workers="2"), origin(origins.echo)
    master = gateway.process.pid
    assert get(gateway) == 403  # it has done warming up
    before = len(kernel.descriptors(master))
    with http_wire.tunnel(gateway, server), http_wire.tunnel(gateway, server):
        for number in range(6):
            gateway.log.rename(gateway.folder / f"log.{number}")
            gateway.process.send_signal(signal.SIGHUP)
            wait.until(gateway.log.exists)
        wait.until(
            lambda: len(kernel.descriptors(master)) <= before + 6
        )  # two generations
    wait.until(lambda: len(kernel.descriptors(master)) == before)
    # A generation that never had a worker has nobody to tell.
    assert [line for line in gateway.said() if "error" in line] == []


def test_the_warming_up_takes_little_whatever_gives_out_the_memory(
    natwork: running.Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    gateway = natwork("spare_workers=1")
    gateway.ready(1)
    assert kernel.number(gateway.process.pid, "VmRSS") < 100_000  # KiB


def test_a_signal_is_not_lost_whatever_workers_write(natwork: running.Start) -> None:
    gateway = natwork("spare_workers=1")
    (worker,) = gateway.ready(1)
    os.kill(gateway.process.pid, signal.SIGSTOP)
    filled, pipes = 0, []
    for fd in kernel.descriptors(worker):  # all that it may write to without a client
        place = f"/proc/{worker}/fd/{fd}"
        if os.readlink(place).startswith("pipe:"):
            with contextlib.suppress(OSError):
                pipes.append(os.open(place, os.O_WRONLY | os.O_NONBLOCK))
    for pipe in pipes:  # one of them sends it away
        with contextlib.suppress(BlockingIOError), open(pipe, "wb", 0) as full:
            while written := full.write(b"p" * 4096):
                filled += written
    assert filled >= 65536
    gateway.process.send_signal(signal.SIGTERM)
    os.kill(gateway.process.pid, signal.SIGCONT)
    assert gateway.process.wait(20) == 0


def test_workers_that_cannot_start_are_no_fork_storm(natwork: running.Start) -> None:
    gateway = natwork("spare_workers=8")
    master = gateway.process.pid
    pids = gateway.ready(8)
    limit(master, "nofile", 4)  # inherited: no epoll for them
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait.until(lambda: not set(pids) & set(gateway.workers()))
    before = len(gateway.errors.read_text())
    assert calm(master)
    assert gateway.errors.read_text()[before:].count("\n") <= 10
    limit(master, "nofile", 1024)
    gateway.ready(8)
    assert get(gateway) == 403


def test_descriptors_that_run_out_at_a_reload_change_nothing(
    daemon: running.Start,
) -> None:
    gateway = daemon(listen="127.0.0.1:0")
    master = gateway.process.pid
    gateway.ready(8)
    before = kernel.descriptors(master)
    free = min(set(range(64)) - set(before))
    for count in range(5):  # the file, a listener, the log, a pipe: fewer than these
        limit(master, "nofile", free + count)
        said = gateway.hangup(listen="127.0.0.2:0 127.0.0.1:0")
        limit(master, "nofile", 1024)
        if said.endswith("configuration reloaded"):
            break
        assert "cannot open more files (limit " in said
        assert kernel.descriptors(master) == before and get(gateway) == 403
    assert gateway.hangup().endswith("configuration reloaded")
    wait.until(lambda: get(gateway) == 403)


def test_memory_that_runs_out_at_a_reload_changes_nothing(
    daemon: running.Start,
) -> None:
    gateway = daemon()
    assert get(gateway) == 403  # it has done warming up
    limit(
        gateway.process.pid, "as", 1024 * kernel.number(gateway.process.pid, "VmSize")
    )
    said = gateway.hangup(rules="deny port 1\n" + " # a long comment\n" * 500_000)
    assert said.endswith("the old one stays: no memory for it")
    assert get(gateway) == 403
    limit(gateway.process.pid, "as", "unlimited")
    assert gateway.hangup(rules="deny port 2").endswith("configuration reloaded")


def test_the_pid_file_is_the_masters_alone(daemon: running.Start) -> None:
    gateway = daemon(pidfile="natwork.pid", clients_per_worker="1")  # trap 20
    pidfile = gateway.folder / "natwork.pid"
    for _ in range(5):
        assert get(gateway) == 403
    os.kill(gateway.ready(8)[0], signal.SIGTERM)
    gateway.ready(8)
    assert pidfile.read_text() == f"{gateway.process.pid}\n"
    gateway.stop()
    assert not pidfile.exists()


def test_a_burst_of_signals_kills_nobody(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("clients_per_worker=1", "user=root")  # traps 17, 18 and 19
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        for _ in range(50):
            gateway.process.send_signal(signal.SIGCHLD)
            gateway.process.send_signal(signal.SIGHUP)
            for pid in gateway.workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGHUP)
        assert get(gateway) == 403
        assert wire.echoes(client)
