"""Who is let in: users, passwords and roles of etcd, mutual TLS, and what its address may say."""

from __future__ import annotations

import importlib.util
import queue
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from etcd_cluster import Cluster, needs_etcd

from autoglm_elastic.coordination import etcd
from autoglm_elastic.coordination.etcd import EtcdTarget, encounter, parse
from autoglm_elastic.coordination.etcd.target import PASSWORD_VARIABLE
from autoglm_elastic.coordination.refusals import StoreDenied
from autoglm_elastic.errors import UsageError
from autoglm_elastic.ports import StoreUnavailable, WatchEvent

WAIT_S = 30.0
PREFIX = "/autoglm/job/"


def test_an_address_names_members_user_and_files() -> None:
    assert parse("etcd://a:1,b,[::1]:3") == EtcdTarget((("a", 1), ("b", 2379), ("[::1]", 3)))
    target = parse("etcd://me@a:1?ca=/c%20a.pem&cert=x&key=y&password_file=p")
    assert target == EtcdTarget((("a", 1),), "/c a.pem", "x", "y", "me", "p")
    assert target.is_tls
    assert target.address == "a:1"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("etcd://", "'' in etcd://"),
        ("etcd://a:1,a:1", "2 endpoints in etcd://a:1,a:1; valid: at most 16, each once"),
        ("etcd://a:0", "'a:0' in"),
        ("etcd://a/b", "'a/b' in"),
        (
            "etcd://me:secret@a",
            "a password in the address of etcd, where everybody can see it; do: give password_file",
        ),
        ("etcd://a?ca=", "ca= in"),
        ("etcd://a?key=x", "a certificate without its key"),
    ],
)
def test_a_bad_address_is_refused(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse(address)
    assert "secret" not in str(caught.value)


def test_a_password_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("from the file\n")
    assert parse(f"etcd://me@a?password_file={tmp_path / 'password'}").password({}) == "from the file"
    assert (
        parse("etcd://me@a").password({PASSWORD_VARIABLE: "from the environment"}) == "from the environment"
    )
    with pytest.raises(UsageError, match="etcd user me without a password; do: give password_file"):
        parse("etcd://me@a").password({})
    with pytest.raises(UsageError, match="none: No such file"):
        parse("etcd://me@a?password_file=none").password({})


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"etcd needs etcd3, grpc, google.protobuf, not installed; do: pip install"
    ):
        etcd.require()


