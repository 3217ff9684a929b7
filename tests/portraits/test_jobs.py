"""Which folder a portrait gets, and whether it is there."""

import json
import logging
import math

import pytest

from gafext.errors import OutputError
from gafext.output import json_clean
from gafext.portraits.jobs import (
    Job,
    check_out,
    digests,
    file_digest,
    find_jobs,
    is_many,
    missing,
    record,
    write_failures,
)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode())


def made(job, command, **changes):
    job.folder.mkdir(parents=True)
    (job.folder / "run.json").write_text(json.dumps({**record(job, command, file_digest(job.portrait)), **changes}))
    (job.folder / "contact_sheet.png").touch()


def test_names_come_from_the_files(tmp_path, caplog):
    people, other = tmp_path / "people", tmp_path / "other"
    touch(people / "b.png", people / "A.jpg", people / "notes.txt", other / "a.webp", other / ".b.png", other / "..png")
    touch(other / "failures.json.png")
    arguments = [other / "a.webp", people, people / "b.png", other / ".b.png", other / "..png"]
    arguments += [other / "failures.json.png", "gone.jpg"]
    jobs = find_jobs([str(path) for path in arguments], tmp_path / "out")
    names = {job.portrait.name: job.folder.name for job in jobs}
    assert names == {
        "a.webp": "a",
        "A.jpg": "A-2",
        "b.png": "b",
        ".b.png": "b-2",
        "..png": "portrait",
        "failures.json.png": "failures.json-2",
        "gone.jpg": "gone",
    }
    assert [job.folder.parent for job in jobs] == [tmp_path / "out"] * 7
    with caplog.at_level(logging.WARNING):
        find_jobs([str(other / "a.webp"), str(people)], "out")
    assert "A.jpg: its views go to out/A-2" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected portraits"):
        find_jobs([str(tmp_path / "empty")], "out")


def test_what_is_taken_of_a_folder(tmp_path, caplog):
    taken = ["a.HEIC", "b.heif", "c.avif", "d.jfif", "e.gif", "f.png"]
    touch(*(tmp_path / name for name in (*taken, "._a.jpg", ".cat.jpg", "notes.txt", "g.cr2")))
    (tmp_path / "folder.png").mkdir()
    with caplog.at_level(logging.WARNING):
        assert [job.portrait.name for job in find_jobs([str(tmp_path)], "out")] == taken
    assert f"{tmp_path}: not taken for pictures, by their suffix: g.cr2, notes.txt" in caplog.text
    assert "cat" not in caplog.text


def test_links_that_lead_nowhere_and_folders_within(tmp_path, caplog):
    names = ("a.png", "people/b.png", "views/c.png", "views/run.json", "texts/d.txt")
    touch(*(tmp_path / name for name in names))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "again.png").symlink_to(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        assert [job.portrait.name for job in find_jobs([str(tmp_path)], "out")] == ["a.png", "gone.png"]
    assert caplog.messages == [f"{tmp_path}: not taken for pictures, by their suffix: people/"]


def test_what_training_changes_of_a_checkpoint_is_noticed(tmp_path):
    weights = tmp_path / "model" / "unet" / "weights.safetensors"
    touch(weights)
    for size in (100, 2**23):
        weights.write_bytes(bytes(size))
        before = digests({}, {"model": str(tmp_path / "model")})
        assert digests({}, {"model": str(tmp_path / "model")}) == before
        weights.write_bytes(b"\1" * size)
        assert digests({}, {"model": str(tmp_path / "model")}) != before
    before = digests({}, {"model": str(tmp_path / "model")})
    touch(tmp_path / "model" / "views" / "run.json", tmp_path / "model" / "views" / "view_000.png")
    assert digests({}, {"model": str(tmp_path / "model")}) == before
    (tmp_path / "model" / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert digests({}, {"model": str(tmp_path / "model")}) == before
    assert digests({}, {"model": "owner/name"}) == {}
    touch(tmp_path / "a.lora", tmp_path / "b.lora")
    assert digests({}, {"lora": str(tmp_path / "a.lora")}) != digests({}, {"lora": str(tmp_path / "b.lora")})


def test_a_portrait_that_cannot_be_read_any_more_is_kept(tmp_path, monkeypatch):
    touch(tmp_path / "a.png")
    [job] = find_jobs([str(tmp_path)], tmp_path / "out")
    made(job, {})

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gafext.portraits.jobs.file_digest", refused)
    assert missing([job], {}, overwrite=False) == []


def test_one_file_is_not_many(tmp_path):
    touch(tmp_path / "a.png")
    assert not is_many([]) and not is_many([str(tmp_path / "a.png")]) and not is_many(["gone.png"])
    assert is_many([str(tmp_path)]) and is_many(["a.png", "b.png"])


def test_what_is_missing(tmp_path):
    command = {"steps": 2, "format": ["3dgs"], "quiet": True, "out": "out"}
    touch(tmp_path / "a.png", tmp_path / "b.png")
    first, second = find_jobs([str(tmp_path)], tmp_path / "out")
    assert missing([first, second], command, overwrite=False) == [first, second]
    made(first, command)
    assert missing([first, second], {**command, "quiet": False, "out": "./out"}, overwrite=False) == [second]
    for changes, word in (({"steps": 3}, r"steps 2 \(now 3\)"), ({"eta": 1.0}, r"eta None \(now 1.0\)")):
        with pytest.raises(OutputError, match=word):
            missing([first, second], {**command, **changes}, overwrite=False)
        assert missing([first, second], {**command, **changes}, overwrite=True) == [first, second]
    assert missing([first], command, overwrite=True) == []
    (tmp_path / "a.png").write_bytes(b"another")
    with pytest.raises(OutputError, match="another picture"):
        missing([first], command, overwrite=False)
    (tmp_path / "a.png").unlink()
    assert missing([first], command, overwrite=False) == []


def test_an_infinite_option_is_the_same_again(tmp_path):
    command = {"guidance_interval": [1.0, math.inf]}
    touch(tmp_path / "a.png")
    (job,) = find_jobs([str(tmp_path)], tmp_path / "out")
    made(job, json_clean(command))
    assert "Infinity" not in (job.folder / "run.json").read_text()
    assert missing([job], command, overwrite=False) == []
    with pytest.raises(OutputError, match="guidance_interval"):
        missing([job], {"guidance_interval": [1.0, 2.0]}, overwrite=False)


def test_files_of_others_are_refused(tmp_path):
    job = Job(tmp_path / "a.png", tmp_path / "out" / "a")
    touch(job.portrait, job.folder / "thesis.txt")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"thesis\.txt"):
            missing([job], {}, overwrite=overwrite)
    (job.folder / "thesis.txt").unlink()
    assert missing([job], {}, overwrite=False) == [job]


def test_the_list_of_failures(tmp_path):
    out = tmp_path / "deep" / "out"
    check_out(out)
    assert not out.parent.exists()
    out.mkdir(parents=True)
    write_failures(out, [{"portrait": "a.png", "error": "broken"}])
    check_out(out)
    assert json.loads((out / "failures.json").read_text()) == {"failures": [{"portrait": "a.png", "error": "broken"}]}
    write_failures(out, [])
    assert list(out.iterdir()) == []
    for text in ("[]", "{}", "half"):
        (out / "failures.json").write_text(text)
        with pytest.raises(OutputError, match=r"failures\.json"):
            check_out(out)
    touch(tmp_path / "file")
    with pytest.raises(OutputError, match="expected a writable folder"):
        check_out(tmp_path / "file" / "out")
