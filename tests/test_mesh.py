"""Normal maps of meshes against formulas."""

import sys
import tracemalloc

import numpy as np
import pytest
import torch
import trimesh
from helpers import max_abs_diff
from PIL import Image
from plyfile import PlyData

from gafext.cameras import Cameras, orbit
from gafext.cli import main
from gafext.errors import MeshError
from gafext.mesh import Mesh, load_mesh

CAMERAS = orbit(3, elevation=25, radius=4)
SIZE = 96


def rays(cameras, view, size):
    """Directions [S,S,3] through the pixels' centres, in camera axes with z = 1."""
    (fx, _, cx), (_, fy, cy), _ = cameras.intrinsics(size)[view].double()
    pixels = torch.arange(size).double() + 0.5
    y, x = torch.meshgrid((pixels - cy) / fy, (pixels - cx) / fx, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def sphere(cameras, view, size, radius=1.0):
    """The formula: normals [S,S,3] in the viewer's axes, depth [S,S], and where there is a sphere."""
    directions, centre = rays(cameras, view, size), cameras.w2c[view, :3, 3].double()
    a, b = directions.square().sum(-1), directions @ centre
    square = b**2 - a * (centre.square().sum() - radius**2)
    depth = (b - square.clamp(min=0).sqrt()) / a
    normals = (directions * depth[..., None] - centre) / radius
    return normals * torch.tensor([1, -1, -1]), depth, square > 0


def angles(encoded, normals):
    """Degrees between the encoded normals [3,S,S] and the formula's [S,S,3]."""
    ours = torch.nn.functional.normalize(encoded.double().permute(1, 2, 0) * 2 - 1, dim=-1)
    return torch.rad2deg((ours * normals).sum(-1).clamp(-1, 1).acos())


def assert_within_a_degree(surface, view, normals):
    covered = surface.alpha[view, 0] == 1
    assert covered.float().mean() > 0.1
    assert (angles(surface.normals[view], normals)[covered] < 1).float().mean() >= 0.99


@pytest.mark.parametrize("name", ["head.obj", "head.ply", "head.glb"])
def test_a_sphere(tmp_path, name):
    trimesh.creation.icosphere(subdivisions=4).export(tmp_path / name)
    surface = load_mesh(tmp_path / name).render(CAMERAS, SIZE)
    for view in range(3):
        normals, depth, inside = sphere(CAMERAS, view, SIZE)
        assert_within_a_degree(surface, view, normals)
        covered = surface.alpha[view, 0] == 1
        assert (surface.depth[view, 0][covered] - depth[covered]).abs().median() < 0.01
        assert (covered != inside).float().mean() < 0.03
    outside = surface.alpha[:, 0] == 0
    assert (surface.normals.permute(0, 2, 3, 1)[outside] == 0.5).all() and surface.depth[:, 0][outside].isinf().all()


def test_a_cube_has_sharp_edges(tmp_path):
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "cube.ply")
    surface = load_mesh(tmp_path / "cube.ply").render(CAMERAS, SIZE)
    for view in range(3):
        points = rays(CAMERAS, view, SIZE) * surface.depth[view, 0].double()[..., None]
        w2c = CAMERAS.w2c[view].double()
        world = (points - w2c[:3, 3]) @ w2c[:3, :3]
        face = world.abs().nan_to_num(0).argmax(-1)
        normals = torch.nn.functional.one_hot(face, 3) * world.gather(-1, face[..., None]).sign()
        assert_within_a_degree(surface, view, normals.double() @ w2c[:3, :3].T * torch.tensor([1, -1, -1]))


def test_the_nearest_surface_is_seen():
    near, far = trimesh.creation.icosphere(radius=0.3), trimesh.creation.box((2, 2, 0.1))
    near.apply_translation([0, 0, 1])
    both = trimesh.util.concatenate([far, near])
    depth = Mesh(both.vertices, both.faces).render(orbit(1), 33, samples=1).depth[0, 0]
    assert abs(depth[16, 16] - (4 - 1.3)) < 0.01 and abs(depth[16, 4] - 3.95) < 0.01


def test_edges_are_antialiased_and_intrinsics_count():
    mesh = trimesh.creation.icosphere(subdivisions=3)
    mesh = Mesh(mesh.vertices, mesh.faces)
    surface = mesh.render(orbit(1), 64)
    assert len(surface.alpha.unique()) == 10
    with pytest.raises(ValueError, match="samples: expected an odd number, .*got 2"):
        mesh.render(orbit(1), 64, samples=2)
    focal = orbit(1).focal(64)
    moved = Cameras(orbit(1).w2c, intrinsics=[[focal, 0, 36], [0, focal, 30], [0, 0, 1]], size=64)
    assert max_abs_diff(mesh.render(moved, 64).alpha[..., :62, 4:], surface.alpha[..., 2:, :60]) == 0


