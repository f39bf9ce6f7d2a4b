"""Names of photos become names of files that every system takes."""

import unicodedata

import pytest

from inference.server.page.names import MAX_NAME_BYTES, clip_name, safe, shown_name, unique


@pytest.mark.parametrize(
    "photo,name",
    [
        ("IMG_1.HEIC", "IMG_1.mp4"),
        ("가족 사진.jpg", "가족 사진.mp4"),
        ("../../etc/passwd.jpg", "passwd.mp4"),
        ("C:\\Users\\me\\beach.png", "beach.mp4"),
        ('a<b>:"c|?*.jpg', "a_b___c___.mp4"),
        ("con.jpg", "_con.mp4"),
        ("a.tar.jpg", "a.tar.mp4"),
        (" .. .jpg", "clip.mp4"),
        ("line\nbreak.jpg", "line_break.mp4"),
    ],
)
def test_clip_names(photo, name):
    """No path, no forbidden character, no reserved name; everything else as it was."""
    assert clip_name(photo, "videos/x.mp4") == name


def test_a_clip_keeps_its_own_extension():
    """A worker may deliver webm."""
    assert clip_name("a.jpg", "videos/x.unique.WebM") == "a.webm"


def test_long_names_are_cut_between_characters():
    """A character of Hangul has three bytes."""
    name = safe("가" * 200)
    assert name == "가" * (MAX_NAME_BYTES // 3)


def test_names_from_macos_are_composed():
    """Names that come from macOS are in decomposed Unicode."""
    pieces = unicodedata.normalize("NFD", "가족.jpg")
    assert shown_name(pieces, "g/p_original.jpg") == "가족.jpg"
    assert clip_name(pieces, "v.mp4") == "가족.mp4"


@pytest.mark.parametrize("filename", [None, "", "  ", "a\x07b", "\u202eevil"])
def test_a_photo_without_a_fit_name_is_called_as_it_is_stored(filename):
    """What cannot be printed, such as what turns the direction of writing around, is not shown."""
    assert shown_name(filename, "g/p_original.jpg") == "p_original.jpg"


def test_names_in_one_archive_differ():
    """Also where a file system does not tell capital letters from small ones."""
    assert list(unique(["a.mp4", "A.mp4", "a (2).mp4", "b.mp4", "a.mp4"])) == [
        "a.mp4",
        "A (2).mp4",
        "a (2) (2).mp4",
        "b.mp4",
        "a (3).mp4",
    ]
