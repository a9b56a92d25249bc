"""What libraries would do without being asked: nothing phones home, nothing is left in HOME.

`core` imports this first, so that it counts in every process of the project, workers included,
before a runtime loads. Whoever wants a library's telemetry sets its variable before.
"""

from __future__ import annotations

import os
import sys
import tempfile

SWITCHES = {
    # From 1.29 on its Linux builds keep a device id and an event store, and send events.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    # It writes a list of fonts; there it is made once a user.
    "MPLCONFIGDIR": os.path.join(tempfile.gettempdir(), f"addbench-matplotlib-{os.getuid()}"),
}


def switch_off() -> None:
    """Set what the user has not set. OpenVINO has no variable: it does without its package for
    telemetry where that is missing, which it is from here on."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


switch_off()
