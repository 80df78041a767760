"""curves.py: what is drawn, and what is said where it cannot be."""
import json
import sys

import pytest

from demo import curves

LOGS = {
    "pt": [{"step": 0, "val": {"en": {"loss": 6.0, "bits_per_byte": 4.0}}},
           {"step": 0, "loss": 6.1},
           {"step": 9, "val": {"en": {"loss": 1.0, "bits_per_byte": 0.5}}}],
    "sft": [{"step": 0, "val": {"en": 3.0, "zh": 4.0}, "text": {}, "answers": {}},
            {"step": 0, "loss": 3.1, "supervised": 7}],
    "rm": [{"step": 4, "val": {"all": {"log_loss": 0.5}, "en": {"log_loss": 0.4}}}],
    "dpo": [{"step": 0, "val": {"pairs": {"all": {"loss": 0.69}}, "samples": {}}},
            {"step": 0, "loss": 0.68}],
    "rl": [{"step": 0, "val": {"reward": 0.0, "kl": 0.0}},
           {"step": 0, "loss": 0.0, "reward": 0.1, "kl": 0.2}]}


@pytest.fixture
def out(tmp_path):
    for stage, records in LOGS.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "log.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "world").mkdir()
    (tmp_path / "world/floor.json").write_text(json.dumps(
        {"pt": {"en": 0.42, "all": 0.4}, "pairs_heldout_bayes": {"loss": 0.29}}))
    return tmp_path


def test_each_stage_has_its_curves_and_known_lines(out):
    """Seen to fail with the records of training steps taken for validations in the panel of PT,
    and with the floor of all languages drawn as one more."""
    found = {title: (points, lines) for title, _, points, lines in curves.panels(out)}
    assert found["PT"] == ({"en": ([0, 9], [4.0, 0.5])}, {"floor en": 0.42})
    assert found["SFT"] == ({"en": ([0], [3.0]), "zh": ([0], [4.0])}, {})
    assert found["RM"] == ({"all": ([4], [0.5])}, {
        "cannot tell: log 2": pytest.approx(0.6931, abs=1e-4), "Bayes": 0.29})
    assert found["DPO"][0] == {"held out": ([0], [0.69]), "training": ([0], [0.68])}
    points, lines = found["RL"]
    assert points == {"reward": ([0], [0.1]), "KL": ([0], [0.2]),
                      "reward, held out": ([0], [0.0]), "KL, held out": ([0], [0.0])}
    assert list(lines) == ["budget of the KL"]


def test_a_stage_that_has_not_run_has_no_panel(out):
    (out / "rl/log.jsonl").unlink()
    (out / "world/floor.json").unlink()
    found = curves.panels(out)
    assert [title for title, *_ in found] == ["PT", "SFT", "RM", "DPO"] and found[0][3] == {}


def test_without_matplotlib_a_line_says_so(out, monkeypatch, capsys):
    """Seen to fail with the check left out: a traceback at the end of the demo."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    assert curves.draw(out) is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "pip install matplotlib" in said


def test_the_picture_has_a_panel_for_each_stage(out):
    pytest.importorskip("matplotlib", reason="the extra `plots`")
    path = curves.draw(out)
    assert path == out / "curves.png" and path.read_bytes()[:4] == b"\x89PNG"
    width, height = (int.from_bytes(path.read_bytes()[a:a + 4], "big") for a in (16, 20))
    assert width > 1.5 * height and height > 400  # five panels in two rows
    assert curves.draw(out / "world") is None  # no log there
