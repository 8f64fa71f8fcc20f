"""The jobs service, judged by a plain grpcio client: the contract of jobs.proto, its limits, and what breaks around it."""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from zerodeploy_agent.foundprocess import start_of

from tests.conftest import alive, kill, wait_until
from tests.jobserver import PROTO, JobsServer, Stub, make_pki, pb
from zerodeploy.jobs import certificates

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def server(pki, tmp_path_factory):
    made = JobsServer(pki, tmp_path_factory.mktemp("jobs") / "state")
    yield made
    made.close()


@pytest.fixture
def own(pki, tmp_path):
    """Makes servers of one state directory, for tests that break them."""
    made = []

    def make(*options: str) -> JobsServer:
        made.append(JobsServer(pki, tmp_path / "state", *options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def alice(server):
    with server.client() as stub:
        yield stub


@pytest.fixture
def bob(server):
    with server.client("bob") as stub:
        yield stub


def refused(call, code: grpc.StatusCode, match: str = "") -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code, caught.value
    assert match in caught.value.details()
    return caught.value.details()


# the contract


def test_the_descriptor_is_that_of_the_proto_file(tmp_path):
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    target = tmp_path / "jobs.binpb"
    assert (
        protoc.main(
            [
                "",
                f"-I{PROTO.parent}",
                f"-I{os.path.dirname(protoc.__file__)}/_proto",
                f"--descriptor_set_out={target}",
                "jobs.proto",
            ]
        )
        == 0
    )
    ours = descriptor_pb2.FileDescriptorSet.FromString((PROTO.parent / "jobs.binpb").read_bytes())
    assert ours == descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes())


def test_a_job_from_start_to_end(alice, tmp_path):
    job = alice.start(
        sys.executable, "-c", "import os, sys\nprint(os.getcwd(), os.environ['ZD_X'])\nprint('err', file=sys.stderr)\nsys.exit(7)",
        env={"ZD_X": "é"}, cwd=str(tmp_path), label="a label",
    )  # fmt: skip
    assert len(job.id) == 32 and job.state == pb().STATE_RUNNING and job.pid > 0 and (job.owner, job.label) == ("alice", "a label")
    assert job.command == sys.executable and job.args[0] == "-c" and not job.HasField("exit_code") and not job.HasField("ended")
    pieces = list(alice.pieces(job.id))
    text = {stream: b"".join(piece.data for piece in pieces if piece.stream == stream).decode() for stream in (1, 2)}
    assert text == {1: f"{tmp_path} é\n", 2: "err\n"}
    assert [piece.offset for piece in pieces] == [sum(len(piece.data) for piece in pieces[:at]) for at in range(len(pieces))]
    assert all(piece.time.seconds > 1.7e9 for piece in pieces)
    end = alice.ended(job.id)
    assert (end.state, end.exit_code, end.HasField("signal"), end.stopped_by_request) == (pb().STATE_EXITED, 7, False, False)
    assert (end.stdout_bytes, end.stderr_bytes, end.dropped_bytes) == (len(text[1].encode()), 4, 0)
    assert (
        end.created.ToDatetime() <= end.ended.ToDatetime()
        and end.usage.max_rss_bytes > 1 << 20
        and end.usage.user_seconds + end.usage.system_seconds > 0
    )
    assert alice.status(job.id) == end
    assert b"".join(piece.data for piece in alice.GetOuput(pb().GetOutputRequest(id=job.id))) == b"".join(p.data for p in pieces)


def test_signals_and_stops(alice):
    job = alice.start("sleep", "1000")
    assert alice.Signal(pb().SignalRequest(id=job.id, signal=signal.SIGSTOP)).state == pb().STATE_RUNNING
    end = alice.stop(job.id)
    assert (end.state, end.signal, end.HasField("exit_code"), end.stopped_by_request) == (pb().STATE_SIGNALED, 15, False, True)
    assert alice.stop(job.id) == end
    refused(lambda: alice.Signal(pb().SignalRequest(id=job.id, signal=9)), Code.FAILED_PRECONDITION, "ended")
    job = alice.start("sleep", "1000")
    for number in (0, -1, 65, 32, 1 << 20):
        refused(lambda number=number: alice.Signal(pb().SignalRequest(id=job.id, signal=number)), Code.INVALID_ARGUMENT)
    for grace in (-1.0, float("nan"), float("-inf")):
        refused(lambda grace=grace: alice.stop(job.id, grace_seconds=grace), Code.INVALID_ARGUMENT)
    assert alice.status(job.id).state == pb().STATE_RUNNING
    alice.Signal(pb().SignalRequest(id=job.id, signal=9))
    assert alice.ended(job.id).signal == 9


STUBBORN = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(1000)"


def test_the_grace(alice):
    job = alice.start(sys.executable, "-c", STUBBORN)
    next(iter(alice.pieces(job.id)))
    with pytest.raises(grpc.RpcError) as caught:
        alice.Stop(pb().StopRequest(id=job.id, no_kill=True), timeout=0.3)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED and alice.status(job.id).state == pb().STATE_STOPPING
    for endless in (float("inf"), 1e300):
        with pytest.raises(grpc.RpcError):
            alice.Stop(pb().StopRequest(id=job.id, grace_seconds=endless), timeout=0.1)
    began = time.monotonic()
    assert alice.stop(job.id, grace_seconds=0.5).signal == 9 and time.monotonic() - began < 5
    job = alice.start(sys.executable, "-c", STUBBORN)
    next(iter(alice.pieces(job.id)))
    with pytest.raises(grpc.RpcError):  # nobody waits for the kill
        alice.Stop(pb().StopRequest(id=job.id, grace_seconds=0.5), timeout=0.1)
    assert alice.ended(job.id).signal == 9


def test_stop_sees_to_the_whole_group(alice):
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {STUBBORN!r}])\ntime.sleep(1000)"
    job = alice.start(sys.executable, "-c", code)
    next(iter(alice.pieces(job.id)))
    assert alice.stop(job.id, grace_seconds=0.4).signal == 15
    assert not [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if group_of(pid) == job.pid and alive(pid)]


