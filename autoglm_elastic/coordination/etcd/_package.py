"""The one place that knows what is wrong with the `etcd3` package, and the only one that imports it.

`etcd3` 0.12.0, its last release, ships code generated for protobuf 3, which newer protobuf refuses to import
("Descriptors cannot be created directly"). The same files carry etcd's API as a serialized descriptor. From
that descriptor messages and stubs are built anew, in a descriptor pool of their own and with whatever
protobuf is installed, and put where the package looks for its generated code. Nothing generated is committed,
no compiler is needed, and `PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION` stays as it is.

Used of the package: `etcdrpc` (messages and stubs), `transactions`, `utils`. Its client is not: it knows one
endpoint, drops the status code of an error, and a watch of it whose member died spins.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from autoglm_elastic.coordination.etcd import require

_PARTS: Final = ("kv", "auth", "rpc")
"""The files of etcd's API, each after those it needs."""

_SERIALIZED: Final = "serialized_pb="
_MESSAGE_TYPE: Final = 11
_OPTIONAL: Final = 1


require()
# Read at import: grpc would write each failed connection to our standard error; what matters of it we say ourselves.
_VERBOSITY: Final = "GRPC_VERBOSITY"
_is_given = _VERBOSITY in os.environ
os.environ.setdefault(_VERBOSITY, "NONE")
import grpc  # noqa: E402

if not _is_given:
    del os.environ[_VERBOSITY]
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: E402


def _package_folder() -> Path:
    spec = importlib.util.find_spec("etcd3")
    return Path(str(spec and spec.origin)).parent


def _descriptor(file: Path) -> Any:
    """The `FileDescriptorProto` in a module that protoc generated for protobuf 3."""
    line = next(text for text in file.read_text().splitlines() if text.strip().startswith(_SERIALIZED))
    literal = line.strip().removeprefix(_SERIALIZED).removeprefix("_b(").rstrip("),")
    value = ast.literal_eval(literal)
    data = value.encode("latin1") if isinstance(value, str) else value
    return descriptor_pb2.FileDescriptorProto.FromString(data)


def _add_progress_request(api: Any) -> None:
    """`WatchRequest.progress_request` of etcd 3.4, which the package is too old to know: it asks a watch
    stream for a sign of life."""
    api.message_type.add(name="WatchProgressRequest")
    request = next(message for message in api.message_type if message.name == "WatchRequest")
    request.field.add(
        name="progress_request",
        number=3,
        type=_MESSAGE_TYPE,
        label=_OPTIONAL,
        type_name=".etcdserverpb.WatchProgressRequest",
        oneof_index=0,
    )


def _stub_class(package: str, service: Any, message: Any) -> type:
    """As grpc's generator writes it: one callable a method, made for a channel."""

    def bind(self: Any, channel: grpc.Channel) -> None:
        for method in service.method:
            sides = [
                "stream" if flag else "unary" for flag in (method.client_streaming, method.server_streaming)
            ]
            make = getattr(channel, "_".join(sides))
            call = make(
                f"/{package}.{service.name}/{method.name}",
                request_serializer=message(method.input_type).SerializeToString,
                response_deserializer=message(method.output_type).FromString,
            )
            setattr(self, method.name, call)

    return type(f"{service.name}Stub", (), {"__init__": bind})


def _build_etcdrpc(folder: Path) -> ModuleType:
    pool = descriptor_pool.DescriptorPool()
    module = ModuleType("etcd3.etcdrpc", "etcd's messages and stubs, built from its API's description.")

    def message(name: str) -> Any:
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(name.removeprefix(".")))

    for part in _PARTS:
        api = _descriptor(folder / "etcdrpc" / f"{part}_pb2.py")
        if part == "rpc":
            _add_progress_request(api)
        pool.AddSerializedFile(api.SerializeToString())
        for each in api.message_type:
            setattr(module, each.name, message(f"{api.package}.{each.name}"))
        for enum in api.enum_type:
            for value in enum.value:
                setattr(module, value.name, value.number)
        for service in api.service:
            setattr(module, f"{service.name}Stub", _stub_class(api.package, service, message))
    return module


if "etcd3.etcdrpc" not in sys.modules:
    sys.modules["etcd3.etcdrpc"] = _build_etcdrpc(_package_folder())
import etcd3  # noqa: E402
from etcd3 import etcdrpc, transactions, utils  # noqa: E402

__all__ = ["etcd3", "etcdrpc", "grpc", "transactions", "utils"]
