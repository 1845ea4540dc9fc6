import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"


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
