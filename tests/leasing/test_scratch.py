"""Temporary folders: gone with their process, one way or another."""

import errno
import os
import subprocess
import sys

import pytest

from inference import private
from inference.errors import DiskFull, NotWritable
from inference.leasing.scratch import scratch_folder, sweep


def test_a_folder_is_gone_afterwards_whatever_happened(tmp_path):
    """Also when the block ends with an error."""

    def work():
        with scratch_folder(tmp_path) as folder:
            (folder / "frames").write_bytes(b"x")
            raise ValueError("oops")

    with pytest.raises(ValueError, match="oops"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_can_be_kept_for_a_look(tmp_path):
    """AUTO_CLEANUP_TEMP=false."""
    with scratch_folder(tmp_path, keep=True) as folder:
        (folder / "frames").write_bytes(b"x")
    assert (folder / "frames").exists()


def test_what_a_killed_process_left_is_swept_and_a_living_one_is_not(tmp_path):
    """The lock ends with the process, however it ends."""
    program = f"""
import os, signal
from pathlib import Path
from inference.leasing.scratch import scratch_folder
with scratch_folder(Path({str(tmp_path)!r})) as folder:
    (folder / "photo.jpg").write_bytes(b"x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], check=False, timeout=30)
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder(tmp_path) as alive:
        assert sweep(tmp_path) == 1
        assert list(tmp_path.iterdir()) == [alive]


def test_a_place_without_locks_serves_and_is_not_swept(tmp_path, monkeypatch):
    """As NFS refuses them: which folders are left over cannot be told there."""

    def refuse(*_arguments):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(private.fcntl, "flock", refuse)
    with scratch_folder(tmp_path) as folder:
        assert sweep(tmp_path) == 0
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_left_alone(tmp_path):
    """Only what is named as ours is swept."""
    (tmp_path / "i2v-demo-abc").mkdir()
    assert sweep(tmp_path) == 0
    assert (tmp_path / "i2v-demo-abc").exists()


def test_no_folder_is_the_machines_fault(tmp_path):
    """A folder that cannot be written hands the task back."""
    with pytest.raises(NotWritable, match="TEMP_DIR"), scratch_folder(tmp_path / "absent"):
        pass


def test_too_little_room_is_found_out_before_the_work(tmp_path, monkeypatch):
    """Nothing is spent on a clip that could not be written."""
    monkeypatch.setattr("inference.leasing.scratch.MIN_FREE_BYTES", 10**18)
    with pytest.raises(DiskFull, match="MB are free"), scratch_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