def group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return -1


def test_what_is_refused(alice, tmp_path):
    request = pb().JobRequest
    for bad in (request(), request(command="a\0b"), request(command="true", args=["\0"]), request(command="true", cwd="/\0"),
                request(command="true", env={"a": "\0"}), request(command="true", env={"": "x"}), request(command="true", env={"a=b": "x"}),
                request(command="true", limits={"cpus": -1}), request(command="true", limits={"cpus": float("nan")})):  # fmt: skip
        refused(lambda bad=bad: alice.Start(bad), Code.INVALID_ARGUMENT)
    count = sum(1 for _ in jobs_of(alice))
    for bad, number in ((request(command="zd-no-such"), 2), (request(command="/"), 13), (request(command="/etc/passwd"), 13),
                        (request(command="true", cwd=str(tmp_path / "none")), 2), (request(command="true", args=["x" * (1 << 18)]), 7)):  # fmt: skip
        refused(lambda bad=bad: alice.Start(bad), Code.FAILED_PRECONDITION, f"[Errno {number}]")
    for name in ("pids", "io_bytes_per_s"):
        text = f"the limit {name}"
        try:
            alice.stop(alice.Start(request(command="true", limits={name: 1 << 20})).id)  # where cgroups are delegated
        except grpc.RpcError as error:
            assert error.code() is Code.FAILED_PRECONDITION and text in error.details()
            count -= 1
        count += 1
    refused(lambda: alice.Start(request(command="true", limits={"open_files": 1 << 62})), Code.FAILED_PRECONDITION, "open_files")
    assert sum(1 for _ in jobs_of(alice)) == count, "none of these is a job"
    refused(lambda: alice.Start(request(command="true", args=["x"] * 5_000_000), timeout=30), Code.RESOURCE_EXHAUSTED, "bytes")


def test_long_words_are_cut_in_errors_and_hold_nobody_up(alice, bob):
    for request in (pb().JobRequest(command="x" * 3_000_000), pb().JobRequest(command="true", cwd="/" + "y" * 3_000_000)):
        call = alice.Start.future(request, timeout=30)
        began = time.monotonic()
        assert bob.List(pb().ListRequest(page_size=1), timeout=10) is not None and time.monotonic() - began < 5
        assert call.exception().code() is Code.FAILED_PRECONDITION and len(call.exception().details()) < 1000
    refused(lambda: alice.start("true", label="x" * 1025), Code.INVALID_ARGUMENT, "label")
    refused(lambda: alice.start("true", idempotency_key="x" * 1025), Code.INVALID_ARGUMENT, "key")


def test_a_list_stays_below_what_clients_take(own):
    server = own()
    with server.client() as stub:
        for _ in range(5):
            stub.start("true", *["x" * 100_000] * 18)
        assert len(stub.List(pb().ListRequest()).jobs) == 1 and len(list(jobs_of(stub))) == 5


