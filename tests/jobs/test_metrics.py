"""What a run reports is read back, also behind a kill, and drawn beside other runs."""

import json
from types import SimpleNamespace

import pytest

from jobs.cli import UserError
from jobs.rundir import Metrics, draw, logger_names, read_metrics
from train import TrainFlags


def steps(n, loss):
    return [{"step": k + 1, "loss": loss / (k + 1), "pairs": 4, "seconds": 2.0} for k in range(n)]


def write(directory, rows, tail=""):
    directory.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text + tail)
    return directory


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    out = write(tmp_path / "out", steps(2, 1.0), tail='{"step": 3, "lo')
    said = []
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl", said.append)] == [1, 2]
    assert len(said) == 1 and "metrics.jsonl:3: the last line is torn" in said[0]


def test_a_broken_line_before_the_last_is_told(tmp_path):
    out = write(tmp_path / "out", [], tail='{"st\n{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="metrics.jsonl:1: broken JSON"):
        read_metrics(out / "metrics.jsonl")


def test_a_resumed_run_goes_on_behind_its_step_also_after_a_torn_line(tmp_path):
    evals = [{"step": 2, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.4}]
    out = write(tmp_path / "out", steps(4, 1.0) + evals, tail='{"step')
    ranks = SimpleNamespace(first=True, say=lambda text: None)
    Metrics(SimpleNamespace(out=out, log=None), ranks, 3).write({"step": 4, "loss": 9.0})
    kept = [(row["step"], row.get("loss")) for row in read_metrics(out / "metrics.jsonl")]
    assert kept == [(1, 1.0), (2, 0.5), (3, 1 / 3), (2, None), (4, 9.0)]


def test_a_figure_that_cannot_be_drawn_is_said_and_ends_nothing(tmp_path):
    out = write(tmp_path / "out", steps(2, 1.0))
    (out / "curves.png").mkdir()
    said = []
    ranks = SimpleNamespace(first=True, say=said.append)
    Metrics(SimpleNamespace(out=out, log=None), ranks, 3).plot()
    assert len(said) == 1 and "curves.png could not be drawn: " in said[0]


def test_curves_have_no_false_zero_and_their_legend_hides_nothing(tmp_path, monkeypatch):
    """At step 0 policy and reference are the same: no pair is won, which is no accuracy of 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **look: drawn.append(figure))
    start = {"step": 0, "eval_accuracy": 0.0, "eval_margin": 0.0, "eval_loss": 0.69}
    later = {"step": 5, "eval_accuracy": 0.6, "eval_margin": 0.1, "eval_loss": 0.6}
    lost = {"step": 9, "eval_accuracy": 0.0, "eval_margin": -0.1, "eval_loss": 0.8}  # a true zero
    lines = [start, *steps(4, 1.0), later, lost]
    draw({None: lines}, "one"), draw({"a": lines, "b": lines}, "two")
    for figure, runs in zip(drawn, (1, 2), strict=True):
        loss, accuracy, margin = figure.axes
        assert accuracy.lines[0].get_xydata().tolist() == [[5, 0.6], [9, 0]]
        assert loss.lines[1].get_xydata()[0].tolist() == [0, 0.69]
        assert margin.lines[0].get_xydata()[0].tolist() == [0, 0]
        assert not any(axis.get_legend() for axis in figure.axes) and len(figure.legends) == 1
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert texts == (["training", "eval_…"] if runs == 1 else
                         ["a: training", "b: training", "a: eval_…", "b: eval_…"])  # fmt: skip
        FigureCanvasAgg(figure).draw()
        top = figure.legends[0].get_window_extent().y1
        assert all(top < axis.get_window_extent().y0 for axis in figure.axes)


# ----------------------------------------------------------------------------- other loggers


def logged(out, log, step, rows):
    """These rows, written to OUT and to a logger, by a run that resumes behind `step`."""
    s = TrainFlags(out=str(out), log=log)
    metrics = Metrics(s, SimpleNamespace(first=True, say=print), step)
    for row in rows:
        metrics.write(row)
    metrics.close()


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    """A resumed run takes back what came after its checkpoint, as metrics.jsonl does."""
    pytest.importorskip("tensorboard", reason="no tensorboard, which is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(Metrics, "plot", lambda self: None)
    logged(tmp_path, "tensorboard", 0, [*steps(4, 1.0), {"step": 4, "eval_loss": 0.25}])
    logged(tmp_path, "tensorboard", 2, [{"step": 3, "loss": 9.0}])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert {"loss", "pairs", "seconds"} <= set(events.Tags()["scalars"])


def test_wandb_gets_every_number(tmp_path, monkeypatch):
    """Offline, in two sessions of one run; the second goes back to an earlier step."""
    wandb = pytest.importorskip("wandb", reason="no wandb, which is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(Metrics, "plot", lambda self: None)
    first = [{"step": 0, "reference_seconds": 0.5}, *steps(3, 1.0), {"step": 3, "eval_loss": 0.25}]
    logged(tmp_path, "wandb", 0, first)
    logged(tmp_path, "wandb", 2, [{"step": 3, "loss": 9.0}])
    wandb.teardown()  # its service writes, and has ended then
    sessions = [history(file) for file in sorted(tmp_path.glob("wandb/offline-*/*.wandb"))]
    assert sessions == [first, [{"step": 3, "loss": 9.0}]]
    assert len({file.name for file in tmp_path.glob("wandb/offline-*/*.wandb")}) == 1, "one run"


def history(file):
    """The rows of an offline wandb file: LevelDB's log format, blocks of 32 KiB, of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if at % 2**15 > 2**15 - 7:  # no header fits: the next block
            at += -at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            items = Record.FromString(record).history.item
            names = ((item.key or ".".join(item.nested_key), item.value_json) for item in items)
            rows.append({k: json.loads(v) for k, v in names if not k.startswith("_")})
            record = b""
    return [row for row in rows if row]


def test_an_unknown_logger_is_told():
    assert (
        logger_names("tensorboard, wandb") == ["tensorboard", "wandb"] and logger_names(None) == []
    )
    with pytest.raises(UserError, match="--log nothing: unknown; choose from tensorboard, wandb"):
        logger_names("nothing")
