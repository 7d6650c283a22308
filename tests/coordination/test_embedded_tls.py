"""The store over TLS: who gets in, who does not and is told why, and that nobody else notices."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from certificates import At, files_in, for_clients_only, foreign, made

from autoglm_elastic.coordination import (
    Credentials,
    StoreClient,
    StoreDenied,
    StoreServer,
    TlsFiles,
    authority,
    limits,
)
from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.ports import StoreUnavailable, WatchEvent

WAIT_S = 20.0


@pytest.fixture
def ours(tmp_path: Path) -> Credentials:
    return made(tmp_path / "tls")


@pytest.fixture
def server(ours: Credentials) -> Iterator[StoreServer]:
    server = StoreServer("127.0.0.1", 0, realm="run", credentials=ours)
    yield server
    server.close()


@pytest.fixture
def client(server: StoreServer, ours: Credentials) -> Iterator[StoreClient]:
    """Somebody who is there all the time; must go on whatever else happens."""
    client = StoreClient(*server.address, realm="run", credentials=ours)
    seen: queue.Queue[WatchEvent] = queue.Queue()
    client.watch("/there/", 1, seen.put)
    client.put("/there/before", 1)
    yield client
    client.put("/there/after", 2)
    assert [seen.get(timeout=WAIT_S).key for _ in range(2)] == ["/there/before", "/there/after"]
    assert client.is_connected
    client.close()


def stranger(context: ssl.SSLContext, server: StoreServer) -> bytes:
    """What somebody who connects with `context` and says hello hears of the store."""
    with (
        socket.create_connection(server.address, WAIT_S) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            hello = b'{"op":"hello","protocol":"autoglm-store/1"}'
            tls.sendall(struct.pack(">I", len(hello)) + hello)
        return tls.recv(65536)


def context_of(files: TlsFiles, *, certificate: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.ca)
    if certificate:
        context.load_cert_chain(files.cert, files.key)
    return context


# Who gets in


def test_both_ends_must_be_of_the_ca_and_what_travels_cannot_be_read(
    server: StoreServer, client: StoreClient, ours: Credentials
) -> None:
    """A relay between them sees nothing of a key that both know."""
    heard = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))

    def relay() -> None:
        near, _ = listener.accept()
        far = socket.create_connection(server.address)

        def pump(source: socket.socket, sink: socket.socket) -> None:
            while data := source.recv(65536):
                heard.extend(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

        back = threading.Thread(target=pump, args=(far, near))
        back.start()
        pump(near, far)
        back.join(WAIT_S)
        near.close()
        far.close()

    thread = threading.Thread(target=relay)
    thread.start()
    through = StoreClient(*listener.getsockname(), realm="run", credentials=ours)
    through.put("/secret-key", "secret-value")
    assert through.get("/secret-key") is not None
    through.close()
    thread.join(WAIT_S)
    listener.close()
    assert len(heard) > 1000
    assert b"secret" not in heard
    assert b"autoglm-store" not in heard


def test_large_values_and_many_watchers_come_through(server: StoreServer, ours: Credentials) -> None:
    value = "v" * (limits.VALUE_BYTES_MAX - 2)
    clients = [StoreClient(*server.address, credentials=ours) for _ in range(4)]
    seen: queue.Queue[WatchEvent] = queue.Queue()
    for each in clients:
        each.watch("/", 1, seen.put)
    for number in range(3):
        clients[0].put(f"/{number}", value)
    for _ in range(3 * len(clients)):
        assert seen.get(timeout=WAIT_S).value == value
    for each in clients:
        each.close()


def test_many_threads_share_one_client(server: StoreServer, ours: Credentials) -> None:
    """Its reader decrypts while they encrypt."""
    client = StoreClient(*server.address, credentials=ours, timeout_s=WAIT_S)
    client.watch("/", 1, lambda _: None)
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(100):
            client.put(f"/{number}", [turn, "x" * (turn * 100)])
            entry = client.get(f"/{number}")
            if entry is None or entry.value[0] != turn:
                wrong.append((number, turn, entry))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert wrong == []
    assert client.is_connected
    client.close()


# Who does not


def test_without_a_certificate_nobody_gets_in(
    server: StoreServer, client: StoreClient, ours: Credentials
) -> None:
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        stranger(context_of(ours.files, certificate=False), server)


def test_older_tls_is_not_spoken(server: StoreServer, client: StoreClient, ours: Credentials) -> None:
    context = context_of(ours.files, certificate=True)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        stranger(context, server)


def test_with_a_certificate_that_is_accepted_a_stock_client_gets_in(
    server: StoreServer, client: StoreClient, ours: Credentials
) -> None:
    assert b'"op":"hello"' in stranger(context_of(ours.files, certificate=True), server)


def test_a_certificate_of_another_ca_is_refused_by_both_ends(
    server: StoreServer, client: StoreClient, ours: Credentials, tmp_path: Path
) -> None:
    other = foreign(tmp_path / "other")
    with pytest.raises(StoreDenied, match=r"we do not accept: self-signed certificate.*give tls\.ca"):
        StoreClient(*server.address, credentials=Credentials(other))
    # It knows our CA, and has a certificate of its own.
    both = tmp_path / "both.pem"
    both.write_bytes(Path(other.ca).read_bytes() + Path(ours.files.ca).read_bytes())
    knows_us = Credentials(TlsFiles(str(both), other.cert, other.key))
    with pytest.raises(StoreDenied, match=r"does not accept our certificate: unknown ca.*tls\.key of its CA"):
        StoreClient(*server.address, credentials=knows_us)


def test_a_server_made_out_to_another_name_is_refused(server: StoreServer, ours: Credentials) -> None:
    with pytest.raises(StoreDenied, match=r"not valid for 'elsewhere'.*tls\.server_name"):
        StoreClient(*server.address, credentials=ours, peer_name="elsewhere")
    named = Credentials(files_in(Path(ours.files.ca).parent, server_name="localhost"))
    StoreClient(*server.address, credentials=named, peer_name="elsewhere").close()


def test_a_certificate_that_expires_after_it_was_read_is_refused_by_the_server(
    server: StoreServer, client: StoreClient, ours: Credentials, tmp_path: Path
) -> None:
    """The client's own check lies in the past; the server's does not."""
    folder = Path(ours.files.ca).parent
    expired = tmp_path / "expired"
    expired.mkdir()
    for name in (authority.CA, authority.CA_KEY, authority.CERT):
        (expired / name).write_bytes((folder / name).read_bytes())
    authority.renew(expired, (), days=1, clock=At(days=-1.5))
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_EXPIRED"):
        stranger(context_of(files_in(expired), certificate=True), server)


def test_a_plain_client_is_told(server: StoreServer, client: StoreClient) -> None:
    with pytest.raises(StoreDenied, match=r"refused us: it speaks TLS only.*give tls\.ca"):
        StoreClient(*server.address, realm="run")


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x16garbage", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\x00" * 9000],
)
def test_noise_ends_its_connection(server: StoreServer, client: StoreClient, sent: bytes) -> None:
    with socket.create_connection(server.address, WAIT_S) as noise, contextlib.suppress(ConnectionError):
        noise.sendall(sent)
        while noise.recv(65536):
            pass


def test_a_handshake_that_stops_half_way_is_dropped(
    server: StoreServer, client: StoreClient, ours: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HELLO_S_MAX", 0.05)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    half = context_of(ours.files, certificate=True).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        half.do_handshake()
    for sent in (b"", outgoing.read()):
        with socket.create_connection(server.address, WAIT_S) as idle:
            idle.sendall(sent)
            while idle.recv(65536):
                pass


def test_after_the_handshake_a_silent_client_is_dropped_too(
    server: StoreServer, client: StoreClient, ours: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HELLO_S_MAX", 0.5)
    with (
        socket.create_connection(server.address, WAIT_S) as sock,
        context_of(ours.files, certificate=True).wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        assert tls.recv(1) == b""


def test_a_client_that_does_not_read_is_dropped(
    server: StoreServer, client: StoreClient, ours: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OUTBOX_BYTES_MAX", 1 << 20)
    other = StoreClient(*server.address, credentials=ours)
    context = context_of(ours.files, certificate=True)
    with (
        socket.create_connection(server.address, WAIT_S) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as deaf,
    ):
        for message in (
            b'{"op":"hello","protocol":"autoglm-store/1"}',
            b'{"op":"watch","id":1,"watch":1,"prefix":"+big","from_revision":1}',
        ):
            deaf.sendall(struct.pack(">I", len(message)) + message)
        for _ in range(40):
            other.put("+big", "v" * (1 << 18))
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while deaf.recv(1 << 20):
                pass
    other.close()


def test_tls_to_a_store_without_it_is_told(ours: Credentials) -> None:
    plain = StoreServer("127.0.0.1", 0)
    there = StoreClient(*plain.address)
    with pytest.raises(PlatformError, match=r"does not speak TLS.*same tls settings"):
        StoreClient(*plain.address, credentials=ours)
    there.put("/a", 1)
    there.close()
    plain.close()


def test_tls_to_a_port_that_says_nothing_ends_in_time(ours: Credentials) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(PlatformError, match="says nothing"):
        StoreClient(*mute.getsockname(), credentials=ours, timeout_s=0.2)


def test_tls_to_nobody_is_unavailable(ours: Credentials) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with pytest.raises(StoreUnavailable, match="refused"):
        StoreClient(*address, credentials=ours)


def test_many_who_come_at_once_get_in_and_nobody_waits_for_them(
    server: StoreServer, client: StoreClient, ours: Credentials
) -> None:
    """More than have a turn together; among them as many who never finish."""
    half = [socket.create_connection(server.address, WAIT_S) for _ in range(40)]
    for each in half:
        each.sendall(b"\x16\x03\x01")
    come: queue.Queue[StoreClient] = queue.Queue()

    def join() -> None:
        come.put(StoreClient(*server.address, realm="run", credentials=ours, timeout_s=WAIT_S))

    threads = [threading.Thread(target=join) for _ in range(80)]
    for thread in threads:
        thread.start()
    for number in range(50):
        client.put("+busy", number)
    for thread in threads:
        thread.join(WAIT_S)
    assert come.qsize() == len(threads)
    while not come.empty():
        come.get().close()
    for each in half:
        each.close()


# Rotation


def test_rotated_certificates_count_for_new_connections_and_harm_no_old_one(
    server: StoreServer, client: StoreClient, ours: Credentials, tmp_path: Path
) -> None:
    folder = Path(ours.files.ca).parent
    before = serial_of(server, ours)
    authority.renew(folder, (), days=3)
    assert serial_of(server, ours) != before
    assert client.get("/there/before") is not None


def test_a_new_ca_comes_in_over_one_that_holds_both(
    server: StoreServer, client: StoreClient, ours: Credentials, tmp_path: Path
) -> None:
    """First everybody knows both, then certificates are replaced, then the old CA goes; nobody is cut off meanwhile."""
    folder, fresh = Path(ours.files.ca).parent, tmp_path / "fresh"
    made(fresh)
    old = files_in(copied(folder, tmp_path / "old"))
    both = (folder / authority.CA).read_bytes() + (fresh / authority.CA).read_bytes()
    replace(folder / authority.CA, both)
    StoreClient(*server.address, realm="run", credentials=Credentials(old)).close()
    for name in (authority.KEY, authority.CERT):  # between the two they do not fit each other
        replace(folder / name, (fresh / name).read_bytes())
        StoreClient(*server.address, realm="run", credentials=ours).close()
    replace(folder / authority.CA, (fresh / authority.CA).read_bytes())
    StoreClient(*server.address, realm="run", credentials=ours).close()
    with pytest.raises(StoreDenied):
        StoreClient(*server.address, realm="run", credentials=Credentials(old))


def test_files_that_are_gone_or_broken_leave_those_before_in_use(
    server: StoreServer, client: StoreClient, ours: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    Path(ours.files.cert).write_text("nothing")
    StoreClient(*server.address, realm="run", credentials=ours).close()
    Path(ours.files.cert).unlink()
    StoreClient(*server.address, realm="run", credentials=ours).close()
    told = [record.getMessage() for record in caplog.records if "stay in use" in record.getMessage()]
    assert len(told) == 2, "each problem once"
    authority.renew(Path(ours.files.ca).parent, ("127.0.0.1",), days=1)
    StoreClient(*server.address, realm="run", credentials=ours).close()


def serial_of(server: StoreServer, ours: Credentials) -> object:
    with (
        socket.create_connection(server.address, WAIT_S) as sock,
        context_of(ours.files, certificate=True).wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        return (tls.getpeercert() or {})["serialNumber"]


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
        (to / path.name).chmod(path.stat().st_mode)
    return to


def replace(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(data)
    fresh.replace(path)


def test_a_certificate_that_ends_soon_is_worth_a_line(
    ours: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(ours.files.ca).parent
    for days, lines in ((30, 0), (3, 1)):
        authority.renew(folder, (), days=days)
        caplog.clear()
        Credentials(ours.files)
        assert sum("ends in" in record.getMessage() for record in caplog.records) == lines


# What is wrong with files


def _missing(folder: Path) -> None:
    (folder / authority.CERT).unlink()


def _open_to_all(folder: Path) -> None:
    (folder / authority.KEY).chmod(0o644)


def _another_key(folder: Path) -> None:
    made(folder / "x")
    (folder / authority.KEY).write_bytes((folder / "x" / authority.KEY).read_bytes())


def _another_ca(folder: Path) -> None:
    made(folder / "x")
    (folder / authority.CA).write_bytes((folder / "x" / authority.CA).read_bytes())


def _expired(folder: Path) -> None:
    authority.renew(folder, (), days=1, clock=At(days=-1.5))


def _not_yet(folder: Path) -> None:
    authority.renew(folder, (), days=1, clock=At(days=0.5))


def _no_pem(folder: Path) -> None:
    (folder / authority.CERT).write_bytes(os.urandom(1000))


def _ca_is_a_folder(folder: Path) -> None:
    (folder / authority.CA).unlink()
    (folder / authority.CA).mkdir()


def _empty_ca(folder: Path) -> None:
    (folder / authority.CA).write_bytes(b"")


def _no_ca(folder: Path) -> None:
    (folder / authority.CA).write_bytes((folder / authority.KEY).read_bytes())


def _password(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    path = folder / authority.KEY
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_missing, r"tls\.cert .*cert\.pem: No such file.*autoglm tls init"),
        (_open_to_all, r"tls\.key .*open to every user of this machine \(mode 0644\).*chmod o="),
        (_another_key, r"tls\.key .* is not the key of tls\.cert"),
        (_another_ca, r"tls\.cert .* does not hold before tls\.ca .*"),
        (_expired, "certificate has expired"),
        (_not_yet, "certificate is not yet valid"),
        (_no_pem, "not a certificate with its key"),
        (_ca_is_a_folder, r"tls\.ca .*directory"),
        (_empty_ca, r"tls\.ca .* is no PEM file"),
        (_no_ca, r"tls\.ca .*no certificate in it"),
        (_password, r"tls\.key .* is encrypted.*without a password"),
    ],
)
def test_files_that_will_not_do_are_named_in_one_line(
    ours: Credentials, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(Path(ours.files.ca).parent)
    with pytest.raises(UsageError, match=said) as caught:
        Credentials(ours.files)
    assert "\n" not in str(caught.value)


def test_a_part_of_the_files_is_refused(ours: Credentials) -> None:
    assert TlsFiles.given("", "", "") is None
    with pytest.raises(UsageError, match=r"tls\.ca, tls\.cert without tls\.key; do: give all three"):
        TlsFiles.given("ca", "cert", "")
    with pytest.raises(UsageError, match=r"tls\.server_name without"):
        TlsFiles.given("", "", "", "node0")


def test_a_certificate_for_clients_only_joins_and_does_not_host(tmp_path: Path) -> None:
    server = made(tmp_path / "tls")
    copied(tmp_path / "tls", tmp_path / "client")
    for_clients_only(tmp_path / "client")
    hosting = StoreServer("127.0.0.1", 0, credentials=server)
    only_joins = Credentials(files_in(tmp_path / "client"))
    StoreClient(*hosting.address, credentials=only_joins).close()
    hosting.close()
    with pytest.raises(
        UsageError, match=r"no certificate to host the store with: unsuitable certificate purpose"
    ):
        StoreServer("127.0.0.1", 0, credentials=only_joins)
