"""A worker that writes its run id into the FIFO $SLEEPER_UP and waits, or exits with $SLEEPER_CODE."""

import os
import signal
import sys

if "SLEEPER_CODE" in os.environ:
    sys.exit(int(os.environ["SLEEPER_CODE"]))
with open(os.environ["SLEEPER_UP"], "w") as file:
    file.write(os.environ["TORCHELASTIC_RUN_ID"])
while True:
    signal.pause()
