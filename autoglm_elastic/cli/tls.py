"""`autoglm tls`: a CA and certificates for the nodes of a job. Thin: parses, calls `coordination.authority`, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Certificates for the store of a job (docs/tls.md).", no_args_is_help=True)

DAYS = 365

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the files.", show_default=False)]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or address of a node, as in --store tcp://HOST:PORT; repeatable."),
]
Days = Annotated[int, typer.Option(help="How long the certificate holds.")]


@app.command()
def init(folder: Folder, hosts: Hosts = None, days: Days = DAYS) -> None:
    """Make a CA, and a certificate that every node of a job can use; overwrites nothing."""
    from autoglm_elastic.coordination import authority

    authority.make(folder, hosts or (), days)
    _show(folder)
    print("every node gets these three; the settings, here as environment variables:")
    for setting, name in (("CA", authority.CA), ("CERT", authority.CERT), ("KEY", authority.KEY)):
        print(f"  export AUTOGLM_TLS_{setting}={(folder / name).absolute()}")
    print(
        f"{folder / authority.CA_KEY} is for autoglm tls renew: whoever has it can join; keep it off the nodes"
    )


@app.command()
def renew(folder: Folder, hosts: Hosts = None, days: Days = DAYS) -> None:
    """Make another certificate of the CA in DIR, in place of the one there; running jobs take it up by themselves."""
    from autoglm_elastic.coordination import authority

    authority.renew(folder, hosts or (), days)
    _show(folder)


@app.command()
def show(folder: Folder) -> None:
    """Check the files in DIR as autoglm-run would, and tell what they are made out to and how long they hold."""
    from autoglm_elastic.coordination import Credentials, TlsFiles, authority

    files = TlsFiles(*(str(folder / name) for name in (authority.CA, authority.CERT, authority.KEY)))
    _show(folder)
    Credentials(files).require_server()


def _show(folder: Path) -> None:
    from autoglm_elastic.coordination import authority

    for name in (authority.CA, authority.CERT):
        for line in authority.describe(folder / name):
            print(line)
