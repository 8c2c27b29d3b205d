"""Settings of every test: a loopback Hub of our own instead of the public one, and fresh caches.

The Hugging Face libraries read HF_ENDPOINT when they are imported, so it is set here, first of all.
"""

import atexit
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
assert "huggingface_hub" not in sys.modules, "a plugin imported huggingface_hub before conftest"

_spec = importlib.util.spec_from_file_location("loopback_hub", TESTS / "hub" / "server.py")
_module = importlib.util.module_from_spec(_spec)
sys.modules["loopback_hub"] = _module
_spec.loader.exec_module(_module)
_SERVER = _module.start_server()
_HOME = tempfile.mkdtemp(prefix="firsthand-hf-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

os.environ.update(
    HF_ENDPOINT=_SERVER.url,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_TOKEN=_SERVER.token,
    HF_HOME=_HOME,
    GRADIO_ANALYTICS_ENABLED="False",
    TOKENIZERS_PARALLELISM="false",
    OMP_WAIT_POLICY="passive",
)
os.environ.pop("HF_HUB_OFFLINE", None)
# `python -m pytest` puts the checkout on the path, where `import spaces` would find our folder
sys.path[:] = [p for p in sys.path if Path(p).resolve() != TESTS.parent]
sys.path.insert(0, str(TESTS))  # so that `from tiny_models import ...` works in importlib mode


@pytest.fixture(scope="session")
def hub():
    """The loopback Hub that the real client talks to."""
    return _SERVER


@pytest.fixture
def serve():
    """Put a checkpoint behind transformers' own server on loopback: folder -> URL."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from transformers.cli.serve import Serve

    servers = []

    def start(folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = Serve(
            force_model=str(folder), host="127.0.0.1", port=port, device="cpu", non_blocking=True
        )
        servers.append(server)
        deadline = time.monotonic() + 120
        while not server.server.started and time.monotonic() < deadline:
            time.sleep(0.05)
        return f"http://127.0.0.1:{port}/v1"

    yield start
    for server in servers:
        server.kill_server()