def test_jobs_hear_every_signal(pki, tmp_path):
    """Also those that the server was told to ignore, as one in the background of a shell is."""
    code = "import os, signal, sys\nfor n in (1, 2, 3): signal.signal(n, signal.SIG_IGN)\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    state = tmp_path / "state"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "-m", "zerodeploy", "jobs", "serve", "--listen", "127.0.0.1:0", "--cacert", "ca.crt", "--cert", "server.crt",
         "--key", "server.key", "--state-dir", str(state)],
        cwd=pki, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = process.stdout.readline().split(" listens on 127.0.0.1:")[1].split(";")[0]
        made = JobsServer.__new__(JobsServer)
        made.pki, made.port = pki, int(port)
        with made.client() as stub:
            job = stub.start("sh", "-c", "grep -E 'Sig(Ign|Blk)' /proc/self/status; exec sleep 1000")
            text = next(iter(stub.pieces(job.id))).data.decode()
            glibcs = 3 << 31  # its own signals, 32 and 33, are nobody else's to set
            assert {line.split()[0]: int(line.split()[1], 16) & ~glibcs for line in text.splitlines()} == {
                "SigBlk:": 0,
                "SigIgn:": 0,
            }
            for number in (1, 2, 3):
                job = stub.start("sleep", "1000")
                stub.Signal(pb().SignalRequest(id=job.id, signal=number))
                assert stub.ended(job.id).signal == number
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_a_new_server_brings_its_own_environment_and_options(own, pki, tmp_path, monkeypatch):
    monkeypatch.setenv("ZD_WHICH", "old")
    server = own("--grace", "1000", "--output-quota", "10")
    with server.client() as stub:
        before = stub.start("sleep", "1000")
        server.kill()
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "zd-new").write_text("#!/bin/sh\necho $ZD_WHICH and a lot more than ten bytes\n")
    (folder / "zd-new").chmod(0o755)
    monkeypatch.setenv("ZD_WHICH", "new")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    server = own("--grace", "0.3")
    with server.client() as stub:
        assert stub.output(stub.start("zd-new", env={"PATH": "/usr/bin"}).id) == b"new and a lot more than ten bytes\n"
        stubborn = stub.start(sys.executable, "-c", STUBBORN)
        next(iter(stub.pieces(stubborn.id)))
        assert stub.stop(stubborn.id).signal == 9 and stub.stop(before.id).signal == 15


def test_stop_of_a_job_whose_leader_has_ended(alice):
    job = alice.start("sh", "-c", "(trap '' TERM; exec sleep 1000 > /dev/null 2>&1) & sleep 1000 > /dev/null 2>&1 & exit 3")
    assert alice.ended(job.id).exit_code == 3
    members = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if group_of(pid) == job.pid and alive(pid)]
    assert len(members) == 2, "they live on"
    refused(lambda: alice.Signal(pb().SignalRequest(id=job.id, signal=9)), Code.FAILED_PRECONDITION)
    assert alice.stop(job.id, grace_seconds=0.3).exit_code == 3
    assert not any(alive(pid) for pid in members)


def test_sigterm_of_the_server_ends_what_leaders_have_left(own):
    server = own("--grace", "0.3")
    with server.client() as stub:
        job = stub.start("sh", "-c", "(trap '' TERM; exec sleep 1000 > /dev/null 2>&1) & echo $!; exit 0")
        pid = int(stub.output(job.id))
        assert stub.ended(job.id).exit_code == 0 and alive(pid)
    assert server.terminate() == 0 and not alive(pid)


def test_a_gap_is_of_the_stream_that_lacks_bytes(alice):
    job = alice.start("sh", "-c", "printf 1234567890abc; sleep 0.2; exit 0", limits={"output_bytes": 10})
    assert alice.ended(job.id).dropped_bytes == 3
    assert [(piece.stream, piece.gap_bytes) for piece in alice.pieces(job.id) if piece.gap_bytes] == [(1, 3)]
    assert list(alice.pieces(job.id, streams=[2])) == []
    job = alice.start("sh", "-c", "printf 1234567890abc; printf xyz >&2", limits={"output_bytes": 10})
    assert alice.ended(job.id).dropped_bytes == 6
    for streams in ([], [1], [2]):
        assert [(piece.stream, piece.gap_bytes) for piece in alice.pieces(job.id, streams=streams) if piece.gap_bytes] == [(0, 6)]


def test_the_final_status_has_all_bytes(alice):
    for _ in range(5):
        job = alice.start("cat", "/dev/zero", limits={"output_bytes": 1_000_000})
        wait_until(lambda job=job: alice.status(job.id).stdout_bytes > 1_000_000, 10, "it writes")
        assert alice.stop(job.id) == alice.status(job.id)


def test_limits_that_rlimits_enforce(alice):
    job = alice.start(
        "sh", "-c", "ulimit -n; ulimit -v; ulimit -t", limits={"open_files": 77, "memory_bytes": 1 << 30, "cpu_seconds": 5}
    )
    words = alice.output(job.id).split()
    assert words[0] == b"77" and words[2] == b"5"
    job = alice.start(sys.executable, "-c", "while True: pass", limits={"cpu_seconds": 1})
    assert alice.ended(job.id).signal in (signal.SIGXCPU, signal.SIGKILL)
    job = alice.start("sleep", "1000", limits={"wall_seconds": 1})
    end = alice.ended(job.id)
    assert end.signal == 15 and not end.stopped_by_request and end.error == "its wall_seconds (1) were over"


def test_the_quota_is_a_gap(alice):
    job = alice.start("sh", "-c", "head -c 3000000 /dev/zero; echo end >&2", limits={"output_bytes": 1_000_000})
    pieces = list(alice.pieces(job.id))
    end = alice.ended(job.id)
    assert sum(len(piece.data) for piece in pieces) == 1_000_000 and end.exit_code == 0
    gaps = [piece for piece in pieces if piece.gap_bytes]  # of a job that runs on there may be several, one behind the other
    assert gaps[0].offset == 1_000_000 and gaps == pieces[-len(gaps) :] and not any(piece.data for piece in gaps)
    assert sum(piece.gap_bytes for piece in gaps) == 2_000_004 and all(piece.time.seconds for piece in gaps)
    assert end.dropped_bytes == 2_000_004 and end.stdout_bytes + end.stderr_bytes == 3_000_004
    assert [piece.gap_bytes for piece in alice.pieces(job.id, from_offset=2_000_000)] == [1_000_004]


