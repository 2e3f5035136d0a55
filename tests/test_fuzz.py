"""A hundred mutated files, each read or refused in one line; and that the fuzzer would see if one were not."""

import random

import _mutate as mutate
import fuzz
import pytest


def test_a_hundred_mutated_files_are_read_or_refused_in_one_line(capsys):
    faults = fuzz.main(["--count", "100", "--seed", "16"])
    assert faults == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "said", "shown"),
    [(-1, "KeyError: 'x'", ""), (1, "error: KeyError: unforeseen, ...", ""), (1, "error: a\nb", ""), (2, "", ""),
     (1, "", ""), (0, "", "\x1b[2J"), (1, "error: \x1b]0;x\x07", ""), (139, "", "")],
)  # fmt: skip
def test_what_is_wrong_is_seen(status, said, shown):
    assert fuzz.judge(status, said, shown) not in ("read", "refused")


def test_what_is_right_is_seen():
    assert fuzz.judge(0, "", "a table") == "read"
    assert fuzz.judge(1, "error: config.json is not valid JSON\n", "") == "refused"


def test_a_file_written_elsewhere_is_seen(tmp_path):
    watch = fuzz.Watch()
    watch.allowed = (str(tmp_path / "out"),)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("x")
    assert not watch.seen
    (tmp_path / "b").write_text("x")
    (tmp_path / "b").rename(tmp_path / "c")
    watch.allowed = None
    assert [line.split()[0] for line in watch.seen] == ["open", "os.rename"]


def test_a_crash_and_a_hang_are_seen(monkeypatch):
    child = fuzz.Child("record", 0)
    assert child.read(0)[0] in ("read", "refused")
    child.process.kill()
    assert child.read(1)[0].startswith("crash")
    monkeypatch.setattr(fuzz, "SECONDS", 0)
    assert child.read(2)[0].startswith("hang")


@pytest.mark.parametrize("name", fuzz.READERS)
def test_an_input_depends_on_its_number_alone_and_is_not_the_valid_one(tmp_path, name):
    reader = fuzz.READERS[name]
    reader.make(tmp_path)
    for pattern, mutations in reader.files.items():
        valid = min(tmp_path.glob(pattern)).read_bytes()
        for mutation in set(mutations):
            made = [mutation(valid, random.Random(i)) for i in range(6)]
            assert made == [mutation(valid, random.Random(i)) for i in range(6)]
            assert sum(m != valid for m in made) >= 4
    assert mutate.NASTY
