"""`docker compose`: the one that is there, or Debian's, taken out of its package."""

from __future__ import annotations

import shutil
from pathlib import Path

from tools import Failed, Skip, run, say, works

FETCH_S = 120.0

_SOURCE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main\n"
"""Debian 12 has only the first docker-compose, which nobody maintains any more."""


def compose_env(folder: Path) -> dict[str, str]:
    """What a docker command needs so that it knows `compose`. Raises `Skip` where it is not to be had."""
    if works("docker", "compose", "version"):
        return {}
    if shutil.which("apt-get") is None:
        raise Skip("no docker compose")
    say("fetching docker compose from Debian 13")
    try:
        _fetch(folder)
    except Failed as error:
        reason = str(error).strip().splitlines()[-1]
        raise Skip(f"no docker compose, and its package cannot be fetched ({reason})") from error
    env = {"DOCKER_CONFIG": str(folder)}
    if not works("docker", "compose", "version", env=env):
        raise Skip("the docker compose of Debian 13 does not run here")
    return env


def _fetch(folder: Path) -> None:
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    source = folder / "debian13.list"
    source.write_text(_SOURCE)
    places = {
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": lists,
        "APT::Sandbox::User": "root",
    }
    apt = ("apt-get", "--quiet", *(f"--option={name}={value}" for name, value in places.items()))
    run(*apt, "update", timeout_s=FETCH_S)
    run(*apt, "download", "docker-compose", timeout_s=FETCH_S, folder=folder)
    package = next(folder.glob("docker-compose_*.deb"))
    run("dpkg", "-x", package, folder / "unpacked", timeout_s=FETCH_S)
    (folder / "cli-plugins").mkdir()
    shutil.move(folder / "unpacked/usr/libexec/docker/cli-plugins/docker-compose", folder / "cli-plugins")