def test_checking_an_address_loads_no_package_of_etcds() -> None:
    """The zygote is forked afterwards: its workers must not find grpc in their memory."""
    code = (
        "import sys, autoglm_elastic.agent.launcher, autoglm_elastic.coordination.etcd as etcd;"
        "etcd.require(), etcd.parse('etcd://a');"
        "sys.exit(any(name.partition('.')[0] in ('grpc', 'etcd3') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=WAIT_S, check=False).returncode == 0


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Cluster]:
    """One member with users: `root`, and `worker`, who may use /autoglm/. A login is good for a second."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem, files = serialization.Encoding.PEM, (tmp_path / "private.pem", tmp_path / "public.pem")
    files[0].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    )
    files[1].write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    tokens = f"--auth-token=jwt,priv-key={files[0]},pub-key={files[1]},sign-method=RS256,ttl=1s"
    with Cluster(tmp_path / "etcd", options=[tokens]) as cluster:
        for path, body in (
            ("user/add", {"name": "root", "password": "r"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("user/add", {"name": "worker", "password": "w"}),
            ("role/add", {"name": "jobs"}),
            (
                "role/grant",
                # "/autoglm/" to "/autoglm0"
                {"name": "jobs", "perm": {"permType": 2, "key": "L2F1dG9nbG0v", "range_end": "L2F1dG9nbG0w"}},
            ),
            ("user/grant", {"user": "worker", "role": "jobs"}),
            ("enable", {}),
        ):
            cluster.ask(0, f"auth/{path}", body)
        yield cluster


@needs_etcd
def test_a_user_does_what_its_role_allows_and_its_token_is_renewed(
    guarded: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoglm_elastic.coordination.etcd.store import EtcdStore

    address = guarded.address.replace("://", "://worker@")
    monkeypatch.setenv(PASSWORD_VARIABLE, "w")
    events: queue.Queue[WatchEvent] = queue.Queue()
    store = EtcdStore(parse(address), prefix=PREFIX)
    lease = store.lease_grant(60)
    store.watch(PREFIX, store.txn((), ()).revision + 1, events.put)
    store.put(f"{PREFIX}a", 1, lease=lease)
    assert events.get(timeout=WAIT_S).value == 1
    with pytest.raises(StoreDenied, match="permission denied; do: give the user a role"):
        store.put("/other", 1)
    number, logins = 1, store.operations["Auth.Authenticate"]
    while store.operations["Auth.Authenticate"] < logins + 2:
        number += 1
        assert store.lease_keep_alive(lease) == 60.0
        store.put(f"{PREFIX}a", number, lease=lease)
        assert events.get(timeout=WAIT_S).value == number
    guarded.kill(0)
    guarded.start(0)
    store.lease_revoke(lease)
    assert events.get(timeout=WAIT_S).value is None
    store.close()


@needs_etcd
@pytest.mark.parametrize(("user", "said"), [("worker@", "authentication failed"), ("", "user name is empty")])
def test_a_wrong_password_or_no_user_is_refused(
    guarded: Cluster, monkeypatch: pytest.MonkeyPatch, user: str, said: str
) -> None:
    from autoglm_elastic.coordination.etcd.store import EtcdStore

    monkeypatch.setenv(PASSWORD_VARIABLE, "not it")
    with pytest.raises(StoreDenied, match=said):
        EtcdStore(parse(guarded.address.replace("://", f"://{user}")), prefix=PREFIX)


@needs_etcd
def test_mutual_tls_lets_in_who_has_a_certificate(tmp_path: Path) -> None:
    from autoglm_elastic.coordination.etcd.store import EtcdStore

    authority, stranger = trustme.CA(), trustme.CA()
    files = {name: str(tmp_path / f"{name}.pem") for name in ("ca", "cert", "key", "alien", "alien_key")}
    files["alien_ca"] = str(tmp_path / "alien_ca.pem")
    authority.cert_pem.write_to_path(files["ca"])
    stranger.cert_pem.write_to_path(files["alien_ca"])
    for issuer, cert, key in ((authority, "cert", "key"), (stranger, "alien", "alien_key")):
        issued = issuer.issue_cert("127.0.0.1", "localhost")
        issued.private_key_pem.write_to_path(files[key])
        issued.cert_chain_pems[0].write_to_path(files[cert])
    options = (
        f"--cert-file={files['cert']}",
        f"--key-file={files['key']}",
        f"--trusted-ca-file={files['ca']}",
        "--client-cert-auth",
    )
    with Cluster(tmp_path / "etcd", options=options, scheme="https") as cluster:
        store = EtcdStore(
            parse(f"{cluster.address}?ca={files['ca']}&cert={files['cert']}&key={files['key']}")
        )
        store.put("/a", 1)
        entry = store.get("/a")
        assert entry is not None
        assert entry.value == 1
        store.close()
        own, alien = (
            f"cert={files['cert']}&key={files['key']}",
            f"cert={files['alien']}&key={files['alien_key']}",
        )
        for query, said in (
            ("", "speaks TLS only; do: give ca=FILE"),
            (f"?ca={files['ca']}", "does not accept us without a certificate: .*do: give cert=FILE"),
            (f"?ca={files['ca']}&{alien}", "does not accept our certificate: .*of the CA that etcd trusts"),
            (
                f"?ca={files['alien_ca']}&{own}",
                "that we do not accept: .*issuer certificate.*ca=FILE that it is of",
            ),
            (f"?ca={files['ca']}&{own}&server_name=elsewhere", "not valid for 'elsewhere'.*server_name=NAME"),
        ):
            with pytest.raises(StoreDenied, match=said):
                EtcdStore(parse(cluster.address + query), timeout_s=1.0)
        cluster.kill(0)
        with pytest.raises(StoreUnavailable, match="does not answer"):
            EtcdStore(parse(f"{cluster.address}?ca={files['ca']}&{own}"), timeout_s=1.0)


@needs_etcd
def test_tls_where_etcd_has_none_is_refused(tmp_path: Path) -> None:
    from autoglm_elastic.coordination.etcd.store import EtcdStore

    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with Cluster(tmp_path / "etcd") as cluster:
        with pytest.raises(StoreDenied, match="does not speak TLS; do: give its port for TLS"):
            EtcdStore(parse(f"{cluster.address}?ca={tmp_path / 'ca.pem'}"), timeout_s=1.0)
        (tmp_path / "password").write_text("x")
        address = cluster.address.replace("://", "://me@") + f"?password_file={tmp_path / 'password'}"
        with pytest.raises(StoreDenied, match=r"denies user me .*is not enabled; do: leave USER@"):
            EtcdStore(parse(address), timeout_s=1.0)


def test_files_that_will_not_do_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    now, files = datetime.now(UTC), {}
    for name, days in (("good", (-1, 30)), ("old", (-9, -1)), ("early", (1, 9))):
        start, end = (now + timedelta(days=each) for each in days)
        issued = trustme.CA().issue_cert("localhost", not_before=start, not_after=end)
        files[name] = (tmp_path / f"{name}.pem", tmp_path / f"{name}-key.pem")
        issued.cert_chain_pems[0].write_to_path(files[name][0])
        issued.private_key_pem.write_to_path(files[name][1])
    (tmp_path / "empty.pem").touch()

    def checked(cert: Path, key: Path, ca: Path | None = None) -> None:
        encounter.check_files(parse(f"etcd://h?ca={ca or files['good'][0]}&cert={cert}&key={key}"))

    checked(*files["good"])
    for pair, said in (
        (files["old"], "old.pem does not hold: certificate has expired; valid: .*not expired"),
        (files["early"], "early.pem does not hold: certificate is not yet valid"),
        ((files["good"][0], files["old"][1]), "old-key.pem is not the key of .*good.pem"),
        ((files["good"][0], tmp_path / "none"), "etcd's key: .*none: No such file"),
        ((files["good"][1], files["good"][1]), "not a certificate with its key"),
    ):
        with pytest.raises(UsageError, match=said):
            checked(*pair)
    for ca, said in ((files["good"][1], "no certificate in it"), (tmp_path / "empty.pem", "has 0 bytes")):
        with pytest.raises(UsageError, match=said):
            checked(*files["good"], ca)
