# SPDX-License-Identifier: MIT
"""A slice of fuzz_checkpoints.py and fuzz_annotations.py, which are run whole by hand; and the width and the order of what must not grow back."""
import ast
import re

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


NARROW = [*sorted(p for p in (ROOT / "common").glob("*.py") if p.name != "boxes.py"), *ROOT.glob("*.py")]
SECTIONS = ["the paper", "what its tables compare with", "detector", "data", "train", "evaluate, predict", "flags", "main"]


@pytest.mark.parametrize("name, share", [("crosskd", 0.5), ("hierkd", 0.4), ("dkdetr", 0.45), ("prototype_kd", 0.5), ("simple21k", 0.3)])
def test_the_paper_comes_first_and_the_other_sections_in_their_order(name, share):
    path = ROOT / f"{name}.py"
    lines = path.read_text(encoding="utf-8").split("\n")
    titles = [(k, line.strip("# =")) for k, line in enumerate(lines) if line.startswith("# ====")]
    assert [title for _, title in titles] == SECTIONS
    assert titles[0][0] < 110 and (titles[3][0] - titles[0][0]) / len(lines) > share  # of the file


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tests/*.py")]), ids=lambda p: p.name)
def test_a_copied_file_carries_its_licence(path):
    assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: MIT\n")


@pytest.mark.parametrize("path", NARROW, ids=lambda p: p.name)
def test_lines_stay_readable(path):
    wide = [f"{path.name}:{k}" for k, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if len(line) > 110]
    assert not wide


# ------------------------------------------------------------------ README's table "Copy this function"

def copied():
    """(file, names) of the rows of README's table that name functions."""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").split("\n"):
        found = re.match(r"\| .*? \| (`\w+\.py: .*?) \| (.*?) \|", line)
        if found:
            names = re.findall(r"`(?:\w+\.py: )?(\w+)`", " ".join(found.groups()))
            yield re.match(r"`(\w+\.py)", found[1])[1], names


def globals_of(table):
    """Names that a piece of code reads and does not define."""
    names = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    return names.union(*map(globals_of, table.get_children()))


@pytest.mark.parametrize("file, names", list(copied()), ids=lambda v: v if isinstance(v, str) else v[0])
def test_a_copied_function_needs_what_readme_says_and_no_more(file, names):
    import builtins
    import symtable
    source = (ROOT / file).read_text(encoding="utf-8")
    pieces = {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None))
        if name in names:
            pieces[name] = ast.get_source_segment(source, node)
            for line in getattr(node, "decorator_list", []):
                assert ast.unparse(line) == "torch.no_grad()"
    assert set(pieces) == set(names), f"README names what {file} has not"
    needed = globals_of(symtable.symtable("\n\n".join(pieces.values()), file, "exec"))
    given = {*dir(builtins), *pieces, *"torch dist F nn math once_differentiable checkpoint reduce_mean".split()}
    assert needed <= given
    idle = "as_one_group pool_patches caption_loss relational_loss reliability feature_loss kl_bernoulli"  # one by one, or before, another
    assert set(names[1:]) - needed <= set(idle.split())
