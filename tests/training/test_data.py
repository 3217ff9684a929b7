"""Training data: folders of VHAP and others, what is wrong with them, and which views a step takes."""

import json
import math
import runpy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from helpers import ROOT, edit_json, max_abs_diff
from PIL import Image
from small_checkpoints import save_checkpoint

from gafext import MultiViewDiffusionPipeline
from gafext.cameras import orbit
from gafext.cli import main
from gafext.heads import head_normals
from gafext.mesh import load_mesh
from gafext.training.batches import Sampling, choose_views, draw_batch
from gafext.training.checks import unframed
from gafext.training.data import hold_out, read_heads
from gafext.training.latents import encode_head
from gafext.training.shards import Shards, write_shards

write_heads = runpy.run_path(str(ROOT / "examples" / "train" / "write_heads.py"))["write_heads"]


def broken(data, fault):
    """Break head_000 of three views."""
    folder = data / "head_000"
    path = folder / "transforms_train.json"
    values = json.loads(path.read_text())
    frames = values["frames"]
    if fault == "missing":
        (folder / "images" / "00000_01.png").unlink()
    elif fault == "damaged":
        (folder / "images" / "00000_01.png").write_bytes(b"not a picture")
    elif fault == "size":
        Image.new("RGB", (16, 16)).save(folder / "images" / "00000_01.png")
    elif fault == "shape":
        values["h"] = 24
    elif fault == "camera":
        frames[1]["camera_index"] = 0
    elif fault == "pose":  # of a camera beside the head that looks past it
        frames[1]["transform_matrix"][2][3] += 1.5
    elif fault == "mask":
        Image.new("RGB", (32, 32)).save(folder / "fg_masks" / "00000_01.png")
    path.write_text(json.dumps(values))


