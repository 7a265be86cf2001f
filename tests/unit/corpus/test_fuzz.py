"""A short form of `python -m tests.chaos.fuzz`: three damaged files of every format."""

from tests.chaos import fuzz


def test_damaged_files_are_read_or_named(tmp_path):
    results = [fuzz.check(0, number, tmp_path) for number in range(3 * len(fuzz.SOUND))]
    assert not [result for result in results if result.outcome not in fuzz.OUTCOMES]
    assert {"exact", "changed", "quarantined"} <= {result.outcome for result in results}


def test_sound_files_are_read_exactly(tmp_path):
    for name in fuzz.SOUND:
        (tmp_path / name).write_bytes(fuzz.sound(name))
        found, bad = fuzz._read(tmp_path / name, "fail", fuzz.SLICE_BYTES[0])
        assert sorted(found) == sorted(fuzz.texts()) and not bad


def test_lost_rows_are_noticed():
    before = fuzz.texts()
    for name in ("a.parquet", "a.jsonl", "a.csv", "a.txt.xz", "array.json"):
        outcome, _ = fuzz._judged(name, fuzz.sound(name), before[:70] + before[71:], [])
        assert outcome not in fuzz.OUTCOMES
