"""Whatever a file holds, it is refused by name or read as it is: some mutations of every kind of file.

`TEST_SEED=random` draws others; `python -m tests.helpers.mutations --count 500` many.
"""

from tests.helpers import mutated_files, mutations

COUNT = 12  # of each kind


def test_mutations(rng):
    """A failure names the kind, the seed and the number with which `tests.helpers.mutations` makes it again."""
    seed, kinds = int(rng.integers(2**32)), list(mutated_files.KINDS)
    found = mutations.outcomes(kinds, seed, 0, COUNT)
    print(f"seed {seed}\n{mutations.table(found)}")
    assert not [each for each in found if each.outcome in mutations.BAD]
    assert len(found) == COUNT * len(kinds)
    ends = [each.outcome for each in found]
    assert ends.count(mutations.REFUSED) > len(ends) / 3 and {mutations.SAME, mutations.SAYS} <= set(ends)


def test_what_the_mutations_find(tmp_path):
    """A reader that hangs, crashes, names nothing or reads something else is counted as such."""
    (tmp_path / "file").write_text("1")

    def fails(error):
        def use(root):
            raise error

        return use

    sound = {"x": 1}
    for use, says, want in (
        (fails(KeyError("x")), None, "crash without a name"),
        (fails(FileNotFoundError("no such file")), None, "refused without a name"),
        (fails(FileNotFoundError(f"{tmp_path}/file: no such file")), None, "refused by name"),
        (lambda root: {"x": 1}, None, "accepted, same result"),
        (lambda root: {"x": 2}, lambda root, got: False, "accepted with another result"),
        (lambda root: {"x": 2}, lambda root, got: 1 / 0, "accepted with another result"),
        (lambda root: {"x": 2}, lambda root, got: got["x"] == 2, "accepted, as the file now says"),
    ):
        kind = mutations.Kind("file", mutations.some_bytes, use, says)
        assert mutations.outcome(kind, tmp_path, sound)[0] == want