def test_offsets_streams_and_no_follow(alice):
    job = alice.start("sh", "-c", "printf 0123456789; sleep 0.3; printf abc >&2; sleep 0.3; printf XYZ")
    early = alice.pieces(job.id, from_offset=12)  # not reached yet
    assert b"".join(piece.data for piece in early) == b"cXYZ"
    assert alice.output(job.id, from_offset=3) == b"3456789abcXYZ"
    assert alice.output(job.id, streams=[2]) == b"abc" and alice.output(job.id, streams=[1]) == b"0123456789XYZ"
    assert alice.output(job.id, streams=[1, 2, 1]) == b"0123456789abcXYZ" and alice.output(job.id, from_offset=16) == b""
    refused(lambda: list(alice.pieces(job.id, from_offset=17)), Code.OUT_OF_RANGE, "16 bytes")
    refused(lambda: list(alice.pieces(job.id, streams=[0])), Code.INVALID_ARGUMENT)
    job = alice.start("sh", "-c", "echo now; exec sleep 1000")
    wait_until(lambda: alice.status(job.id).stdout_bytes, 5, "it has written")
    assert alice.output(job.id, no_follow=True) == b"now\n" and alice.output(job.id, no_follow=True, from_offset=1000) == b""
    waiting = alice.pieces(job.id, from_offset=1000)
    threading.Timer(0.2, lambda: alice.stop(job.id)).start()
    refused(lambda: list(waiting), Code.OUT_OF_RANGE)


def test_a_grandchild_that_keeps_the_pipe_does_not_hang_the_end(alice):
    job = alice.start("sh", "-c", "sleep 1000 & echo $!; exit 0")
    began = time.monotonic()
    pid = int(alice.output(job.id))
    try:
        assert time.monotonic() - began < 10 and alice.status(job.id).exit_code == 0
    finally:
        kill(pid)


def test_watch_status(alice):
    job = alice.start(sys.executable, "-c", STUBBORN)
    next(iter(alice.pieces(job.id)))
    seen = []

    def watch() -> None:
        seen.extend(status.state for status in alice.WatchStatus(pb().StatusRequest(id=job.id)))

    thread = threading.Thread(target=watch)
    thread.start()
    wait_until(lambda: seen, 5, "it watches")
    alice.stop(job.id, grace_seconds=0.3)
    thread.join(10)
    assert seen == [pb().STATE_RUNNING, pb().STATE_STOPPING, pb().STATE_SIGNALED]
    assert [status.state for status in alice.WatchStatus(pb().StatusRequest(id=job.id))] == [pb().STATE_SIGNALED]


def jobs_of(stub: Stub, **fields):
    token = ""
    while True:
        page = stub.List(pb().ListRequest(page_token=token, **fields))  # type: ignore[attr-defined]
        yield from page.jobs
        token = page.next_page_token
        if not token:
            return


def test_list_has_pages(bob, alice):
    alice.start("true")
    ids = [bob.start("echo", str(number)).id for number in range(23)]
    assert all(bob.ended(id).exit_code == 0 for id in ids)
    assert [job.id for job in jobs_of(bob)] == ids and {job.owner for job in jobs_of(bob)} == {"bob"}
    assert [job.id for job in jobs_of(bob, page_size=10)] == ids and len(bob.List(pb().ListRequest(page_size=10)).jobs) == 10
    assert [job.id for job in jobs_of(bob, page_size=23)] == ids and bob.List(pb().ListRequest(page_size=23)).next_page_token == ""
    assert list(jobs_of(bob, states=[pb().STATE_RUNNING])) == []
    assert [job.id for job in jobs_of(bob, states=[pb().STATE_EXITED, pb().STATE_RUNNING], page_size=4)] == ids
    for bad in ("x", "AAAA", "W10=", "é", "bnVsbA=="):
        refused(lambda bad=bad: bob.List(pb().ListRequest(page_token=bad)), Code.INVALID_ARGUMENT, "page_token")
    refused(lambda: bob.List(pb().ListRequest(states=[0])), Code.INVALID_ARGUMENT)


def test_idempotency(alice, bob):
    request = pb().JobRequest(command="echo", args=["once"], idempotency_key="the key")
    with ThreadPoolExecutor(16) as pool:
        ids = {job.id for job in pool.map(lambda _: alice.Start(request), range(32))}
    assert len(ids) == 1
    assert bob.Start(request).id not in ids and alice.Start(pb().JobRequest(command="false", idempotency_key="the key")).id in ids


# who may what


