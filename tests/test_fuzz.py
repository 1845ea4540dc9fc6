"""A slice of fuzz_checkpoints.py and fuzz_annotations.py, which are run whole by hand; and the width and the order of what must not grow back."""
import pytest

import fuzz_annotations
import fuzz_checkpoints
from conftest import ROOT


def test_damaged_checkpoints_are_refused_in_one_line_or_are_what_was_saved(tmp_path):
    bad = [(what, verdict) for what, verdict in fuzz_checkpoints.attempts(60, 3, tmp_path) if verdict.split(":")[0] not in
           ("refused", "as saved", "another content without a checksum to tell")]
    assert not bad, bad


def test_changed_annotation_files_are_refused_in_one_line_or_score_100(tmp_path):
    if not fuzz_annotations.DATA.exists():
        pytest.skip(f"real annotations are not here: {fuzz_annotations.DATA}")
    bad = [(what, verdict) for what, verdict in fuzz_annotations.attempts(25, 3, tmp_path, images=2) if verdict not in ("refused", "perfect")]
    assert not bad, bad


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "common").glob("*.py") if p.name != "boxes.py"), ids=lambda p: p.name)
def test_lines_of_common_stay_readable(path):
    wide = [f"{path.name}:{k}" for k, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if len(line) > 110]
    assert not wide
