"""Execute one notebook with papermill in this process: `python -m bkd_utils.running.execute IN OUT PARAMETERS-AS-JSON`.

The runner starts this as a child, so that a time limit or Ctrl-C can end kernel and papermill together."""

import json
import os
import sys
import tempfile
from pathlib import Path

import papermill
from ipykernel.kernelspec import write_kernel_spec

from bkd_utils.common.files import ROOT


def main(source: str, target: str, parameters: str) -> None:
    # The kernel is this interpreter, whatever kernel is registered on the machine under the notebook's kernel name.
    with tempfile.TemporaryDirectory() as jupyter:
        write_kernel_spec(Path(jupyter) / "kernels" / "bkd")
        # The user's Jupyter and IPython settings are not used, and the home folder need not be writable.
        os.environ["JUPYTER_PATH"] = jupyter
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            os.environ[name] = str(Path(jupyter) / name.lower())
        os.environ["BKD_STATIC"] = "1"  # nobody moves sliders here, see `reports.live`
        where = {"kernel_name": "bkd", "language": "python", "cwd": str(ROOT), "store_widget_state": False}
        given = json.loads(parameters)
        papermill.execute_notebook(source, target, given, **where, progress_bar=False, autosave_cell_every=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
