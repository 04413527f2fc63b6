"""Files written in one piece."""

import numpy as np
import pytest

from dms_jax.files import write_atomically


def test_text_bytes_and_what_a_function_writes(tmp_path):
    file = tmp_path / "file"
    for content, want in (("naïve\n", "naïve\n".encode()), (b"\xff", b"\xff"), (lambda out: out.write(b"ab"), b"ab")):
        write_atomically(file, content)
        assert file.read_bytes() == want
    write_atomically(tmp_path / "a.npz", lambda out: np.savez(out, a=np.arange(3)))
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["a"].tolist() == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "file"]


def test_a_failure_leaves_what_was_there(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def breaks_off(out):
        out.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, breaks_off)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_the_temporary_file_of_a_killed_process_is_written_over(tmp_path):
    (tmp_path / ".file.new").write_text("half of something")
    write_atomically(tmp_path / "file", "whole")
    assert (tmp_path / "file").read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nothing" / "file", "")
