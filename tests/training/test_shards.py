"""Training data in WebDataset shards, against the same data in folders."""

import io
import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import replace

import pytest
import torch
from helpers import ROOT
from PIL import Image
from training_runs import ENVIRONMENT, LAUNCH, OPTIONS, command, losses, write_heads

from gafext.cli import main
from gafext.training.data import read_heads
from gafext.training.shards import Shards, index_shards, write_shards
from gafext.training.train import share_of


@pytest.fixture(scope="module")
def shards(files):
    """Folder of shards of one head each."""
    assert main(["train", str(files / "data"), "--pack", str(files / "shards"), "--shard-mb", "0.001"]) == 0
    return files / "shards"


def words(files, shards, out, *options):
    return ["train", str(shards), "--parent", str(files / "parent"), "--out", str(out), *OPTIONS, *options]


def test_a_head_comes_back_as_it_was(files, shards):
    heads, _ = read_heads(files / "data")
    packed = Shards(shards)
    assert len(list(shards.glob("heads-*.tar"))) == 3
    assert [(head.name, head.subject) for head in packed.heads] == [(head.name, head.subject) for head in heads]
    seen = []
    for index, head in packed.open(packed.heads, [2, 0]):
        seen.append(index)
        before = heads[index]
        assert head.name == before.name and head.subject == before.subject
        for ours, theirs in ((head.w2c, before.w2c), (head.intrinsics, before.intrinsics)):
            assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-6)
        assert len(head.normals) == len(before.normals) == 4
        for ours, theirs in zip(head.files(), before.files(), strict=True):
            assert ours.read_bytes() == theirs.read_bytes()
        kept = head.pictures[0]
    assert seen == [0, 2] and not kept.exists()  # in the order of the shards; the files are for their turn


def test_pictures_that_are_not_square(tmp_path):
    write_heads(tmp_path / "data", 1, views=3, size=32)
    [path] = (tmp_path / "data").rglob("transforms_train.json")
    values = json.loads(path.read_text())
    for frame in values["frames"]:
        frame.pop("camera_angle_x", None)
        frame.update(w=32, h=24, fl_x=60.0, fl_y=61.0, cx=15.0, cy=13.0)
    values.pop("camera_angle_x", None)
    path.write_text(json.dumps(values))
    for picture in (tmp_path / "data").rglob("*.png"):
        Image.open(picture).crop((0, 4, 32, 28)).save(picture)
    [head], faults = read_heads(tmp_path / "data")
    assert not faults
    write_shards([head], tmp_path / "shards", megabytes=1)
    packed = Shards(tmp_path / "shards")
    [(_, again)] = packed.open(packed.heads, [0])
    assert torch.allclose(torch.stack(again.intrinsics), torch.stack(head.intrinsics), atol=1e-6)
    assert again.sizes == [(32, 24)] * 3


def test_a_run_on_shards_is_the_run_on_folders(files, shards, tmp_path, capsys):
    assert main(command(files, tmp_path / "folders", "--steps", "3")) == 0
    assert main(words(files, shards, tmp_path / "shards", "--steps", "3")) == 0
    assert losses(tmp_path / "shards") == losses(tmp_path / "folders")
    scores = [
        [json.loads(line).get("psnr") for line in (tmp_path / name / "log.jsonl").read_text().splitlines()][-1]
        for name in ("folders", "shards")
    ]
    assert scores[0] == scores[1] is not None
    # A later run finds what is encoded, and reads of the shards only their index and the heads held out.
    for shard in ("heads-000000.tar", "heads-000001.tar"):
        (shards / shard).rename(shards / f"{shard}.away")
    try:
        assert main(words(files, shards, tmp_path / "shards", "--steps", "4")) == 0
        capsys.readouterr()
        assert main(words(files, shards, tmp_path / "other", "--steps", "1")) == 1
        assert "heads-000000.tar: expected a shard" in capsys.readouterr().err
    finally:
        for shard in ("heads-000000.tar", "heads-000001.tar"):
            (shards / f"{shard}.away").rename(shards / shard)