def test_a_foreign_job_is_a_missing_one(alice, bob):
    job = alice.start("sh", "-c", "echo mine; exec sleep 1000")
    calls = {
        "Status": lambda id: bob.status(id), "Stop": lambda id: bob.stop(id), "GetOutput": lambda id: list(bob.pieces(id)),
        "GetOuput": lambda id: list(bob.GetOuput(pb().GetOutputRequest(id=id))), "WatchStatus": lambda id: bob.ended(id),
        "Signal": lambda id: bob.Signal(pb().SignalRequest(id=id, signal=9)),
    }  # fmt: skip
    for name, call in calls.items():
        texts = {refused(lambda id=id, call=call: call(id), Code.NOT_FOUND)
                 for id in (job.id, "0" * 32, "", "x", job.id[:-1], job.id.upper(), "../" + job.id, "é\n\0", "x" * 100_000)}  # fmt: skip
        assert texts == {"no such job"}, name
    assert alice.status(job.id).state == pb().STATE_RUNNING and job.id not in {each.id for each in jobs_of(bob)}
    took: dict[str, list[float]] = {job.id: [], "f" * 32: []}
    for _ in range(150):
        for id, times in took.items():
            began = time.perf_counter()
            refused(lambda id=id: bob.status(id), Code.NOT_FOUND)
            times.append(time.perf_counter() - began)
    foreign, missing = (statistics.median(times) for times in took.values())
    assert 0.5 < foreign / missing < 2
    alice.stop(job.id)


