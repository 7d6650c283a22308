"""A worker that says it is up in $SLEEPER_OUT/<rank> and waits to be killed, or exits with $SLEEPER_CODE."""

import os
import signal
import sys

with open(os.path.join(os.environ["SLEEPER_OUT"], os.environ["RANK"]), "w") as file:
    file.write(os.environ.get("TORCHELASTIC_RUN_ID", ""))
if "SLEEPER_CODE" in os.environ:
    sys.exit(int(os.environ["SLEEPER_CODE"]))
while True:
    signal.pause()
