"""A test double of bench/worker.py: speaks its protocol, sleeps as its own revision says.

Copied over bench/worker.py of a scratch repository, where it starts in a tenth of a second. What a
UNet step takes it reads from the default in the backends/null.py beside it, so that a revision
with another default is another program.
"""

import json
import re
import sys
import time
from pathlib import Path

PROTOCOL = 1
LAST_STATUSES = ("oom", "failed", "skipped")

if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    source = Path("backends/null.py").read_text()
    step_ms = float(re.search(r'"unet_ms": Option\(([\d.]+)', source)[1])
    fails = "SCRIPTED_FAILURE" in source

    def say(event: str, **fields: object) -> None:
        print(json.dumps({"event": event, **fields}), flush=True)

    say("loaded", shared={})
    for number, cell in enumerate(job["cells"]):
        say("begin", cell=number)
        if fails and cell["steps"] == 2:
            say("row", cell=number, result={"status": "mismatch"})
            continue
        samples = []
        for _ in range(3):
            started = time.perf_counter()
            time.sleep(cell["steps"] * step_ms / 1e3)
            samples.append((time.perf_counter() - started) * 1e3)
        median = sorted(samples)[1]
        result = {"status": "ok", "samples_ms": samples, "median_ms": median, "nfe": cell["steps"]}
        say("row", cell=number, result=result)
