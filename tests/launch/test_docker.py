"""docker/: the compose file against the product, and what it says in several places. docker/test runs it for real."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from autoglm_elastic import settings
from autoglm_elastic.agent import flags
from autoglm_elastic.coordination.etcd import parse

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "docker"


def _default(text: str) -> str:
    """As compose reads it where no variable is set."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text).replace("$$", "$")


SERVICES: dict[str, Any] = yaml.safe_load(_default((FOLDER / "compose.yaml").read_text()))["services"]
NODES = [SERVICES[name] for name in ("n1", "n2", "n3")]
MEMBERS = [SERVICES[name] for name in ("e1", "e2", "e3")]


def _address(node: dict[str, Any]) -> str:
    (flag,) = (word for word in node["command"] if word.startswith("--store="))
    return str(flag.removeprefix("--store="))


def _seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def test_the_command_line_and_the_settings_are_ours() -> None:
    for node in NODES:
        program, *arguments = node["command"]
        assert program == "autoglm-run"
        command = flags.parse(["--print-config", *arguments], {})
        assert command.args.nnodes == f"1:{len(NODES)}"
        store = parse(_address(node))
        assert store.endpoints == tuple((member["hostname"], 2379) for member in MEMBERS)
        assert store.is_tls
        settings.load(None, node["environment"], [])
        assert _seconds(node["stop_grace_period"]) > int(command.args.shutdown_timeout)


def test_the_observer_looks_at_the_job_of_the_nodes() -> None:
    for node in NODES:
        (run_id,) = (word for word in node["command"] if word.startswith("--rdzv-id="))
        assert SERVICES["observer"]["command"] == ["autoglm", "status", _address(node), run_id, "--watch"]


def test_nobody_can_do_more_than_he_must() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "ports" not in service, name
    stages = re.split(r"^FROM ", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    for target in {service["build"]["target"] for service in SERVICES.values()}:
        (stage,) = (stage for stage in stages if stage.splitlines()[0].endswith(f" AS {target}"))
        assert "\nUSER 1000:1000\n" in stage, target


def test_every_member_has_its_own_certificate() -> None:
    command = SERVICES["certificates"]["command"]
    assert command[3:] == [member["hostname"] for member in MEMBERS]


def test_torch_is_the_one_that_everything_else_installs() -> None:
    (version,) = re.findall(r"AUTOGLM_TORCH:-([\d.]+)", (REPOSITORY / "launch" / "_setup.sh").read_text())
    given = SERVICES["n1"]["build"]["args"]["TORCH"]
    assert given == f"torch=={version}+cpu"
    assert f"ARG TORCH=torch=={version}\n" in (FOLDER / "Dockerfile").read_text()


def test_what_the_images_copy_is_let_in() -> None:
    let_in = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().split() if line[0] == "!"]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert sorted(let_in) == sorted({name for names in copied for name in names.split()})
    for name in let_in:
        assert (REPOSITORY / name).exists(), name
