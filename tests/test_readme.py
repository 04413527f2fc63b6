"""The README's tables are those of the recorded results."""

import pytest

from paper_figures import readme_tables


def test_tables_are_drawn_from_the_results():
    text = (readme_tables.ROOT / "README.md").read_text()
    assert text.count("<!-- table ") == len(readme_tables.TABLES)
    assert readme_tables.render(text) == text, "run `make figures`"


@pytest.mark.parametrize("name", readme_tables.TABLES)
def test_a_wrong_number_is_seen(name):
    text = f"<!-- table {name} -->\n| 99.9 |\n<!-- end -->"
    assert "99.9 |\n" not in readme_tables.render(text)
