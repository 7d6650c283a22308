"""`autoglm tls`: a CA in one command, certificates that hold, nothing overwritten."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from autoglm_elastic.cli.main import main


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(["tls", *argv]) == code
    out, err = capsys.readouterr()
    assert (err == "") == (code == 0)
    assert err.count("\n") == (code != 0)
    return out + err


def test_one_command_makes_what_every_node_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "tls"
    told = said(capsys, "init", str(folder), "--host", "node0", "--host", "10.0.0.1", "--host", "[fd00::1]")
    assert "made out to node0, 10.0.0.1, fd00::1, localhost, 127.0.0.1, ::1" in told
    assert f"export AUTOGLM_TLS_KEY={folder / 'key.pem'}" in told
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes.pop("key.pem") == modes.pop("ca-key.pem") == 0o600
    assert set(modes) == {"ca.pem", "cert.pem"}
    assert folder.stat().st_mode & 0o077 == 0
    assert "made out to" in said(capsys, "show", str(folder))

    for word in ("init", "init", "renew"):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        said(capsys, word, str(folder), "--host=other", code=0 if word == "renew" else 2)
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == ({"cert.pem", "key.pem"} if word == "renew" else set())
    told = said(capsys, "renew", str(folder))
    assert "made out to other, localhost" in told
    assert "Key Usage" not in told


def test_a_part_of_an_earlier_one_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key.pem").write_text("precious")
    assert "has a key.pem" in said(capsys, "init", str(tmp_path), code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]


def test_other_tools_can_use_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenSSL's own judgement, as strict as it gets."""
    said(capsys, "init", str(tmp_path / "tls"), "--host=node0")
    context = ssl.create_default_context(cafile=str(tmp_path / "tls/ca.pem"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(tmp_path / "tls/cert.pem", tmp_path / "tls/key.pem")
    near, far = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(near, far, server_hostname="node0")
    server = listening.wrap_bio(far, near, server_side=True)
    for end in (client, server):
        with pytest.raises(ssl.SSLWantReadError):
            end.do_handshake()
    client.do_handshake()
    assert client.getpeercert()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("init", "DIR", "--host=a:1"), "--host 'a:1'; valid: a name or an address"),
        (("init", "DIR", "--host=tcp://a"), "--host 'tcp://a'; valid"),
        (("init", "DIR", "--host=größe"), "--host 'größe'"),
        (("init", "DIR", "--days=0"), "--days 0; valid: 1 to"),
        (("renew", "DIR"), "no CA in DIR"),
        (("show", "DIR"), "DIR/ca.pem: No such file"),
        (("init", "/proc/none/tls"), "/proc/none/tls cannot be written to"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], line: str
) -> None:
    folder = str(tmp_path / "tls")
    told = said(capsys, *(word.replace("DIR", folder) for word in argv), code=1 if "/proc" in argv[1] else 2)
    assert line.replace("DIR", folder) in told
