"""Batches addressed by step, documents, packing, and streams that go on where they were left."""

import itertools
import json
import threading

import numpy as np
import pytest

from dms_jax.config import ConfigError
from dms_jax.training.config import SourceConfig
from dms_jax.training.data import Batch, PackedStream, PoolStream, batch_at, blend, one_document, prefetch
from dms_jax.training.documents import open_documents, open_rows


def pool(n: int) -> Batch:
    """Row r holds r in every field, so that fields that were shuffled apart show."""
    rows = np.arange(n)
    return Batch(np.repeat(rows[:, None], 3, 1).astype(np.uint8), rows + 100, rows + 200)


def rows_of(batch: Batch) -> list[int]:
    assert batch.tokens.dtype == batch.lengths.dtype == batch.prompt_lengths.dtype == np.int32
    first = batch.tokens[:, 0]
    np.testing.assert_array_equal(batch.tokens, np.repeat(first[:, None], 3, 1))
    np.testing.assert_array_equal(batch.prompt_lengths, first + 100)
    np.testing.assert_array_equal(batch.lengths, first + 200)
    return first.tolist()


def epoch(n, size, number, seed=0):
    steps = range(number * (n // size), (number + 1) * (n // size))
    return [row for step in steps for row in rows_of(batch_at(pool(n), step, size, seed))]


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [epoch(12, 4, number) for number in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(12)) != order
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch(12, 4, 0, seed=1) != epochs[0]


def test_a_remainder_is_left_out_of_its_epoch_only():
    epochs = [epoch(14, 4, number) for number in range(20)]
    for order in epochs:
        assert len(order) == len(set(order)) == 12
    assert set().union(*epochs) == set(range(14))


def test_a_batch_is_a_function_of_its_step():
    """Asked for in any order, as by a resumed run."""
    whole = [rows_of(batch_at(pool(9), step, 2, 5)) for step in range(10)]
    for step in (9, 3, 3, 0):
        assert rows_of(batch_at(pool(9), step, 2, 5)) == whole[step]


def test_a_pool_as_a_stream():
    """From any cursor; packed, every sequence is a row of one document."""
    stream = PoolStream(Batch(np.zeros((6, 4), int), np.ones(6, int), np.arange(1, 7) % 5), 3, 7)
    for (batch, after), step in zip(stream(2), range(2, 6), strict=False):
        assert after == step + 1
        for got, want in zip(batch, batch_at(stream.pool, step, 3, 7), strict=True):
            np.testing.assert_array_equal(got, want)
    (packed, after), (batch, _) = next(stream.packed(None)), next(stream(None))
    assert after == 1 and packed.segments.sum(1).tolist() == batch.lengths.tolist()


def test_too_small_a_pool():
    with pytest.raises(ConfigError, match=r"batch_size=5: the pool holds only 4 sequences"):
        batch_at(pool(4), 0, 5, 0)
    assert sorted(rows_of(batch_at(pool(4), 7, 4, 0))) == [0, 1, 2, 3]


# Documents, packing, streams


class Words:
    """A tokenizer by characters: a = 1, b = 2 ..., and a chat template."""

    eos_token = "!"
    chat_template = "there is one"

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[33 if c == "!" else ord(c) - 96 for c in text] for text in texts]}

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        assert not tokenize and not add_generation_prompt
        return "".join({"user": "u", "assistant": "a", "system": "s"}[turn["role"]] + turn["content"] for turn in chat)


