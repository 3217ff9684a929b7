"""What a run says about its stages: their time, their peak memory, their bars."""

import json
import time

import pytest
import torch
from small_checkpoints import portrait, run

from gafext import MultiViewDiffusionPipeline
from gafext.cli import main
from gafext.watch.peak import peak_memory
from gafext.watch.stages import Stages

CPU = torch.device("cpu")


def measures_memory():
    with peak_memory(CPU) as peak:
        pass
    return peak.bytes is not None


needs_memory = pytest.mark.skipif(not measures_memory(), reason="this system does not say what a process has had")


@needs_memory
def test_the_peak_is_that_of_the_context():
    with peak_memory(CPU) as large:
        torch.ones(2**26)
    with peak_memory(CPU) as small:
        torch.ones(2**10)
    assert 0.99 * 2**28 < large.above < 2**28 + 2**25 and small.above < 2**24
    with peak_memory(torch.device("meta")) as unknown:
        pass
    assert unknown.above is None


def test_the_stages_of_a_run(checkpoint):
    pipe, stages = MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu"), Stages(CPU)
    expected = run(pipe)
    with stages.follow(pipe):
        followed = run(pipe)
    assert torch.equal(followed.images, expected.images)
    assert list(stages.found) == ["encode", "denoise", "upsample", "decode"]
    assert all(stage.seconds > 0 and stage.peak_bytes is None for stage in stages.found.values())
    before = stages.to_dict()
    run(pipe)
    assert stages.to_dict() == before and "prepare" not in vars(pipe)  # only what runs in the context


@needs_memory
def test_the_table():
    stages = Stages(CPU, memory=True)
    with stages("long"):
        time.sleep(0.03)
    with stages("wide"):
        torch.ones(2**26)
    lines = [line.split() for line in stages.table().splitlines()]
    assert [line[0] for line in lines] == ["stage", "long", "wide", "all"]
    assert float(lines[2][3]) == float(lines[3][3]) > float(lines[1][3]) + 0.2  # GiB
    assert float(lines[1][1]) + float(lines[2][1]) == pytest.approx(float(lines[3][1]), abs=0.011)


def test_generate_prints_the_stages_and_keeps_them(checkpoint, tmp_path, capsys):
    portrait(0).save(tmp_path / "portrait.png")
    words = ["generate", str(tmp_path / "portrait.png"), "--model", str(checkpoint), "--steps", "2", "--views", "2"]
    words += ["--device", "cpu", "--profile", "--out", str(tmp_path / "views")]
    assert main(words) == 0
    text = capsys.readouterr().err
    names = ["load", "encode", "denoise", "upsample", "decode", "save"]
    table = text[text.index("stage ") :].splitlines()
    assert [line.split()[0] for line in table[1:8]] == [*names, "all"]
    assert all(f"{name}: 100%" in text for name in names if name != "denoise") and "2 views: 100%" in text
    assert list(json.loads((tmp_path / "views/run.json").read_text())["profile"]) == names[:-1]
    assert main([*words[:-2], "--quiet", "--out", str(tmp_path / "again")]) == 0
    assert "%|" not in capsys.readouterr().err


def test_one_line_of_json_per_event(checkpoint, tmp_path, capsys):
    portrait(0).save(tmp_path / "portrait.png")
    words = ["generate", str(tmp_path / "portrait.png"), "--model", str(checkpoint), "--steps", "2", "--views", "2"]
    words += ["--device", "cpu", "--quiet", "--json", "--preview", "1"]
    assert main([*words, "--out", str(tmp_path / "views")]) == 0
    events = list(map(json.loads, capsys.readouterr().out.splitlines()))
    stages = [event["stage"] for event in events if event["event"] == "stage"]
    assert stages == ["load", "encode", "denoise", "upsample", "decode", "save"]
    assert [event["step"] for event in events if event["event"] == "progress"] == [1, 2]
    assert events[-1]["event"] == "portrait" and events[-1]["views"] == 2 and events[-1]["seconds"] > 0
    assert (tmp_path / "views.preview.png").exists()


@pytest.mark.parametrize("option", [["--profile"], ["--preview", "5"]])
def test_several_portraits_are_not_watched(checkpoint, tmp_path, capsys, option):
    for number in range(2):
        portrait(number).save(tmp_path / f"{number}.png")
    words = ["generate", str(tmp_path), "--model", str(checkpoint), "--out", str(tmp_path / "views")]
    assert main([*words, *option]) == 1
    assert f"{option[0]}: expected one portrait" in capsys.readouterr().err and not (tmp_path / "views").exists()