def test_a_pose_moves_turns_and_scales(tmp_path):
    trimesh.creation.icosphere(subdivisions=4).export(tmp_path / "a.ply")
    pose = np.diag([0.5, 0.5, 0.5, 1.0])
    pose[:3, :3] = 0.5 * np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    moved = load_mesh(tmp_path / "a.ply", pose=pose).render(orbit(1), SIZE)
    normals, _, _ = sphere(orbit(1), 0, SIZE, radius=0.5)
    assert_within_a_degree(moved, 0, normals)
    shifted = np.eye(4)
    shifted[0, 3] = 0.5
    alpha = load_mesh(tmp_path / "a.ply", pose=shifted).render(orbit(1, radius=8), SIZE).alpha[0, 0]
    assert alpha[:, SIZE // 2 :].sum() > 1.5 * alpha[:, : SIZE // 2].sum()


@pytest.mark.parametrize(
    ("pose", "words"),
    [
        (np.eye(3), "pose: expected a 4 x 4 matrix with the last row"),
        (np.eye(4) + np.eye(4, k=-1) * [[0], [0], [0], [0.5]], r"with the last row \[0, 0, 0, 1\], got"),
        (np.diag([1.0, 2, 1, 1]), "pose: expected a rotation with one scale"),
        (np.diag([-1.0, 1, 1, 1]), "pose: expected a rotation with one scale"),
        ("front", "pose: expected a 4 x 4 matrix of numbers"),
    ],
)
def test_poses_that_are_refused(tmp_path, pose, words):
    trimesh.creation.box().export(tmp_path / "a.ply")
    with pytest.raises(MeshError, match=words):
        load_mesh(tmp_path / "a.ply", pose=pose)


def test_files_that_are_refused(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\n")
    (tmp_path / "b.ply").write_text("not a mesh")
    (tmp_path / "c.txt").write_text("")
    for name in ("a.obj", "b.ply", "c.txt", "missing.obj"):
        with pytest.raises(MeshError, match=name):
            load_mesh(tmp_path / name)
    with pytest.raises(MeshError, match="expected indices of 3 vertices, got 3"):
        Mesh(np.eye(3), [[0, 1, 3]])
    with pytest.raises(MeshError, match="finite"):
        Mesh(np.eye(3) * np.inf, [[0, 1, 2]])


def test_without_trimesh_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(ImportError, match=r'pip install "gafext\[mesh\]"'):
        load_mesh(tmp_path / "a.ply")


def test_generate_with_a_mesh(checkpoint, tmp_path):
    """The normal maps are the mesh's, and so are the points."""
    trimesh.creation.icosphere(subdivisions=3, radius=0.8).export(tmp_path / "head.obj")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "portrait.png")
    np.savetxt(tmp_path / "pose.txt", np.diag([0.5, 0.5, 0.5, 1]))
    base = ["generate", tmp_path / "portrait.png", "--model", checkpoint, "--steps", 1, "--views", 2]
    mesh = ["--mesh", tmp_path / "head.obj", "--mesh-pose", tmp_path / "pose.txt"]
    for name, options in (("plain", []), ("mesh", mesh)):
        assert main([str(a) for a in (*base, *options, "--out", tmp_path / name)]) == 0
    pictures = [(tmp_path / name / "view_000.png").read_bytes() for name in ("plain", "mesh")]
    assert pictures[0] != pictures[1]
    vertex = PlyData.read(tmp_path / "mesh" / "points3d.ply")["vertex"]
    points, normals = (np.stack([vertex[p + axis] for axis in "xyz"], axis=1) for p in ("", "n"))
    assert ((points * normals).sum(1) / 0.4 > 0.99).mean() > 0.99  # outward
    assert len(points) > 500 and np.abs(np.linalg.norm(points, axis=1) - 0.4).max() < 0.01
    for options in (["--mesh-pose", tmp_path / "pose.txt"], [*mesh, "--normals", tmp_path]):
        assert main([str(a) for a in (*base, *options, "--out", tmp_path / "refused")]) == 1
        assert not (tmp_path / "refused").exists()


def ellipsoid(height, place=(0, 0, 0)):
    head = trimesh.creation.icosphere(subdivisions=3, radius=height / 2)
    return Mesh(head.vertices * [0.75, 1, 0.9] + place, head.faces)


@pytest.mark.parametrize(
    ("height", "words"),
    [
        (0.28, r"mesh: expected 3% to 97% of each picture covered, got 1.*% of view 0. It is 0.28 units .*about 5.7\)"),
        (280, r"got 100.0% of view 0. It is 280 units .*\(--mesh-pose, pose=; a scale of about 0.0057\)"),
    ],
)
def test_a_head_in_metres_or_millimetres_is_named(height, words):
    with pytest.warns(UserWarning, match=words):
        ellipsoid(height).normal_maps(CAMERAS, 64)


def test_a_head_of_the_right_size_is_not(recwarn):
    for mesh, cameras in ((ellipsoid(1.8), CAMERAS), (ellipsoid(0.28), orbit(3, radius=0.7))):
        assert torch.equal(mesh.normal_maps(cameras, 64), mesh.render(cameras, 64).normals)
    assert not recwarn.list


def test_generate_says_what_the_views_do_not_see(checkpoint, tmp_path, capsys):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "portrait.png")
    base = ["generate", tmp_path / "portrait.png", "--model", checkpoint, "--steps", 1, "--views", 2]
    away = ellipsoid(1, place=(0, 9, 0))
    trimesh.Trimesh(away.vertices, away.faces).export(tmp_path / "away.ply")
    assert main([str(a) for a in (*base, "--mesh", tmp_path / "away.ply", "--out", tmp_path / "views")]) == 1
    text = capsys.readouterr().err
    assert "got 0.0% of view 0. It is 1 units across with its middle at [0.0, 9.0, 0.0]" in text
    assert not (tmp_path / "views").exists()
    assert main([str(a) for a in (*base, "--radius", 1, "--out", tmp_path / "views")]) == 0
    assert "normal_maps: expected 3% to 97% of each picture covered, got 100.0% of view 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "vertices, faces, words",
    [
        (np.zeros((8, 3)), [[0, 1, 2, 3]] * 6, r"expected faces \[N,3\] of whole numbers, got \[6, 4\] of int64"),
        (np.zeros((8, 4)), [[0, 1, 2]], r"expected vertices \[N,3\] of numbers, got \[8, 4\] of float64"),
        (np.zeros((8, 3)), [[0.0, 1.0, 2.7]], r"expected faces \[N,3\] of whole numbers, got \[1, 3\] of float64"),
        (np.zeros((3, 3)), [[0, 1, -1]], "expected indices of 3 vertices, got -1"),
        (np.zeros((3, 3)), [], "expected triangles, got none"),
    ],
)
def test_rows_that_are_no_triangles(vertices, faces, words):
    with pytest.raises(MeshError, match=words):
        Mesh(vertices, faces)