FAULTS = {
    "none": "1 heads, 4 views, 0 heads with normal maps, 0 faults",
    "missing": "00000_01.png: expected a picture, got no such file",
    "damaged": "00000_01.png: expected a picture, got a damaged one",
    "size": "head_000/0: expected pictures, masks and normals of one size, got 16 x 16, 32 x 32",
    "shape": "head_000/0: expected pictures of 32 x 24, as w and h say, got 32 x 32",
    "camera": "frame 1: camera_index 0 disagrees with its pose in another frame",
    "pose": "00000_01.png: expected its foreground where the other cameras put it",
    "mask": "head_000/0: expected a foreground in each mask, got an empty one",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_what_is_broken(fault, tmp_path, capsys):
    write_heads(tmp_path / "data", 1, views=4, size=32, normals=False)
    broken(tmp_path / "data", fault)
    code = main(["train", str(tmp_path / "data"), "--check", "--cache", str(tmp_path / "cache")])
    assert code == (fault != "none") and FAULTS[fault] in capsys.readouterr().out
    assert (tmp_path / "cache" / "index.json").is_file()


def test_what_vhap_leaves_beside_the_splits(tmp_path):
    """A backup of other cameras is not read, and a union's pictures, which are another folder's, count once."""
    write_heads(tmp_path / "data", 1, views=4, size=32)
    folder = tmp_path / "data" / "head_000"
    (whole,), _ = read_heads(tmp_path / "data")
    values = json.loads((folder / "transforms_train.json").read_text())
    frames = values["frames"]
    for split, part in (("train", frames[:2]), ("val", frames[2:]), ("test", frames[1:3])):
        (folder / f"transforms_{split}.json").write_text(json.dumps({**values, "frames": part}))
    moved = json.loads(json.dumps(values))
    for frame in moved["frames"]:
        frame["transform_matrix"][2][3] += 3
    (folder / "transforms_backup.json").write_text(json.dumps(moved))
    union = tmp_path / "data" / "union"
    union.mkdir()
    for frame in frames:
        frame |= {name: f"../head_000/{frame[name]}" for name in ("file_path", "fg_mask_path")}
    (union / "transforms_train.json").write_text(json.dumps(values))
    (head,), faults = read_heads(tmp_path / "data", thorough=True)
    assert not faults and torch.equal(head.cameras.w2c, whole.cameras.w2c) and len(head.normals) == 4
    shutil.move(folder / "transforms_train.json", folder / "transforms_backup_2.json")
    for split in ("val", "test"):
        (folder / f"transforms_{split}.json").unlink()
    (head,), faults = read_heads(tmp_path / "data")  # the union alone
    assert not faults and head.name == "union/0" and len(head.normals) == 4


def in_moments(data, views):
    """Make every `views` frames of each head a moment of its own."""
    for path in data.rglob("transforms_train.json"):
        edit_json(path, lambda whole: [f.update(timestep_index=i // views) for i, f in enumerate(whole["frames"])])


def test_moments_of_a_subject_are_held_out_together(tmp_path):
    write_heads(tmp_path / "data", 3, views=6, size=32)
    in_moments(tmp_path / "data", 2)
    heads, _ = read_heads(tmp_path / "data")
    known, measured = hold_out(heads, 1)
    assert [head.name for head in known] == [f"head_00{head}/{time}" for head in range(2) for time in range(3)]
    assert [head.name for head in measured] == ["head_002/0"]
    assert hold_out(heads, 0) == (heads, [])
    with pytest.raises(ValueError, match="expected more than the 3 heads held out, got 3"):
        hold_out(heads, 3)
    for index, name in enumerate(("074_EMO-1_v16", "074_EXP-2_v16", "UNION10_074_EMO1")):
        (tmp_path / "data" / f"head_00{index}").rename(tmp_path / "data" / name)
    heads, _ = read_heads(tmp_path / "data")
    assert {head.subject for head in heads} == {"074"}
    with pytest.warns(UserWarning, match="moments of one subject, 074: the last 2 are held out, of a person whom"):
        assert hold_out(heads, 2) == (heads[:-2], heads[-2:])
    with pytest.raises(ValueError, match=r"got 1 .timesteps of one subject are held out together"):
        hold_out(heads, len(heads))


def test_a_union_has_the_cameras_of_each_sequence(tmp_path):
    """VHAP moves each sequence's cameras by the mean translation of the sequence's head, here 1 cm."""
    data = tmp_path / "data"
    write_heads(data, 2, views=3, size=32)
    content = {}
    for time, name in enumerate(("head_000", "head_001")):
        path = data / name / "transforms_train.json"
        values = json.loads(path.read_text())
        for frame in values["frames"]:
            frame["transform_matrix"][0][3] += 0.01 * time
            frame |= {"timestep_index": time, "file_path": f"../{name}/{frame['file_path']}"}
            frame["fg_mask_path"] = f"../{name}/{frame['fg_mask_path']}"
        content = {**values, "frames": content.get("frames", []) + values["frames"]}
        path.unlink()
    (data / "union").mkdir()
    (data / "union" / "transforms_train.json").write_text(json.dumps(content))
    for root in (data, data / "union"):
        heads, faults = read_heads(root)
        assert not faults and [head.name for head in heads] == ["union/0", "union/1"]
    shift = heads[1].cameras.c2w[:, :3, 3] - heads[0].cameras.c2w[:, :3, 3]
    assert max_abs_diff(shift, torch.tensor([0.01, 0, 0]).expand(3, 3)) < 1e-5
    content["frames"][4]["transform_matrix"][0][3] += 0.01
    content["frames"][4]["camera_index"] = 0
    (data / "union" / "transforms_train.json").write_text(json.dumps(content))
    _, faults = read_heads(data)
    assert len(faults) == 1 and "camera_index 0 disagrees" in faults[0]


def test_splits_without_frames(tmp_path):
    """VHAP writes them for few timesteps and for one camera."""
    write_heads(tmp_path / "data", 1, views=3, size=32)
    folder = tmp_path / "data" / "head_000"
    for split in ("val", "test"):
        (folder / f"transforms_{split}.json").write_text('{"frames": []}')
    (head,), faults = read_heads(tmp_path / "data")
    assert not faults and len(head.pictures) == 3
    (folder / "transforms_train.json").write_text('{"frames": []}')
    heads, [fault] = read_heads(tmp_path / "data")
    assert not heads and fault == f"{folder / 'transforms_train.json'}: frames: expected at least one, got none"


def test_cameras_in_metres_do_not_frame_the_neutral_head(tmp_path, capsys):
    """Without normal maps of their own, heads get the neutral one's, which such cameras are inside of."""
    for name, normals in (("with", True), ("without", False)):
        write_heads(tmp_path / name, 2, views=3, size=32, normals=normals)
        heads, _ = read_heads(tmp_path / name)
        assert unframed(heads) == ""
        for path in (tmp_path / name).rglob("transforms_train.json"):
            edit_json(path, lambda whole: [scale(frame["transform_matrix"], 0.15) for frame in whole["frames"]])
        heads, _ = read_heads(tmp_path / name)
        assert ("2 of 2: head_000/0: expected 3% to 97% of each picture" in unframed(heads)) == (not normals)
        assert main(["train", str(tmp_path / name), "--check", "--views", "3"]) == 0
        assert ("warning: heads without normals/" in capsys.readouterr().out) == (not normals)


def scale(matrix, factor):
    for row in matrix[:3]:
        row[3] *= factor


def test_folders_behind_links_and_byte_order_marks(tmp_path, capsys):
    write_heads(tmp_path / "elsewhere", 2, views=2, size=16)
    first, second = sorted(path for path in (tmp_path / "elsewhere").iterdir() if path.is_dir())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").symlink_to(first)
    (tmp_path / "data" / "b").symlink_to(second)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    for path in second.glob("transforms*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    heads, faults = read_heads(tmp_path / "data", views=2)
    assert not faults and len(heads) == 2


def test_fewer_views_than_a_step_takes(tmp_path, capsys):
    write_heads(tmp_path / "data", 1, views=4, size=32)
    assert main(["train", str(tmp_path / "data"), "--check", "--views", "5"]) == 1
    assert "head_000/0: expected at least 5 views (--views), got 4" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "data"), "--check", "--views", "4"]) == 0


def test_what_lies_behind_transparent_pixels(tmp_path):
    """A normal map has no direction there, a mask is not the head's, a picture has the background asked for."""
    write_heads(tmp_path / "data", 1, views=3, size=32)
    (opaque,), _ = read_heads(tmp_path / "data", thorough=True)
    masks, alphas = [opaque.mask(view) for view in range(3)], []
    for mask, picture, normal in zip(masks, opaque.pictures, opaque.normals, strict=True):
        alphas.append(mask.point(lambda level: 255 * (level > 127)))
        for path in (picture, normal):
            with Image.open(path) as image:
                cut = Image.composite(image, Image.new("RGB", image.size, "red"), alphas[-1])
            cut.putalpha(alphas[-1])
            cut.save(path)
    for alpha, path in zip(alphas, opaque.masks, strict=True):
        white = Image.new("RGB", alpha.size, "white")
        white.putalpha(alpha)
        white.save(path)
    (head,), faults = read_heads(tmp_path / "data", thorough=True)
    assert not faults
    outside = np.asarray(alphas[0]) == 0
    assert (np.asarray(head.normal_map(0))[outside] == 128).all()
    assert (np.asarray(head.mask(0)) == np.asarray(alphas[0])).all()
    assert (np.asarray(head.picture(0))[outside] == 255).all()
    for same in (head, replace(head, masks=[None] * 3)):
        assert (np.asarray(same.picture(0, (127, 127, 127)))[outside] == 127).all()


@pytest.mark.parametrize(
    "values", [{"timestep_index": None}, {"timestep_index": [1]}, {"file_path": 3}, {"fg_mask_path": 3}]
)
def test_fields_of_another_type_are_named(values, tmp_path):
    write_heads(tmp_path / "data", 1, views=3, size=32)
    path = tmp_path / "data" / "head_000" / "transforms_train.json"
    edit_json(path, lambda whole: whole["frames"][1].update(values))
    _, faults = read_heads(tmp_path / "data")
    [name] = values
    assert f"frame 1: expected {name} of type" in faults[0]


def test_a_truncated_picture_is_named(tmp_path):
    write_heads(tmp_path / "data", 1, views=3, size=32)
    path = tmp_path / "data" / "head_000" / "fg_masks" / "00000_01.png"
    path.write_bytes(path.read_bytes()[:-40])
    _, faults = read_heads(tmp_path / "data", thorough=True)
    assert faults == [f"{path}: expected a picture, got a damaged one"]


def test_extensions_that_are_left_out(tmp_path):
    write_heads(tmp_path / "data", 1, views=3, size=32)
    path = tmp_path / "data" / "head_000" / "transforms_train.json"
    edit_json(path, lambda whole: [f.update(file_path=f["file_path"].removesuffix(".png")) for f in whole["frames"]])
    (head,), faults = read_heads(tmp_path / "data")
    assert not faults and all(picture.is_file() for picture in head.pictures)


def test_near_views_are_neighbours():
    """Of cameras on a circle, whatever the pose that the U-Net is given."""
    places, random = orbit(16).c2w[:, :3, 3], torch.Generator().manual_seed(0)
    for _ in range(5):
        first, *others = choose_views(places, 3, near=True, random=random).tolist()
        assert {(other - first) % 16 for other in others} == {1, 15}


def test_pictures_that_are_not_square_are_padded(tmp_path):
    """A column of 8 pixels cut off each side and padded again is the same head, with the same cameras."""
    write_heads(tmp_path / "data", 1, views=3, size=32)
    (whole,), _ = read_heads(tmp_path / "data")
    pictures, normals = ([getattr(whole, name)(view) for view in range(3)] for name in ("picture", "normal_map"))
    folder = tmp_path / "data" / "head_000"
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.crop((8, 0, 24, 32)).save(path)
    values = json.loads((folder / "transforms_train.json").read_text())
    focal = 16 / math.tan(values.pop("camera_angle_x") / 2)
    values |= {"w": 16, "h": 32, "fl_x": focal, "fl_y": focal, "cx": 8, "cy": 16}
    (folder / "transforms_train.json").write_text(json.dumps(values))
    (cut,), faults = read_heads(tmp_path / "data")
    assert not faults and max_abs_diff(cut.cameras.intrinsics(32), whole.cameras.intrinsics(32)) < 1e-5
    for view in range(3):
        for made, true in ((cut.picture(view), pictures[view]), (cut.normal_map(view), normals[view])):
            made, true = np.asarray(made), np.asarray(true)
            assert made.shape == true.shape and (made[:, 8:24] == true[:, 8:24]).all()
            assert (np.abs(made[:, :8].astype(int) - true[0, 0]) <= 1).all()  # the background


class Encoded:
    """A head of 16 cameras on a circle, whose latents are the numbers of its views."""

    places, portraits = orbit(16).c2w[:, :3, 3], 3

    def read(self, views, portrait):
        latents = torch.tensor(views).float().view(-1, 1, 1, 1)
        pose, features = torch.ones(len(views), 12), torch.full((2, 4), 1.0 + portrait)
        return {"latents": latents, "normals": torch.ones_like(latents), "pose": pose, "features": features}


def drawn(step=0, seed=0, **fractions):
    nothing = dict.fromkeys(("near", "apart", "drop_image", "drop_all", "blindfold"), 0.0)
    sampling = Sampling(batch=8, views=4, **{**nothing, **fractions})
    return draw_batch([Encoded()], step, sampling, seed=seed, timesteps=1000)


def test_each_fraction_changes_what_it_says():
    plain = drawn()
    assert plain.sees.all() and plain.normals.all() and plain.pose.all()
    assert (plain.timesteps == plain.timesteps[:, :1]).all() and len(plain.timesteps[:, 0].unique()) == 8
    assert set(plain.features.unique().tolist()) == {1.0, 2.0, 3.0}  # every portrait
    image, every = drawn(drop_image=1.0), drawn(drop_all=1.0)
    assert not image.sees.any() and image.normals.all() and image.pose.all()
    assert not every.sees.any() and not every.normals.any() and not every.pose.any()
    blind = drawn(blindfold=1.0).sees
    assert 0.2 < blind.mean() < 0.8 and (blind != blind[:, :1]).any()
    apart = drawn(apart=1.0).timesteps
    assert (apart != apart[:, :1]).any(1).all()
    views = drawn(near=1.0).latents.flatten(1)
    steps = (views - views[:, :1] + 8) % 16 - 8
    assert (steps.abs() <= 2).all() and (drawn().latents.flatten(1) - views).abs().max() > 2
    for other in (drawn(step=1), drawn(seed=1)):
        assert not torch.equal(other.noise, plain.noise) and not torch.equal(other.timesteps, plain.timesteps)
    assert torch.equal(drawn().noise, plain.noise)


@pytest.mark.parametrize("name", ["meshes/0.ply", "meshes/00000.obj", "mesh.obj"])
def test_normals_of_a_mesh(tmp_path, name):
    """Where there are no normal maps; also out of a shard."""
    write_heads(tmp_path / "data", 1, views=3, size=32, normals=False)
    [folder] = {path.parent for path in (tmp_path / "data").rglob("transforms_train.json")}
    assert read_heads(tmp_path / "data")[0][0].mesh is None
    (folder / name).parent.mkdir(exist_ok=True)
    trimesh.creation.icosphere(3, radius=0.7).export(folder / name)
    [head], faults = read_heads(tmp_path / "data", thorough=True)
    assert not faults and head.mesh == folder / name and name in head.describe()["mesh"]
    save_checkpoint(tmp_path / "model")
    pipe = MultiViewDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    with torch.no_grad():
        encoded = encode_head(head, pipe, size=32, degrees=30.0)["normals"]
        expected = pipe.encode(load_mesh(folder / name).normal_maps(head.cameras, 32))
        neutral = pipe.encode(head_normals(head.cameras, 32))
    assert torch.equal(encoded, expected) and not torch.allclose(encoded, neutral, atol=1e-2)
    write_shards([head], tmp_path / "shards", megabytes=1)
    shards = Shards(tmp_path / "shards")
    for _, unpacked in shards.open(shards.heads, [0]):
        assert unpacked.mesh is not None and unpacked.mesh.read_bytes() == head.mesh.read_bytes()
    trimesh.creation.icosphere(3, radius=70).export(folder / name)
    [fault] = read_heads(tmp_path / "data", thorough=True)[1]
    assert "of each picture covered" in fault and fault.endswith("expected a mesh in the cameras' world")
    (folder / name).write_text("no mesh")
    [fault] = read_heads(tmp_path / "data", thorough=True)[1]
    assert str(folder / name) in fault and ("not readable as a mesh" in fault or "expected triangles" in fault)
