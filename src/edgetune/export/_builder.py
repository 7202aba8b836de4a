"""Runs the ONNX Runtime GenAI model builder in a process of its own: `python -m edgetune.export._builder JSON`.

The builder prints freely, puts modules under general names into `sys.modules` and keeps its memory, so it gets a
process, and its output goes to a log file.
"""

from __future__ import annotations

import json
import os
import sys
import threading


def main() -> None:
    """Build what the JSON argument asks for, and say the peak memory on the last line."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(sys.argv[1])
    # It stamps graphs with the commit of the repository around it, which is whoever's environment it is installed in.
    os.environ["GIT_DIR"] = os.devnull
    from edgetune.runtime import genai

    genai()  # telemetry off before the builder's package can send any
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    where = ("", job["model"], job["out"], job["precision"], job["provider"], job["cache"])
    options = parse_extra_options(*where, [f"{name}={value}" for name, value in job["options"].items()])
    create_model(*where, **options)
    from edgetune.runtime.memory import peak_rss_mb

    print(f"peak_rss_mb={peak_rss_mb():.1f}")


def _end_with_parent() -> None:
    os.read(
        0, 1
    )  # returns when the parent closes its end, or is no more; sys.stdin's lock would stand in the way at exit
    os._exit(1)


if __name__ == "__main__":
    main()