def test_relative_indices_of_an_obj_file_count_back_from_their_line(tmp_path):
    corners = ["v 0 0 0", "v 1 0 0", "v 0 1 0"]
    moved = ["v 5 0 0", "v 6 0 0", "v 5 1 0"]
    face = "f -3//-1 -2//-1 -1//-1"
    lines = ["mtllib none.mtl", *corners, "vn 0 0 1", face, *moved, "vn 0 0 1", face, "f 1 2 3"]
    (tmp_path / "two.obj").write_text("\n".join(lines) + "\n")
    mesh = load_mesh(tmp_path / "two.obj")
    left = sorted(mesh.vertices[face][:, 0].min() for face in mesh.faces)
    assert left == [0, 0, 5]


def test_seams_of_textures_and_normals_are_no_edges(tmp_path):
    corners = ["v 0 0 0", "v 0 1 0", "v -1 0 0.2", "v 1 0 0.2"]
    textures = [f"vt {u} 0" for u in range(4)] + ["vn 0 0 1", "vn 0.2 0 1"]
    (tmp_path / "bent.obj").write_text("\n".join([*corners, *textures, "f 3/1/1 1/2/1 2/3/1", "f 1/4/2 4/1/2 2/2/2"]))
    mesh = load_mesh(tmp_path / "bent.obj")
    assert len(mesh.vertices) == 4 and len(set(mesh.faces[0]) & set(mesh.faces[1])) == 2


def test_a_vertex_with_very_many_faces_takes_little_memory():
    count = 3000
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles), np.zeros(count)], axis=1)
    faces = [[0, 1 + i, 1 + (i + 1) % count] for i in range(count)]
    tracemalloc.start()
    mesh = Mesh(np.concatenate([[[0, 0, 0.5]], ring]), faces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 2**20  # a table of all neighbours took 1.9 GiB
    middle = np.array(mesh._corner_normals)[:, 0]
    assert np.allclose(middle, middle[0], atol=0.6) and (middle[:, 2] > 0.8).all()


@pytest.mark.parametrize(
    "name, content",
    [("a.zip", b"PK no"), ("a.dae", b"<x/>"), ("a.3mf", b"PK no"), ("a.ply", b"ply\nformat ascii 1.0\n")],
)
def test_files_that_trimesh_cannot_read_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MeshError, match=f"{name}: not readable as a mesh"):
        load_mesh(tmp_path / name)