def leaf(pki: Path, subject: list[tuple[str, str]], *, usage: str = "client", expired: bool = False, name: str = "odd") -> str:
    """A certificate of the tests' authority that ours would not make."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    ca = x509.load_pem_x509_certificate((pki / "ca.crt").read_bytes())
    ca_key = serialization.load_pem_private_key((pki / "ca.key").read_bytes(), None)
    oids = {"CN": x509.NameOID.COMMON_NAME, "O": x509.NameOID.ORGANIZATION_NAME}
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder().subject_name(x509.Name([x509.NameAttribute(oids[kind], value) for kind, value in subject]))
        .issuer_name(ca.subject).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9)).not_valid_after(now + datetime.timedelta(days=-1 if expired else 9))
    )  # fmt: skip
    oid = {
        "client": x509.ExtendedKeyUsageOID.CLIENT_AUTH,
        "server": x509.ExtendedKeyUsageOID.SERVER_AUTH,
        "code": x509.ExtendedKeyUsageOID.CODE_SIGNING,
    }
    builder = builder.add_extension(x509.ExtendedKeyUsage([oid[usage]]), critical=False)
    (pki / f"{name}.crt").write_bytes(builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))  # type: ignore[arg-type]
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (pki / f"{name}.key").write_bytes(private)
    return name


@pytest.mark.parametrize(
    "subject", [[], [("O", "x")], [("CN", "alice"), ("CN", "bob")], [("CN", "alice"), ("O", "x"), ("CN", "alice")]]
)
def test_not_exactly_one_common_name(server, pki, subject):
    with server.client(leaf(pki, subject)) as stub:
        refused(lambda: stub.status("x"), Code.UNAUTHENTICATED, "exactly one common name")
        refused(lambda: list(stub.pieces("x")), Code.UNAUTHENTICATED)
        refused(lambda: stub.start("true"), Code.UNAUTHENTICATED)


@pytest.mark.parametrize("wrong", ["server", "code", "expired", "other authority"])
def test_certificates_that_are_no_good(server, pki, tmp_path, wrong):
    if wrong == "other authority":
        make_pki(tmp_path)
        for ending in ("crt", "key"):
            (pki / f"odd.{ending}").write_bytes((tmp_path / f"alice.{ending}").read_bytes())
    elif wrong == "expired":
        leaf(pki, [("CN", "alice")], expired=True)
    else:
        leaf(pki, [("CN", "alice")], usage=wrong)
    with server.client("odd") as stub:
        refused(lambda: stub.status("x"), Code.UNAVAILABLE)


def raw(server: JobsServer, data: bytes) -> bytes:
    """What the server says to *data*, until it hangs up or falls silent."""
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        sock.settimeout(2)
        heard = b""
        try:
            sock.sendall(data)
            while got := sock.recv(4096):
                heard += got
        except OSError:
            pass
        return heard


def test_a_scan_of_malformed_tls(server, pki, alice):
    alice.status(alice.start("true").id)
    before = server.fds()
    noise = random.Random(3)
    hello = bytes.fromhex("16030100050100000103")
    for data in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", b"\x16\x03\x01\xff\xff" + b"\0" * 70000,
                 hello, b"SSH-2.0-x\r\n", *(b"\x16\x03\x01" + noise.randbytes(noise.randrange(300)) for _ in range(40)),
                 *(noise.randbytes(noise.randrange(1, 600)) for _ in range(40))):  # fmt: skip
        if data in (b"", b"\0", hello):  # nobody waits for the rest of these but the server's own deadline
            socket.create_connection(("127.0.0.1", server.port), 5).close()
            continue
        assert not raw(server, data).startswith(b"\0\0"), "no HTTP/2 in the clear"
    assert alice.status(alice.start("true").id).id
    wait_until(lambda: server.fds() <= before, 15, "the connections are gone")
    for version, ok in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "alice.crt", pki / "alice.key")
        context.set_alpn_protocols(["h2"])
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = version
        with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
            if ok:
                with context.wrap_socket(sock, server_hostname="localhost") as tls:
                    assert tls.version() == "TLSv1.3" and tls.selected_alpn_protocol() == "h2"
            else:
                with pytest.raises(ssl.SSLError):
                    context.wrap_socket(sock, server_hostname="localhost")
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))  # no certificate at all
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock, pytest.raises((ssl.SSLError, OSError)):
        with context.wrap_socket(sock, server_hostname="localhost") as tls:
            tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            while True:
                if not tls.recv(1000):
                    raise ConnectionResetError


def test_the_client_checks_the_servers_name(server, pki):
    with grpc.secure_channel(f"127.0.0.2:{server.port}", server.credentials()) as channel:
        refused(lambda: Stub(channel).status("x"), Code.UNAVAILABLE)


def test_fuzzed_requests(server, alice):
    noise = random.Random(11)
    with grpc.secure_channel(f"localhost:{server.port}", server.credentials()) as channel:
        bare = {
            name: channel.unary_unary(f"/zerodeploy.jobs.v1.JobService/{name}")
            for name in ("Start", "Status", "Stop", "Signal", "List", "Nothing")
        }
        streams = {
            name: channel.unary_stream(f"/zerodeploy.jobs.v1.JobService/{name}")
            for name in ("GetOutput", "GetOuput", "WatchStatus")
        }
        seen = set()
        for _ in range(300):
            data = noise.randbytes(noise.randrange(60))
            name = noise.choice([*bare, *streams])
            try:
                if name in bare:
                    bare[name](data, timeout=20)
                else:
                    list(streams[name](data, timeout=20))
            except grpc.RpcError as error:
                seen.add(error.code())
        assert seen <= {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.FAILED_PRECONDITION}, seen
        assert Code.UNIMPLEMENTED in seen and Code.INVALID_ARGUMENT in seen
    assert server.process.poll() is None and alice.ended(alice.start("true").id).exit_code == 0


# many


NOISY = "import sys, random\nr = random.Random(7)\nfor i in range(3000):\n    f = sys.stdout if r.random() < 0.7 else sys.stderr\n    f.buffer.write(r.randbytes(r.randrange(3000)))\n    f.flush()\n    if i % 300 == 0:\n        import time; time.sleep(0.05)"


def test_100_watchers_on_one_connection_and_room_for_other_calls(server, alice):
    job = alice.start(sys.executable, "-c", NOISY)
    noise = random.Random(1)
    got: list[bytes] = []

    def watch(delay: float) -> None:
        time.sleep(delay)
        got.append(alice.output(job.id))

    threads = [threading.Thread(target=watch, args=(noise.random(),)) for _ in range(100)]
    for thread in threads:
        thread.start()
    assert alice.status(alice.start("true").id).id
    for thread in threads:
        thread.join(60)
    assert (
        len(got) == 100
        and len(set(got)) == 1
        and len(got[0]) == alice.status(job.id).stdout_bytes + alice.status(job.id).stderr_bytes
    )


def test_100_open_streams_leave_room(server):
    with server.client() as stub:
        job = stub.start("sh", "-c", "echo x; exec sleep 1000")
        streams = [stub.GetOutput(pb().GetOutputRequest(id=job.id)) for _ in range(250)]
        assert {next(stream).data for stream in streams} == {b"x\n"}
        assert stub.status(job.id).state == pb().STATE_RUNNING
        stub.stop(job.id)
        assert all(list(stream) == [] for stream in streams)


def test_a_reader_that_stops_holds_nobody_up(server, alice):
    job = alice.start("sh", "-c", "head -c 40000000 /dev/zero")
    slow = alice.GetOutput(pb().GetOutputRequest(id=job.id))
    next(slow)  # and no more for now, on the same connection
    assert len(alice.output(job.id)) == 40_000_000
    with server.client() as other:
        assert len(other.output(job.id)) == 40_000_000
    assert alice.status(job.id).exit_code == 0
    slow.cancel()


def rss(pid: int) -> int:
    return int(next(row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in row).split()[1])


def test_memory_is_bounded_whatever_a_job_writes(own):
    server = own()
    with server.client() as stub:
        stub.output(stub.start("sh", "-c", "head -c 10000000 /dev/zero").id)
        before = rss(server.process.pid), rss(server.supervisor())
        job = stub.start("sh", "-c", "head -c 400000000 /dev/zero")
        assert sum(len(piece.data) for piece in stub.pieces(job.id)) == 400_000_000
        after = rss(server.process.pid), rss(server.supervisor())
    assert after[1] - before[1] < 1024 and after[0] - before[0] < 40_000, "KiB"


CLIENT = (
    "import sys, threading, time\nfrom pathlib import Path\nimport grpc\nfrom tests.jobserver import Stub, pb\n"
    "pki, port, id = Path(sys.argv[1]), sys.argv[2], sys.argv[3]\n"
    "c = grpc.ssl_channel_credentials(*((pki / f).read_bytes() for f in ('ca.crt', 'alice.key', 'alice.crt')))\n"
    "stub = Stub(grpc.secure_channel('localhost:' + port, c))\n"
    "streams = [stub.GetOutput(pb().GetOutputRequest(id=id)) for _ in range(20)]\n"
    "[next(s) for s in streams]\nprint('up', flush=True)\ntime.sleep(1000)"
)


def test_a_client_that_is_killed_in_mid_stream_leaves_nothing(server, alice):
    job = alice.start("sh", "-c", "while :; do head -c 100000 /dev/zero; sleep 0.01; done", limits={"output_bytes": 30_000_000})
    before = server.fds()
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(server.pki), str(server.port), job.id], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None and client.stdout.readline() == "up\n"
    assert server.fds() > before
    client.kill()
    client.communicate()
    wait_until(lambda: server.fds() <= before, 1.5, lambda: f"its descriptors are free: {server.fds()} of {before}")
    alice.stop(job.id)


def test_a_client_that_is_frozen_goes_on_where_it_was(server, alice):
    code = CLIENT.replace("time.sleep(1000)", "print(sum(len(p.data) for s in streams[:1] for p in s), flush=True)")
    job = alice.start("sh", "-c", "echo; sleep 1; head -c 50000000 /dev/zero")
    client = subprocess.Popen(
        [sys.executable, "-c", code, str(server.pki), str(server.port), job.id], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None and client.stdout.readline() == "up\n"
    client.send_signal(signal.SIGSTOP)
    assert len(alice.output(job.id)) == 50_000_001
    client.send_signal(signal.SIGCONT)
    assert client.stdout.readline() == "50000000\n"
    client.kill()
    client.communicate()


def test_1000_idle_jobs(own):
    server = own()
    supervisor = server.supervisor()
    before = rss(supervisor)
    with server.client() as stub, ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda _: stub.start("sleep", "1000"), range(1000)))
        assert (rss(supervisor) - before) / 1000 <= 32, "KiB for each"
        assert len(os.listdir(f"/proc/{supervisor}/task")) == 1 and len(os.listdir(f"/proc/{supervisor}/fd")) <= 3 * 1000 + 60
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 60
        assert sum(1 for _ in jobs_of(stub, states=[pb().STATE_RUNNING], page_size=300)) == 1000
        ticks = [cpu(pid) for pid in (supervisor, server.process.pid)]
        time.sleep(1)  # what idle jobs cost is measured over a time in which nothing happens
        assert [cpu(pid) for pid in (supervisor, server.process.pid)] == pytest.approx(ticks, abs=2)
        assert stub.output(stub.start("echo", "quick").id) == b"quick\n"
    assert server.terminate() == 0
    assert not [job for job in jobs if alive(job.pid)]


def cpu(pid: int) -> int:
    """Clock ticks that it has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_races_of_start_stop_and_exit(server, alice):
    noise = random.Random(2)

    def one(number: int) -> None:
        with server.client() as stub:
            job = stub.start("sh", "-c", f"echo {number}; sleep {noise.choice((0, 0, 0.01, 5))}")
            actions = [lambda: stub.stop(job.id, grace_seconds=1), lambda: stub.output(job.id), lambda: stub.status(job.id),
                       lambda: stub.Signal(pb().SignalRequest(id=job.id, signal=15)), lambda: stub.ended(job.id)]  # fmt: skip
            for action in noise.sample(actions, 3):
                try:
                    action()
                except grpc.RpcError as error:
                    assert error.code() is Code.FAILED_PRECONDITION, error
            end = stub.stop(job.id, grace_seconds=1)
            assert end.HasField("exit_code") != end.HasField("signal")
            assert stub.output(job.id) in (f"{number}\n".encode(), b"") and not alive(job.pid)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(150)))


