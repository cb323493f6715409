"""How does Ctrl-C end a program that imports torch for seconds? Quietly, if this comes first."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:     # until flags.program begins
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