def test_two_processes_read_shards_of_their_own_by_their_url(files, shards, tmp_path):
    """With an encoder that is trained, of which some weights get no gradient."""
    options = ("--steps", "2", "--encoder-rate", "1e-4")
    run = [*LAUNCH, "-m", "gafext", *words(files, f"file://{shards}", tmp_path / "two", *options)]
    subprocess.run(run, env=ENVIRONMENT, cwd=ROOT, check=True, timeout=300)
    assert main(command(files, tmp_path / "one", *options)) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize("heads, processes", [(0, 2), (1, 2), (2, 4), (7, 3), (8, 2)])
def test_processes_encode_neighbours(heads, processes):
    shares = [list(range(heads))[share_of(heads, process, processes)] for process in range(processes)]
    assert [head for share in shares for head in share] == list(range(heads))
    assert max(map(len, shares)) == -(-heads // processes)


def add(path, **entries):
    """Write a tar file of entries by name; names have one underscore for each dot."""
    with tarfile.open(path, "w") as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_the_check_reads_every_sample(files, shards, tmp_path, capsys):
    assert main(["train", str(shards), "--check"]) == 0
    assert "3 heads, 12 views, 3 heads with normal maps, 0 faults" in capsys.readouterr().out
    write_heads(tmp_path / "data", 1, views=4, size=32)
    heads, _ = read_heads(tmp_path / "data")
    heads[0].pictures[2].write_bytes(b"no picture")
    heads[0].sizes = [(32, 32)] * 4
    write_shards(heads, tmp_path / "broken", megabytes=1)
    assert main(["train", str(tmp_path / "broken"), "--check"]) == 1
    out = capsys.readouterr().out
    assert "0 heads" in out and f"heads-000000.tar: {heads[0].name}/002.png: expected a picture, got a damaged" in out
    assert main(words(files, tmp_path / "broken", tmp_path / "out", "--validation", "0")) == 1
    assert f"{heads[0].name}/002.png: expected a picture, got a damaged one" in capsys.readouterr().err


def test_shards_that_others_made(tmp_path, capsys):
    """A transforms.json and its pictures per sample; the check makes their index."""
    write_heads(tmp_path / "data", 2, views=3, size=32, normals=False)
    (tmp_path / "shards").mkdir()
    for number, path in enumerate(sorted((tmp_path / "data").rglob("transforms_train.json"))):
        values, entries = json.loads(path.read_text()), {}
        values.pop("timestep_index", None)
        for view, frame in enumerate(values["frames"]):
            for name in ("timestep_index", "fg_mask_path", "mask_path"):
                frame.pop(name, None)
            entries[f"074_{number}"[:3] + f"{number}_v{view}_png"] = (path.parent / frame["file_path"]).read_bytes()
            frame["file_path"] = f"v{view}.png"
        add(tmp_path / "shards" / f"{number}.tar", **{f"074{number}_json": json.dumps(values).encode()}, **entries)
    with pytest.raises(
        ValueError, match=r"heads.json: expected the index of the shards, .* gafext train --check writes"
    ):
        Shards(tmp_path / "shards")
    assert main(["train", str(tmp_path / "shards"), "--check"]) == 1
    assert "0.tar: 0740: expected at least 4 views (--views), got 3\n" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "shards"), "--check", "--views", "3"]) == 0
    assert "2 heads, 6 views, 0 heads with normal maps, 0 faults" in capsys.readouterr().out
    assert [head.subject for head in Shards(tmp_path / "shards").heads] == ["0740", "0741"]
    assert Shards(tmp_path / "shards").read_heads(views=4)[1][0] == "0740: expected at least 4 views (--views), got 3"


def test_shards_with_faults_are_named(files, shards, tmp_path):
    add(tmp_path / "a.tar", a_png=b"x")
    with pytest.raises(ValueError, match=r"a.tar: a: expected a transforms.json a.json, got none"):
        index_shards(tmp_path)
    add(tmp_path / "a.tar", a_json=b'{"frames": []}')
    add(tmp_path / "b.tar", a_json=b'{"frames": []}')
    with pytest.raises(ValueError, match=r"b.tar: expected samples of different names, got a twice"):
        index_shards(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"no tar file")
    with pytest.raises(ValueError, match=r"b.tar: expected a shard, got one that cannot be read"):
        index_shards(tmp_path)
    changed = tmp_path / "changed"
    write_shards(read_heads(files / "data")[0], changed, megabytes=1)
    lines = json.loads((changed / "heads.json").read_text())
    lines[0]["digest"] = "0"
    (changed / "heads.json").write_text(json.dumps(lines))
    packed = Shards(changed)
    with pytest.raises(ValueError, match=r"expected .* as heads.json lists it, got another or none"):
        list(packed.open(packed.heads, [0, 1]))


