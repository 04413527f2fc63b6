"""Where a beginning-of-sequence token stands: one at the front where the tokenizer puts one, never two, none inside."""

import numpy as np
import pytest

from dms_jax.config import ConfigError
from dms_jax.weights.text import encode, encode_all, encode_turn, has_chat, rendered
from tests.helpers.tokenizers import TEMPLATE, letters

B, E, T = 1, 2, 3
USER = {"role": "user", "content": "ab"}


def drawn(rng, count: int = 200) -> list[str]:
    return ["".join(rng.choice([*"abcdefgh "], rng.integers(1, 20))) for _ in range(count)]


@pytest.mark.parametrize("before", ["<b>", ""])
@pytest.mark.parametrize("after", ["<e>", ""])
def test_one_at_the_front_of_a_text(rng, before, after):
    """With the tokenizer's own, or with the one of a chat that was rendered; what ends a text is not put behind it."""
    tokenizer, texts = letters(before, after), drawn(rng)
    plain = [one.ids for one in tokenizer._tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert encode_all(tokenizer, texts) == [[B] * bool(before) + ids for ids in plain]
    assert encode_all(tokenizer, [f"<b>{text}" for text in texts]) == [[B, *ids] for ids in plain]
    assert encode_all(tokenizer, texts, begins=False) == plain
    assert encode(tokenizer, "") == [B] * bool(before)


@pytest.mark.parametrize("own", ["<b>", ""])
@pytest.mark.parametrize("before", ["<b>", ""])
def test_a_chat_has_what_its_template_writes(rng, own, before):
    tokenizer = letters(before, "", own + TEMPLATE)
    for text in drawn(rng, 50):
        ids, content = encode_turn(tokenizer, text), encode(tokenizer, text, begins=False)
        want = [B] * bool(own) + encode(tokenizer, f"<t>u{text}<e> <t>a", begins=False)
        assert ids == want and ids.count(B) == bool(own)
        later = encode_turn(tokenizer, text, first=False)
        assert later == encode(tokenizer, f"<e> <t>u{text}<e> <t>a", begins=False) and B not in later
        without = letters(before, "", None)
        assert encode_turn(without, text) == [B] * bool(before) + content
        assert encode_turn(without, text, first=False) == content


def test_templates_that_refuse():
    assert has_chat(letters()) and not has_chat(letters(template=None)) and not has_chat(None)
    for template in ("{{ raise_exception('no') }}", "{{ messages[7].content }}{{ 1 / 0 }}", "{% if %}"):
        with pytest.raises(ConfigError, match="the chat template refuses it"):
            rendered(letters(template=template), [USER])
    with pytest.raises(ConfigError, match="does not show earlier answers"):
        encode_turn(letters(template="{{ messages[-1]['content'] }}"), "ab", first=False)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair(text):
    with pytest.raises(ConfigError, match="is not Unicode text"):
        encode(letters(), text)


def test_text_for_a_model_without_a_tokenizer():
    with pytest.raises(ConfigError, match="tokenizer=None: this model has none: pass token ids"):
        encode(None, "ab")


def test_documents_begin_as_the_tokenizer_begins_texts(tmp_path):
    """A text and a chat without a template with one BOS each, a chat with what its template writes."""
    from dms_jax.training.config import SourceConfig
    from dms_jax.training.documents import open_documents

    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "ab c"}\n{"text": "<b>ab"}\n')
    for before, want in (("<b>", [B]), ("", [])):
        one, two = open_documents(SourceConfig(str(file)), letters(before)).encode([0, 1])
        np.testing.assert_array_equal(one, [*want, *encode(letters(before), "ab c<e>", begins=False)])
        assert two.tolist().count(B) == 1
    file.write_text('{"question": "a", "answer": "b"}\n')
    for template, want in ((None, [B]), (TEMPLATE, [T]), ("<b>" + TEMPLATE, [B])):
        (ids,) = open_documents(SourceConfig(str(file)), letters("<b>", "", template)).encode([0])
        assert ids[:1].tolist() == want and ids[1:].tolist().count(B) == 0