class Characters(Words):
    """Any character, and any role."""

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        return "".join(turn["role"] + turn["content"] for turn in chat)


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def ids(text: str) -> list[int]:
    return Words()([text], add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize(
    "row, fields, want",
    [
        ({"question": "xy", "answer": "z", "id": 3}, {}, "uxyaz"),
        ({"problem": "p", "solution": "q", "answer": "r"}, {}, "upaq"),
        ({"problem": "p", "solution": "q", "answer": "r"}, {"prompt": "problem", "response": "answer"}, "upar"),
        ({"messages": [{"role": "system", "content": "k"}, {"role": "user", "content": "l"}]}, {}, "skul"),
        ({"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}, {}, "uhag"),
        ({"text": "some", "question": ""}, {}, "some!"),
    ],
)
def test_rows_are_understood(tmp_path, row, fields, want):
    file = written(tmp_path / "rows.jsonl", [row])
    documents = open_documents(SourceConfig(str(file), **fields), Words())
    assert len(documents) == 1
    (got,) = documents.encode([0])
    assert got.tolist() == ids(want) and got.dtype == np.int32


def test_without_a_chat_template(tmp_path):
    tokenizer = Words()
    tokenizer.chat_template = None
    tokenizer.eos_token = "z"
    file = written(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    (got,) = open_documents(SourceConfig(str(file)), tokenizer).encode([0])
    assert got.tolist() == [17, ord("\n") - 96, 1, 26]


def test_parquet_and_jsonl_read_alike(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"question": "abc"[: n % 3 + 1], "answer": "d" * n} for n in range(1, 9)]
    file = written(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    one, other = (open_documents(SourceConfig(str(p)), Words()) for p in (file, tmp_path / "rows.parquet"))
    assert len(one) == len(other) == 8
    for a, b in zip(one.encode(range(8)), other.encode(range(8)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.encode([5])[0].tolist() == ids("uaadddddd")


@pytest.mark.parametrize(
    "text, fields, message",
    [
        ('{"a": 1}', {}, "none of a is understood"),
        ('{"question": "a"}', {"prompt": "question", "response": "reply"}, "has no field reply"),
        ("", {}, "holds no documents"),
        ("[1]", {}, "row 0.*list"),
        ("{", {}, "row 0.*JSON"),
        ("[" * 10_000, {}, "row 0: cannot be read as JSON"),
        ('{"text": "\\ud800"}', {}, "row 0: text=.*is not Unicode text"),
        ('{"text": 7}', {"text": "text"}, "row 0, text=7: expected text"),
        ('{"messages": [{"role": "user"}]}', {}, r"row 0, messages\[0\]: has no field content"),
        ('{"messages": [{"role": "user", "content": null}]}', {}, r"row 0, messages\[0\].content=None: expected text"),
        ('{"messages": "hello"}', {}, "row 0, messages='hello': expected a list of turns"),
        ('{"chat": "hello"}', {"messages": "chat"}, "row 0, chat='hello': expected a list of turns"),
        ('{"messages": ["hello"]}', {}, r"row 0, messages\[0\]='hello': expected a turn"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', {}, "row 0: chat=.*the chat template refuses it .*tool"),
        ('{"question": "a", "answer": ["b"]}', {}, r"row 0, answer=\['b'\]: expected text"),
        ('{"text": "", "messages": []}', {"text": "text"}, "row 0: is empty"),
    ],
)
def test_bad_data_names_the_file(tmp_path, text, fields, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    tokenizer = Words()
    tokenizer.eos_token = ""
    with pytest.raises(ConfigError, match=message) as error:
        open_documents(SourceConfig(str(file), **fields), tokenizer).encode([0])
    assert str(file) in str(error.value) and len(str(error.value)) < 1000


def test_bad_rows_are_named_by_their_number(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n{"text": "b"}\n{"txt": "c"}\n\xff\n')
    documents = open_documents(SourceConfig(str(file)), Words())
    assert [x.tolist() for x in documents.encode([1, 0])] == [ids("b!"), ids("a!")]
    with pytest.raises(ConfigError, match=r"rows.jsonl, row 2: has no field text .but txt"):
        documents.encode([0, 2])
    with pytest.raises(ConfigError, match=r"rows.jsonl, row 3: cannot be read as JSON"):
        documents.encode([3])


@pytest.mark.parametrize("seed", range(20))
def test_mutated_files_are_read_or_named(tmp_path, seed):
    """Bytes of a good file replaced, removed and doubled: its rows are read, or the error names the file."""
    rng = np.random.default_rng(seed)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [{"messages": chat}, {"question": "q", "answer": "r"}, {"text": "t"}]
    good = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = tmp_path / "rows.jsonl"
    for _ in range(25):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(bad)))
            bad[at : at + int(rng.integers(0, 3))] = (
                rng.integers(0, 256, int(rng.integers(0, 3))).astype(np.uint8).tobytes()
            )
        file.write_bytes(bad)
        for row in range(3):
            try:
                open_documents(SourceConfig(str(file)), Characters()).encode(
                    [min(row, len(open_rows(SourceConfig(str(file)))) - 1)]
                )
            except ConfigError as error:
                assert str(file) in str(error)


@pytest.mark.parametrize("path", ("nothing.jsonl", "nothing", "/nowhere/at/all"))
def test_data_that_is_not_there(path):
    with pytest.raises(ConfigError, match=path):
        open_documents(SourceConfig(path), Words())


@pytest.mark.parametrize(
    "fields, key",
    [({"weight": 0}, "weight"), ({"prompt": "a"}, "response"), ({"text": "a", "messages": "b"}, "text")],
)
def test_a_source_is_checked(fields, key):
    with pytest.raises(ConfigError, match=f"data.{key}"):
        SourceConfig("a/b", **fields)


class Numbered:
    """Documents of these lengths: each is its own number, repeated."""

    def __init__(self, first: int, lengths):
        self.first, self.lengths = first, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def encode(self, rows):
        return [np.full(self.lengths[row], self.first + row, np.int32) for row in rows]


def two_sources():
    rng = np.random.default_rng(0)
    return [Numbered(1000, rng.integers(1, 12, 40)), Numbered(2000, rng.integers(1, 40, 25))]


def taken(stream, cursor, count):
    return [next_of for next_of, _ in zip(stream(cursor), range(count), strict=False)]


def test_packing():
    """Whole documents in rows, none split but those longer than a row, positions and segments in step."""
    stream = PackedStream(two_sources(), (3, 1), 24, 4, seed=7)
    for batch, _ in taken(stream, None, 20):
        assert batch.tokens.shape == (4, 24) and batch.tokens.dtype == batch.segments.dtype == np.int32
        for tokens, positions, segments in zip(*batch, strict=True):
            assert (np.diff(segments[segments > 0]) >= 0).all() and segments[0] == 1
            for segment in np.unique(segments):
                mine = segments == segment
                np.testing.assert_array_equal(positions[mine], np.arange(mine.sum()))
                assert len(np.unique(tokens[mine])) == 1 and (tokens[mine][0] == 0) == (segment == 0)


def test_every_document_comes_once_an_epoch_and_sources_by_weight():
    sources = two_sources()
    lengths = {int(x[0]): min(len(x), 24) for source in sources for x in source.encode(range(len(source)))}
    stream = PackedStream(sources, (3, 1), 24, 4, seed=7)
    order = []
    for batch, _ in taken(stream, None, 30):
        for row, segments in zip(batch.tokens, batch.segments, strict=True):
            for segment in range(1, segments.max() + 1):
                mine = row[segments == segment]
                assert len(mine) == lengths[int(mine[0])]
                order.append(int(mine[0]))
    first = [n for n in order if n < 2000]
    assert sorted(first[:40]) == list(range(1000, 1040)) == sorted(first[40:80])
    assert first[:40] != first[40:80]
    assert abs(len(first) / len(order) - 0.75) < 0.01
    other = PackedStream(sources, (3, 1), 24, 4, seed=8)
    assert taken(other, None, 1)[0][0].tokens.tolist() != taken(stream, None, 1)[0][0].tokens.tolist()


def test_a_stream_goes_on_from_its_cursor():
    """Also through JSON, as a checkpoint keeps it, and at a place where documents are tokenised ahead."""
    stream = PackedStream(two_sources(), (1, 1), 24, 4, seed=0)
    whole = taken(stream, None, 30)
    for start in (1, 13):
        cursor = json.loads(json.dumps(whole[start - 1][1]))
        for (batch, after), (want, want_after) in zip(taken(stream, cursor, 5), whole[start:], strict=False):
            assert after == want_after
            for got, expected in zip(batch, want, strict=True):
                np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("weights", [(1,), (1, 1), (0.2, 5, 1.3)])
def test_blend_stays_close_to_its_shares(weights):
    counts = [0] * len(weights)
    for n in range(1, 300):
        counts[blend(counts, weights)] += 1
        assert np.abs(np.array(counts) - n * np.array(weights) / sum(weights)).max() < len(weights)


def test_prefetch_keeps_the_order_and_brings_errors_in_their_place():
    def items():
        yield from range(5)
        raise KeyError("here")

    got = prefetch(items())
    assert [next(got) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="here"):
        next(got)
    assert list(prefetch(iter("abc"))) == list("abc")


def test_prefetch_ends_its_thread():
    before = threading.active_count()
    got = prefetch(itertools.count())
    assert next(got) == 0 and threading.active_count() == before + 1
    got.close()
    assert threading.active_count() == before


def test_one_document_a_row():
    got = one_document(Batch(np.ones((2, 4), np.int32), np.ones(2, int), np.array([2, 4])))
    assert got.segments.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and got.positions.tolist() == [[0, 1, 2, 3]] * 2