# restarts


def test_the_server_is_killed_with_20_jobs_running(own):
    server = own()
    with server.client() as stub:
        jobs = [
            stub.start(
                "sh", "-c", f"echo {number}; while read x; do :; done < /dev/null; sleep 2; echo {number} end; exit {number}"
            )
            for number in range(19)
        ]
        jobs.append(stub.start("sleep", "1000", idempotency_key="k"))
        done = stub.start("sh", "-c", "echo done; exit 3")
        assert stub.ended(done.id).exit_code == 3
        supervisor = server.supervisor()
        server.kill()
    starts = [start_of(job.pid) for job in jobs]
    assert all(starts) and alive(supervisor), "they run on"
    server = own()
    with server.client() as stub:
        assert server.supervisor() == supervisor
        assert stub.status(done.id).exit_code == 3 and stub.output(done.id) == b"done\n"
        for number, job in enumerate(jobs[:19]):
            assert stub.output(job.id).decode() == f"{number}\n{number} end\n", "not a byte is lost"
            assert stub.ended(job.id).exit_code == number
        assert stub.start("sleep", "1000", idempotency_key="k").id == jobs[19].id
        assert [job.id for job in jobs_of(stub)] == [*(job.id for job in jobs), done.id]
        assert stub.stop(jobs[19].id).signal == 15


