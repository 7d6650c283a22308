"""Does a client of a c10d store ask for the name of the other end? A resolver of our own notices."""

import contextlib
import ctypes
import socket
import struct
import sys
from datetime import timedelta

from torch.distributed import DistError, TCPStore

resolver = ctypes.CDLL("libresolv.so.2")
resolver.__res_init()
resolver.__res_state.restype = ctypes.c_void_p
state = resolver.__res_state()
dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
dns.bind(("127.0.0.1", 0))
address, port = dns.getsockname()
# int retrans, retry; unsigned long options; int nscount; struct sockaddr_in nsaddr_list[]
head = struct.pack("@ii", 1, 1)
ctypes.memmove(state, head, len(head))
servers = struct.pack("@iH", 1, socket.AF_INET) + struct.pack("!H4s", port, socket.inet_aton(address))
ctypes.memmove(state + 16, servers, len(servers))

nobody = socket.socket()
nobody.bind(("127.0.0.1", 0))
with contextlib.suppress(DistError):
    TCPStore("127.0.0.1", nobody.getsockname()[1], is_master=False, timeout=timedelta(milliseconds=1))
dns.setblocking(False)
try:
    question = dns.recv(512)
except BlockingIOError:
    sys.exit("asked nobody")
sys.exit(f"asked for {question!r}")
