"""What every forked test process begins with: imported once, by the server of tests/forking.py."""

from __future__ import annotations

import gc
import importlib

from eellm.quiet import quiet_dependencies

quiet_dependencies()
for task in ("benchmark", "calibrate", "convert", "evaluate", "generate", "quickstart", "report", "serve", "train", "tune"):
    importlib.import_module(f"eellm.tasks.{task}")
gc.collect()
gc.freeze()  # what has been imported stays, and its pages stay shared