def test_server_and_supervisor_are_killed(own):
    server = own()
    with server.client() as stub:
        job = stub.start("sleep", "1000")
        done = stub.start("echo", "kept")
        assert stub.ended(done.id).exit_code == 0
        kill(server.supervisor())
        wait_until(lambda: not (server.state / "socket").exists() or code_of(stub, job.id) is None, 10, "the server finds another")
        assert stub.status(job.id).state == pb().STATE_RUNNING and stub.output(done.id) == b"kept\n"
        supervisor = server.supervisor()
        server.kill()
        kill(supervisor)
    server = own()
    with server.client() as stub:
        assert stub.status(job.id).state == pb().STATE_RUNNING
        end = stub.stop(job.id)
        assert end.state == pb().STATE_LOST and end.error and not alive(job.pid) and not end.HasField("exit_code")


def code_of(stub: Stub, id: str) -> grpc.StatusCode | None:
    try:
        stub.status(id)
    except grpc.RpcError as error:
        assert error.code() is Code.UNAVAILABLE
        return error.code()
    return None


def test_a_watcher_outlives_the_supervisor(own):
    server = own()
    with server.client() as stub:
        job = stub.start("sh", "-c", "echo one; exec sleep 1000")
        stream = stub.GetOutput(pb().GetOutputRequest(id=job.id))
        assert next(stream).data == b"one\n"
        kill(server.supervisor())
        wait_until(lambda: code_of(stub, job.id) is None, 10, "the server finds another")
        stub.stop(job.id)
        assert list(stream) == []


def test_sigterm_stops_the_jobs_with_their_grace(own):
    server = own("--grace", "1")
    with server.client() as stub:
        meek = stub.start("sh", "-c", "trap 'echo bye; exit 5' TERM; echo up; while :; do :; done")
        stubborn = stub.start(sys.executable, "-c", STUBBORN)
        streams = [stub.GetOutput(pb().GetOutputRequest(id=job.id)) for job in (meek, stubborn)]
        assert next(streams[0]).data == b"up\n" and next(streams[1]).data.startswith(b"up")
        supervisor = server.supervisor()
        assert server.terminate() == 0
        assert b"".join(piece.data for piece in streams[0]) == b"bye\n", "watchers see the end"
    assert not alive(supervisor) and not alive(meek.pid) and not alive(stubborn.pid)
    server = own()
    with server.client() as stub:
        assert stub.status(meek.id).exit_code == 5 and stub.status(stubborn.id).signal == 9
        assert stub.output(meek.id) == b"up\nbye\n"


def test_a_second_signal_does_not_wait(own):
    server = own("--grace", "1000")
    with server.client() as stub:
        stubborn = stub.start(sys.executable, "-c", STUBBORN)
        next(iter(stub.pieces(stubborn.id)))
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: stub_state(stub, stubborn.id) != pb().STATE_RUNNING, 5, "it was told")
        server.process.send_signal(signal.SIGINT)
        server.process.communicate(timeout=20)
    assert server.process.returncode == 0 and not alive(stubborn.pid)


def stub_state(stub: Stub, id: str) -> int:
    try:
        return int(stub.status(id).state)
    except grpc.RpcError:
        return -1


def test_one_server_for_a_state_directory(own, pki):
    server = own()
    with pytest.raises(AssertionError, match=f"another jobs server .pid {server.process.pid}. uses"):
        own()
    with server.client() as stub:
        assert stub.status(stub.start("true").id).id


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cert", "none.crt"], "none.crt can't be read: No such file"), (["--cacert", "server.key"], "is no certificate in PEM"),
        (["--key", "alice.key"], "does not belong to the certificate"), (["--listen", "x"], "host:port"), (["--listen", "::1:5"], "stands in brackets"),
        (["--listen", "localhost:99999"], "host:port"), (["--listen", "http://localhost:5"], "is a URL"), (["--cert", "alice.crt"], "is not for a server"),
        (["--cert", "alice.key"], "is no certificate in PEM"), (["--state-dir", "/proc/nothing"], "can't be used"), (["--listen", "192.0.2.1:0"], "can't be listened on"),
    ],
)  # fmt: skip
def test_a_server_that_can_not_start(pki, tmp_path, options, said):
    given = {
        "--listen": "127.0.0.1:0",
        "--cacert": "ca.crt",
        "--cert": "server.crt",
        "--key": "server.key",
        "--state-dir": str(tmp_path / "s"),
    }
    given |= dict([options])
    done = subprocess.run(
        [sys.executable, "-m", "zerodeploy", "jobs", "serve", *sum(given.items(), ())],
        cwd=pki,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and not done.stdout, done.stderr


def test_the_proto_is_shipped_and_shown():
    done = subprocess.run([sys.executable, "-m", "zerodeploy", "jobs", "proto"], capture_output=True, text=True, timeout=30)
    assert done.stdout == PROTO.read_text()


def test_no_secret_in_sight(server, pki):
    key = (pki / "server.key").read_text().splitlines()[1]
    for pid in (server.process.pid, server.supervisor()):
        for name in ("cmdline", "environ"):
            assert key.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    for path in server.state.rglob("*"):
        assert not path.lstat().st_mode & 0o077, path
    assert certificates.KINDS