def test_the_check_compares_with_the_index(files, tmp_path, capsys):
    heads, _ = read_heads(files / "data")
    write_shards(heads, tmp_path / "shards", megabytes=0.001)
    before = (tmp_path / "shards" / "heads.json").read_bytes()
    (tmp_path / "shards" / "heads-000001.tar").unlink()
    shutil.copy(tmp_path / "shards" / "heads-000000.tar", tmp_path / "shards" / "heads-000002.tar")
    assert main(["train", str(tmp_path / "shards"), "--check"]) == 1
    out = capsys.readouterr().out
    for fault in (
        f"heads-000002.tar: {heads[0].name}: expected what heads.json lists, got another head",
        f"heads-000001.tar: {heads[1].name}: expected it as heads.json lists it, got none",
        "heads-000001.tar: expected a shard, got one that cannot be read (FileNotFoundError",
    ):
        assert fault in out
    assert (tmp_path / "shards" / "heads.json").read_bytes() == before
    (tmp_path / "empty").mkdir()
    add(tmp_path / "empty" / "a.tar")
    assert main(["train", str(tmp_path / "empty"), "--check"]) == 1
    assert "expected heads in its shards, got none" in capsys.readouterr().err


def test_a_folder_with_a_colon_is_no_url(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(files / "data"), "--pack", "run:2"]) == 0
    assert main(["train", "run:2", "--check"]) == 0


def test_names_that_shards_do_not_keep_are_refused(files, tmp_path, capsys):
    heads, _ = read_heads(files / "data")
    for names, message in {
        ("a.b", "a_b", "c"): "a_b: expected a name of its own in the shards, got a_b, as of a.b",
        ("__a__", "b", "c"): "got '__a__': empty, or with __ before it",
        ("", "b", "c"): "got ''",
    }.items():
        named = [replace(head, name=name) for head, name in zip(heads, names, strict=True)]
        with pytest.raises(ValueError, match=re.escape(message)):
            write_shards(named, tmp_path / "shards", megabytes=1)
        assert not (tmp_path / "shards").exists()
    assert main(["train", str(files / "data"), "--pack", str(files / "data")]) == 1
    assert "expected a new or empty folder for the shards" in capsys.readouterr().err


def test_pictures_beside_an_archive_are_no_shards(files, tmp_path):
    shutil.copytree(files / "data", tmp_path / "data")
    add(tmp_path / "data" / "backup.tar", a_txt=b"x")
    assert not Shards.are_at(tmp_path / "data") and Shards.are_at("https://example.org/shards")
    assert main(["train", str(tmp_path / "data"), "--check", "--views", "2"]) == 0


def test_capitals_in_names_of_files_and_samples_of_two_moments(tmp_path, capsys):
    write_heads(tmp_path / "data", 1, views=3, size=32, normals=False)
    [path] = (tmp_path / "data").rglob("transforms_train.json")
    values, entries = json.loads(path.read_text()), {}
    for view, frame in enumerate(values["frames"]):
        frame.pop("fg_mask_path", None)
        entries[f"a_Cam{view}_PNG"] = (path.parent / frame["file_path"]).read_bytes()
        frame.update(file_path=f"Cam{view}.PNG", timestep_index=0)
    (tmp_path / "shards").mkdir()
    add(tmp_path / "shards" / "a.tar", a_json=json.dumps(values).encode(), **entries)
    assert main(["train", str(tmp_path / "shards"), "--check", "--views", "3"]) == 0
    values["frames"] += [{**frame, "timestep_index": 1} for frame in values["frames"]]
    for view, frame in enumerate(values["frames"]):
        entries[f"a_x{view}_png"] = entries["a_Cam0_PNG"]
        frame["file_path"] = f"x{view}.png"
    (tmp_path / "shards" / "heads.json").unlink()
    add(tmp_path / "shards" / "a.tar", a_json=json.dumps(values).encode(), **entries)
    capsys.readouterr()
    assert main(["train", str(tmp_path / "shards"), "--check", "--views", "3"]) == 1
    assert "a.tar: a: expected one moment of one head, got 2" in capsys.readouterr().out
