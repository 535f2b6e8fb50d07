"""Files of keys."""

import pytest

from moemerge.errors import InvalidRecipe, NotFound
from moemerge.server.keys import read_keys


def write(path, text, mode=0o600):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def test_keys_stand_one_per_line(tmp_path):
    keys = read_keys(write(tmp_path / "keys", "first\n\n  second \r\n"))
    assert keys == ("first", "second")


def test_group_may_read(tmp_path):
    assert read_keys(write(tmp_path / "keys", "k", 0o640)) == ("k",)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602, 0o777])
def test_others_may_not_read_or_change(tmp_path, mode):
    with pytest.raises(InvalidRecipe, match="chmod 600"):
        read_keys(write(tmp_path / "keys", "k", mode))


@pytest.mark.parametrize("text", ["", "\n \n", "one two", "käse", b"\xff\xff", "a\tb"])
def test_keys_that_nobody_could_send_are_refused(tmp_path, text):
    with pytest.raises(InvalidRecipe):
        read_keys(write(tmp_path / "keys", text))


def test_no_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(NotFound):
        read_keys(tmp_path / "none")
    with pytest.raises(InvalidRecipe):
        read_keys(tmp_path)
