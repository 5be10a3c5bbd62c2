from mae_jax.errors import pluralize, printable


def test_names_from_data_are_printed_as_one_plain_line():
    assert printable("cat/été 1.jpg") == "cat/été 1.jpg"
    assert printable("a\nb\x1b[31m\udce9") == r"a\nb\x1b[31m\udce9"
    printable("\udce9\u202e").encode("ascii")


def test_things_are_counted_in_words():
    assert [pluralize(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
