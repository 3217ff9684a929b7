"""Claims on output folders, within a process and between processes."""

import os
import subprocess
import sys

import pytest

from gafext.errors import OutputError
from gafext.portraits.claim import Claim


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_claim_is_exclusive_until_it_is_released(tmp_path):
    claim = Claim.take(tmp_path / "out" / "a")
    assert Claim.take(tmp_path / "out" / "a") is None
    other = Claim.take(tmp_path / "out" / "b")
    other.release()
    claim.release()
    assert names(tmp_path / "out") == []
    Claim.take(tmp_path / "out" / "a").release()


def test_the_output_appears_as_a_whole_and_replaces_an_older_one(tmp_path):
    target = tmp_path / "a"
    for content in ("first", "second"):
        claim = Claim.take(target)
        claim.new.mkdir()
        (claim.new / "file").write_text(content)
        before = target.exists()
        claim.publish()
        claim.release()
        assert before == (content == "second") and (target / "file").read_text() == content
        assert names(tmp_path) == ["a"]


def test_an_older_output_stays_if_the_new_one_cannot_be_published(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("first")
    claim = Claim.take(tmp_path / "a")
    with pytest.raises(FileNotFoundError):  # nothing was written to claim.new
        claim.publish()
    claim.release()
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "file").read_text() == "first"


def test_what_a_killed_process_left_is_emptied_and_nothing_else(tmp_path):
    code = (
        "import os, sys, signal, pathlib; from gafext.portraits.claim import Claim\n"
        "claim = Claim.take(pathlib.Path(sys.argv[1])); claim.new.mkdir(); (claim.new / 'half').write_text('half')\n"
        "print('taken', flush=True); sys.stdin.read()"
    )
    (tmp_path / ".gafext-notes").mkdir()
    (tmp_path / ".gafext-notes" / "mine").write_text("mine")
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout.readline() == b"taken\n"
        assert Claim.take(tmp_path / "a") is None
        process.kill()
        process.wait()
    assert names(tmp_path) == [".gafext-a", ".gafext-notes"]
    claim = Claim.take(tmp_path / "a")
    assert names(tmp_path / ".gafext-a") == []
    claim.release()
    assert names(tmp_path) == [".gafext-notes"] and (tmp_path / ".gafext-notes" / "mine").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Claim.take(tmp_path / "file" / "a")
