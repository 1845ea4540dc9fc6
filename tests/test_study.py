# SPDX-License-Identifier: MIT
"""tests/study.py: the statistics of the studies, on numbers that a hand can check; its runs and rows."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import study  # noqa: E402

STUDIES = Path(__file__).parent / "STUDIES.md"


def rows_of(**arms):
    return [dict(arm=arm, seed=seed, AP=ap, seconds=10.0) for arm, aps in arms.items() for seed, ap in enumerate(aps, 1)]


def test_interval_of_three_numbers():
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t of 2 degrees, deviation 1
    assert study.interval([5.0])[1] != study.interval([5.0])[1]  # nan


def test_interval_and_p_agree():
    gains = [0.5, 1.5, 0.2, 2.0, 1.1]
    mean, half = study.interval(gains, 1 - study.p_value(gains))
    assert mean - half == pytest.approx(0, abs=1e-9)
    assert study.p_value([1.0]) == 1 and study.p_value([0.0, 0.0]) == 1 and study.p_value([2.0, 2.0]) == 0


def test_holm():
    assert study.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert study.holm([0.6, 0.5]) == [1.0, 1.0]
    assert study.holm([]) == []


def test_gains_are_paired_by_seed():
    rows = rows_of(alone=[10, 20, 30], kd=[11, 23]) + [dict(arm="kd", seed=9, AP=99.0)]
    assert study.paired(rows, "kd", "alone", "AP") == [1, 3]


def test_claims_and_tables(capsys):
    rows = rows_of(alone=[10.0, 20, 30, 10], up=[11.0, 22, 31, 11], down=[9.0, 19.2, 29, 9],
                   noise=[12.0, 18, 31, 9], young=[11.0, 21.1])
    study.claims(rows, [("a", "up", "alone", "AP"), ("b", "down", "alone", "AP"), ("c", "noise", "alone", "AP"),
                        ("d", "young", "alone", "AP"), ("e", "never", "alone", "AP")],
                 dict.fromkeys(["alone", "up", "down", "noise", "young", "never"], range(1, 5)))
    lines = capsys.readouterr().out.strip().splitlines()
    assert [x.split("  ")[0].strip() for x in lines] == ["holds", "REFUTED", "not shown", "interim", "not run"]
    alone = study.p_value([1.0, 2, 1, 1])  # of five, the second smallest p counts four times
    assert f"a: AP +1.25 +- 0.80, p {4 * alone:.3f}, up on 4 of 4 seeds" in lines[0]
    listed = [("a", "up", "alone", "AP"), ("d", "young", "alone", "AP"), ("e", "never", "alone", "AP")]
    head, _, a, d, e = study.markdown(rows, listed, dict.fromkeys(["alone", "up", "young", "never"], range(1, 5))).split("\n")
    assert a == "| a | 18.8 | 17.5 | +1.2 ± 0.8 | 4 | holds |"
    assert d == "| d | 16.1 | 15.0 | +1.1 ± 0.6 | 2 | interim |" and e == "| e | | | | 0 | not run |"
    study.table("title", rows, ["alone", "up", "young"], ("AP",), "alone")
    head, alone, up, young = capsys.readouterr().out.strip().splitlines()
    assert 'against "alone"' in head and "17.50" in alone and up.endswith("+1.25 +- 0.80")
    assert young.endswith("+1.05 +- 0.64")
    study.table("title", rows_of(one=[1.0], two=[2.0, 3, 4]), ["one", "two"], ("AP",), "one")
    head, one, two = capsys.readouterr().out.strip().splitlines()
    assert "1.00    - " in one and two.endswith("+1.00 (1 seeds)")
    study.table("title", rows, ["never"], ("AP",), "alone")
    assert not capsys.readouterr().out


def test_curve_draws_the_seeds_that_have_all(tmp_path, capsys):
    rows = rows_of(a=[1.0, 2, 9], b=[2.0, 4])
    study.curve(rows, {"one": ["a", "b"]}, "AP", tmp_path / "c.png", "t")
    assert (tmp_path / "c.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "1.5 +-" in said and "3.0 +-" in said and "2 seeds" in said
    study.curve(rows, {"one": ["a", "never"]}, "AP", tmp_path / "none.png", "t")
    assert "no curve" in capsys.readouterr().out


def test_curve_compares_at_equal_seconds(tmp_path, capsys):
    row = lambda arm, seed, ap, seconds: dict(arm=arm, seed=seed, AP=ap, seconds=seconds)
    rows = [row("short", 1, 10.0, 100), row("long", 1, 30.0, 400), row("kd", 1, 23.0, 200), row("kd long", 1, 40.0, 800)]
    study.curve(rows, {"alone": ["short", "long"], "kd": ["kd", "kd long"]}, "AP", tmp_path / "c.png", "t")
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("at equal seconds")]
    assert said == ["at equal seconds, 200, interpolated: AP +3.00 (1 seeds)"]  # 200 s: halfway from 100 to 400 in log; 800 s: nothing there
    slower = [row(r["arm"], 2, r["AP"], 3 * r["seconds"] if r["arm"] != "long" else None) for r in rows]  # the clock is seed 1's
    study.curve(rows + slower, {"alone": ["short", "long"], "kd": ["kd", "kd long"]}, "AP", tmp_path / "c.png", "t")
    assert "at equal seconds, 200, interpolated: AP +3.00 +- 0.00 (2 seeds)" in capsys.readouterr().out
    study.curve(rows + [r for r in slower if r["arm"] != "kd long"], {"alone": ["short", "long"], "kd": ["kd", "kd long"]},
                "AP", tmp_path / "c.png", "t")
    said = capsys.readouterr().out  # the gain needs no longer arm, the picture does
    assert "at equal seconds, 200, interpolated: AP +3.00 +- 0.00 (2 seeds)" in said and "1 seeds: " in said


def test_a_study_runs_what_is_missing(tmp_path, capsys, monkeypatch):
    ran = []

    def run(arm, seed, folder):
        ran.append((arm, seed))
        return dict(AP=1.0 * seed, seconds=1.0)

    arms = dict(a=[1, 2], b=[1])
    one = study.Study("x", run, lambda seed, folder: None, arms, lambda rows: print(len(rows), "rows"))
    monkeypatch.setattr(one, "path", tmp_path / "study_x.jsonl")
    monkeypatch.setattr(sys, "argv", ["study_x.py", "--jobs", "1"])
    one.main_program("doc")
    one.main_program("doc")
    assert ran == [("a", 1), ("b", 1), ("a", 2)]
    monkeypatch.setattr(sys, "argv", ["study_x.py", "--jobs", "1", "--seeds", "2"])
    one.main_program("doc")  # "b" has one seed
    assert not ran[3:]
    monkeypatch.setattr(sys, "argv", ["study_x.py", "--jobs", "1", "--seeds", "2", "--arms", "b"])
    one.main_program("doc")
    assert ran[3:] == [("b", 2)]
    rows = [json.loads(line) for line in one.path.read_text().splitlines()]
    assert len(rows) == 4 and all(r["commit"] for r in rows)
    assert "4 rows" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["study_x.py", "--seeds", "0"])
    with pytest.raises(SystemExit):
        one.main_program("doc")


def test_a_run_is_taken_where_it_is_finished_and_made_anew_with_other_flags(tmp_path, monkeypatch):
    script, out = tmp_path / "script.py", tmp_path / "out"
    works = ("import json, sys, pathlib\n"
             "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
             "(out / 'results.json').write_text(json.dumps(dict(epoch=1, it=2, said=sys.argv[-1], all=sys.argv)))\n")
    script.write_text(works)
    first = study.train(script, out, ["--x", 1])
    assert first[0]["said"] == "1" and first[1]["steps"] == 2 and first[1]["seconds"] >= 0 and first[1]["commit"]
    assert study.train(script, out, ["--x", 1]) == first
    (out / "trace").touch()
    assert study.train(script, out, ["--x", 2])[0]["said"] == "2" and not (out / "trace").exists()
    (start := tmp_path / "start.pt").write_text("1")
    flags = ["--x", 2, "--from", start]
    result, took = study.train(script, out, flags)
    assert result["said"] == str(start) and list(took["start"]) == [f"{tmp_path.name}/start.pt"] and len(took["start"].popitem()[1]) == 16
    (out / "cost.json").unlink()
    (out / "last.pt").touch()
    result, took = study.train(script, out, flags)  # last.pt knows where it came from
    assert result["said"] == "--resume" and str(start) not in result["all"] and took["seconds"] is None
    (out / "cost.json").unlink()
    script.write_text("import sys; sys.exit(143)")  # stopped: what it took is kept
    with pytest.raises(SystemExit):
        study.train(script, out, flags)
    assert "spent" not in json.loads((out / "flags.json").read_text())  # it was killed before
    shutil.rmtree(out)
    with pytest.raises(SystemExit):
        study.train(script, out, flags)
    assert json.loads((out / "flags.json").read_text())["spent"] >= 0
    (out / "last.pt").touch()
    script.write_text(works)
    assert study.train(script, out, flags)[1]["seconds"] is not None
    start.write_text("2")
    assert study.train(script, out, flags)[1]["seconds"] is not None  # made anew
    monkeypatch.setattr(study, "gpu", lambda: "a GPU")  # its seconds are none of a CPU's
    took = study.train(script, out, [*flags, "--y"])[1]
    assert took["seconds"] is None and took["gpu"] == "a GPU"


def test_a_row_with_another_start_than_its_seed_s_is_refused(tmp_path):
    each = study.Study("none", None, None, {}, None)
    each.path = tmp_path / "rows.jsonl"
    row = dict(seed=2, commit="c", AP=1.0)
    each.add(row | dict(arm="a", start={"burn-in/best.pt": "1"}))
    each.add(row | dict(arm="b", start={"burn-in/best.pt": "1", "teacher-8/best.pt": "3"}))
    each.add(row | dict(arm="c"))
    each.add(row | dict(arm="a", seed=3, start={"burn-in/best.pt": "2"}))
    with pytest.raises(SystemExit, match="seed 2: burn-in/best.pt of 'd' is not that of a, b"):
        each.add(row | dict(arm="d", start={"burn-in/best.pt": "2"}))
    assert len(each.rows()) == 4


def test_a_command_that_fails_stops_the_study():
    out, seconds = study.command([sys.executable, "-c", "print(3)"])
    assert out == "3\n" and 0 < seconds < 60
    with pytest.raises(SystemExit, match="no such luck"):
        study.command([sys.executable, "-c", "raise ValueError('no such luck')"])


@pytest.mark.parametrize("name", ["crosskd", "hierkd", "dkdetr", "prototype_kd", "simple21k"])
def test_every_claim_compares_arms_that_exist(name):
    module = __import__(f"study_{name}")
    for _, arm, against, key in module.CLAIMS:
        known = {*module.ARMS, *getattr(module, "FUSE", ())}
        assert arm in known and against in known and {arm, against} <= {*module.SEEDS}
        assert key in (*module.METRICS, *getattr(module, "NAMING", ()))


def test_every_arm_of_crosskd_is_one_run(monkeypatch):
    """Without --method, --data shapes is the quick start."""
    import crosskd
    for flags in __import__("study_crosskd").ARMS.values():
        assert crosskd.parse_args(["--data", "shapes", *flags]).method is not None


@pytest.mark.parametrize("script, without, with_it, key", [
    ("crosskd", "alone", "CrossKD, i = 3", "AP"), ("hierkd", "none", "both", "zsd_AP50"),
    ("dkdetr", "none", "both", "novel_AP50"), ("prototype_kd", "continued", "all three", "AP"),
    ("simple21k", "-stage I", "full", "novel_AP50")])
def test_readme_s_table_says_what_the_rows_say(script, without, with_it, key):
    rows = [json.loads(line) for line in (Path(__file__).parent / f"study_{script}.jsonl").read_text().splitlines()]
    of = {(r["arm"], r["seed"]): r[key] for r in rows if key in r}
    seeds = [s for a, s in of if a == with_it and (without, s) in of]
    before, after = (sum(of[arm, s] for s in seeds) / len(seeds) for arm in (without, with_it))
    line = next(x for x in (study.ROOT / "README.md").read_text().splitlines() if x.startswith(f"| `{script}.py`"))
    mean, half = study.interval(study.paired(rows, with_it, without, key))
    assert f"{before:.1f} → {after:.1f} ({mean:+.1f} ± {half:.1f}" in line and f"), n = {len(seeds)} |" in line


@pytest.mark.parametrize("name", ["crosskd", "hierkd", "dkdetr", "prototype_kd", "simple21k"])
def test_studies_md_has_every_claim_as_the_rows_have_it(name):
    module = __import__(f"study_{name}")
    rows = [json.loads(line) for line in (Path(__file__).parent / f"study_{name}.jsonl").read_text().splitlines()]
    assert study.markdown(rows, module.CLAIMS, module.SEEDS) in STUDIES.read_text()


def test_prose_says_no_interval_that_the_rows_do_not():
    """Means and half widths in the text of STUDIES.md and on README's first page."""
    known = set()
    for name in ("crosskd", "hierkd", "dkdetr", "prototype_kd", "simple21k"):
        module = __import__(f"study_{name}")
        rows = [json.loads(line) for line in (study.ROOT / f"tests/study_{name}.jsonl").read_text().splitlines()]
        compared = [c[1:] for c in module.CLAIMS] + [*module.ASIDES]
        gains = [study.paired([r for r in rows if not c[3:] or r["seed"] in c[3:]], *c[:3]) for c in compared]
        if name == "dkdetr":  # the one whose plain line is flat
            gains += [g for _, g in study.at_equal_seconds(rows, module.CURVES, module.METRICS[0])]
        for mean, half in (study.interval(g) for g in gains if g):
            known |= {f"{mean:+.1f} ± {half:.1f}", f"{abs(mean):.1f} ± {half:.1f}"}  # without a sign: words say it
    page = (study.ROOT / "README.md").read_text().split("## Quick start")[0]
    for text in (page, STUDIES.read_text()):
        found = re.findall(r"[+-]?\d+\.\d ± \d+\.\d", re.sub(r"\s+", " ", text))
        assert len(found) > 10 and {*found} - known == set()
