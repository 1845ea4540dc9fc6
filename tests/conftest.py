import faulthandler
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"


def pytest_configure(config):
    config.stderr = os.fdopen(os.dup(2), "w")  # the real one, before pytest captures it


@pytest.fixture(autouse=True)
def no_test_hangs(request):
    """A test that has not ended after ten minutes ends the whole run, with the stack of every thread."""
    faulthandler.dump_traceback_later(600, exit=True, file=request.config.stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def coco_mini():
    """80 + 79 real COCO photographs."""
    path = SHARED / "data" / "coco_mini"
    if not path.exists():
        pytest.skip(f"real photographs are not here: {path}")
    return path


@pytest.fixture(scope="session")
def golden():
    """Numbers made by mmdet 3.3.0 and by the CrossKD authors' repository."""
    path = SHARED / "golden"
    if not path.exists():
        pytest.skip(f"golden numbers are not here: {path}")
    return path
