"""Run code in a new process where firsthand cannot be imported: a stranger's."""

import os
import subprocess
import sys
import tempfile

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "firsthand":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
try:
    import firsthand.modeling
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("firsthand is importable")
"""


def run_fresh(code: str, **env: str) -> str:
    """What the code prints; raises with its stderr where it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code],
        capture_output=True,
        text=True,
        env={**environment, **env},
        cwd=tempfile.gettempdir(),  # where no folder of ours can be imported
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()
