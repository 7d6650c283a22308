"""The images of docker/compose.yaml: built as a user does where a registry can be reached; else from a base that
debootstrap makes, and from wheels that this machine fetches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from daemon import Daemon
from tools import Failed, Skip, run, say, works

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "python:3.11-slim"
PULL_S = 120.0
DEBOOTSTRAP_S = 300.0
WHEELS_S = 300.0
BUILD_S = 900.0
COMMAND_S = 120.0

_PYTHON = (3, 11)
_SUITE = "bookworm"
_MIRROR = "http://deb.debian.org/debian"
_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
_PACKAGES = "python3,python3-venv,ca-certificates"


def context(folder: Path) -> Path:
    """A copy of what the images are built from, so that no file of the repository is touched; its compose file."""
    for name in ("pyproject.toml", "README.md", ".dockerignore"):
        shutil.copy2(REPOSITORY / name, folder)
    for name in ("autoglm_elastic", "docker"):
        ignored = shutil.ignore_patterns("__pycache__", "*.whl")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    return folder / "docker" / "compose.yaml"


def ingredients(here: Daemon, folder: Path, wheels: Path, tag: str, torch: str) -> dict[str, str]:
    """What compose.yaml needs to know, by variable; the images that it names are there. `torch`: a requirement."""
    if not here.is_ours and works("docker", "pull", "--quiet", BASE, timeout_s=PULL_S):
        say(f"the registry can be reached: {BASE}")
        return {"AUTOGLM_TAG": tag}
    say("no registry: the base comes from debootstrap, etcd from this machine, packages as wheels")
    _check()
    names = {"BASE_IMAGE": f"autoglm-base:{tag}", "ETCD_IMAGE": f"autoglm-etcd-release:{tag}"}
    try:
        _make(here, folder, wheels, torch, names)
    except Failed as error:
        said = str(error).strip().splitlines()
        raise Skip(f"what the images are made of is not to be had: {said[0]} … {said[-1]}") from error
    if not works("docker", "run", "--rm", "--init", names["BASE_IMAGE"], "true", env=here.env):
        raise Skip("this Docker starts no containers")
    return {"AUTOGLM_TAG": tag, **names, "TORCH": torch, "PIP_NO_INDEX": "1"}


def _make(here: Daemon, folder: Path, wheels: Path, torch: str, names: dict[str, str]) -> None:
    with ThreadPoolExecutor() as pool:
        base = pool.submit(_base, folder / "base")
        fetched = pool.submit(_wheels, wheels, torch, folder / "constraints.txt")
        _import(base.result(), names["BASE_IMAGE"], here)
        _import(_etcd(folder / "etcd"), names["ETCD_IMAGE"], here)
        say(f"made the base image: {_size(names['BASE_IMAGE'], here)}")
        fetched.result()
        count = sum(1 for _ in wheels.glob("*.whl"))
        say(f"fetched {count} wheels: {sum(path.stat().st_size for path in wheels.iterdir()) / 1e6:.0f} MB")


def _check() -> None:
    for program in ("debootstrap", "etcd", "etcdctl"):
        if shutil.which(program) is None:
            raise Skip(f"no registry can be reached, and there is no {program}")
    if os.getuid() != 0:
        raise Skip("no registry can be reached, and only root may run debootstrap")
    if sys.version_info[:2] != _PYTHON:
        raise Skip(f"no registry can be reached, and this is not Debian {_SUITE}'s Python {_PYTHON}")


def _base(root: Path) -> Path:
    # In namespaces of its own: what it mounts in there is gone when it is.
    isolated = ("unshare", "-m", "-p", "-f", "--kill-child", "--propagation", "private")
    options = ("--variant=minbase", f"--include={_PACKAGES}")
    run(*isolated, "debootstrap", *options, _SUITE, root, _mirror(), timeout_s=DEBOOTSTRAP_S)
    for unneeded in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / unneeded)
        (root / unneeded / "partial").mkdir(parents=True)
    return root


def _mirror() -> str:
    """The one that apt uses."""
    try:
        told = run(
            *("apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages"),
            f"Codename: {_SUITE}",
            timeout_s=COMMAND_S,
        )
    except Failed:
        told = ""
    return next(iter(told.split()), _MIRROR)


def _etcd(root: Path) -> Path:
    """The two programs where etcd's own image has them."""
    place = root / "usr" / "local" / "bin"
    place.mkdir(parents=True)
    for program in ("etcd", "etcdctl"):
        found = shutil.which(program)
        assert found is not None
        shutil.copy2(found, place)
    return root


def _wheels(folder: Path, torch: str, constraints: Path) -> None:
    """All that the images install, in the versions of this environment."""
    frozen = run(
        sys.executable, "-m", "pip", "freeze", "--exclude-editable", timeout_s=COMMAND_S
    ).splitlines()
    kept = [line for line in frozen if "==" in line and not line.startswith("torch==")]
    constraints.write_text("\n".join(kept) + "\n")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [
        torch,
        *project["build-system"]["requires"],
        *(line for line in project["project"]["dependencies"] if not line.startswith("torch")),
        *extras["etcd"],
        *extras["s3"],
        *(line for line in extras["dev"] if line.startswith("moto")),
    ]
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-input", "--disable-pip-version-check")
    command = (*pip, "--wheel-dir", folder, "--constraint", constraints, *wanted)
    try:
        run(*command, timeout_s=WHEELS_S)
    except Failed as error:
        if "No matching distribution" not in str(error):
            raise
        run(*command, "--extra-index-url", _TORCH_INDEX, timeout_s=WHEELS_S)


def _import(root: Path, name: str, here: Daemon) -> None:
    packed = subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE)
    try:
        done = subprocess.run(
            ["docker", "import", "-", name],
            stdin=packed.stdout,
            env={**os.environ, **here.env},
            stdout=subprocess.DEVNULL,
            timeout=COMMAND_S,
            check=False,
        )
        if done.returncode or packed.wait(COMMAND_S):
            raise Failed(f"docker import of {name} failed")
    finally:
        packed.kill()
        packed.wait(COMMAND_S)
        assert packed.stdout is not None
        packed.stdout.close()
    shutil.rmtree(root)


def _size(name: str, here: Daemon) -> str:
    told = run("docker", "image", "inspect", name, "--format", "{{.Size}}", timeout_s=COMMAND_S, env=here.env)
    return f"{int(told) / 1e6:.0f} MB"
